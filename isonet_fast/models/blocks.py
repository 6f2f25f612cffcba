"""What the networks are built of, with the module names of the official checkpoints.

Every activation runs in place on the output before it. In a residual block the branch's scale is folded into its last
convolution, and the join runs in place over the branch.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import OrthoConv2d, SharedScale
from ..nn.srelu import SharedShift
from .ingredients import Ingredients


def through(x: Tensor, *layers: nn.Module | None) -> Tensor:
    """Apply the layers that are not None, one after the other."""
    for layer in layers:
        x = x if layer is None else layer(x)
    return x


def end(conv: nn.Module, norm: nn.Module | None, scale: SharedScale | None, x: Tensor) -> Tensor:
    """Apply the last convolution of a branch, then its normalisation and scale, if any."""
    if scale is None:
        return through(conv(x), norm)
    if norm is None:
        return scale.fold(conv, x)
    y = norm(conv(x))
    return scale(y).to(y.dtype)


class BasicBranch(nn.Module):
    """3x3 (strided), activation, 3x3. x_in, x_out: Fixup's shifts before and behind a convolution."""

    a: OrthoConv2d
    b: OrthoConv2d
    a_bn: nn.BatchNorm2d | None
    b_bn: nn.BatchNorm2d | None
    a_relu: nn.Module
    a_in: SharedShift | None
    a_out: SharedShift | None
    b_in: SharedShift | None
    b_out: SharedShift | None
    shared_scalar: SharedScale  # if `scaled`
    scaled: bool

    def __init__(self, inputs: int, outputs: int, stride: int, made: Ingredients) -> None:
        super().__init__()
        self.a_in, self.a = made.shift(), made.conv(inputs, outputs, 3, stride)
        self.a_bn, self.a_out = made.norm(outputs), made.shift()
        self.a_relu = made.act(outputs)
        self.b_in, self.b = made.shift(), made.conv(outputs, outputs, 3)
        self.b_bn, self.b_out = made.norm(outputs, last=True), made.shift()
        if made.scaled:
            self.shared_scalar = made.scale()
        self.scaled = made.scaled

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_relu(through(self.a(through(x, self.a_in)), self.a_bn, self.a_out))
        scale = self.shared_scalar if self.scaled else None
        return through(end(self.b, self.b_bn, scale, through(x, self.b_in)), self.b_out)


class BottleneckBranch(nn.Module):
    """1x1, activation, 3x3 (strided), activation, 1x1, a quarter as wide inside. x_in, x_out: Fixup's shifts."""

    a: OrthoConv2d
    b: OrthoConv2d
    c: OrthoConv2d
    a_bn: nn.BatchNorm2d | None
    b_bn: nn.BatchNorm2d | None
    c_bn: nn.BatchNorm2d | None
    a_relu: nn.Module
    b_relu: nn.Module
    a_in: SharedShift | None
    a_out: SharedShift | None
    b_in: SharedShift | None
    b_out: SharedShift | None
    c_in: SharedShift | None
    c_out: SharedShift | None
    shared_scalar: SharedScale  # if `scaled`
    scaled: bool

    def __init__(self, inputs: int, outputs: int, stride: int, made: Ingredients) -> None:
        super().__init__()
        inner = outputs // 4
        self.a_in, self.a = made.shift(), made.conv(inputs, inner, 1)
        self.a_bn, self.a_out = made.norm(inner), made.shift()
        self.a_relu = made.act(inner)
        self.b_in, self.b = made.shift(), made.conv(inner, inner, 3, stride)
        self.b_bn, self.b_out = made.norm(inner), made.shift()
        self.b_relu = made.act(inner)
        self.c_in, self.c = made.shift(), made.conv(inner, outputs, 1)
        self.c_bn, self.c_out = made.norm(outputs, last=True), made.shift()
        if made.scaled:
            self.shared_scalar = made.scale()
        self.scaled = made.scaled

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_relu(through(self.a(through(x, self.a_in)), self.a_bn, self.a_out))
        x = self.b_relu(through(self.b(through(x, self.b_in)), self.b_bn, self.b_out))
        scale = self.shared_scalar if self.scaled else None
        return through(end(self.c, self.c_bn, scale, through(x, self.c_in)), self.c_out)


class Block(nn.Module):
    """Plain: act(f(x)). Residual: act(shortcut(x) + f(x)), the shortcut a strided 1x1 where the shape changes."""

    f: BasicBranch | BottleneckBranch
    relu: nn.Module  # two arguments if `joins`: shortcut and branch
    proj: OrthoConv2d | None
    proj_in: SharedShift | None
    bn: nn.BatchNorm2d | None
    residual: bool
    joins: bool

    def __init__(
        self,
        branch: type[BasicBranch] | type[BottleneckBranch],
        inputs: int,
        outputs: int,
        stride: int,
        made: Ingredients,
    ) -> None:
        super().__init__()
        project = made.residual and (inputs != outputs or stride != 1)
        self.proj_in = made.shift() if project else None
        self.proj = made.conv(inputs, outputs, 1, stride) if project else None
        self.bn = made.norm(outputs) if project else None
        self.f = branch(inputs, outputs, stride, made)
        self.relu = made.join(outputs) if made.residual else made.act(outputs)
        self.residual, self.joins = made.residual, made.activation == "srelu"

    def forward(self, x: Tensor) -> Tensor:
        if not self.residual:
            return self.relu(self.f(x))
        shortcut = through(x, self.proj_in, self.proj, self.bn)
        return self.relu(shortcut, self.f(x)) if self.joins else self.relu(shortcut + self.f(x))


def stage(
    branch: type[BasicBranch] | type[BottleneckBranch],
    inputs: int,
    outputs: int,
    stride: int,
    blocks: int,
    made: Ingredients,
) -> nn.Sequential:
    """Blocks b1, b2, ...; the first one changes the width and applies the stride."""
    blocks_ = nn.Sequential()
    for n in range(blocks):
        blocks_.add_module(f"b{n + 1}", Block(branch, inputs, outputs, stride, made))
        inputs, stride = outputs, 1
    return blocks_


class Head(nn.Module):
    """Average pooling, dropout (0: no such layer), linear classifier; Fixup's shift before it."""

    avg_pool: nn.AdaptiveAvgPool2d
    dropout: nn.Dropout | nn.Identity
    fc_in: SharedShift | None
    fc: nn.Linear

    def __init__(self, inputs: int, num_classes: int, dropout: float, made: Ingredients) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.fc_in = made.shift()
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(through(self.dropout(self.avg_pool(x).flatten(1)), self.fc_in))
