"""The processes of a run: what torchrun's environment says of them, and what they tell each other.

A single process has no process group: every exchange returns what it was given.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..models.blocks import Block
from .build import choose_device
from .terminal import printable

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all processes of the run (rank, size) and of its machine (local_rank, local_size).

    `sum`, `largest`, `gather` and `from_main` exchange something: every process must call them, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """The process group of the run; None for a single process."""
        return dist.group.WORLD if self.size > 1 else None

    def device(self, name: str) -> torch.device:
        """The device of this process. If there are several, each has the GPU of its local rank."""
        device = choose_device(name)
        if device.type != "cuda" or self.size == 1:
            return device
        if device.index is not None:
            raise ValueError(f"device must be auto, cuda or cpu where torchrun starts the processes, got {name!r}")
        if self.local_size > torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {self.local_size} processes on a machine with {torch.cuda.device_count()} GPUs; "
                "--nproc-per-node must not be more than that"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def say(self, text: str) -> None:
        if self.main:
            print(printable(text), flush=True)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, a new tensor."""
        value = value.clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: Tensor) -> OnHost:
        """The element-wise maximum over all processes, on its way to the host."""
        return OnHost(value, dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True) if self.size > 1 else None)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of the ranks. They travel as pickles, but only within one run."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0; only rank 0 calls it. If it fails, rank 0 says why and all leave."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [False, None]
        try:
            if self.main:
                outcome = [True, function()]
        finally:  # the other processes must not wait for an answer that never comes
            dist.broadcast_object_list(outcome, src=0)
        if not outcome[0]:
            raise SystemExit(1)
        return outcome[1]


ALONE = Processes()


class OnHost:
    """Values on their way to the host: `get` waits only for them, not for what was launched after them."""

    def __init__(self, value: Tensor, work: Any = None) -> None:
        self._on_device, self._work = value.detach(), work
        self._event: torch.cuda.Event | None = None
        if value.is_cuda:
            self._on_host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            stream = torch.cuda.current_stream() if work is None else _side_stream(value.device)
            with torch.cuda.stream(stream):  # the stream that computes must not wait for the other processes
                if work is not None:
                    work.wait()
                self._on_host.copy_(self._on_device, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()

    def get(self) -> Any:
        if self._event is not None:
            self._event.synchronize()
            return self._on_host.tolist()
        if self._work is not None:
            self._work.wait()
        return self._on_device.tolist()


_side_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]


def rank_and_size() -> tuple[int, int]:
    """Rank and size as torchrun sets them; without torchrun (0, 1), whatever RANK says."""
    return (_number("RANK"), _number("WORLD_SIZE")) if _under_torchrun() else (0, 1)


def _under_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        raise ValueError(f"the environment variable {variable} must be a number as torchrun sets it, got {text!r}")
    return int(text)


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun has started; without torchrun a single one. The group is torn down only if the run
    ends well: after a failure the other processes may never answer."""
    rank, size = rank_and_size()
    if size == 1:
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1") and not _under_torchrun():
            print("WORLD_SIZE is set, but torchrun did not start this process: it trains alone", flush=True)
        yield ALONE
        return
    one = Processes(rank, size, _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE"))
    _join(size)
    yield one
    gc.collect()  # DDP holds the group and is part of a cycle; a group whose threads outlive Python ends in an abort
    dist.destroy_process_group()


def _join(size: int) -> None:
    # Tensors go through the backend of their device; objects are exchanged on the CPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    restart, shared = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "USE_AGENT_STORE"))
    if restart in (None, "0") or shared != "True":
        dist.init_process_group(backend)
        return
    # The processes find each other through torchrun's store, which outlives them. Without a prefix, restarted ones
    # would connect to the addresses of the dead (pytorch issue 135712).
    store: dist.Store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"restart {restart}", store)
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=size)


def launch_name() -> str | None:
    """A name that all restarts by one torchrun (or of one job, by its --rdzv-id) share; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"none, process {os.getppid()}" if name == "none" else name  # "none" is torchrun's default for everyone


def wrap(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """Data parallel: gradients are averaged over the processes during backward."""
    if processes.size == 1:
        return model
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True)


def shard(model: nn.Module, processes: Processes, device: torch.device, precision: str) -> None:
    """Shard the model fully, in place. Each process keeps a part of every block's weights, gradients and momentum in
    float32. A block is gathered where it is computed, in bfloat16 if that is the precision."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # imported here, because it takes a second

    half = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    mesh = init_device_mesh(device.type, (processes.size,))
    for module in [*(m for m in model.modules() if isinstance(m, Block)), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


def shards_of(
    weights: Mapping[str, Tensor], state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This process's part, as `shard` lays it out, of weights and an optimizer's state that are whole everywhere."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def part(whole: Any, parameter: Any) -> Any:
        if not isinstance(whole, Tensor) or not isinstance(parameter, DTensor):
            return whole
        mesh = parameter.device_mesh
        whole = whole.to(mesh.device_type, memory_format=torch.contiguous_format)
        return distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)

    own = model.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {key: part(value, parameters[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {name: part(value, own.get(name)) for name, value in weights.items()}, {**state, "state": moments}


def synchronising(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """The context of one micro-batch: only the last one of a step exchanges gradients in its backward pass."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    exchange: Any = getattr(model, "set_requires_gradient_sync", None)  # a sharded model has it
    if exchange is not None:
        exchange(last)
    return nullcontext()
