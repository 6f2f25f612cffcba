"""Singular values against the dense operator; the report of a network."""

import math

import pytest
import torch

from isonet_fast import OrthoConv2d, OrthoLinear, diagnostics, models
from tests.test_reference import operator


@pytest.mark.parametrize(
    "conv, size",
    [
        (torch.nn.Conv2d(3, 5, 3), (6, 4)),
        (torch.nn.Conv2d(6, 4, 3, stride=2), (6, 8)),
        (torch.nn.Conv2d(2, 8, (1, 3), stride=(1, 2), dilation=(1, 2)), (3, 8)),
        (torch.nn.Conv2d(4, 6, 3, groups=2), (5, 5)),
        (torch.nn.Conv1d(3, 7, 4, stride=3), (9,)),
        (torch.nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (3, 4, 3)),
    ],
)
def test_singular_values_are_those_of_the_dense_operator(conv, size):
    conv = conv.double()
    values = diagnostics.singular_values(conv, size)
    dense = operator(conv.weight.detach(), conv.stride, conv.dilation, conv.groups, size)
    expected = torch.linalg.svdvals(dense)
    kept = min(len(values), len(expected))
    torch.testing.assert_close(values[:kept], expected[:kept], rtol=1e-9, atol=1e-7)
    assert (values[kept:] < 1e-6).all() and (expected[kept:] < 1e-6).all()


def test_a_delta_is_an_isometry():
    for conv in (OrthoConv2d(8, 8, 3), OrthoConv2d(16, 64, 3, stride=2, penalty="lorth")):
        values = diagnostics.singular_values(conv, 8)
        torch.testing.assert_close(values, torch.ones_like(values))
    torch.testing.assert_close(diagnostics.singular_values(OrthoLinear(4, 4), 1), torch.ones(4, dtype=torch.double))


def test_report_of_a_network():
    model = models.isonet_cifar(8, residual=True, in_channels=1)
    model.train()
    report = diagnostics.isometry_report(model, (1, 16, 16))
    names = [name for name, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert [row.name for row in report] == names, "the folded convolutions too"
    rows = {row.name: row for row in report}
    assert rows["s3.b1.f.b"].grid == (4, 4) and rows["stem.conv"].grid == (16, 16)
    same = rows["s1.b1.f.a"]
    assert same.smallest == pytest.approx(1) and same.largest == pytest.approx(1) and same.penalty == 0
    assert "s1.b1.f.a" in str(report) and len(str(report).splitlines()) == len(report) + 1
    assert model.training and not any("_conv_forward" in vars(m) for m in model.modules())


def test_errors_name_the_argument():
    with pytest.raises(
        ValueError, match=r"input_size must have 2 values divisible by the stride \(2, 2\).*got \(5, 5\)"
    ):
        diagnostics.singular_values(torch.nn.Conv2d(2, 2, 3, stride=2), 5)
    with pytest.raises(ValueError, match="no smaller than the dilated kernel"):
        diagnostics.singular_values(torch.nn.Conv2d(2, 2, 3), 2)
    with pytest.raises(TypeError, match="conv must be a convolution or a linear layer.*got ReLU"):
        diagnostics.singular_values(torch.nn.ReLU(), 4)
    for size in (None, 1.5, "44", [None, None], torch.ones(2), torch.eye(3).to_sparse_csr()):
        with pytest.raises(TypeError, match="input_size must be a sequence of ints, got"):
            diagnostics.singular_values(torch.nn.Conv2d(2, 2, 3), size)
    for size in (0, -4, (4, 10**400)):
        with pytest.raises(ValueError, match="input_size must be positive and below 2147483648, got"):
            diagnostics.singular_values(torch.nn.Conv2d(2, 2, 3), size)
    for conv in (None, torch.zeros(2, 2, 3, 3)):
        with pytest.raises(TypeError, match="conv must be a convolution or a linear layer.*got"):
            diagnostics.singular_values(conv, 4)


def test_errors_of_a_report_name_the_argument():
    conv = torch.nn.Conv2d(2, 2, 3)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got NoneType"):
        diagnostics.isometry_report(None, (2, 8, 8))
    with pytest.raises(TypeError, match="input_size must be a sequence of ints, got int"):
        diagnostics.isometry_report(conv, 8)
    with pytest.raises(ValueError, match=r"model takes no input of input_size \(3, 8, 8\): .*channels"):
        diagnostics.isometry_report(conv, (3, 8, 8))
    assert "_conv_forward" not in vars(conv)
    assert diagnostics.isometry_report(torch.nn.ReLU(), (2, 8, 8)) == []


def rows_by_name(*arguments, **keywords):
    return {row.name: row for row in diagnostics.isometry_report(*arguments, **keywords)}


def test_every_layer_has_a_row_with_its_numbers_or_the_reason():
    class Scaled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.ModuleDict(
        {
            "conv": torch.nn.Conv2d(2, 4, 3, stride=2),
            "up": torch.nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1),
            "own": Scaled(4, 4, 3),
            "unused": torch.nn.Conv2d(4, 4, 3),
            "normed": torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(4, 4, 1)),
            "linear": torch.nn.Linear(4, 4),
            "ortho": OrthoLinear(4, 4),
            "never": OrthoConv2d(4, 4, 1, penalty=None),
        }
    )
    names = ["conv", "up", "own", "normed", "never"]
    model.forward = lambda x: [x := model[name](x) for name in names]
    rows = rows_by_name(model, (2, 16, 16))
    assert {name: row.excluded for name, row in rows.items()} == {
        "conv": "",
        "up": "transposed, not in include",
        "own": "Scaled has a forward of its own and is not in include",
        "unused": "not reached by this input",
        "normed": "parametrized",
        "linear": "linear, not in include",
        "ortho": "",
        "never": "",
    }
    assert rows["conv"].grid == (16, 16) and rows["ortho"].grid == () and rows["ortho"].isometry == "both"
    assert rows["up"].smallest != rows["up"].smallest, "NaN"
    asked = rows_by_name(model, (2, 16, 16), include=(torch.nn.Linear, torch.nn.ConvTranspose2d, Scaled))
    assert [name for name, row in asked.items() if row.excluded] == ["unused", "normed"]
    assert asked["up"].grid == (14, 14), "the grid of what it writes"
    conv = torch.nn.Conv2d(4, 4, 4, stride=2, padding=1)
    conv.weight = model["up"].weight
    largest = diagnostics.singular_values(conv, 14)[0].item()
    assert (
        asked["up"].largest
        == pytest.approx(largest)
        == pytest.approx(diagnostics.singular_values(model["up"], 14)[0].item())
    )


def test_a_report_leaves_the_mode_of_every_module_as_it_was():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Dropout()).train()
    model[1].eval()  # frozen statistics
    diagnostics.isometry_report(model, (2, 8, 8))
    assert [module.training for module in model] == [True, False, True]


def test_weights_without_values_are_excluded_and_lazy_ones_refused():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), OrthoLinear(2, 2))
    rows = rows_by_name(model, (2, 8, 8))
    assert [row.excluded for row in rows.values()] == ["no values (meta device or FakeTensor)"] * 2
    with pytest.raises(TypeError, match="conv must have a dense floating-point weight to read, got Conv2d: no values"):
        diagnostics.singular_values(model[0], 8)
    lazy = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.Flatten(), torch.nn.LazyLinear(2))
    with pytest.raises(ValueError, match="model has lazy layers without a shape yet, '2.weight' first"):
        diagnostics.isometry_report(lazy, (2, 8, 8))
    assert isinstance(lazy[2], torch.nn.LazyLinear)


def test_a_complex_or_sparse_weight_is_named():
    conv = torch.nn.Conv2d(2, 2, 3, dtype=torch.cfloat)
    with pytest.raises(TypeError, match="got Conv2d: complex64 weight"):
        diagnostics.singular_values(conv, 8)
    rows = rows_by_name(torch.nn.Sequential(conv), (2, 8, 8))
    assert rows["0"].excluded == "complex64 weight"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_layer_has_singular_values_that_are_nan(value):
    model = torch.nn.Sequential(OrthoConv2d(4, 4, 3, padding=1), OrthoConv2d(4, 8, 3, padding=1), OrthoLinear(2, 2))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = value
        model[2].weight[0, 0] = value
    assert diagnostics.singular_values(model[0], 8).shape == (4 * 64,)
    assert diagnostics.singular_values(model[2], ()).isnan().all()
    rows = rows_by_name(model[:2], (4, 8, 8))
    assert math.isnan(rows["0"].smallest) and math.isnan(rows["0"].largest) and rows["1"].largest == pytest.approx(1)
