"""The orthogonality penalty of a list of weights and its gradient: a few launches, however many layers.

    loss: pack, gram (one launch per tile size), finish        gradient: grad (one launch per tile size)

Layers that are computed over frequencies (`Layer.triton_form`) add a transform beside pack, and to the gradient a grad
launch per tile size and a transform back.

`accumulate_grad_` launches finish on a stream of its own, beside grad.

No launch waits for the host, the same input gives the same bits, and nothing but tables is kept between calls: packed
planes and residuals belong to the call. A CUDA graph can capture a call once a first one has been made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..gradient_layout import GradientLayout, layout_of
from ..problem import Problem
from . import packed, tiles
from .finish import finish_kernel
from .grad import grad_kernel
from .gram import gram_kernel
from .pack import pack_kernel
from .packed import RESIDUAL_PANEL
from .plan import Plan
from .tables import Tables
from .tiles import GradTile
from .transform import transform_back_kernel, transform_kernel


def tables_of(problem: Problem, device: torch.device) -> Tables:
    """The tables of a problem on one device. The problem keeps them."""
    tables = problem.tables.get(device)
    if tables is None:
        tables = problem.tables[device] = Tables(Plan(problem, variant(device, problem.precision)), device)
    return tables


def variant(device: torch.device, precision: str | None) -> str:
    """The name of the variant: descriptors need Hopper's or data-centre Blackwell's copy engine and shared memory."""
    if precision == "highest":
        return "highest"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return "pointer"
    return "tma"


def forward(
    weights: Sequence[Tensor],
    problem: Problem,
    save: bool,
    split_k: tuple[Tensor, Tensor] | None = None,
    partials: Tensor | None = None,
    aside: torch.cuda.Stream | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """sum of coefficient * penalty, a float32 scalar; each layer's penalty (L,); what `backward` needs if `save`.

    The first two are computed on the stream `aside`, if there is one, from `partials`. The caller's stream must wait
    for that stream before these three are freed: their memory is the caller's, and its next tensor would take it. A
    gradient that follows uses the same `split_k`.
    """
    tables = tables_of(problem, weights[0].device)
    plan, device, launch = tables.plan, tables.device, tables.launches
    split = plan.precision is None
    dtype = torch.bfloat16 if split else torch.float32
    with _on(tables) as stream:
        hi = torch.empty(plan.planes_shape, dtype=dtype, device=device)
        lo = torch.empty(plan.planes_shape, dtype=dtype, device=device) if split else hi
        residual = torch.empty(plan.residual_shape if save else (1, RESIDUAL_PANEL), dtype=dtype, device=device)
        partials = _partials(tables) if partials is None else partials
        losses = torch.empty(len(weights), dtype=torch.float32, device=device)
        loss = torch.empty((), dtype=torch.float32, device=device)
        arguments: tuple
        parts, arrivals = split_k or _split_k(tables, after_pack=True)
        view = tables.view("read", weights, stream)
        if len(plan.pack_tiles):
            arguments = (hi, lo, tables.pack, view, arrivals, plan.arrivals)
            launch("pack", pack_kernel, len(plan.pack_tiles), arguments, tiles.pack_options(plan.variant))
        if len(plan.spectrum.there):
            arguments = (hi, lo, tables.there, tables.waves, view)
            launch("transform", transform_kernel, len(plan.spectrum.there), arguments, tiles.transform_options(split))
        for tile, table in tables.gram.items():
            box = [tile.block, tile.chunk]
            arguments = (_plane(hi, box, plan), _plane(lo, box, plan), residual, partials, parts, arrivals, table)
            options = tiles.gram_options(plan.variant, tile, save)
            launch(("gram", tile, save), gram_kernel, len(table), arguments, options)
        if aside is not None:
            aside.wait_stream(stream)
            tables.use_on(aside)
        with contextlib.nullcontext() if aside is None else torch.cuda.stream(aside):
            arguments = (
                loss, losses, partials, tables.ranges, tables.shares, tables.constants, tables.coefficients,
                len(weights), plan.longest_range,
            )  # fmt: skip
            launch("finish", finish_kernel, 1, arguments, tiles.FINISH_OPTIONS)
    return loss, losses, [hi, residual] if save else []


def saved_like(weights: Sequence[Tensor], problem: Problem) -> list[Tensor]:
    """Empty tensors of the shapes of `saved`: the hi plane and the residuals."""
    dtype = torch.bfloat16 if problem.precision is None else torch.float32
    return [weights[0].new_empty(shape, dtype=dtype) for shape in packed.shapes(problem)]


def backward(grad_output: Tensor, saved: Sequence[Tensor], weights: Sequence[Tensor], problem: Problem) -> list[Tensor]:
    """grad_output * dloss/dW of every weight, in its dtype and strides: views of `backward_buffers`."""
    return layout_of(weights).views(backward_buffers(grad_output, saved, weights, problem))


def backward_buffers(
    grad_output: Tensor, saved: Sequence[Tensor], weights: Sequence[Tensor], problem: Problem
) -> list[Tensor]:
    """The gradients, a buffer per dtype of the weights (see gradient_layout.py)."""
    tables = tables_of(problem, weights[0].device)
    with _on(tables) as stream:
        layout, flat = _grad_to_flat(tables, weights, saved, grad_output, _split_k(tables, after_pack=False), stream)
    return layout.buffers(flat)


def accumulate_grad_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], problem: Problem, scale: float
) -> tuple[Tensor, Tensor]:
    """grads[l] += scale * coefficient * dpenalty/dW in place; returns the loss (without scale) and the penalties.

    Raises as `penalty_arguments.check_gradients` does, before any gradient changes.
    """
    tables = tables_of(problem, weights[0].device)
    with _on(tables) as stream:
        view = tables.view("add", grads, stream)
        split_k, partials = _split_k(tables, after_pack=True), _partials(tables)
        # One program of finish keeps one multiprocessor busy: beside the gradient, which doesn't need the loss
        loss, losses, saved = forward(weights, problem, True, split_k, partials, tables.aside)
        try:
            if view is not None and not any(map(Tensor.is_neg, grads)):
                _grad(tables, saved, split_k, view, scale=float(scale))
            else:  # formed in float32, added with one rounding
                factor = torch.full((), scale, dtype=torch.float32, device=tables.device)
                layout, flat = _grad_to_flat(tables, weights, saved, factor, split_k, stream)
                for grad, addend in zip(grads, layout.wide_views(flat), strict=True):
                    grad.add_(addend)
        finally:  # also if there is no memory for the gradient
            if tables.aside is not None:
                stream.wait_stream(tables.aside)
    return loss, losses


def _on(tables: Tables) -> contextlib.AbstractContextManager:
    """Launches go to the weights' device, on its current stream."""
    return _CurrentStream(tables) if tables.device.type == "cuda" else contextlib.nullcontext()


class _CurrentStream(torch.cuda.device):
    def __init__(self, tables: Tables) -> None:
        super().__init__(tables.device)
        self._tables = tables

    def __enter__(self) -> Any:
        super().__enter__()
        stream = torch.cuda.current_stream(self.idx)
        self._tables.use_on(stream)
        return stream


def _split_k(tables: Tables, after_pack: bool) -> tuple[Tensor, Tensor]:
    """`parts` and `arrivals` of split_k.py. `after_pack`: pack sets the second to 0, if it is launched.

    One `parts` for gram and for the gradient that follows on the same stream.
    """
    plan, device = tables.plan, tables.device
    if not plan.arrivals:
        return tables.unsplit
    make = torch.empty if after_pack and len(plan.pack_tiles) else torch.zeros
    parts = torch.empty(plan.parts_size, dtype=torch.float32, device=device)
    return parts, make(plan.arrivals, dtype=torch.int32, device=device)


def _partials(tables: Tables) -> Tensor:
    """The square sums of gram's tiles, which finish adds."""
    return torch.empty(max(1, tables.plan.partials), dtype=torch.float32, device=tables.device)


def _grad_to_flat(
    tables: Tables, weights: Sequence[Tensor], saved: Sequence[Tensor], factor: Tensor,
    split_k: tuple[Tensor, Tensor], stream: Any,
) -> tuple[GradientLayout, Tensor]:  # fmt: skip
    layout, view = tables.flat(weights)
    make = torch.empty if tables.plan.fills else torch.zeros
    flat = make(layout.size, dtype=torch.float32, device=tables.device)
    _grad(tables, saved, split_k, view.on(stream), flat=flat, grad_output=factor.float())
    return layout, flat


def _grad(
    tables: Tables, saved: Sequence[Tensor], split_k: tuple[Tensor, Tensor], view: Tensor,
    flat: Tensor | None = None, grad_output: Tensor | None = None, scale: float = 1.0,
) -> None:  # fmt: skip
    """Write the gradient into `flat` (times grad_output), or add it to what the view points at (times scale)."""
    plan = tables.plan
    hi, residual = saved

    def launch(made: dict[GradTile, Tensor], out: Tensor | None, *rest: Any) -> None:
        """One launch per tile size; `rest`: the last of the kernel's arguments."""
        for tile, table in made.items():
            arguments = (
                _plane(residual, [tile.rows, tile.depth], plan), _plane(residual, [tile.depth, tile.rows], plan),
                _plane(hi, [tile.depth, tile.columns], plan), out, *split_k, table, tables.runs, *rest,
            )  # fmt: skip
            options = tiles.grad_options(plan.variant, tile, out is None)
            tables.launches(("grad", tile, out is None), grad_kernel, len(table), arguments, options)

    launch(tables.grad, flat, view, tables.coefficients, grad_output, scale)
    if len(plan.spectrum.back):
        spectrum = torch.empty(plan.spectrum.size, dtype=torch.float32, device=tables.device)
        factor = tables.one if grad_output is None else grad_output
        launch(tables.spectrum, spectrum, tables.spectrum_view, tables.spectrum_coefficients, factor, 1.0)
        arguments = (spectrum, flat, tables.back, tables.waves, view, scale)
        options = tiles.transform_back_options(flat is None)
        tables.launches(("back", flat is None), transform_back_kernel, len(plan.spectrum.back), arguments, options)


class _Plane(TensorDescriptor):
    """Boxes of a matrix that is aligned by construction: no call checks it again."""

    def __post_init__(self) -> None:
        pass


def _plane(tensor: Tensor, box: list[int], plan: Plan) -> Any:
    return _Plane(tensor, tensor.shape, tensor.stride(), box) if plan.variant.tma else tensor
