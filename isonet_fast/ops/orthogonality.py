"""The orthogonality penalty of a list of weights as one op: schema, fake, autograd, dispatch.

`reference.orthogonality_loss` is the definition. On CUDA the Triton kernels serve the whole list; elsewhere, and for
float64, the closed form does, but for small layers on the CPU (`small_layers`). Whatever the forward keeps for the
backward belongs to that call: two forwards before a backward are right.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..flat import lay_out
from ..geometry import Layer, shard
from . import closed_form, small_layers
from ._library import implement, library, ops

# problem is `Problem.text`: a list per property would take longer to pass than the kernels to launch. The backward
# returns a buffer per dtype (flat.py): what an op returns must not share memory. A later version whose
# op returns other shapes must rename it: Inductor's cache on a user's disk knows an op by its name and schema alone.
# Under torch.compile(mode="reduce-overhead") both stay between the graphs: their tables outlive a graph's memory.
for _schema in (
    "orthogonality_loss(Tensor[] weights, str problem, bool save) -> (Tensor, Tensor, Tensor[])",
    "orthogonality_loss_backward(Tensor grad_output, Tensor[] saved, Tensor[] weights, str problem) -> Tensor[]",
):
    library.define(_schema, tags=(torch.Tag.cudagraph_unsafe,))


class Problem:
    """What to compute, apart from the weights. Kept by its user: plans are found by the identity of its tuples.

    part: (rank, number of ranks); a rank computes its share of the (layer, offset) units.
    """

    def __init__(
        self,
        layers: tuple[Layer, ...],
        coefficients: tuple[float, ...],
        precision: str | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.layers, self.coefficients, self.precision, self.part = layers, coefficients, precision, part
        self._offsets: tuple | None = None
        self._parts: list[tuple[list[int], Problem]] | None = None
        self._small: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._text: str | None = None

    @property
    def text(self) -> str:
        """Everything but the weights and their shapes, one line per layer, as the ops take it. `_read` reads it."""
        if self._text is None:
            lines = [f"{self.precision or 'default'} {self.part[0]} {self.part[1]}"]
            for layer, coefficient in zip(self.layers, self.coefficients, strict=True):
                stride, dilation = "x".join(map(str, layer.stride)), "x".join(map(str, layer.dilation))
                lines.append(f"{stride} {dilation} {layer.groups} {layer.penalty} {coefficient!r}")
            self._text = "\n".join(lines)
        return self._text

    @property
    def offsets(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Of each layer, what this rank computes."""
        if self._offsets is None:
            self._offsets = shard(self.layers, *self.part)
        return self._offsets

    def small(self, members: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The plan of these layers (`small_layers.plan`)."""
        key = tuple(members)
        if key not in self._small:
            self._small[key] = small_layers.plan([self.layers[n] for n in key], [self.offsets[n] for n in key])
        return self._small[key]

    @property
    def parts(self) -> list[tuple[list[int], Problem]]:
        """What is computed together: indices into the layers, and their problem.

        The default precision suits residuals that vanish at the optimum. Where "lorth" has more rows than the operator
        has columns they don't: R tends to a projector of size 1 whose product with A cancels, and in bf16 the
        gradient would be noise. Those layers (mostly a network's first) take float32.
        """
        if self._parts is None:
            everything = list(range(len(self.layers)))
            tall = [] if self.precision else [n for n in everything if self.layers[n].constant > 0]
            rest = [n for n in everything if n not in tall]
            if tall:
                split = [(rest, self._restricted(rest, None)), (tall, self._restricted(tall, "highest"))]
                self._parts = [(members, part) for members, part in split if members]
            else:
                self._parts = [(everything, self)]
        return self._parts

    def _restricted(self, members: list[int], precision: str | None) -> Problem:
        layers = tuple(self.layers[n] for n in members)
        return Problem(layers, tuple(self.coefficients[n] for n in members), precision, self.part)


@functools.lru_cache(maxsize=64)
def _read(text: str, shapes: tuple[tuple[int, ...], ...]) -> Problem:
    """The problem of this `Problem.text`, for weights of these shapes."""
    (precision, *part), *lines = (line.split(" ") for line in text.split("\n"))
    layers, coefficients = [], []
    for shape, (*steps, groups, penalty, coefficient) in zip(shapes, lines, strict=True):
        stride, dilation = (tuple(map(int, numbers.split("x"))) if numbers else () for numbers in steps)
        layers.append(Layer(tuple(shape), stride, dilation, int(groups), penalty))
        coefficients.append(float(coefficient))
    rank, ranks = map(int, part)
    return Problem(tuple(layers), tuple(coefficients), None if precision == "default" else precision, (rank, ranks))


def _shapes(weights: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple([w.shape for w in weights])


def serves(weights: Sequence[Tensor]) -> bool:
    """Whether the Triton kernels compute this list; else the closed form."""
    return (
        len(weights) > 0
        and weights[0].is_cuda
        and torch.float64 not in [w.dtype for w in weights]
        and kernels.unavailable(weights[0].device) is None
    )


def _triton() -> Any:
    """The launchers, imported where they are needed: the package works without Triton."""
    from ..kernels import orthogonality

    return orthogonality


def _total(losses: Tensor, coefficients: Sequence[float]) -> Tensor:
    """sum of coefficient * penalty, added in float64."""
    weighted = losses.double() * torch.tensor(coefficients, dtype=torch.float64).to(losses.device)
    return weighted.sum().to(losses.dtype)


@implement("orthogonality_loss")
def _orthogonality_loss(weights: list[Tensor], text: str, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        raise RuntimeError(
            "the op isonet_fast::orthogonality_loss is not differentiable by itself; call "
            "isonet_fast.functional.orthogonality_loss"
        )
    problem = _read(text, _shapes(weights))
    if serves(weights):
        return _triton().forward(weights, *_triton_arguments(problem), save)
    saved = _saved_like(weights) if save else []
    grads = lay_out(weights).views(saved) if saved else []
    losses = _evaluate(weights, problem, grads, 1.0, add=False)
    return _total(losses, problem.coefficients), losses, saved


def _evaluate(weights: Sequence[Tensor], problem: Problem, grads: Sequence[Tensor], scale: float, add: bool) -> Tensor:
    """Each layer's penalty, (L,). Its gradient times scale * coefficient is written or added into `grads`, if any."""
    factors = [scale * c for c in problem.coefficients]
    small = small_layers.members(weights, problem.layers, grads)

    def sink(n: int, grad: Tensor) -> None:
        if add:
            grads[n].add_(grad, alpha=factors[n])
        else:
            torch.mul(grad, factors[n], out=grads[n])

    offsets = list(problem.offsets)
    for n in small:
        offsets[n] = ()
    losses = closed_form.evaluate(weights, problem.layers, offsets, sink if grads else None)
    if small:
        plan, constants = problem.small(small)
        squares = ops.orthogonality_small_(
            [weights[n] for n in small], [grads[n] for n in small if grads], plan, [factors[n] for n in small], add
        )
        losses[small] = (squares - constants).to(losses.dtype)
    return losses


def _triton_arguments(problem: Problem) -> tuple:
    return problem.layers, problem.coefficients, problem.precision, problem.offsets


def _saved_like(weights: Sequence[Tensor]) -> list[Tensor]:
    """The closed form keeps the gradients themselves: 0 for a layer of another rank."""
    regions = lay_out(weights).regions
    return [weights[0].new_zeros(end - start, dtype=closed_form.wide_dtype(dtype)) for dtype, start, end in regions]


@torch.library.register_fake("isonet_fast::orthogonality_loss")
def _orthogonality_loss_fake(weights: list[Tensor], problem: str, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = max((closed_form.wide_dtype(w.dtype) for w in weights), key=lambda d: d.itemsize)
    saved: list[Tensor] = []
    if save and serves(weights):
        shapes = tuple(tuple(map(int, w.shape)) for w in weights)  # the kernels' plan is for sizes, not symbols
        read = _read(problem, shapes)
        saved = _triton().saved_like(weights, read.layers, read.precision, read.offsets)
    elif save:
        saved = _saved_like(weights)
    return weights[0].new_empty((), dtype=dtype), weights[0].new_empty(len(weights), dtype=dtype), saved


@implement("orthogonality_loss_backward")
def _orthogonality_loss_backward(
    grad_output: Tensor, saved: list[Tensor], weights: list[Tensor], problem: str
) -> list[Tensor]:
    if serves(weights):
        return _triton().backward_buffers(
            grad_output, saved, weights, *_triton_arguments(_read(problem, _shapes(weights)))
        )
    regions = lay_out(weights).regions
    return [(buffer * grad_output).to(dtype) for buffer, (dtype, _, _) in zip(saved, regions, strict=True)]


@torch.library.register_fake("isonet_fast::orthogonality_loss_backward")
def _orthogonality_loss_backward_fake(
    grad_output: Tensor, saved: list[Tensor], weights: list[Tensor], problem: str
) -> list[Tensor]:
    return [weights[0].new_empty(end - start, dtype=dtype) for dtype, start, end in lay_out(weights).regions]


class OrthogonalityLoss(torch.autograd.Function):
    """orthogonality_loss under autograd: (total, penalties) of (Problem.text, whether to save, *weights).

    Around an op that knows nothing of it: `register_autograd` takes longer than the kernels to launch.
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
        weights, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        grads = lay_out(weights).views(ops.orthogonality_loss_backward(grad_output, saved, weights, ctx.text))
        return None, None, *(g if n else None for g, n in zip(grads, ctx.needs_input_grad[2:], strict=True))


def loss(weights: Sequence[Tensor], problem: Problem) -> tuple[Tensor, Tensor]:
    """sum of coefficient * penalty (differentiable), and each layer's penalty (L,), detached."""
    save = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    (_, first), *more = problem.parts
    if not more:
        return OrthogonalityLoss.apply(first.text, save, *weights)
    parts = [(part.text, [weights[n] for n in members]) for members, part in problem.parts]
    return _joined(problem, [OrthogonalityLoss.apply(text, save, *ws) for text, ws in parts])


@torch.no_grad()
def accumulate_grad_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], problem: Problem, scale: float
) -> tuple[Tensor, Tensor]:
    """Add scale * coefficient * dpenalty/dW to each gradient in place; returns what `loss` returns."""
    torch.autograd.graph.increment_version(grads)  # the kernels write unseen by autograd
    (_, first), *more = problem.parts
    if not more:
        return _accumulate_grad_(weights, grads, first, scale)
    return _joined(
        problem,
        [
            _accumulate_grad_([weights[n] for n in members], [grads[n] for n in members], part, scale)
            for members, part in problem.parts
        ],
    )


def _joined(problem: Problem, results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Total and penalties of all layers, in their order, from those of the problem's parts."""
    in_order: dict[int, Tensor] = {}
    for (members, _), (_, losses) in zip(problem.parts, results, strict=True):
        in_order.update(zip(members, losses.unbind(), strict=True))
    (first, _), (second, _) = results
    return first + second, torch.stack([in_order[n] for n in range(len(in_order))])


def _accumulate_grad_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], problem: Problem, scale: float
) -> tuple[Tensor, Tensor]:
    if serves(weights):
        return _triton().accumulate_grad_(weights, grads, *_triton_arguments(problem), scale)
    losses = _evaluate(weights, problem, grads, scale, add=True)
    return _total(losses, problem.coefficients), losses
