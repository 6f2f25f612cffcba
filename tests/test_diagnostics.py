"""Singular values against the dense operator; the report of a network."""

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
