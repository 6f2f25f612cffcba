"""SReLU as dispatcher ops: PyTorch implementation, fakes, autograd. Mathematics: `reference.srelu`.

Only the output and the bias are saved, so the op can run in place; the mask is m = not (y <= b). The bias holds C
values in any shape, and its gradient has that shape: the layer's (1, C, 1, 1) needs no view and no autograd node.

Autograd is a pair of `torch.autograd.Function`s around ops that know nothing of it: `register_autograd` refuses an op
that mutates, and its Python wrapper around every call costs more than a small kernel. The code calls the overload
`.default` by name: without it, PyTorch looks it up at every call, which costs as much as all checks of the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import summing
from .library import implement, ops


def per_channel(bias: Tensor, x: Tensor) -> Tensor:
    """The C values of bias rounded to x's dtype, in the shape that broadcasts over x (N, C, ...)."""
    return bias.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2))


def blocked(output: Tensor, bias: Tensor) -> Tensor:
    """1 - m: where the bias was taken. Comparisons with NaN are false, so a NaN passes its gradient."""
    return output <= per_channel(bias, output)


def channel_sum(values: Tensor, bias: Tensor) -> Tensor:
    """Sum over every axis but C, accumulated in float32 at least, rounded once, in bias's dtype and shape."""
    dims = [d for d in range(values.dim()) if d != 1]
    return values.sum(dims, dtype=summing(values)).to(bias.dtype).reshape(bias.shape)


@implement("srelu(Tensor x, Tensor bias) -> Tensor")
def _srelu(x: Tensor, bias: Tensor) -> Tensor:
    return torch.maximum(x, per_channel(bias, x), out=torch.empty_like(x))


@implement("srelu_(Tensor(a!) x, Tensor bias) -> ()")
def _srelu_(x: Tensor, bias: Tensor) -> None:
    torch.maximum(x, per_channel(bias, x), out=x)


@implement("srelu_backward(Tensor grad_output, Tensor output, Tensor bias) -> (Tensor, Tensor)")
def _srelu_backward(grad_output: Tensor, output: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    taken = blocked(output, bias)
    grad_x = torch.empty_like(output).copy_(grad_output).masked_fill_(taken, 0)
    return grad_x, channel_sum(torch.where(taken, grad_output, 0), bias)


@torch.library.register_fake("isonet_fast::srelu")
def _srelu_fake(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("isonet_fast::srelu_")
def _srelu_inplace_fake(x: Tensor, bias: Tensor) -> None:
    return None


@torch.library.register_fake("isonet_fast::srelu_backward")
def _srelu_backward_fake(grad_output: Tensor, output: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), torch.empty_like(bias)


def standard_gradients(grad_output: Tensor, output: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, db) in standard operators, which vmap and autograd see through."""
    taken = blocked(output, bias)
    return torch.where(taken, 0, grad_output), channel_sum(torch.where(taken, grad_output, 0), bias)


def gradients(grad_output: Tensor, output: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, db), differentiable where somebody asks for that (create_graph=True)."""
    if torch._C._are_functorch_transforms_active():  # is_grads_batched
        return standard_gradients(grad_output, output, bias)
    if torch.is_grad_enabled():
        return SReLUBackward.apply(grad_output, output.detach(), bias)  # the mask has no derivative
    return ops.srelu_backward.default(grad_output, output, bias)


class SReLU(torch.autograd.Function):
    """srelu, or srelu_ if `inplace`, under autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ops.srelu_.default(x, bias)
            ctx.mark_dirty(x)
            output = x
        else:
            output = ops.srelu.default(x, bias)
        ctx.save_for_backward(output, bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x, grad_bias = gradients(grad_output, *ctx.saved_tensors)
        return (grad_x if ctx.needs_input_grad[0] else None), (grad_bias if ctx.needs_input_grad[1] else None), None


class SReLUBackward(torch.autograd.Function):
    """srelu_backward under autograd, for second derivatives."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, output: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(output, bias)
        return ops.srelu_backward.default(grad_output, output, bias)

    @staticmethod
    def backward(ctx: Any, grad_grad_x: Tensor, grad_grad_bias: Tensor) -> tuple[Tensor, None, None]:
        """The backward is linear in g: dg = m ddx + (1 - m) ddb. The mask is piecewise constant in y and b."""
        output, bias = ctx.saved_tensors
        grad = torch.where(blocked(output, bias), per_channel(grad_grad_bias, grad_grad_x), grad_grad_x)
        return grad, None, None
