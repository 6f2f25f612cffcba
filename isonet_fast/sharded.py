"""Weights that FSDP2 has spread over ranks: made whole by one all-gather, their gradient brought back to the shards.

    whole = shards.gather(weights)      one collective for all weights, in float32 (float64 for float64)
    shards.add_(weights, gradients)     each rank's rows of the gradients, added to its shard of `.grad`

FSDP2 (`torch.distributed.fsdp.fully_shard`) averages what reaches its gathered weights over the ranks and adds that to
the shards' `.grad`. The penalty's gradient goes there directly, before or after, and is not averaged again: `.grad` is
the mean of the ranks' task gradients plus the whole gradient of the penalty.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from .dtypes import wide


def is_sharded(weight: Tensor) -> bool:
    """Whether it is a DTensor. Their module is slow to import; if nobody has imported it, no DTensor exists."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(weight, tensor.DTensor)


def reshard(model: nn.Module) -> None:
    """Put the shards back in place. After a forward pass FSDP2 leaves the weights of its outermost module gathered."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


class Shards:
    """How a list of weights lies over the ranks of one process group.

    A weight has O rows (its first dimension). Every rank has ceil(O / ranks) of them; the last ranks have fewer or
    none. In messages every rank's part is padded to ceil(O / ranks) rows. Whole weights lie in one buffer, each with
    its padding at its end.

    split_over: the `work_group` of `OrthoRegularizer`, or None if every rank computes everything.

    Raises ValueError for weights that are not all Shard(0) over one one-dimensional mesh, and for a `split_over` of
    other ranks.
    """

    def __init__(self, weights: Sequence[Tensor], split_over: Any = None) -> None:
        mesh = _common_mesh(weights)
        self._group, self._rank, self._ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self._split = split_over is not None
        if self._split and _ranks(split_over) != _ranks(self._group):
            raise ValueError(
                f"work_group must have the ranks over which the weights are sharded, {_ranks(self._group)} in this "
                f"order, got {_ranks(split_over)}"
            )
        self._shapes = [weight.shape for weight in weights]
        self._sizes = [-(-shape[0] // self._ranks) * shape[1:].numel() for shape in self._shapes]  # of one rank's part

    def gather(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Every weight whole, on every rank. Differentiable: its backward is `add_`, at the end of that pass."""
        return list(_Gather.apply(self, *weights))

    def zeros(self, whole: Tensor) -> Tensor:
        """A buffer for the gradients of all weights, in the dtype and on the device of the whole weight `whole`."""
        return whole.new_zeros(sum(self._sizes) * self._ranks)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Every whole weight in a buffer of `zeros`."""
        padded = buffer.split([size * self._ranks for size in self._sizes])
        return [one[: shape.numel()].view(shape) for one, shape in zip(padded, self._shapes, strict=True)]

    @torch.no_grad()
    def add_(self, weights: Sequence[Tensor], grads: Tensor) -> None:
        """Add this rank's rows of `grads` (a buffer of `zeros`) to the `.grad` of every weight that requires one.

        If the work is split over ranks, their `grads` are averaged first (one reduce-scatter).
        """
        if not any(weight.requires_grad for weight in weights):
            return
        parts = self._mean(grads) if self._split else [part[self._rank] for part in self._parts(grads)]
        for weight in weights:
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        trained = [(w.grad.to_local(), p) for w, p in zip(weights, parts, strict=True) if w.requires_grad]  # type: ignore
        torch._foreach_add_([g for g, _ in trained], [p[: g.numel()].view_as(g) for g, p in trained])

    def _whole(self, weights: Sequence[Tensor]) -> list[Tensor]:
        rows = [weight.to_local() for weight in weights]  # type: ignore[attr-defined]
        dtype = max((wide(row.dtype) for row in rows), key=lambda d: d.itemsize)
        mine = torch.zeros(sum(self._sizes), dtype=dtype, device=rows[0].device)
        torch._foreach_copy_([m[: r.numel()].view_as(r) for m, r in zip(mine.split(self._sizes), rows)], rows)
        everyones, buffer = (mine.new_empty(self._ranks * len(mine)) for _ in range(2))
        _collective("all_gather_single", "all_gather_into_tensor")(everyones, mine, group=self._group)
        torch._foreach_copy_(self._parts(buffer), self._columns(everyones))
        return self.views(buffer)

    def _mean(self, grads: Tensor) -> list[Tensor]:
        everyones, mine = torch.empty_like(grads), grads.new_empty(sum(self._sizes))
        torch._foreach_copy_(self._columns(everyones), self._parts(grads))
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(mine, everyones, group=self._group)
        return list(mine.div_(self._ranks).split(self._sizes))

    def _columns(self, message: Tensor) -> list[Tensor]:
        """Every weight in a message, (ranks, elements of a rank's part). A message is ordered by rank, then weight."""
        return list(message.view(self._ranks, -1).split(self._sizes, dim=1))

    def _parts(self, buffer: Tensor) -> list[Tensor]:
        """Every weight in a buffer of whole weights, with its padding, (ranks, elements of a rank's part)."""
        padded = buffer.split([size * self._ranks for size in self._sizes])
        return [one.view(self._ranks, size) for one, size in zip(padded, self._sizes, strict=True)]


class _Gather(torch.autograd.Function):
    """Shards to whole weights. Its backward adds the gradients to `.grad` itself, at the end of the backward pass.

    During the backward pass FSDP writes to the same `.grad`s, on a CUDA stream that the autograd engine does not know.
    At the end of the pass, a callback of FSDP makes the current stream wait for that stream. Our gradients must come
    after that. So our callback queues a second callback: it runs after FSDP's, in whatever order the loss was computed.
    """

    @staticmethod
    def forward(ctx: Any, shards: Shards, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.shards, ctx.weights = shards, weights
        return tuple(shards._whole(weights))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        def add() -> None:
            buffer = ctx.shards.zeros(grads[0])
            torch._foreach_copy_(ctx.shards.views(buffer), list(grads))
            ctx.shards.add_(ctx.weights, buffer)

        engine = Variable._execution_engine
        engine.queue_callback(lambda: engine.queue_callback(add))
        return None, *(None for _ in ctx.weights)


def _common_mesh(weights: Sequence[Any]) -> Any:
    for weight in weights:
        if not is_sharded(weight):
            raise ValueError(
                f"either all penalised weights are sharded by fully_shard or none is, got a plain one of shape "
                f"{tuple(weight.shape)} among them"
            )
        if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
            raise ValueError(
                f"a sharded weight must be Shard(0) on a one-dimensional mesh, as fully_shard makes it by default, got "
                f"{weight.placements} on {weight.device_mesh} for one of shape {tuple(weight.shape)}"
            )
        if weight.device_mesh != weights[0].device_mesh:
            raise ValueError(
                f"all penalised weights must be sharded over one mesh, got {weights[0].device_mesh} and "
                f"{weight.device_mesh}"
            )
    return weights[0].device_mesh


def _collective(name: str, old_name: str) -> Any:
    """The collective of this name, or of its `old_name` before PyTorch 2.13, which warns of the old names."""
    return getattr(dist, name, None) or getattr(dist, old_name)


def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)
