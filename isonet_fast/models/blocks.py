"""What the networks are made of, with the module names of the official checkpoints.

Every SReLU runs in place on a convolution's output. In a residual block the branch's scale is folded into its last
convolution, and the join runs in place over the branch.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..geometry import Penalty
from ..nn import OrthoConv2d, ResidualSReLU, SharedScale, SReLU


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, penalty: Penalty | None = "isonet") -> OrthoConv2d:
    """A convolution without bias that keeps the size at stride 1."""
    return OrthoConv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, penalty=penalty)


class BasicBranch(nn.Module):
    """3x3 (strided), SReLU, 3x3; with a shared scale, initially 0, where the block is residual."""

    def __init__(self, inputs: int, outputs: int, stride: int, residual: bool) -> None:
        super().__init__()
        self.a = conv(inputs, outputs, 3, stride)
        self.a_relu = SReLU(outputs, inplace=True)
        self.b = conv(outputs, outputs, 3)
        if residual:
            self.shared_scalar = SharedScale(0.0)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_relu(self.a(x))
        return self.shared_scalar.fold(self.b, x) if self.residual else self.b(x)


class BottleneckBranch(nn.Module):
    """1x1, SReLU, 3x3 (strided), SReLU, 1x1, a quarter as wide inside; with a shared scale where residual."""

    def __init__(self, inputs: int, outputs: int, stride: int, residual: bool) -> None:
        super().__init__()
        inner = outputs // 4
        self.a = conv(inputs, inner, 1)
        self.a_relu = SReLU(inner, inplace=True)
        self.b = conv(inner, inner, 3, stride)
        self.b_relu = SReLU(inner, inplace=True)
        self.c = conv(inner, outputs, 1)
        if residual:
            self.shared_scalar = SharedScale(0.0)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.b_relu(self.b(self.a_relu(self.a(x))))
        return self.shared_scalar.fold(self.c, x) if self.residual else self.c(x)


class Block(nn.Module):
    """Plain: srelu(f(x)). Residual: srelu(shortcut(x) + f(x)), the shortcut a strided 1x1 where the shape changes."""

    def __init__(self, branch: nn.Module, inputs: int, outputs: int, stride: int, residual: bool) -> None:
        super().__init__()
        self.proj = conv(inputs, outputs, 1, stride) if residual and (inputs != outputs or stride != 1) else None
        self.f = branch
        self.relu: nn.Module = (ResidualSReLU if residual else SReLU)(outputs, inplace=True)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        if not self.residual:
            return self.relu(self.f(x))
        return self.relu(x if self.proj is None else self.proj(x), self.f(x))


def stage(
    branch: type[BasicBranch] | type[BottleneckBranch],
    inputs: int,
    outputs: int,
    stride: int,
    blocks: int,
    residual: bool,
) -> nn.Sequential:
    """Blocks b1, b2, ...; the first one changes the width and applies the stride."""
    blocks_ = nn.Sequential()
    for n in range(blocks):
        block = Block(branch(inputs, outputs, stride, residual), inputs, outputs, stride, residual)
        blocks_.add_module(f"b{n + 1}", block)
        inputs, stride = outputs, 1
    return blocks_


class Head(nn.Module):
    """Average pooling, dropout (0: no such layer), linear classifier."""

    def __init__(self, inputs: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.avg_pool(x).flatten(1)))
