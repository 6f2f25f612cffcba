"""Convolution and linear layers that start as a delta and know their own orthogonality penalty.

Same constructor, state_dict and behaviour as the torch.nn parent, plus `penalty`.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor, nn

from .. import functional, init
from ..geometry import PENALTIES


class _Orthogonal:
    """What the layers share: the `penalty` argument, delta initialisation, the penalty of this layer alone."""

    weight: Tensor
    bias: Any
    penalty: str | None
    stride: Any = 1
    dilation: Any = 1
    groups: int = 1

    def __init__(self, *args: Any, penalty: str | None = "isonet", **kwargs: Any) -> None:
        if penalty is not None and penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {PENALTIES} or None (never penalised), got {penalty!r}")
        self.penalty = penalty  # read by reset_parameters, which the parent's constructor calls
        super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the parent's arguments and `penalty` in `help` and `inspect.signature`."""
        super().__init_subclass__(**kwargs)
        if _Orthogonal not in cls.__bases__:
            return  # a layer's subclass says itself what it takes

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            _Orthogonal.__init__(self, *args, **kwargs)

        parent, own = (inspect.signature(vars(base)["__init__"]) for base in (cls.__bases__[1], _Orthogonal))
        arguments = [*parent.parameters.values(), own.parameters["penalty"]]
        __init__.__signature__ = parent.replace(parameters=arguments)  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[method-assign]

    def reset_parameters(self) -> None:
        """Delta weight, zero bias. The stride cell is used where "lorth" rewards it (`init.delta_`)."""
        init.delta_(self.weight, self.groups, self._cell() if self.penalty == "lorth" else 1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _cell(self) -> Any:
        """The stride as the taps see it: taps whose distance is a multiple of s / gcd(e, s) read the same phase."""
        if isinstance(self.stride, int):  # a linear layer
            return 1
        return tuple(s // math.gcd(e, s) for s, e in zip(self.stride, self.dilation, strict=True))

    def orthogonality_loss(self) -> Tensor:
        """The penalty of this layer, a 0-dim tensor (`functional.orthogonality_loss`); 0 for penalty=None."""
        if self.penalty is None:
            return self.weight.new_zeros(())
        return functional.orthogonality_loss(
            self.weight, stride=self.stride, dilation=self.dilation, groups=self.groups, penalty=self.penalty
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, penalty={self.penalty!r}"  # type: ignore[misc]


class OrthoConv1d(_Orthogonal, nn.Conv1d):
    """nn.Conv1d with delta initialisation and an orthogonality penalty: "isonet", "lorth", "matrix" or None."""


class OrthoConv2d(_Orthogonal, nn.Conv2d):
    """nn.Conv2d with delta initialisation and an orthogonality penalty: "isonet", "lorth", "matrix" or None."""


class OrthoConv3d(_Orthogonal, nn.Conv3d):
    """nn.Conv3d with delta initialisation and an orthogonality penalty: "isonet", "lorth", "matrix" or None."""


class OrthoLinear(_Orthogonal, nn.Linear):
    """nn.Linear that starts as the identity, with the penalty 1/2 ||W W^T - I||^2 on its smaller side."""


__all__ = ["OrthoConv1d", "OrthoConv2d", "OrthoConv3d", "OrthoLinear"]
