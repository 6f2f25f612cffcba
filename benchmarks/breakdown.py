"""Where the time of a training step goes: convolution, SReLU, penalty, optimizer, rest.

Operators run inside ranges that hooks open around every SReLU, and around penalty and optimizer; a backward operator
belongs where the forward operator with its sequence number does. Kernels that no operator owns (Triton's, launched
from Python) are known by name. On the CPU, the lines are what our step has and the bare step has not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from . import ROOT, rows
from .harness import ROUNDS, Session, Workload, percentiles
from .step import Step

CATEGORIES = ("convolution", "SReLU", "penalty", "optimizer", "rest")
PATTERNS = (  # names of operators and kernels; the outermost owner that matches decides
    ("penalty", r"^bench:penalty$|orthogonality|^(pack|transform|gram|grad|transform_back|finish)_kernel$"),
    ("optimizer", r"^Optimizer\.step"),
    ("SReLU", r"^bench:SReLU$|srelu"),
    ("convolution", r"^aten::(_?convolution|conv\d?d|cudnn_conv|mkldnn_conv|_conv|thnn_conv|slow_conv)"),
)
LINES = (  # names of operators on the CPU; the innermost owner that matches decides
    ("SReLU's forward kernel", r"^isonet_fast::\w*srelu_?$"),
    ("SReLU's backward kernel", r"^isonet_fast::\w*srelu_backward$"),
    ("the penalty's compiled kernel", r"^isonet_fast::orthogonality"),
    ("SReLU's layer and autograd function, forward", r"SReLU$"),
    ("SReLU's autograd node, kernel excluded", r"SReLUBackward$"),
    ("the regularizer, kernel excluded", r"^bench:penalty$"),
)
PROFILER = "added to our whole step by the profiler"
SECONDS = 15.0  # for the steps recorded on a CPU


@contextmanager
def ranges(step: Step) -> Iterator[None]:
    """Ranges around every SReLU and join, and around the penalty."""
    open_ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function("bench:SReLU"))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks = []
    for module in step.network.modules():
        if "SReLU" in type(module).__name__ or "Join" in type(module).__name__:
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    penalty, regularizer = step.penalty, step.regularizer
    if penalty is not None:
        step.penalty = _within("bench:penalty", penalty)
    if regularizer is not None:
        regularizer.accumulate_grad_ = _within("bench:penalty", regularizer.accumulate_grad_)  # type: ignore[method-assign]
    yield
    for hook in hooks:
        hook.remove()
    step.penalty = penalty
    if regularizer is not None:
        del regularizer.accumulate_grad_


def _within(name: str, function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        with record_function(name):
            return function(*args)

    return call


def category(names: list[str]) -> str:
    """The category of an operator, from its name and those of the operators that called it, outermost first."""
    return next((c for c, pattern in PATTERNS for name in names if re.search(pattern, name)), "rest")


def chain(event: Any) -> list[str]:
    """The names of an operator and of those that called it, outermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names[::-1]


def lines(events: Any) -> dict[str, float]:
    """Milliseconds per line of a step on the CPU: self time of operators."""
    total = dict.fromkeys((line for line, _ in LINES), 0.0)
    for event in events:
        owners = (line for name in reversed(chain(event)) for line, pattern in LINES if re.search(pattern, name))
        if line := next(owners, None):
            total[line] += event.self_cpu_time_total / 1e3
    return total


def tally(events: Any, cuda: bool) -> dict[str, float]:
    """Milliseconds per category: device time of kernels on CUDA, self time of operators on the CPU."""
    operators = [e for e in events if e.device_type == DeviceType.CPU]
    forward = {}  # sequence number -> category of the forward operator that set it
    for event in operators:
        if event.sequence_nr >= 0 and "evaluate_function" not in chain(event)[0]:
            forward[event.sequence_nr] = category(chain(event))
    total: dict[str, float] = defaultdict(float)
    for event in operators:
        outermost = event
        while outermost.cpu_parent is not None:
            outermost = outermost.cpu_parent
        found = category(chain(event))
        if found == "rest" and "evaluate_function" in outermost.name:
            found = forward.get(outermost.sequence_nr, "rest")
        total[found] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
    if cuda:
        owned = sum(total.values())
        annotations = ("bench:", "Optimizer.", "ProfilerStep")  # ranges that the profiler shows on the device too
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith(annotations)]
        by_name: dict[str, float] = defaultdict(float)
        for kernel in kernels:
            by_name[category([kernel.name])] += kernel.time_range.elapsed_us() / 1e3
        launched = sum(by_name.values()) - owned  # by no operator: our Triton kernels, in the penalty
        total["penalty"] += min(max(launched, 0.0), by_name["penalty"])
    return {name: total.get(name, 0.0) for name in CATEGORIES}


def profile(
    session: Session, workload: Workload, provider: str, step: Step, x: Tensor, y: Tensor, compared: bool
) -> None:
    """Write a trace to runs/profile/, a row for each category and, on a CPU, one for each line of a step of ours that
    was compared with the official and the bare one just before."""
    cuda = session.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]

    def timed() -> float:
        start = session.clock.now()
        step(x, y)
        session.clock.synchronize()
        return 1e3 * (session.clock.now() - start)

    steps: list[dict[str, float]] = []
    by_line: list[dict[str, float]] = []
    end = session.clock.now() + SECONDS
    while not steps or (not cuda and len(steps) < ROUNDS and session.clock.now() < end):
        plain = timed()
        with ranges(step), torch.profiler.profile(activities=activities) as recorded:
            profiled = timed()
        events = recorded.events()
        steps.append(tally(events, cuda))
        if compared and not cuda:
            by_line.append({**lines(events), PROFILER: profiled - plain})
    folder = session.path.parent if session.dry else ROOT / "runs" / "profile"
    path = folder / f"{workload.case}-{provider}.json".replace(" ", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
    stamp = {**rows.machine(session.device.type), "utc": rows.utc()}
    about = {"op": "profile", "provider": provider, "case": workload.case, **stamp}
    written = [{**about, "mode": name, **numbers} for name, numbers in _numbers(steps).items()]
    about = {**workload._asdict(), "op": "step, lines", **stamp}
    written += [{**about, "provider": line, **numbers} for line, numbers in _numbers(by_line).items()]
    rows.append(session.path, written)
    times = {row["mode"]: rows.ms(row) for row in written if row["op"] == "profile"}
    shares = ", ".join(f"{name} {ms:.3g} ms ({ms / max(sum(times.values()), 1e-9):.0%})" for name, ms in times.items())
    session.say(f"{workload.case} {provider}: {shares}; trace: {path}")


def _numbers(steps: list[dict[str, float]]) -> dict[str, rows.Row]:
    """The columns of percentiles over steps, by what was timed."""
    timings = {name: percentiles([step[name] for step in steps]) for name in (steps[0] if steps else ())}
    return {
        name: {"p50_ms": f"{t.p50:.6g}", "p20_ms": f"{t.p20:.6g}", "p80_ms": f"{t.p80:.6g}"}
        for name, t in timings.items()
    }
