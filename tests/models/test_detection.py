"""The detectors: torchvision's parts and names, the penalty on the backbone, the operators in plain PyTorch."""

import pytest
import torch
from torch import nn

from isonet_fast import OrthoRegularizer
from isonet_fast.import_torchvision import import_torchvision
from isonet_fast.models import isonet_cifar, risonet18
from isonet_fast.models.detection_operators import nms, roi_align

torchvision = import_torchvision()
from isonet_fast.models import detection


def small(kind=detection.maskrcnn, body=None, **options):
    torch.manual_seed(0)
    body = isonet_cifar(8, True, width=4) if body is None else body
    return kind(body, **{"num_classes": 3, "channels": 8, "min_size": 32, "max_size": 32, **options})


TARGET = {
    "boxes": torch.tensor([[2.0, 3.0, 20.0, 22.0]]),
    "labels": torch.tensor([1]),
    "masks": torch.ones(1, 32, 32, dtype=torch.uint8),
}


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["maskrcnn", "fasterrcnn"])
@pytest.mark.parametrize("norm", ["live", "frozen"])
def test_a_resnet_has_the_names_and_shapes_of_torchvision(kind, norm):
    with torch.device("meta"):
        theirs = getattr(torchvision.models.detection, f"{kind}_resnet50_fpn")(weights=None, weights_backbone=None)
    ours = shapes(getattr(detection, kind)("resnet50", norm=norm))
    counts = "num_batches_tracked"  # frozen BatchNorm has none
    expected = {name: shape for name, shape in shapes(theirs).items() if norm == "live" or not name.endswith(counts)}
    assert ours == expected


def test_outside_the_backbone_ours_are_the_same_too():
    theirs = detection.maskrcnn("resnet50")
    ours = detection.maskrcnn_risonet50_fpn()
    assert {n: s for n, s in shapes(ours).items() if "backbone.body." not in n} == {
        n: s for n, s in shapes(theirs).items() if "backbone.body." not in n
    }
    assert not [n for n, m in ours.named_modules() if isinstance(m, nn.BatchNorm2d)]
    anchors = torchvision.models.detection.faster_rcnn._default_anchorgen()
    assert all(map(torch.equal, ours.rpn.anchor_generator.cell_anchors, anchors.cell_anchors))


def test_it_trains_and_detects():
    detector = small()
    losses = detector([torch.rand(3, 32, 32)] * 2, [TARGET] * 2)
    assert sorted(losses) == ["loss_box_reg", "loss_classifier", "loss_mask", "loss_objectness", "loss_rpn_box_reg"]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    (found,) = detector.eval()([torch.rand(3, 32, 32)])
    assert found["masks"].shape[1:] == (1, 32, 32) and len(found["boxes"]) == len(found["labels"])
    maps = detector.backbone(torch.randn(1, 3, 32, 32))
    assert {n: tuple(m.shape) for n, m in maps.items()} == {
        "0": (1, 8, 32, 32), "1": (1, 8, 16, 16), "2": (1, 8, 8, 8), "pool": (1, 8, 4, 4),
    }  # fmt: skip


def penalised(model):
    return {row.name for row in OrthoRegularizer(model).summary() if not row.excluded}


@pytest.mark.parametrize("kind", [detection.maskrcnn, detection.fasterrcnn])
def test_the_penalty_is_on_the_backbone_alone(kind):
    detector = small(kind)
    body = {f"backbone.body.{name}" for name in penalised(isonet_cifar(8, True, width=4))}
    assert penalised(detector) == body and len(body) == 8
    assert penalised(nn.Sequential(detector)) == {f"0.{name}" for name in body}  # wrapped, as by DDP
    outside = OrthoRegularizer(detector, penalty="lorth").summary()
    assert {row.name for row in outside if not row.excluded} == body


def test_a_plain_convolution_may_opt_out_of_the_penalty():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    assert penalised(net) == {"0", "1"}
    net[1].penalty = None
    assert penalised(net) == {"0"}


@pytest.mark.parametrize("trainable, frozen", [(None, []), (4, []), (3, ["stem"]), (1, ["stem", "s1", "s2"])])
def test_stages_are_frozen_from_the_stem_on(trainable, frozen):
    body = small(trainable_backbone_layers=trainable).backbone.body
    parts = {name.partition(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    assert sorted(parts) == sorted(frozen)


@pytest.mark.parametrize("layout", ["official", "plain"])
def test_the_backbone_is_read_from_a_checkpoint_of_the_classifier(tmp_path, layout):
    classifier = isonet_cifar(8, True, width=4, num_classes=7)
    state = {name: torch.randn_like(value) for name, value in classifier.state_dict().items()}
    contents = {"net": {f"module.{n}": v for n, v in state.items()}, "epoch": 1} if layout == "official" else state
    torch.save(contents, tmp_path / "weights.pt")
    body = small(weights_backbone=tmp_path / "weights.pt").backbone.body
    loaded = body.state_dict()
    assert loaded and all(torch.equal(value, state[name]) for name, value in loaded.items())
    assert {name.partition(".")[0] for name, p in body.named_parameters() if not p.requires_grad} == {"stem"}


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    torch.save(risonet18(num_classes=2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not fit this ISONetCifar: unexpected s1.b2"):
        small(weights_backbone=tmp_path / "weights.pt")


@pytest.mark.parametrize("norm, weights", [("frozen", True), ("live", True)])
def test_a_resnet_is_read_from_its_state_dict(tmp_path, norm, weights):
    state = {name: torch.rand_like(v) if v.is_floating_point() else v for name, v in resnet18().state_dict().items()}
    torch.save(state, tmp_path / "resnet18.pth")
    body = detection.fasterrcnn("resnet18", norm=norm, weights_backbone=tmp_path / "resnet18.pth").backbone.body
    assert all(torch.equal(value, state[name]) for name, value in body.state_dict().items())
    assert not any(p.requires_grad for p in body.layer1.parameters())
    assert all(p.requires_grad for p in body.layer2.parameters())


def resnet18():
    return torchvision.models.resnet18()


@pytest.mark.parametrize(
    "options, error",
    [
        ({"body": "risonet51"}, "body must be one of isonet18, .* or a network, got 'risonet51'"),
        ({"norm": "group"}, "norm must be 'frozen' or 'live', got 'group'"),
        ({"trainable_backbone_layers": 5}, "trainable_backbone_layers must be None or 0 to 4, got 5"),
        ({"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ({"channels": -1}, "channels must be a positive int"),
    ],
    ids=["body", "norm", "trainable", "classes", "channels"],
)
def test_errors_name_the_argument(options, error):
    with pytest.raises(ValueError, match=error):
        small(**options)


# -- operators ---------------------------------------------------------------------------------------------------------


def test_nms_is_what_was_computed_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 6], [20, 20, 30, 30], [0, 0, 10, 10]])
    scores = torch.tensor([0.8, 0.9, 0.7, 0.1, 0.8])
    # IoU with the best one (row 1): 0.8, 1, 0.75, 0, 0.8; of rows 0 and 2: 0.6
    assert nms(boxes, scores, 0.7).tolist() == [1, 3]
    assert nms(boxes, scores, 0.77).tolist() == [1, 2, 3]
    assert nms(boxes, scores, 0.8).tolist() == [1, 0, 2, 3]  # more than the threshold, not as much; row 4 equals row 0
    assert nms(boxes, scores, 1.0).tolist() == [1, 0, 4, 2, 3]
    assert nms(boxes[:0], scores[:0], 0.5).tolist() == []
    assert nms(torch.zeros(2, 4), scores[:2], 0.5).tolist() == [1, 0]  # no area, no overlap


def test_a_suppressed_box_suppresses_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10], [12, 0, 22, 10]])  # neighbours: 6/14
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert nms(boxes, scores, 0.4).tolist() == [0, 2]


def test_nms_is_the_greedy_one():
    torch.manual_seed(0)
    corners = torch.rand(300, 2) * 40
    boxes, scores = torch.cat([corners, corners + 1 + torch.rand(300, 2) * 20], 1), torch.rand(300)
    kept = []
    for n in scores.argsort(descending=True).tolist():
        if not kept or torchvision.ops.box_iou(boxes[[n]], boxes[kept]).max() <= 0.3:
            kept.append(n)
    assert 10 < len(kept) < 200 and nms(boxes, scores, 0.3).tolist() == kept


GRID = torch.arange(16.0).reshape(1, 1, 4, 4)  # the value at (y, x) is 4 y + x


@pytest.mark.parametrize(
    "box, size, options, expected",
    [
        ([0, 0, 4, 4], 2, {"aligned": True, "sampling_ratio": 1}, [2.5, 4.5, 10.5, 12.5]),  # at 0.5 and 2.5
        ([0, 0, 4, 4], 2, {"sampling_ratio": 1}, [5, 7, 13, 15]),  # at 1 and 3
        ([0, 0, 8, 8], 2, {"spatial_scale": 0.5, "sampling_ratio": 1}, [5, 7, 13, 15]),
        ([0, 0, 4, 4], 1, {"aligned": True}, [7.5]),  # 4 x 4 samples: every pixel
        ([0, 0, 4, 2], (1, 2), {"aligned": True}, [2.5, 4.5]),  # rows 0 and 1
        ([2, 1, 2, 1], 1, {}, [8.5]),  # not smaller than a pixel: at (1.5, 2.5)
        (
            [-2, 0, 1, 1],
            3,
            {"sampling_ratio": 1, "aligned": True},
            [0] * 7 + [4 / 3] * 2,
        ),  # x at -2, -1, 0; y at -1/3, 0, 1/3
        ([20, 20, 24, 24], 1, {}, [0]),
    ],
    ids=["aligned", "legacy", "scale", "adaptive", "not square", "empty box", "edge", "outside"],
)
def test_roi_align_by_hand(box, size, options, expected):
    assert roi_align(GRID, [torch.tensor([box]).float()], size, **options).flatten().tolist() == pytest.approx(expected)


def boxes_over_the_edge(images, dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(12, 2, generator=generator, dtype=dtype) * 24 - 4
    size = torch.rand(12, 2, generator=generator, dtype=dtype) * 16
    image = torch.arange(12, dtype=dtype)[:, None] % images
    return torch.cat([image, start, start + size], 1)


@pytest.mark.parametrize("sampling", [2, -1])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_is_that_of_torchvision(sampling, aligned):
    torch.manual_seed(0)
    theirs = torchvision.ops.roi_align.__globals__["_roi_align"].__wrapped__  # its own in Python, not compiled
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64, requires_grad=True)
    boxes = boxes_over_the_edge(2, torch.float64)
    start = boxes[:, 1:3].clamp(0, 8)  # inside: it has no rule for outside
    boxes[:, 1:] = torch.cat([start, start + (boxes[:, 3:] - boxes[:, 1:3]).clamp(2, 9)], 1)
    ours, expected = roi_align(x, boxes, (3, 2), 0.5, sampling, aligned), theirs(x, boxes, 0.5, 3, 2, sampling, aligned)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    g = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (ours, expected)), rtol=0, atol=1e-12)


def test_roi_align_is_differentiable():
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    boxes = boxes_over_the_edge(2, torch.float64)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, 2, 0.25, 2, False), x)


def test_roi_align_of_no_boxes_and_of_bfloat16():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    none = roi_align(x, [torch.zeros(0, 4)] * 2, 7)
    assert none.shape == (0, 3, 7, 7)
    none.sum().backward()
    boxes = boxes_over_the_edge(2, torch.float32)
    half = roi_align(x.bfloat16(), boxes, 2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), roi_align(x.bfloat16().float(), boxes, 2), rtol=1e-2, atol=1e-2)


def test_ours_are_used_where_those_of_torchvision_do_not_load():
    ours = torchvision.ops.boxes.nms is nms, torchvision.ops.poolers.roi_align is roi_align
    assert ours == (not torchvision.extension._has_ops(),) * 2
