"""Convolution and linear layers that start as a delta and know their own orthogonality penalty.

Same constructor, state_dict and behaviour as the torch.nn parent, plus `penalty`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import functional, init
from ..geometry import Penalty, check_penalty

__all__ = ["OrthoConv1d", "OrthoConv2d", "OrthoConv3d", "OrthoLinear"]

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Size1 = int | tuple[int]
Size2 = int | tuple[int, int]
Size3 = int | tuple[int, int, int]
Device = torch.device | str | int | None


class Orthogonal:
    """What the layers share: delta initialisation and the penalty of this layer."""

    weight: Tensor
    bias: Any
    penalty: Penalty | None
    stride: Any = 1
    dilation: Any = 1
    groups: int = 1

    def _choose(self, penalty: Penalty | None) -> None:
        """Set the penalty, before the parent's constructor, which calls `reset_parameters`."""
        check_penalty(penalty, none="never penalised")
        self.penalty = penalty

    def reset_parameters(self) -> None:
        """Set the weight to a delta and the bias to zero. With penalty="lorth", the delta of a strided layer also uses
        taps other than the middle one (see `stride` of `init.delta_`)."""
        init.delta_(self.weight, self.groups, self._cell() if self.penalty == "lorth" else 1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _cell(self) -> Any:
        """The stride as the taps see it: taps whose distance is a multiple of s / gcd(e, s) read the same phase."""
        if isinstance(self.stride, int):  # a linear layer
            return 1
        return tuple(s // math.gcd(e, s) for s, e in zip(self.stride, self.dilation, strict=True))

    def orthogonality_loss(self) -> Tensor:
        """The penalty of this layer, a 0-dim tensor (`functional.orthogonality_loss`); 0 for penalty=None.

        Examples:
            >>> conv = isonet_fast.OrthoConv2d(4, 8, 3)
            >>> conv.weight.data *= 2
            >>> conv.orthogonality_loss().item()  # four singular values 2: 1/2 * 4 * (2^2 - 1)^2
            18.0
        """
        if self.penalty is None:
            return self.weight.new_zeros(())
        return functional.orthogonality_loss(
            self.weight, stride=self.stride, dilation=self.dilation, groups=self.groups, penalty=self.penalty
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, penalty={self.penalty!r}"  # type: ignore[misc]


class OrthoConv1d(Orthogonal, nn.Conv1d):
    """nn.Conv1d with delta initialisation and an orthogonality penalty: "isonet", "lorth", "matrix" or None.

    Examples:
        >>> conv = isonet_fast.OrthoConv1d(2, 2, 3, padding=1, bias=False)
        >>> conv(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).tolist()  # it starts as the identity
        [[[1.0, 2.0], [3.0, 4.0]]]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size1,
        stride: Size1 = 1,
        padding: str | Size1 = 0,
        dilation: Size1 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        penalty: Penalty | None = "isonet",
    ) -> None:
        self._choose(penalty)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )


class OrthoConv2d(Orthogonal, nn.Conv2d):
    """nn.Conv2d with delta initialisation and an orthogonality penalty: "isonet", "lorth", "matrix" or None.

    Examples:
        >>> conv = isonet_fast.OrthoConv2d(4, 8, 3, stride=2, padding=1, penalty="lorth")
        >>> conv(torch.zeros(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
        >>> conv.orthogonality_loss().item()
        0.0
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: str | Size2 = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        penalty: Penalty | None = "isonet",
    ) -> None:
        self._choose(penalty)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )


class OrthoConv3d(Orthogonal, nn.Conv3d):
    """nn.Conv3d with delta initialisation and an orthogonality penalty: "isonet", "lorth", "matrix" or None.

    Examples:
        >>> conv, x = isonet_fast.OrthoConv3d(2, 2, 3, padding=1, groups=2), torch.rand(1, 2, 4, 4, 4)
        >>> torch.equal(conv(x), x)  # it starts as the identity
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size3,
        stride: Size3 = 1,
        padding: str | Size3 = 0,
        dilation: Size3 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        penalty: Penalty | None = "isonet",
    ) -> None:
        self._choose(penalty)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )


class OrthoLinear(Orthogonal, nn.Linear):
    """nn.Linear that starts as the identity, with the penalty 1/2 ||W W^T - I||^2 on its smaller side.

    Examples:
        >>> isonet_fast.OrthoLinear(2, 3).weight.tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        penalty: Penalty | None = "isonet",
    ) -> None:
        self._choose(penalty)
        super().__init__(in_features, out_features, bias, device, dtype)
