"""A Python for `make test-gpu bench-gpu PYTHON=...` on a machine without a GPU: a rehearsal of the first GPU run.

    REHEARSAL=folder python rehearsal.py -m benchmarks.run_all --device cuda --seconds 100

The benchmarks take every branch that they take on a GPU: torch.cuda's clocks, streams and graphs are stood in for here,
tensors stay on the CPU, networks and shapes are tiny, and the penalty's launches go to a driver that launches nothing
where no result is checked. Rows, figures and tables go to the folder. $REHEARSAL_FAILS names a part that crashes,
$REHEARSAL_HANGS one that never ends, and $REHEARSAL_REFUSES is why neither we nor torch.compile can compile for Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pathlib
import sys
import time
import types

HERE = pathlib.Path(__file__).resolve()
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT)]


class Event:
    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """Replayed by calling what was captured again."""

    def replay(self):
        self.call()


@contextlib.contextmanager
def graph(captured, stream=None):
    """Around the one call that `CudaClock.graph` makes."""
    captured.call = sys._getframe(2).f_locals["call"]
    yield


def pretend_cuda(torch):
    stand_ins = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "Rehearsed GPU",
        "get_device_properties": lambda *_: types.SimpleNamespace(L2_cache_size=4096),
        "synchronize": lambda *_: None,
        "_sleep": lambda cycles: None,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda *_: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1 << 20,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)


class OnTheCpu:
    """torch, for a module whose devices are to be the CPU."""

    def __init__(self, torch):
        self._torch = torch

    def __getattr__(self, name):
        return getattr(self._torch, name)

    def device(self, *arguments):
        return self._torch.device("cpu")

    def randn(self, *sizes, **options):  # of products that are made to warm a GPU up
        return self._torch.randn(*(min(size, 64) for size in sizes), **options)


def without_cuda(torch, function):
    """torch.compile asks a GPU more than is stood in for."""

    def call(*arguments):
        torch.cuda.is_available = lambda: False
        try:
            return function(*arguments)
        finally:
            torch.cuda.is_available = lambda: True

    return call


def refuse(reason, *arguments, **options):
    raise RuntimeError(reason)


def shrink(torch, folder):
    """Every module of the benchmarks as it is, with tiny problems, short samples and its results in the folder."""
    from benchmarks import (
        accuracy,
        bench_host,
        bench_orthogonality,
        bench_scaling,
        bench_srelu,
        bench_step,
        clocks,
        harness,
        providers,
        rows,
        run_all,
        table,
    )
    from isonet_fast import kernels

    rows.RESULTS = folder / "results"
    machine = rows.machine
    rows.machine = lambda kind: machine("cpu") | {"device": torch.cuda.get_device_name(), "driver": "none"}
    accuracy.ROOT = folder
    (folder / "docs").mkdir(exist_ok=True)
    pages = [folder / page.relative_to(ROOT) for page in table.PAGES]
    for page in pages:
        page.write_text((ROOT / page.relative_to(folder)).read_text())
    table.main = functools.partial(table.main, pages=pages)

    clocks.torch = harness.torch = OnTheCpu(torch)
    clocks.CudaClock.sample_ms = 0.01
    harness.ROUNDS, harness.SECONDS = 3, {"cpu": 0.0}
    harness.CudaClock = clocks.CudaClock
    bench_step.SECONDS = {"cpu": 0.0}
    refused = os.environ.get("REHEARSAL_REFUSES")
    kernels.why_not = lambda device: refused

    compiled, build, bound = providers.compiled, providers.build, providers.matmul_bound
    providers.compiled = lambda function, dry, mode=None: without_cuda(torch, compiled(function, True))
    if refused:
        accuracy.kernels = providers.compiled = functools.partial(refuse, refused)
    providers.build = lambda name: build(name if name.startswith("cifar") else "cifar8")
    resnet = bench_step.torchvision_resnet
    bench_step.torchvision_resnet = lambda depth: resnet(18)
    providers.matmul_bound = lambda flops, *rest: bound(min(flops, 1e6), *rest)
    bench_srelu.activation_shapes = lambda network, kind, batch: [(batch, 16, 2, 2), (batch, 8, 1, 1)]
    bench_srelu.ActivationCase.head = property(lambda case: case.shape[1] == 16)
    bench_srelu.LARGE = 20_000  # bytes: of the cases, some are above it
    bench_orthogonality.NETWORKS = bench_orthogonality.NETWORKS[:2]
    run_all.GRACE = 2.0
    hangs = os.environ.get("REHEARSAL_HANGS")
    parts = run_all.PARTS["cuda"]
    run_all.PARTS["cuda"] = tuple(part._replace(seconds=10) if part.module == hangs else part for part in parts)
    cases = bench_step.cases
    bench_step.cases = lambda session: tuple(
        [case._replace(batch=2, size=32 if case.depth else 8) for case in part[:most]]
        for part, most in zip(cases(session), (2, 1), strict=True)
    )
    bench_scaling.SIZE = 8
    bench_scaling.VARY = {name: ([value[0][0]], [value[0][0]]) for name, value in bench_scaling.VARY.items()}
    measure = accuracy.measure
    accuracy.measure = lambda size, seeds, device, failures: measure(
        size._replace(channels=8), 1, torch.device("cpu"), failures
    )
    bench_host.without_gpu = without_cuda(torch, bench_host.without_gpu)
    return bench_host.without_gpu


def main() -> int:
    arguments = sys.argv[1:]
    if "why_not_gpu.py" in arguments[0]:
        print("none")
        return 0
    if arguments[0] != "-m" or not arguments[1].startswith("benchmarks."):
        return 1 if "pytest" in arguments else 0  # tests fail, installing works, xdist is there
    part = arguments[1].removeprefix("benchmarks.")
    if part == os.environ.get("REHEARSAL_FAILS"):
        os.abort()
    while part == os.environ.get("REHEARSAL_HANGS"):
        time.sleep(1)

    import torch

    torch.set_num_threads(1)
    pretend_cuda(torch)
    launch_nothing = shrink(torch, pathlib.Path(os.environ["REHEARSAL"]))
    if part == "accuracy":
        launch_nothing()
    if part == "run_all":
        sys.executable = str(HERE.with_name("rehearsal"))
    module = importlib.import_module(arguments[1])
    sys.argv = [part, *arguments[2:]]
    if part in ("run_all", "accuracy"):
        return module.main() or 0
    return module.main().finish()


if __name__ == "__main__":
    sys.exit(main())
