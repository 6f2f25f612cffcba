"""Our networks as the backbone of torchvision's detectors: the penalty restricted to the backbone."""

import pytest
import torch
from torch import nn

from isonet_fast import OrthoRegularizer
from isonet_fast.models import isonet_cifar
from isonet_fast.train.data.import_torchvision import import_torchvision


@pytest.fixture
def detector():
    """Mask R-CNN as docs/networks.md puts it together, on a small network."""
    import_torchvision()
    from torchvision.models.detection import MaskRCNN
    from torchvision.ops import FeaturePyramidNetwork

    class Backbone(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.out_channels = body, 8
            self.fpn = FeaturePyramidNetwork(list(body.feature_channels.values()), self.out_channels)

        def forward(self, x):
            return self.fpn(self.body.features(x))

    body = isonet_cifar(8, True, width=4)
    body.head = nn.Identity()
    return MaskRCNN(Backbone(body), num_classes=3)


def penalised(reg):
    return {row.name for row in reg.summary() if not row.excluded}


def test_a_filter_restricts_the_penalty_to_the_backbone(detector):
    convolutions = {name for name, m in detector.named_modules() if isinstance(m, nn.Conv2d)}
    body = {name for name in convolutions if name.startswith("backbone.body.")} - {"backbone.body.stem.conv"}
    restricted = OrthoRegularizer(detector, filter=lambda name, module: name.startswith("backbone.body."))
    assert penalised(restricted) == body and len(body) == 8
    default = penalised(OrthoRegularizer(detector))
    assert {name.split(".")[0] for name in default} == {"backbone", "rpn", "roi_heads"}  # what the filter is for
    assert body < default
    features = detector.backbone(torch.randn(1, 3, 16, 16))
    assert [tuple(f.shape) for f in features.values()] == [(1, 8, 16, 16), (1, 8, 8, 8), (1, 8, 4, 4)]
