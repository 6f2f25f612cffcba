"""`import isonet_fast.timm` registers the networks with timm: `timm.create_model("risonet50", num_classes=10)`.

isonet18 to isonet101, risonet18 to risonet101, and isonet_cifar (with `depth=`, `residual=`, `width=`). Each takes what
timm's own convolutional networks take: num_classes (0: none), in_chans, global_pool, drop_rate, output_stride,
features_only. There are no published weights to download; `pretrained=True, pretrained_cfg_overlay=dict(file=PATH)`
reads a checkpoint file, of the official code too. Under timm's `set_scriptable(True)` a network comes as `deconvert`
leaves it.

Examples:
    >>> import isonet_fast.timm, timm
    >>> net = timm.create_model("isonet_cifar", depth=8, width=4, num_classes=5)
    >>> net(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 5])
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from .deconvert import deconvert
from .import_torchvision import import_torchvision
from .models.arguments import integer
from .models.blocks import through
from .models.dilate import dilate_
from .models.image_statistics import CIFAR, IMAGENET
from .models.ingredients import Switches
from .models.isonet import BLOCKS, ISONet
from .models.isonet_cifar import ISONetCifar
from .models.network import Network
from .nn import ResidualSReLU, SReLU
from .safe_load import weights_in

import_torchvision()  # timm imports it, which fails beside a CPU torch without this
try:
    from timm.layers import SelectAdaptivePool2d, is_scriptable
    from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
    from timm.models._features import feature_take_indices
    from timm.models._features_fx import register_notrace_module
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"isonet_fast.timm needs timm: pip install timm ({error})") from error

for layer in (SReLU, ResidualSReLU):
    register_notrace_module(layer)


class _Timm(Network):
    """What timm asks of a network, beside what `Network` has."""

    head: Any  # blocks.Head, with timm's pooling, and without fc after reset_classifier(0)

    def _adapt(self, num_classes: int, in_chans: int, stem_stride: int, output_stride: int, global_pool: str) -> None:
        self.in_chans, self.drop_rate = in_chans, getattr(self.head.dropout, "p", 0.0)
        self.num_features = list(self.feature_channels.values())[-1]
        self.grad_checkpointing = False
        dilate_(self, output_stride, stem_stride)
        self.feature_info = [
            dict(num_chs=channels, reduction=min(stem_stride * 2**n, output_stride), module=name)
            for n, (name, channels) in enumerate(self.feature_channels.items())
        ]
        self._set_pool(global_pool)
        self.num_classes = num_classes
        if num_classes == 0 or self.head_hidden_size != self.num_features:
            self.reset_classifier(num_classes)

    def _set_pool(self, global_pool: str) -> None:
        self.global_pool = global_pool
        self.head.avg_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.head.avg_pool.feat_mult()

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes`, none for 0; `global_pool` "avg", "max", "avgmax", "catavgmax" or "",
        which needs num_classes=0."""
        num_classes = _class_count(num_classes)
        if global_pool is not None:
            self._set_pool(global_pool)
        if num_classes and not self.global_pool:
            raise ValueError(f'global_pool="" needs num_classes=0, got {num_classes}')
        self.num_classes = num_classes
        parameter = next(self.parameters())
        options: dict[str, Any] = dict(device=parameter.device, dtype=parameter.dtype)
        self.head.fc = nn.Linear(self.head_hidden_size, num_classes, **options) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward, and compute the block again there."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's layer-wise learning rates: the stem, then a group for each block (coarse: for each stage)."""
        return dict(stem=r"^stem", blocks=r"^s(\d+)" if coarse else r"^s(\d+)\.b(\d+)")

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage = self.get_submodule(name)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.get_submodule("stem")(x)
        for name in self.feature_channels:
            x = self._stage(name, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = through(self.head.avg_pool(x), self.head.dropout, self.head.fc_in)
        return x if pre_logits else self.head.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages' features by index, with the last one before them unless `intermediates_only`. norm: ignored."""
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt must be "NCHW", got {output_fmt!r}')
        wanted, last = feature_take_indices(len(self.feature_channels), indices)
        names = list(self.feature_channels)
        found = []
        x = self.get_submodule("stem")(x)
        for n, name in enumerate(names[: last + 1] if stop_early else names):
            x = self._stage(name, x)
            if n in wanted:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Delete the stages behind the last index, and with `prune_head` the classifier; returns the indices."""
        wanted, last = feature_take_indices(len(self.feature_channels), indices)
        for name in list(self.feature_channels)[last + 1 :]:
            delattr(self, name)
            del self.feature_channels[name]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted


class TimmISONet(_Timm, ISONet):
    """See `isonet_fast.models.isonet18` to `risonet101`."""

    def __init__(
        self,
        depth: int,
        residual: bool,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float | None = None,
        global_pool: str = "avg",
        output_stride: int = 32,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(depth, residual, _class_count(num_classes) or 1, in_chans, drop_rate, **switches)
        self._adapt(num_classes, in_chans, 4, output_stride, global_pool)


class TimmISONetCifar(_Timm, ISONetCifar):
    """See `isonet_fast.models.isonet_cifar`."""

    def __init__(
        self,
        depth: int = 32,
        residual: bool = False,
        width: int = 16,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float | None = None,
        global_pool: str = "avg",
        output_stride: int = 4,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(depth, residual, width, _class_count(num_classes) or 1, in_chans, drop_rate, **switches)
        self._adapt(num_classes, in_chans, 1, output_stride, global_pool)


def _class_count(value: Any) -> int:
    count = integer("num_classes", value)
    if count < 0:
        raise ValueError(f"num_classes must be at least 0 (no classifier), got {count}")
    return count


def _read(contents: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    return weights_in(contents, "the checkpoint")


def _create(cls: type[_Timm], variant: str, pretrained: bool, **arguments: Any) -> nn.Module:
    indices = (0, 1, 2, 3) if cls is TimmISONet else (0, 1, 2)
    model = build_model_with_cfg(
        cls, variant, pretrained, feature_cfg=dict(out_indices=indices), pretrained_filter_fn=_read, **arguments
    )
    if not is_scriptable():
        return model
    plain: Any = deconvert(model)
    plain.pretrained_cfg = plain.default_cfg = model.pretrained_cfg
    return plain


_IMAGENET = dict(
    url="",
    input_size=(3, 224, 224),
    pool_size=(7, 7),
    crop_pct=0.875,
    interpolation="bilinear",
    mean=IMAGENET[0],
    std=IMAGENET[1],
    first_conv="stem.conv",
    classifier="head.fc",
    paper_ids="arXiv:2006.16992",
)
_CIFAR = dict(num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, mean=CIFAR[0], std=CIFAR[1])
_ARCHITECTURES = {
    f"{kind}isonet{depth}": dict(depth=depth, residual=kind == "r") for kind in ("", "r") for depth in BLOCKS
}
default_cfgs = generate_default_cfgs(
    {**dict.fromkeys(_ARCHITECTURES, _IMAGENET), "isonet_cifar": {**_IMAGENET, **_CIFAR}}
)
__all__: list[str] = []  # filled by register_model


def _register(name: str, cls: type[_Timm], **architecture: Any) -> None:
    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return _create(cls, name, pretrained, **{**architecture, **arguments})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name} with timm's interface; see `isonet_fast.models.{name}`."
    globals()[name] = register_model(create)


for name, architecture in _ARCHITECTURES.items():
    _register(name, TimmISONet, **architecture)
_register("isonet_cifar", TimmISONetCifar)
