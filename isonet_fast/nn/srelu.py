"""SReLU, the residual join and the shared scale as layers, with the parameter names of the official checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import functional
from ..activation_arguments import check_dtype, checked_spatial_dims, number, positive_int
from ..dtypes import wide
from .conv import Device, OrthoConv1d, OrthoConv2d, OrthoConv3d

__all__ = ["ResidualSReLU", "SReLU", "SharedScale"]


class _ChannelBias(nn.Module):
    """What both activations hold: `srelu_bias` (1, C, 1, 1), whether they write over their input, and its rank."""

    spatial_dims: int | str = "inferred"

    def __init__(
        self,
        num_channels: int,
        init: float = -1.0,
        inplace: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        spatial_dims: int | None = None,
    ) -> None:
        super().__init__()
        self.num_channels: int = positive_int("num_channels", num_channels)
        self.inplace: bool = inplace
        self.spatial_dims = checked_spatial_dims(spatial_dims)
        self.srelu_bias: nn.Parameter = _filled((1, self.num_channels, 1, 1), init, device, dtype)

    def _writes_over(self, x: Tensor) -> bool:
        """Whether to compute in place: if the user asked for it, but never on a view in compiled code. Autograd forbids
        writing over some views (those that full backward hooks make), and compiled code cannot tell which ones. It
        loses nothing, because the compiler allocates the memory itself."""
        return self.inplace and not (torch.compiler.is_compiling() and x._base is not None)

    def _bias_over(self, x: Tensor) -> Tensor:
        """The bias in the dtype of x, in a shape that broadcasts over x. It serves `_in_torch` of the layers."""
        dims = self.spatial_dims
        shape = [-1] + [1] * dims if isinstance(dims, int) else [1, -1] + [1] * (x.dim() - 2)
        return self.srelu_bias.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        dims = f", spatial_dims={self.spatial_dims}" if isinstance(self.spatial_dims, int) else ""
        return f"{self.num_channels}" + (", inplace=True" if self.inplace else "") + dims


class SReLU(_ChannelBias):
    """y = max(x, b), one learnable b per channel, initially `init` (`functional.srelu`).

    State: `srelu_bias` (1, C, 1, 1). x: (N, C, ...), the output of a linear layer or of a convolution of any rank. Like
    nn.Conv2d, the layer also takes an unbatched (C, H, W). If H equals C, such an x could also be (N, C, L), and the
    layer raises ValueError. To avoid this, set `spatial_dims` to the number of spatial dimensions of the layer before:
    0 (linear) to 3 (nn.Conv3d). Then every batched and unbatched x is accepted.

    inplace=True lets y be written over x: right behind any operation that does not need its own output for its
    backward, such as a convolution. Use only the returned tensor: under torch.compile the layer never writes over a
    view.

    Raises TypeError or ValueError, with the argument's name, for channels below 1, an `init` that is no number, another
    `spatial_dims` and a dtype that `functional.srelu` does not take.

    Examples:
        >>> layer = isonet_fast.SReLU(2)
        >>> layer(torch.tensor([[-2.0, 0.5]])).tolist()
        [[-1.0, 0.5]]
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.srelu(x, self.srelu_bias, self._writes_over(x), self.spatial_dims)

    def _in_torch(self, x: Tensor) -> Tensor:
        """The forward with operators of torch only, which `deconvert` puts in the layer's place."""
        return torch.maximum(x, self._bias_over(x))


class ResidualSReLU(_ChannelBias):
    """y = max(shortcut + s * branch, b), the join of a residual block (`functional.residual_srelu`).

    State: `srelu_bias` (1, C, 1, 1). The scale s is an argument because it belongs to the branch (`SharedScale.scale`).
    inplace=True lets y be written over the branch and needs a branch without a scale. Shapes, `spatial_dims` and errors
    as in `SReLU`.

    Examples:
        >>> join = isonet_fast.ResidualSReLU(2)
        >>> shortcut, branch = torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 0.5]])
        >>> join(shortcut, branch, torch.tensor(0.5)).tolist()
        [[2.0, -1.0]]
    """

    def forward(self, shortcut: Tensor, branch: Tensor, scale: Tensor | None = None) -> Tensor:
        inplace = self._writes_over(branch)
        return functional.residual_srelu(shortcut, branch, self.srelu_bias, scale, inplace, self.spatial_dims)

    def _in_torch(self, shortcut: Tensor, branch: Tensor, scale: Any = 1.0) -> Tensor:
        y = shortcut + (branch * scale).reshape(shortcut.shape)
        return torch.maximum(y, self._bias_over(y))

    def _in_torch_in_block(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """`_in_torch` for the blocks of `isonet_fast.models`, which call a join without a scale."""
        y = shortcut + branch
        return torch.maximum(y, self._bias_over(y))


class SharedScale(nn.Module):
    """x -> s x with one learnable scalar per residual branch, initially `init`. State: `scale` (1, 1, 1, 1).

    Examples:
        >>> scale = isonet_fast.SharedScale(0.5)
        >>> scale(torch.tensor([4.0, 2.0])).tolist()
        [2.0, 1.0]
    """

    def __init__(self, init: float = 1.0, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale: nn.Parameter = _filled((1, 1, 1, 1), init, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view([1] * x.dim())

    def fold(self, conv: nn.Module, x: Tensor) -> Tensor:
        """s * conv(x), computed as one convolution with the weight s W, which is formed in float32.

        Same values and gradients as scaling the output, but neither the unscaled output nor a pass over it is needed.
        Only a bare convolution is folded into. One with hooks, a parametrisation, a pruning mask, a replaced forward or
        a wrapper is called as a module, and so is this scale; the product is rounded once, to the output's dtype.

        Examples:
            >>> scale, conv, x = isonet_fast.SharedScale(0.5), nn.Conv2d(1, 1, 1), torch.rand(1, 1, 2, 2)
            >>> torch.allclose(scale.fold(conv, x), scale(conv(x)))
            True
        """
        if not (isinstance(x, Tensor) and isinstance(conv, _CONVOLUTIONS) and _bare(conv) and _bare(self)):
            y = conv(x)
            return self(y).to(y.dtype)
        weight, bias = conv.weight, conv.bias
        dtype = wide(weight.dtype)
        scale = self.scale.to(dtype).view(())
        scaled = (scale * weight.to(dtype)).to(weight.dtype)
        return conv._conv_forward(x, scaled, None if bias is None else (scale * bias.to(dtype)).to(bias.dtype))


class SharedShift(nn.Module):
    """x -> x + b with one learnable number for the whole of x, initially 0 (Fixup). State: `shift` (1, 1, 1, 1)."""

    def __init__(self, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.shift: nn.Parameter = _filled((1, 1, 1, 1), 0.0, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.view([1] * x.dim())


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BARE = (*_CONVOLUTIONS, OrthoConv1d, OrthoConv2d, OrthoConv3d, SharedScale)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _bare(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of exactly one of these classes, and nothing else."""
    return (
        type(module) in _BARE
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not _has_any_global_hook()
    )


def _filled(shape: tuple[int, ...], init: Any, device: Device, dtype: torch.dtype | None) -> nn.Parameter:
    check_dtype(dtype)
    return nn.Parameter(torch.full(shape, number("init", init), device=device, dtype=dtype))
