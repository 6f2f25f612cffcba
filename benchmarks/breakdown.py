"""Where the time of a training step goes: convolution, SReLU, penalty, optimizer, rest.

Operators run inside ranges that hooks open around every SReLU, and around penalty and optimizer; a backward operator
belongs where the forward operator with its sequence number does. Kernels that no operator owns (Triton's, launched
from Python) are known by name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from . import ROOT, rows
from .harness import Session
from .step import Step

CATEGORIES = ("convolution", "SReLU", "penalty", "optimizer", "rest")
PATTERNS = (  # names of operators and kernels; the outermost owner that matches decides
    ("penalty", r"^bench:penalty$|orthogonality|^(pack|transform|gram|grad|transform_back|finish)_kernel$"),
    ("optimizer", r"^Optimizer\.step"),
    ("SReLU", r"^bench:SReLU$|srelu"),
    ("convolution", r"^aten::(_?convolution|conv\d?d|cudnn_conv|mkldnn_conv|_conv|thnn_conv|slow_conv)"),
)


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


def tally(events: Any, cuda: bool) -> dict[str, float]:
    """Milliseconds per category: device time of kernels on CUDA, self time of operators on the CPU."""
    operators = [e for e in events if e.device_type == DeviceType.CPU]
    chains: dict[int, list[str]] = {}

    def chain(event: Any) -> list[str]:
        if id(event) not in chains:
            above = chain(event.cpu_parent) if event.cpu_parent is not None else []
            chains[id(event)] = [*above, event.name]
        return chains[id(event)]

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


def profile(session: Session, case: object, provider: str, step: Step, run: Callable[[], Any]) -> None:
    """Write a trace to runs/profile/ and a row for each category."""
    cuda = session.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with ranges(step):
        run()
        session.clock.synchronize()
        with torch.profiler.profile(activities=activities) as recorded:
            run()
            session.clock.synchronize()
    folder = session.path.parent if session.dry else ROOT / "runs" / "profile"
    path = folder / f"{case}-{provider}.json".replace(" ", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
    times = tally(recorded.events(), cuda)
    stamp = {**rows.machine(session.device.type), "utc": rows.utc()}
    about = {"op": "profile", "provider": provider, "case": str(case), **stamp}
    rows.append(session.path, [{**about, "mode": name, "p50_ms": f"{ms:.6g}"} for name, ms in times.items()])
    shares = ", ".join(f"{name} {ms:.3g} ms ({ms / max(sum(times.values()), 1e-9):.0%})" for name, ms in times.items())
    session.say(f"{case} {provider}: {shares}; trace: {path}")
