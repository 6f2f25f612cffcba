"""SReLU as dispatcher ops: PyTorch implementation, fakes, autograd. Mathematics: `reference.srelu`.

Only the output and the bias are saved, so the op can run in place; the mask is m = not (y <= b).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import implement, ops


def per_channel(bias: Tensor, x: Tensor) -> Tensor:
    """bias (C,) rounded to x's dtype, in the shape that broadcasts over x (N, C, ...)."""
    return bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def blocked(output: Tensor, bias: Tensor) -> Tensor:
    """1 - m: where the bias was taken. Comparisons with NaN are false, so a NaN passes its gradient."""
    return output <= per_channel(bias, output)


def channel_sum(values: Tensor, bias: Tensor) -> Tensor:
    """Sum over every axis but C, accumulated in float32 at least, in bias's dtype."""
    dims = [d for d in range(values.dim()) if d != 1]
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.sum(dims, dtype=wide).to(bias.dtype)


@implement("srelu")
def _srelu(x: Tensor, bias: Tensor) -> Tensor:
    return torch.maximum(x, per_channel(bias, x), out=torch.empty_like(x))


@implement("srelu_")
def _srelu_(x: Tensor, bias: Tensor) -> None:
    torch.maximum(x, per_channel(bias, x), out=x)


@implement("srelu_backward")
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


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    output, bias = ctx.saved_tensors
    grad_x, grad_bias = ops.srelu_backward(grad_output, output, bias)
    return (grad_x if ctx.needs_input_grad[0] else None), (grad_bias if ctx.needs_input_grad[1] else None)


def _save_double(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[1:])


def _double_backward(ctx: Any, grad_grad_x: Tensor, grad_grad_bias: Tensor) -> tuple[Tensor, None, None]:
    """The backward is linear in g: dg = m ddx + (1 - m) ddb. The mask is piecewise constant in y and b."""
    output, bias = ctx.saved_tensors
    grad = torch.where(blocked(output, bias), per_channel(grad_grad_bias, grad_grad_x), grad_grad_x)
    return grad, None, None


torch.library.register_autograd("isonet_fast::srelu", _backward, setup_context=_save)
torch.library.register_autograd("isonet_fast::srelu_backward", _double_backward, setup_context=_save_double)


class SReLUInPlace(torch.autograd.Function):
    """srelu_ under autograd; `register_autograd` refuses ops that mutate an input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ops.srelu_(x, bias)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, bias)
        return x

    backward = staticmethod(_backward)
