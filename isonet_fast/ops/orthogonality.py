"""The orthogonality penalty of a list of weights as one op: schema, fake, autograd, dispatch.

`reference.orthogonality_loss` is the definition. On CUDA the Triton kernels compute the whole list. On other devices,
and for float64, the closed form computes it, except the small layers on the CPU (`small_layers`). What the forward
keeps for the backward belongs to that one call, so two forwards before a backward give the right gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..dtypes import wide
from ..gradient_layout import layout_of
from ..penalty_arguments import check_gradients
from ..problem import Problem, read
from . import closed_form, small_layers
from .library import implement, ops

# `problem` is `Problem.text`: to pass one list per property would take longer than to launch the kernels. The backward
# returns one buffer per dtype (gradient_layout.py), because the results of an op must not share memory. If a later
# version of an op returns other shapes, rename the op: Inductor's cache on a user's disk knows it only by its name and
# schema. Under torch.compile(mode="reduce-overhead") both ops run between the CUDA graphs: their tables outlive a
# graph's memory.
_LOSS = "orthogonality_loss(Tensor[] weights, str problem, bool save) -> (Tensor, Tensor, Tensor[])"
_BACKWARD = "orthogonality_loss_backward(Tensor grad_output, Tensor[] saved, Tensor[] weights, str problem) -> Tensor[]"
_TAGS = (torch.Tag.cudagraph_unsafe,)


def _shapes(weights: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple([w.shape for w in weights])


def serves(weights: Sequence[Tensor]) -> bool:
    """Whether the Triton kernels compute this list; else the closed form."""
    return (
        len(weights) > 0
        and weights[0].is_cuda
        and torch.float64 not in [w.dtype for w in weights]
        and kernels.why_not(weights[0].device) is None
    )


def _triton() -> Any:
    """The launchers, imported where they are needed: the package works without Triton."""
    from ..kernels import orthogonality

    return orthogonality


def _total(losses: Tensor, coefficients: Sequence[float]) -> Tensor:
    """sum of coefficient * penalty, added in float64."""
    weighted = losses.double() * torch.tensor(coefficients, dtype=torch.float64).to(losses.device)
    return weighted.sum().to(losses.dtype)


@implement(_LOSS, _TAGS)
def _orthogonality_loss(weights: list[Tensor], text: str, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        raise RuntimeError(
            "the op isonet_fast::orthogonality_loss is not differentiable by itself; call "
            "isonet_fast.functional.orthogonality_loss"
        )
    problem = read(text, _shapes(weights))
    if serves(weights):
        return _triton().forward(weights, problem, save)
    saved = _saved_like(weights) if save else []
    grads = layout_of(weights).views(saved) if saved else []
    losses = _evaluate(weights, problem, grads, 1.0, add=False)
    return _total(losses, problem.coefficients), losses, saved


def _evaluate(weights: Sequence[Tensor], problem: Problem, grads: Sequence[Tensor], scale: float, add: bool) -> Tensor:
    """Each layer's penalty, (L,). Its gradient times scale * coefficient is written or added into `grads`, if any."""
    factors = [scale * c for c in problem.coefficients]
    work = _work(weights, problem)
    small = small_layers.members(weights, problem.layers, grads)

    def sink(n: int, grad: Tensor) -> None:
        if add:
            grads[n].add_(grad, alpha=factors[n])
        else:
            torch.mul(grad, factors[n], out=grads[n])

    others = list(work)
    for n in small:
        others[n] = work[n][0], ()
    losses = closed_form.evaluate(weights, problem.layers, others, sink if grads else None)
    if small:
        plan, waves, constants = _small_plan(problem, small, work)
        ours, theirs = [weights[n] for n in small], [grads[n] for n in small if grads]
        squares = ops.orthogonality_small_(ours, theirs, plan, waves, [factors[n] for n in small], add)
        losses[small] = (squares - constants).to(losses.dtype)
    return losses


def _work(weights: Sequence[Tensor], problem: Problem) -> list[closed_form.Work]:
    """How each layer is computed where the Triton kernels do not serve it, and which units of it.

    If the work is shared, every rank must split it in the same way. On a GPU another rank may have the Triton kernels,
    so every rank takes their forms and costs.
    """
    float64 = any(w.dtype == torch.float64 for w in weights)
    triton = problem.share[1] > 1 and any(w.is_cuda for w in weights) and not float64
    forms = tuple([layer.triton_form if triton else layer.form for layer in problem.layers])
    return list(zip(forms, problem.units(forms, triton), strict=True))


def _small_plan(
    problem: Problem, members: list[int], work: Sequence[closed_form.Work]
) -> tuple[Tensor, Tensor, Tensor]:
    key = "small", *[(n, work[n][0]) for n in members]
    if key not in problem.tables:
        problem.tables[key] = small_layers.kernel_arguments(
            [problem.layers[n] for n in members], [work[n] for n in members]
        )
    return problem.tables[key]


def _saved_like(weights: Sequence[Tensor]) -> list[Tensor]:
    """The closed form keeps the gradients themselves: 0 for a layer of another rank."""
    regions = layout_of(weights).regions
    return [weights[0].new_zeros(end - start, dtype=wide(dtype)) for dtype, start, end in regions]


@torch.library.register_fake("isonet_fast::orthogonality_loss")
def _orthogonality_loss_fake(weights: list[Tensor], problem: str, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = max((wide(w.dtype) for w in weights), key=lambda d: d.itemsize)
    saved: list[Tensor] = []
    if save and serves(weights):
        shapes = tuple(tuple(map(int, w.shape)) for w in weights)  # the kernels' plan is for sizes, not symbols
        saved = _triton().saved_like(weights, read(problem, shapes))
    elif save:
        saved = _saved_like(weights)
    return weights[0].new_empty((), dtype=dtype), weights[0].new_empty(len(weights), dtype=dtype), saved


@implement(_BACKWARD, _TAGS)
def _orthogonality_loss_backward(
    grad_output: Tensor, saved: list[Tensor], weights: list[Tensor], problem: str
) -> list[Tensor]:
    if serves(weights):
        return _triton().backward_buffers(grad_output, saved, weights, read(problem, _shapes(weights)))
    regions = layout_of(weights).regions
    return [(buffer * grad_output).to(dtype) for buffer, (dtype, _, _) in zip(saved, regions, strict=True)]


@torch.library.register_fake("isonet_fast::orthogonality_loss_backward")
def _orthogonality_loss_backward_fake(
    grad_output: Tensor, saved: list[Tensor], weights: list[Tensor], problem: str
) -> list[Tensor]:
    return [weights[0].new_empty(end - start, dtype=dtype) for dtype, start, end in layout_of(weights).regions]


class OrthogonalityLoss(torch.autograd.Function):
    """orthogonality_loss under autograd: (total, penalties) of (Problem.text, whether to save, *weights).

    It wraps an op that knows nothing of autograd, because `register_autograd` takes longer than the kernels to launch.
    """

    @staticmethod
    def forward(ctx: Any, text: str, save: bool, *weights: Tensor) -> tuple[Tensor, Tensor]:
        total, losses, saved = ops.orthogonality_loss(weights, text, save)
        ctx.text, ctx.count = text, len(weights)
        ctx.save_for_backward(*weights, *saved)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "orthogonality_loss is differentiable once, but create_graph=True asked for a graph of its gradient; "
                "isonet_fast.reference.orthogonality_loss is the form that is differentiable at every order"
            )
        tensors = ctx.saved_tensors  # each look at it checks every version anew
        weights, saved = tensors[: ctx.count], tensors[ctx.count :]
        grads = layout_of(weights).views(ops.orthogonality_loss_backward(grad_output, saved, weights, ctx.text))
        return None, None, *(g if n else None for g, n in zip(grads, ctx.needs_input_grad[2:], strict=True))


def loss(weights: Sequence[Tensor], problem: Problem) -> tuple[Tensor, Tensor]:
    """sum of coefficient * penalty (differentiable), and each layer's penalty (L,), detached."""
    save = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    (_, first), *more = problem.by_precision
    if not more:
        return OrthogonalityLoss.apply(first.text, save, *weights)
    parts = [(part.text, [weights[n] for n in members]) for members, part in problem.by_precision]
    return _joined(problem, [OrthogonalityLoss.apply(text, save, *ws) for text, ws in parts])


def accumulate_grad_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], problem: Problem, scale: float
) -> tuple[Tensor, Tensor]:
    """Add scale * coefficient * dpenalty/dW to each gradient in place; returns what `loss` returns.

    Raises as `penalty_arguments.check_gradients` does, before any gradient changes.
    """
    (_, first), *more = problem.by_precision
    if not more:
        return _accumulate_grad_(weights, grads, first, scale)
    check_gradients(grads)
    return _joined(
        problem,
        [
            _accumulate_grad_([weights[n] for n in members], [grads[n] for n in members], part, scale)
            for members, part in problem.by_precision
        ],
    )


def _joined(problem: Problem, results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Total and penalties of all layers, in their order, from those of the problem's parts."""
    in_order: dict[int, Tensor] = {}
    for (members, _), (_, losses) in zip(problem.by_precision, results, strict=True):
        in_order.update(zip(members, losses.unbind(), strict=True))
    (first, _), (second, _) = results
    return first + second, torch.stack([in_order[n] for n in range(len(in_order))])


def _accumulate_grad_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], problem: Problem, scale: float
) -> tuple[Tensor, Tensor]:
    if serves(weights):
        result = _triton().accumulate_grad_(weights, grads, problem.unique, scale)
        torch.autograd.graph.increment_version(grads)  # the kernels write unseen by autograd
        return result
    check_gradients(grads)
    torch.autograd.graph.increment_version(grads)
    with torch.no_grad():
        losses = _evaluate(weights, problem.unique, grads, scale, add=True)
        return _total(losses, problem.coefficients), losses
