"""The residual join as dispatcher ops: PyTorch implementation, fakes, autograd. See `reference.residual_srelu`.

Without a scale both gradients of the sum are g m, so the backward is srelu_backward's; with one, the branch is
saved too, for ds = sum g m branch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import summing, wide
from .library import implement, ops
from .srelu import blocked, channel_sum, gradients, per_channel, standard_gradients


def summed(shortcut: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """shortcut + s * branch, formed in float32 at least and rounded once."""
    dtype = wide(shortcut.dtype)
    scaled = branch.to(dtype) if scale is None else scale.to(dtype).reshape(()) * branch.to(dtype)
    return (shortcut.to(dtype) + scaled).to(shortcut.dtype)


def scale_sum(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Sum of a * b, accumulated in float32 at least, rounded once, in scale's dtype and shape."""
    dtype = summing(a)
    return (a.to(dtype) * b.to(dtype)).sum().to(scale.dtype).view_as(scale)


def _join(shortcut: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None, out: Tensor) -> None:
    total = summed(shortcut, branch, scale)
    torch.maximum(total, per_channel(bias, total), out=out)


@implement("residual_srelu(Tensor shortcut, Tensor branch, Tensor bias, Tensor? scale) -> Tensor")
def _residual_srelu(shortcut: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    output = torch.empty_like(shortcut)
    _join(shortcut, branch, bias, scale, out=output)
    return output


@implement("residual_srelu_(Tensor shortcut, Tensor(a!) branch, Tensor bias, Tensor? scale) -> ()")
def _residual_srelu_(shortcut: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None) -> None:
    _join(shortcut, branch, bias, scale, out=branch)


@implement(
    "residual_srelu_backward(Tensor grad_output, Tensor output, Tensor branch, Tensor bias, Tensor scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _residual_srelu_backward(
    grad_output: Tensor, output: Tensor, branch: Tensor, bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = wide(output.dtype)
    taken = blocked(output, bias)
    grad_shortcut = torch.empty_like(output).copy_(grad_output).masked_fill_(taken, 0)
    grad_branch = torch.empty_like(output)
    grad_branch.copy_(grad_shortcut.to(dtype) * scale.to(dtype).view(()))
    grad_bias = channel_sum(torch.where(taken, grad_output, 0), bias)
    grad_scale = scale_sum(grad_shortcut, branch, scale)
    return grad_shortcut, grad_branch, grad_bias, grad_scale


@torch.library.register_fake("isonet_fast::residual_srelu")
def _residual_srelu_fake(shortcut: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    return torch.empty_like(shortcut)


@torch.library.register_fake("isonet_fast::residual_srelu_")
def _residual_srelu_inplace_fake(shortcut: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None) -> None:
    return None


@torch.library.register_fake("isonet_fast::residual_srelu_backward")
def _residual_srelu_backward_fake(
    grad_output: Tensor, output: Tensor, branch: Tensor, bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    return like(output), like(output), like(bias), like(scale)


def scaled_gradients(
    grad_output: Tensor, output: Tensor, branch: Tensor, bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dshortcut, dbranch, db, ds), differentiable where somebody asks for that (create_graph=True)."""
    if torch._C._are_functorch_transforms_active():  # is_grads_batched
        dtype = wide(output.dtype)
        grad_shortcut, grad_bias = standard_gradients(grad_output, output, bias)
        grad_branch = (grad_shortcut.to(dtype) * scale.to(dtype).reshape(())).to(output.dtype)
        grad_scale = scale_sum(grad_shortcut, branch, scale)
        return grad_shortcut, grad_branch, grad_bias, grad_scale
    if torch.is_grad_enabled():
        return ResidualSReLUBackward.apply(grad_output, output.detach(), branch, bias, scale)  # see `gradients`
    return ops.residual_srelu_backward.default(grad_output, output, branch, bias, scale)


class ResidualSReLU(torch.autograd.Function):
    """residual_srelu, or residual_srelu_ over the branch if `inplace`, under autograd.

    It works in place only without a scale, because ds needs the branch. The branch is the first argument: if it is a
    view, autograd takes the gradient of input 0 as the gradient of the tensor that is written over.
    """

    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, shortcut: Tensor, bias: Tensor, scale: Tensor | None, inplace: bool
    ) -> Tensor:
        if inplace:
            ops.residual_srelu_.default(shortcut, branch, bias, scale)
            ctx.mark_dirty(branch)
            output = branch
        else:
            output = ops.residual_srelu.default(shortcut, branch, bias, scale)
        ctx.save_for_backward(output, bias, *(() if scale is None else (branch, scale)))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        output, bias, *scaled = ctx.saved_tensors
        grads: tuple[Tensor | None, ...]
        if scaled:
            grad_shortcut, grad_branch, *others = scaled_gradients(grad_output, output, scaled[0], bias, scaled[1])
            grads = grad_branch, grad_shortcut, *others
        else:
            grad_sum, grad_bias = gradients(grad_output, output, bias)
            grads = grad_sum, grad_sum, grad_bias, None
        return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad[:4], strict=True)), None


class ResidualSReLUBackward(torch.autograd.Function):
    """residual_srelu_backward under autograd, for second derivatives."""

    @staticmethod
    def forward(
        ctx: Any, grad_output: Tensor, output: Tensor, branch: Tensor, bias: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # the product of a zero that nobody asked for and an infinity would be NaN
        ctx.save_for_backward(grad_output, output, branch, bias, scale)
        return ops.residual_srelu_backward.default(grad_output, output, branch, bias, scale)

    @staticmethod
    def backward(
        ctx: Any, gg_shortcut: Tensor | None, gg_branch: Tensor | None, gg_bias: Tensor | None, gg_scale: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The backward is linear in g, in the branch and in s:

        dg = m (ddshortcut + s ddbranch + dds branch) + (1 - m) ddb;  dbranch = dds g m;  ds = sum g m ddbranch.
        """
        grad_output, output, branch, bias, scale = ctx.saved_tensors
        taken, dtype = blocked(output, bias), summing(output)
        masked = torch.where(taken, 0, grad_output).to(dtype)
        passed, grad_branch, grad_scale = torch.zeros_like(masked), None, None
        if gg_shortcut is not None:
            passed = gg_shortcut.to(dtype)
        if gg_branch is not None:
            passed = passed + scale.to(dtype).reshape(()) * gg_branch.to(dtype)
            grad_scale = scale_sum(masked, gg_branch, scale)
        if gg_scale is not None:
            gg_s = gg_scale.to(dtype).reshape(())
            passed = passed + gg_s * branch.to(dtype)
            grad_branch = (gg_s * masked).to(output.dtype)
        blocked_side = 0 if gg_bias is None else per_channel(gg_bias, passed)
        return torch.where(taken, blocked_side, passed).to(output.dtype), None, grad_branch, None, grad_scale
