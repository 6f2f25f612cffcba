"""param_groups: the official optimizer groups, with every parameter exactly once."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from isonet_fast import OrthoConv2d, ResidualSReLU, SharedScale, SReLU, param_groups
from isonet_fast.models import isonet_cifar
from isonet_fast.models.official import official


def by_name(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


@pytest.mark.parametrize("convert", [lambda model: model, official])
@pytest.mark.parametrize("residual", [False, True])
def test_biases_of_srelu_do_not_decay_and_scales_learn_at_a_tenth(residual, convert):
    """Ours and the official form of the network, whose modules are of other classes but have the same names."""
    model = convert(isonet_cifar(14, residual))
    groups = param_groups(model, 0.1, 1e-4)
    every = [name for name, _ in model.named_parameters()]
    srelu = [name for name in every if name.endswith("srelu_bias")]
    scales = [name for name in every if name.endswith("shared_scalar.scale")]
    other = [name for name in every if name not in srelu + scales]
    assert len(srelu) == 13 and len(scales) == 6 * residual and "head.fc.bias" in other
    expected = [(other, 0.1, 1e-4), (srelu, 0.1, 0.0), (scales, pytest.approx(0.01), 1e-4)]
    expected = [row for row in expected if row[0]]
    assert by_name(model, groups) == [names for names, *_ in expected]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [tuple(row) for _, *row in expected]
    assert all(set(group) == {"params", "lr", "weight_decay"} for group in groups)


def test_every_parameter_exactly_once_however_often_it_is_shared():
    scale, relu, conv = SharedScale(), SReLU(4), nn.Conv2d(4, 4, 3)
    model = nn.ModuleDict({"a": scale, "b": scale, "c": relu, "d": relu, "e": conv, "f": nn.Conv2d(4, 4, 3)})
    model["f"].weight = conv.weight
    groups = param_groups(model, 1.0, 1.0)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    torch.optim.SGD(groups)  # which refuses duplicates


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_parameters_are_in_their_group(frozen):
    model = nn.Sequential(nn.Linear(2, 2), SReLU(2)).requires_grad_(not frozen)
    assert by_name(model, param_groups(model, 1.0, 0.5)) == [["0.weight", "0.bias"], ["1.srelu_bias"]]


@pytest.mark.parametrize(
    "model, lr, weight_decay",
    [
        (SReLU(3), 1.0, 0.0),
        (ResidualSReLU(3), 1.0, 0.0),
        (SharedScale(), pytest.approx(0.1), 0.5),
        (OrthoConv2d(3, 3, 3, bias=False), 1.0, 0.5),
    ],
)
def test_a_single_layer_is_a_model_too(model, lr, weight_decay):
    (group,) = param_groups(model, 1.0, 0.5)
    assert (group["lr"], group["weight_decay"]) == (lr, weight_decay)
    assert group["params"] == list(model.parameters())


def test_scales_are_known_by_class_whatever_they_are_called():
    model = nn.ModuleDict({"gain": SharedScale(), "scale": nn.ParameterList([torch.ones(1)])})
    groups = param_groups(model, 1.0, 0.5)
    assert by_name(model, groups) == [["scale.0"], ["gain.scale"]]


def test_official_scales_are_known_by_name_at_the_top_of_a_model_too():
    class OfficialScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1, 1, 1, 1))

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared_scalar = OfficialScale()

    for model in (Branch(), nn.Sequential(Branch())):
        (group,) = param_groups(model, 1.0, 0.5)
        assert group["lr"] == pytest.approx(0.1)


def test_a_step_of_sgd_uses_the_groups():
    model = nn.ModuleDict({"fc": nn.Linear(1, 1, bias=False), "relu": SReLU(1), "s": SharedScale()})
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.ones_like(p)
    torch.optim.SGD(param_groups(model, 0.5, 0.1)).step()
    assert model["fc"].weight.item() == pytest.approx(1 - 0.5 * 1.1)
    assert model["relu"].srelu_bias.item() == pytest.approx(1 - 0.5)
    assert model["s"].scale.item() == pytest.approx(1 - 0.05 * 1.1)


def test_a_schedule_that_multiplies_keeps_the_ratio():
    model = isonet_cifar(8, residual=True)
    optimizer = torch.optim.SGD(param_groups(model, 0.1, 1e-4), momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], 0.1)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01, 0.001])


def test_a_model_without_parameters_has_no_groups():
    assert param_groups(nn.ReLU(), 0.1, 0.0) == []


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": None}, TypeError, "model must be a torch.nn.Module, got NoneType"),
        ({"model": [nn.Parameter(torch.ones(1))]}, TypeError, "model must be a torch.nn.Module, got list"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"lr": None}, TypeError, "lr must be a number, got None"),
        ({"lr": True}, TypeError, "lr must be a number, got True"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1.0"),
        ({"lr": torch.eye(2).to_sparse_csr()}, TypeError, "lr must be a number or a dense tensor of one real number"),
        ({"lr": torch.ones(2)}, TypeError, "lr must be a number or a dense tensor of one real number"),
        ({"lr": float("inf")}, ValueError, "lr must be finite"),
        ({"lr": 10**5000}, ValueError, "lr must be finite"),
        ({"lr": float("nan")}, ValueError, "lr must be at least 0, got nan"),
        ({"weight_decay": [0.1]}, TypeError, r"weight_decay must be a number, got \[0.1\]"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0, got -0.1"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        param_groups(**{"model": nn.Linear(2, 2), "lr": 0.1, "weight_decay": 0.0} | arguments)


def test_numbers_of_any_kind_and_tensors_are_learning_rates():
    (group,) = param_groups(SharedScale(), np.float32(0.5), Fraction(1, 4))
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.05), 0.25)
    (group,) = param_groups(SharedScale(), torch.tensor(0.5), 0)
    assert isinstance(group["lr"], torch.Tensor) and group["lr"].item() == pytest.approx(0.05)


def test_parameters_without_values_are_in_their_group():
    """On the meta device, lazy, complex: the optimizer decides what it can do with them."""
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(3, 3, 3, device="meta"), nn.Linear(2, 2, dtype=torch.cfloat))
    model.append(SReLU(4))
    assert [len(group["params"]) for group in param_groups(model, 0.1, 0.0)] == [6, 1]
