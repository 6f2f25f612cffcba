"""How a number is made: every provider is checked against float64, all are timed in turn, rows are written."""

from __future__ import annotations

import argparse
import functools
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from isonet_fast import kernels
from isonet_fast.ops import library

from . import STARTED, rows
from .clocks import Call, Clock, CudaClock

QUICK = 110.0  # seconds of `--quick` on a CPU, unless it is told otherwise
ROUNDS = 25  # samples of each provider, at most
SECONDS = {"cpu": 2.0, "cuda": 1.0}  # for the samples of one group, unless three rounds take longer
NEEDS = {  # all that our rows of an op, or of one provider, are made with; others need every kernel
    "srelu": ("SReLU",),
    "residual_srelu": ("SReLU",),
    "orthogonality": ("the penalty",),
    "orthogonality_host": ("the penalty",),
    "step": ("SReLU", "the penalty"),
    "isonet_fast without penalty": ("SReLU",),
}
Built = TypeVar("Built")


def lacking(device: torch.device) -> dict[str, str]:
    """Which of our kernels can't serve this GPU, and why."""
    reasons = {"SReLU": library.why_not(device), "the penalty": kernels.why_not(device)}
    return {what: why for what, why in reasons.items() if why}


@dataclass
class Contender:
    """One provider in a group. `run` makes `calls` calls (over rotated buffers, where they would fit in a cache)."""

    provider: str
    run: Call
    check: Callable[[], float] | None = None  # its error against float64; None: a bound, which computes something else
    calls: int = 1
    flops: float = 0.0  # of one call: what the op needs, not what this provider does
    bytes: float = 0.0
    resident: int = 0  # bytes that it holds between calls
    plain: Call | None = None  # `run` before its capture, which is what allocates


class Timing(NamedTuple):
    p50: float
    p20: float
    p80: float


class Workload(NamedTuple):
    """What is computed: the columns that every provider of a group shares."""

    op: str
    mode: str
    case: str
    dtype: str
    layout: str = ""


def percentiles(samples: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile, interpolated."""
    ordered = sorted(samples)

    def at(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Timing(at(0.5), at(0.2), at(0.8))


def interleave(
    clock: Clock,
    calls: dict[str, Call],
    seconds: float,
    rounds: int,
    how: str = "sample",
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Samples of every call: one of each per round, each round starting with another one.

    At least three rounds, then until `rounds` or `seconds` are reached. Uncounted samples before them set how often
    a call is repeated in one. how: "sample", "cold" or "host", as in `Clock`. A call that raises is told to `failed`
    and left out.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def sample(name: str, repeats: int) -> float:
        try:
            return getattr(clock, how)(calls[name], repeats)
        except Exception as failure:  # a provider is foreign code: whatever it throws, the others are timed
            if failed is None:
                raise
            failed(name, failure)
            del samples[name]
            return math.nan

    repeats = {}
    for name in calls:
        once = sample(name, 1)
        if once < 100:  # the first is slower than the rest; a long call is not worth another
            once = sample(name, 1)
        if name in samples:
            repeats[name] = max(1, min(1000, math.ceil(clock.sample_ms / max(once, 1e-6))))
    start = clock.now()
    for n in range(rounds):
        if not samples or (n >= 3 and clock.now() - start > seconds):
            break
        names = list(samples)
        for name in names[n % len(names) :] + names[: n % len(names)]:
            taken = sample(name, repeats[name])
            if name in samples:
                samples[name].append(taken)
    return {name: percentiles(values) for name, values in samples.items()}


def error(results: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest deviation from float64, each tensor's relative to its reference's largest value."""
    worst = 0.0
    for result, reference in zip(results, references, strict=True):
        if result.shape != reference.shape:
            return math.inf
        scale = reference.abs().max().clamp_min(1e-30)
        deviation = ((result.double() - reference).abs().max() / scale).item()
        worst = max(worst, deviation if math.isfinite(deviation) else math.inf)
    return worst


class Session:
    """One run of one script: its clock, where its rows go, the time it has left, what failed."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.dry, self.quick = args.dry_run, args.quick or args.dry_run
        cuda = torch.cuda.is_available() and args.device != "cpu" and not self.dry
        if args.device == "cuda" and not cuda:
            raise SystemExit("--device cuda: this machine has no CUDA device (or this is a dry run)")
        self.clock: Clock = CudaClock() if cuda else Clock()
        self.device = self.clock.device
        self.cuda = cuda or self.dry  # a dry run takes the branches that are meant for a GPU, on the CPU
        if self.dry:  # the smallest shapes gain nothing from threads, and tests share the machine
            torch.set_num_threads(1)
            self.clock.sample_ms = 0.0
        folder = Path(tempfile.mkdtemp(prefix="benchmark-dry-run-")) if self.dry else rows.RESULTS
        self.path = folder / f"{name}.csv"
        self.name, self.failures, self.skipped = name, 0, 0
        self._budget = args.budget or (QUICK if args.quick and not cuda else math.inf)
        self._matmul: dict[torch.dtype, float] = {}
        self.say(f"isonet_fast from {_origin()}, torch {torch.__version__}, {rows.machine(self.device.type)['device']}")
        self._lacking = lacking(self.device) if cuda else {}
        for what, why in self._lacking.items():
            self.say(f"nothing is timed as isonet_fast that needs {what}: {why}")
        if cuda:
            torch.backends.cudnn.benchmark = True  # as the official training script does
            self._raise_clocks()

    def _raise_clocks(self) -> None:
        """Half a second of work: an idle GPU starts at a low clock rate."""
        a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            a @ a
            torch.cuda.synchronize()

    def say(self, text: str) -> None:
        elapsed = time.monotonic() - STARTED
        print(f"[{self.name} {elapsed:5.1f}/{self._budget:.0f} s] {text}", file=sys.stderr, flush=True)

    def late(self, what: str, needed: float = 0.0) -> bool:
        """Whether the time is spent (or less than `needed` seconds are left): says what is left out."""
        if time.monotonic() - STARTED + needed <= self._budget:
            return False
        self.skipped += 1
        self.say(f"left out, no time: {what}")
        return True

    def compare(
        self,
        workload: Workload,
        contenders: Sequence[Contender],
        tolerance: float = 0.0,
        limit: str | float = "",
        how: str = "sample",
        seconds: float | None = None,
    ) -> dict[str, Timing]:
        """Check, time and record a group. A provider that fails is reported and left out.

        limit: the provider that shows what the machine can do (bytes are compared with its bytes, else FLOPs),
        or a rate in TFLOP/s. Every row's share of it is recorded.
        """
        if self.late(" ".join(workload)):
            return {}
        ready = {c.provider: (c, checked) for c in contenders if (checked := self._check(workload, c, tolerance))}
        if not ready:
            return {}
        seconds, rounds = (0.0, 2) if self.dry else (seconds or SECONDS[self.device.type], ROUNDS)
        calls, failed = {p: c.run for p, (c, _) in ready.items()}, functools.partial(self._failed, workload)
        timings = interleave(self.clock, calls, seconds, rounds, how, failed)
        if not timings:
            return {}
        timings = {p: Timing(*(t / ready[p][0].calls for t in timing)) for p, timing in timings.items()}
        stamp = {**rows.machine(self.device.type), "utc": rows.utc()}
        written = []
        for provider in timings:
            contender, (wrong, peak) = ready[provider]
            bound = next((c for c in contenders if c.provider == limit and limit in timings), None)
            rate = _share(contender, timings[provider], bound, timings[bound.provider] if bound else limit)
            numbers = _numbers(contender, timings[provider], rate, wrong, peak)
            written.append({**stamp, **workload._asdict(), **numbers})
        rows.append(self.path, written)
        self._progress(workload, written)
        return timings

    def _check(self, workload: Workload, contender: Contender, tolerance: float) -> tuple[float | None, int] | None:
        """(error, peak bytes) of a provider that is right; None, reported, of one that is not or fails."""
        try:
            if contender.provider.startswith("isonet_fast"):
                self.demand(workload.op, contender.provider)
            with torch.enable_grad():
                wrong = contender.check() if contender.check else None
            if wrong is not None and not wrong <= tolerance:
                raise ArithmeticError(f"error {wrong:.3g} against float64, at most {tolerance:.3g} is allowed")
            contender.run()  # what is tuned or allocated at the first call is not the call's peak
            peak = self.clock.peak(contender.plain or contender.run) // contender.calls
            return wrong, peak + contender.resident
        except Exception as failure:  # a provider is foreign code: whatever it throws, the others are timed
            self._failed(workload, contender.provider, failure)
            return None

    def demand(self, op: str, provider: str = "isonet_fast") -> None:
        """Nothing but our kernels may be timed under our name: raises RuntimeError where one can't serve this op."""
        needs = NEEDS.get(provider) or NEEDS.get(op.partition(",")[0], self._lacking)
        for what in self._lacking:
            if what in needs:
                raise RuntimeError(f"{what} has no CUDA kernel here: {self._lacking[what]}")

    def _failed(self, workload: Workload, provider: str, failure: Exception) -> None:
        self.failures += 1
        reason = str(failure).splitlines() or [""]
        self.say(f"FAILED {' '.join(workload)}: {provider}: {type(failure).__name__}: {reason[0]}")
        if self.dry:
            traceback.print_exception(failure)
        self.clock.release()

    def attempt(self, what: str, build: Callable[[], list[Built]]) -> list[Built]:
        """What `build` makes; [], reported, where it fails."""
        try:
            return build()
        except Exception as failure:  # as in _check
            self._failed(Workload(what, "", "", ""), "building it", failure)
            return []

    def case(self, what: str, build: Callable[[], Built], needed: float = 0.0) -> list[Built]:
        """The case that `build` makes; [] where there is no time for it, or where that fails."""
        return [] if self.late(what, needed) else self.attempt(what, lambda: [build()])

    def matmul_tflops(self, dtype: torch.dtype) -> float:
        """The machine's matrix rate in this run: a large product, measured once and recorded."""
        if dtype not in self._matmul:
            size = 64 if self.dry else 8192 if self.cuda else 2048
            a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
            contender = Contender("matmul", lambda: a @ b, flops=2.0 * size**3)
            timing = self.compare(Workload("matmul", "forward", f"{size}^3", dtype_name(dtype)), [contender])
            self._matmul[dtype] = 2e-9 * size**3 / timing["matmul"].p50 if timing else math.nan
        return self._matmul[dtype]

    def finish(self) -> int:
        """Exit status: 0, or 3 where a provider failed."""
        self.say(f"{self.failures} failures, {self.skipped} left out; rows: {self.path}")
        return 3 if self.failures else 0

    def _progress(self, workload: Workload, written: list[rows.Row]) -> None:
        parts = [f"{r['provider']} {rows.ms(r):.4g} ms" + _percent(r["fraction_of_limit"]) for r in written]
        self.say(f"{' '.join(filter(None, workload))}: {', '.join(parts)}")


def _percent(fraction: str) -> str:
    return f" ({float(fraction):.0%})" if fraction else ""


def _share(contender: Contender, timing: Timing, bound: Contender | None, limit: Timing | str | float) -> float | None:
    """The share of the limit (a bound timed alongside, or TFLOP/s) that a provider reaches; None if it is unknown."""
    if bound is not None and isinstance(limit, Timing):
        work, bound_work = (contender.bytes, bound.bytes) if bound.bytes else (contender.flops, bound.flops)
        return (work / timing.p50) / (bound_work / limit.p50) if work else None
    if isinstance(limit, float) and limit > 0 and contender.flops:
        return contender.flops / timing.p50 * 1e-9 / limit
    return None


def _numbers(contender: Contender, timing: Timing, rate: float | None, checked: float | None, peak: int) -> rows.Row:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.6g}"

    return {
        "provider": contender.provider,
        "p50_ms": text(timing.p50),
        "p20_ms": text(timing.p20),
        "p80_ms": text(timing.p80),
        "peak_bytes": str(peak),
        "gbytes_per_s": text(contender.bytes / timing.p50 * 1e-6 if contender.bytes else None),
        "tflops": text(contender.flops / timing.p50 * 1e-9 if contender.flops else None),
        "fraction_of_limit": text(rate),
        "error": text(checked),
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _origin() -> str:
    import isonet_fast

    return str(Path(isonet_fast.__file__).parent)


def parser(description: str | None, official_repo: bool = False) -> argparse.ArgumentParser:
    """The options that every script has."""
    options = argparse.ArgumentParser(description=description)
    add = options.add_argument
    add("--quick", action="store_true", help="what the README shows; minutes, not an hour")
    add("--dry-run", action="store_true", help="tiny shapes through everything, on the CPU; no rows kept")
    add("--device", choices=("cpu", "cuda"), help="default: CUDA where there is one")
    add("--budget", type=float, metavar="SECONDS", help="start nothing after this")
    if official_repo:
        add("--official-repo", type=Path, metavar="PATH", help="time the authors' code from this clone too")
    return options
