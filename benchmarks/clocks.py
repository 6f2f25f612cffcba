"""How long one call takes, on the CPU and on a CUDA device; the only file that knows CUDA's timing calls."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


class Clock:
    """Wall time on the CPU."""

    device = torch.device("cpu")
    sample_ms = 5.0  # a sample repeats the call until it lasts this long
    cache_bytes = 0  # no buffers are rotated: a convolution leaves its output in the cache here too

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def sample(self, call: Call, repeats: int) -> float:
        """Milliseconds of one call, averaged over `repeats` in a row."""
        start = self.now()
        for _ in range(repeats):
            call()
        return 1e3 * (self.now() - start) / repeats

    def cold(self, call: Call, repeats: int) -> float:
        """As `sample`, with nothing of the call's data in the device's cache."""
        return self.sample(call, repeats)

    def host(self, call: Call, repeats: int) -> float:
        """Milliseconds until the call returns, the device's work not awaited."""
        return self.sample(call, repeats)

    def graph(self, call: Call) -> Call:
        """The call as one launch, where the device has such a thing."""
        return call

    def synchronize(self) -> None: ...

    def release(self) -> None:
        """Give cached memory back."""

    def peak(self, call: Call) -> int:
        """Bytes that a call allocates at its highest point, above what was allocated before it."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            call()
        result = profile.profiler.kineto_results
        memory = sorted((e.start_ns(), e.nbytes()) for e in result.events() if e.name() == "[memory]")
        return max(itertools.accumulate(nbytes for _, nbytes in memory), default=0)


class CudaClock(Clock):
    """Device time between two events. The device is kept busy before the first, while the host launches what follows:
    on an idle one the first call's host latency would be in the sample, 3 % of a backward of 2 ms."""

    sample_ms = 2.0
    head_start = 1_000_000  # clock cycles, about half a millisecond

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = getattr(properties, "L2_cache_size", 64 << 20)
        self._flush = torch.zeros(2 * self.cache_bytes // 4, device=self.device)

    def sample(self, call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(self.head_start)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats

    def cold(self, call: Call, repeats: int) -> float:
        """Before each call a buffer of twice the cache is read: reading leaves no dirty lines to write back later."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda._sleep(self.head_start)
        for start, end in pairs:
            self._flush.sum()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / repeats

    def host(self, call: Call, repeats: int) -> float:
        """One call at a time on an idle device: a full launch queue would be measured as host time."""
        total = 0.0
        for _ in range(repeats):
            torch.cuda.synchronize()
            total += super().sample(call, 1)
        return total / repeats

    def graph(self, call: Call) -> Call:
        """A CUDA graph of the call, warmed up on the stream that captures it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()):  # a capture that fails leaves its own current
            with torch.cuda.graph(graph, stream=stream):
                call()
        torch.cuda.synchronize()

        def replay(keep: Call = call) -> None:  # the call owns the buffers that the graph reads
            graph.replay()

        return replay

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        torch.cuda.empty_cache()

    def peak(self, call: Call) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class Graphed:
    """A call as one launch, captured when it is first made: a capture that fails is the failure of that provider."""

    def __init__(self, clock: Clock, call: Call) -> None:
        self._clock, self._call = clock, call
        self._replay: Call | None = None
        self._result: Any = None

    def _keep(self) -> None:
        self._result = self._call()

    def __call__(self) -> Any:
        """What the call returns, where the capture left it."""
        if self._replay is None:
            self._replay = self._clock.graph(self._keep)
        self._replay()
        return self._result
