"""Mask R-CNN and Faster R-CNN on the networks of the paper: torchvision's detection parts, a pyramid without
normalisation, and the penalty only on the backbone.

torchvision is optional. Where its compiled operators do not load (a CPU torch beside torchvision's CUDA build), nms and
roi_align are those of `detection_operators`.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from torch import Tensor, nn

from .. import models
from ..import_torchvision import import_torchvision
from ..safe_load import few, read_checkpoint, weights_in
from .arguments import integer, positive
from .detection_operators import nms, roi_align
from .isonet import BLOCKS
from .isonet_cifar import ISONetCifar
from .load_official import load_weights
from .network import Network

import_torchvision()  # first, because it says what to install

# isort: split
from torchvision import extension
from torchvision.models import detection, resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, boxes, poolers
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

if not extension._has_ops():  # only then, because torchvision's own operators would raise
    boxes.nms = nms
    poolers.roi_align = detection.roi_heads.roi_align = roi_align

Norm = Literal["frozen", "live"]
NETWORKS = tuple(f"{kind}isonet{depth}" for kind in ("", "r") for depth in BLOCKS)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")  # torchvision's, for comparison
_CLASSIFIER = ("head.fc.", "fc.")


class Pyramid(nn.Module):
    """A network's stages and the feature pyramid on them: "0", "1", ..., and "pool", half as fine as the last.

    `body` is the network without its head. Names of weights are those of torchvision's detectors.
    """

    body: nn.Module
    fpn: nn.Module
    out_channels: int

    def __init__(self, network: nn.Module, out_channels: int) -> None:
        super().__init__()
        stages = _stages(network)
        if isinstance(network, Network):
            network.add_module("head", nn.Identity())
            self.body = network
        else:
            self.body = IntermediateLayerGetter(network, {name: name for name in stages})
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork([*stages.values()], out_channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stages = self.body.features(x) if isinstance(self.body, Network) else self.body(x)
        return self.fpn({str(n): stage for n, stage in enumerate(stages.values())})


def maskrcnn(
    body: str | nn.Module,
    *,
    num_classes: int = 91,
    weights_backbone: str | os.PathLike[str] | None = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm = "live",
    channels: int = 256,
    **options: Any,
) -> nn.Module:
    """Mask R-CNN (He et al., ICCV 2017) with a feature pyramid on `body`: torchvision's MaskRCNN.

    Args:
        body: a network of the paper by its name ("risonet50"), one that you made (`isonet_cifar(32, residual=True)`;
            its head is taken off), or for comparison "resnet18", "resnet34", "resnet50", "resnet101" of torchvision.
        num_classes: the number of classes, with the background, which is class 0.
        weights_backbone: a checkpoint file of the classifier, official or of this package, in every layout that
            `load_official` reads; for a ResNet torchvision's state_dict. The classifier's last layer is left out.
        trainable_backbone_layers: how many parts of the body train, counted from the last stage; the stem is one too.
            None: 3 with `weights_backbone`, as in torchvision, else all.
        norm: only matters for a body with BatchNorm. "frozen" fixes its statistics and weights, "live" keeps BatchNorm.
        channels: the width of the pyramid and of the heads.
        **options: the other options of torchvision's MaskRCNN (min_size, max_size, rpn_..., box_...).

    Every convolution outside the body has `penalty = None`: `OrthoRegularizer(detector)` penalises only the body.

    Raises ModuleNotFoundError without torchvision; TypeError or ValueError for an argument, and for a file that does
    not fit.

    Examples:
        >>> net = isonet_fast.models.isonet_cifar(8, residual=True, width=4)
        >>> detector = isonet_fast.models.detection.maskrcnn(net, num_classes=3, channels=8, min_size=32, max_size=32)
        >>> sorted(detector.eval()([torch.zeros(3, 32, 32)])[0])
        ['boxes', 'labels', 'masks', 'scores']
    """
    return _detector(
        detection.MaskRCNN, body, num_classes, weights_backbone, trainable_backbone_layers, norm, channels, options
    )


def fasterrcnn(
    body: str | nn.Module,
    *,
    num_classes: int = 91,
    weights_backbone: str | os.PathLike[str] | None = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm = "live",
    channels: int = 256,
    **options: Any,
) -> nn.Module:
    """Faster R-CNN (Ren et al., NeurIPS 2015) with a feature pyramid on `body`; arguments as for `maskrcnn`.

    Examples:
        >>> net = isonet_fast.models.isonet_cifar(8, width=4)
        >>> detector = isonet_fast.models.detection.fasterrcnn(net, num_classes=3, channels=8)
        >>> {row.name.split(".")[1] for row in isonet_fast.OrthoRegularizer(detector).summary() if not row.excluded}
        {'body'}
    """
    return _detector(
        detection.FasterRCNN, body, num_classes, weights_backbone, trainable_backbone_layers, norm, channels, options
    )


def maskrcnn_risonet50_fpn(**options: Any) -> nn.Module:
    """`maskrcnn("risonet50", ...)`: the detector of the paper's Table 6.

    Examples:
        >>> detector = isonet_fast.models.detection.maskrcnn_risonet50_fpn(num_classes=91)
        >>> list(detector.backbone(torch.zeros(1, 3, 64, 64)))
        ['0', '1', '2', '3', 'pool']
    """
    return maskrcnn("risonet50", **options)


def fasterrcnn_risonet50_fpn(**options: Any) -> nn.Module:
    """`fasterrcnn("risonet50", ...)`.

    Examples:
        >>> isonet_fast.models.detection.fasterrcnn_risonet50_fpn(num_classes=21).roi_heads.box_predictor.cls_score
        Linear(in_features=1024, out_features=21, bias=True)
    """
    return fasterrcnn("risonet50", **options)


def _detector(
    kind: type[nn.Module],
    body: str | nn.Module,
    num_classes: int,
    weights: str | os.PathLike[str] | None,
    trainable: int | None,
    norm: Norm,
    channels: int,
    options: dict[str, Any],
) -> nn.Module:
    num_classes, channels = positive("num_classes", num_classes), positive("channels", channels)
    network = _network(body, norm)
    if weights is not None:
        _load(network, weights)
    _freeze(network, 3 if trainable is None and weights is not None else trainable)
    pyramid = Pyramid(network, channels)
    options.setdefault("rpn_anchor_generator", _anchors(network, len(_stages(network)) + 1))
    detector = kind(pyramid, None, **_heads(kind, channels, num_classes), **options)
    for name, module in detector.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("backbone.body."):
            module.penalty = None  # type: ignore[assignment]
    return detector


def _network(body: str | nn.Module, norm: Norm) -> nn.Module:
    """The classifier, with frozen BatchNorm where it has any and `norm` says so."""
    if norm not in ("frozen", "live"):
        raise ValueError(f"norm must be 'frozen' or 'live', got {norm!r}")
    if isinstance(body, Network):
        network: nn.Module = body
    elif body in RESNETS:
        network = getattr(resnet, body)()
    elif body in NETWORKS:
        network = getattr(models, body)()
    else:
        raise ValueError(f"body must be one of {', '.join((*NETWORKS, *RESNETS))}, or a network, got {body!r}")
    if norm == "frozen":
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent, _, own = name.rpartition(".")
                network.get_submodule(parent).add_module(own, _frozen(module))
    return network


def _frozen(norm: nn.BatchNorm2d) -> nn.Module:
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return frozen


def _load(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights of a classifier of any number of classes."""
    weights, own = weights_in(read_checkpoint(path), path), network.state_dict()
    kept = {name: value for name, value in weights.items() if not name.startswith(_CLASSIFIER)}
    if not kept.keys() & own.keys():
        raise ValueError(
            f"{os.fspath(path)} holds no weights of this {type(network).__name__}: found {few(list(weights))}"
        )
    if any(isinstance(module, FrozenBatchNorm2d) for module in network.modules()):  # it counts no batches
        kept = {name: value for name, value in kept.items() if not name.endswith("num_batches_tracked")}
    load_weights(
        network, {**kept, **{name: value for name, value in own.items() if name.startswith(_CLASSIFIER)}}, path
    )


def _stages(network: nn.Module) -> dict[str, int]:
    """The channels of each stage, by its name."""
    if isinstance(network, Network):
        return network.feature_channels
    width: int = network.get_submodule("fc").in_features  # type: ignore[assignment]
    return {f"layer{n + 1}": width // 2 ** (3 - n) for n in range(4)}


def _freeze(network: nn.Module, trainable: int | None) -> None:
    """Freeze all but the last `trainable` parts, of which the stem is the first; None freezes nothing."""
    stem = ("stem",) if isinstance(network, Network) else ("conv1", "bn1")
    parts = [*((stage,) for stage in reversed(_stages(network))), stem]
    if trainable is None:
        return
    if not 0 <= integer("trainable_backbone_layers", trainable) <= len(parts):
        raise ValueError(f"trainable_backbone_layers must be None or 0 to {len(parts)}, got {trainable}")
    for name in (name for part in parts[trainable:] for name in part):
        network.get_submodule(name).requires_grad_(False)


def _anchors(network: nn.Module, levels: int) -> nn.Module:
    """One size for each level, eight times its stride, in three shapes: torchvision's 32 to 512 at strides 4 to 64."""
    stride = 1 if isinstance(network, ISONetCifar) else 4
    return AnchorGenerator(tuple((8 * stride * 2**n,) for n in range(levels)), ((0.5, 1.0, 2.0),) * levels)


def _heads(kind: type[nn.Module], channels: int, num_classes: int) -> dict[str, nn.Module]:
    """torchvision's heads, of any width."""
    heads = {
        "box_head": TwoMLPHead(channels * 7**2, 4 * channels),
        "box_predictor": FastRCNNPredictor(4 * channels, num_classes),
    }
    if kind is detection.MaskRCNN:
        heads["mask_head"] = MaskRCNNHeads(channels, (channels,) * 4, 1)
        heads["mask_predictor"] = MaskRCNNPredictor(channels, channels, num_classes)
    return heads
