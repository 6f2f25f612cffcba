"""Which layers OrthoRegularizer covers, with which coefficient, and what `summary()` says of each."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from isonet_fast import OrthoConv1d, OrthoConv2d, OrthoConv3d, OrthoLinear, OrthoRegularizer, reference
from isonet_fast.models import isonet_cifar

DOUBLE = torch.float64


class Standardised(nn.Conv2d):
    """A user's subclass: covered as its parent is."""


def randomised(net):
    with torch.no_grad():
        for n, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n), dtype=DOUBLE))
    return net.double()


def penalties(net):
    """The unweighted isonet penalty of each convolution by name, from the reference."""
    convolutions = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))}
    return {
        name: reference.orthogonality_loss(
            m.weight.detach(), stride=m.stride, dilation=m.dilation, groups=m.groups
        ).item()
        for name, m in convolutions.items()
        if "weight" in m._parameters
    }


def included(reg):
    return [row.name for row in reg.summary() if not row.excluded]


def test_covers_convolutions_and_ortho_linear_subclasses_too():
    net = nn.ModuleDict(
        {
            "conv1d": nn.Conv1d(4, 4, 3),
            "conv2d": nn.Conv2d(4, 4, 3),
            "conv3d": nn.Conv3d(4, 4, 3),
            "ortho1d": OrthoConv1d(4, 4, 3),
            "ortho2d": OrthoConv2d(4, 4, 3),
            "ortho3d": OrthoConv3d(4, 4, 3),
            "subclass": Standardised(4, 4, 3),
            "ortho linear": OrthoLinear(4, 4),
            "linear": nn.Linear(4, 4),
            "norm": nn.BatchNorm2d(4),
            "embedding": nn.Embedding(4, 4),
            "transposed1d": nn.ConvTranspose1d(4, 4, 3),
            "transposed2d": nn.ConvTranspose2d(4, 4, 3),
            "transposed3d": nn.ConvTranspose3d(4, 4, 3),
        }
    )
    reg = OrthoRegularizer(net)
    covered = ["conv1d", "conv2d", "conv3d", "ortho1d", "ortho2d", "ortho3d", "subclass", "ortho linear"]
    assert included(reg) == covered
    assert {row.name: row.excluded for row in reg.summary() if row.excluded} == {
        "linear": "linear, not in include",
        **dict.fromkeys(["transposed1d", "transposed2d", "transposed3d"], "transposed, not in include"),
    }
    assert all(row.shape == tuple(net[row.name].weight.shape) for row in reg.summary())
    reg().backward()
    assert [name for name, m in net.items() if m.weight.grad is not None] == covered
    accumulated = OrthoRegularizer(net)
    net.zero_grad()
    accumulated.accumulate_grad_()
    assert [name for name, m in net.items() if m.weight.grad is not None] == covered


def test_the_model_itself_may_be_the_layer():
    conv = randomised(nn.Conv2d(4, 4, 3))
    assert OrthoRegularizer(conv, 1.0)().item() == pytest.approx(penalties(conv)[""], rel=1e-12)


def test_official_filter_leaves_out_seven_by_seven_and_three_channels():
    """The weight's channels count: a grouped convolution with three inputs per group is left out as well."""
    net = nn.ModuleDict(
        {
            "stem": nn.Conv2d(4, 4, 7),
            "image": nn.Conv2d(3, 4, 3),
            "grouped": nn.Conv2d(6, 4, 3, groups=2),
            "seven by one": nn.Conv2d(4, 4, (7, 1)),
            "seven": nn.Conv1d(4, 4, 7),
            "three outputs": nn.Conv2d(4, 3, 3),
            "linear": OrthoLinear(3, 3),
        }
    )
    reg = OrthoRegularizer(net)
    assert included(reg) == ["seven by one", "seven", "three outputs", "linear"]
    assert {row.name: row.excluded for row in reg.summary() if row.excluded} == dict.fromkeys(
        ["stem", "image", "grouped"], "filter"
    )


def test_a_filter_replaces_the_official_one():
    net = randomised(nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3), "c": nn.Conv2d(4, 4, 7)}))
    asked = []

    def wanted(name, module):
        asked.append((name, module))
        return name != "b"

    reg = OrthoRegularizer(net, 1.0, filter=wanted)
    assert asked == list(net.items())
    values = penalties(net)
    assert reg().item() == pytest.approx(values["a"] + values["c"], rel=1e-12)
    reg()
    reg.summary()
    assert len(asked) == 3  # asked once


def test_coeff_may_be_a_function_of_name_and_module():
    net = randomised(nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 8, 3, stride=2)}))
    asked = []

    def coeff(name, module):
        asked.append((name, module))
        return {"a": 0.5, "b": 3}[name]  # an int will do

    reg = OrthoRegularizer(net, coeff)
    values = penalties(net)
    expected = 0.5 * values["a"] + 3 * values["b"]
    value = reg()
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    separate = [nn.Parameter(m.weight.detach().clone()) for m in net.values()]
    total = 0.5 * reference.orthogonality_loss(separate[0]) + 3 * reference.orthogonality_loss(separate[1], stride=2)
    total.backward()
    for module, weight in zip(net.values(), separate, strict=True):
        torch.testing.assert_close(module.weight.grad, weight.grad, rtol=1e-12, atol=1e-10)
    assert asked == list(net.items())
    assert [row.coeff for row in reg.summary()] == [0.5, 3.0]
    assert reg.last.item() == pytest.approx(sum(values.values()), rel=1e-12)


def test_coeff_zero_leaves_a_layer_in_the_report_without_a_gradient():
    net = randomised(nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 3)}))
    reg = OrthoRegularizer(net, lambda name, module: float(name == "b"))
    reg.accumulate_grad_()
    assert net["a"].weight.grad.eq(0).all() and net["b"].weight.grad.any()
    assert reg.summary()[0].value == pytest.approx(penalties(net)["a"], rel=1e-12)


def test_penalty_none_on_a_layer_is_never_penalised_whatever_the_regularizer_says():
    net = nn.ModuleDict({"a": OrthoConv2d(4, 4, 3, penalty=None), "b": OrthoConv2d(4, 4, 3, penalty="lorth")})
    for penalty in (None, "matrix"):
        reg = OrthoRegularizer(net, penalty=penalty, filter=lambda name, module: True)
        assert [(row.penalty, row.excluded) for row in reg.summary()] == [
            (None, "penalty=None"),
            (penalty or "lorth", ""),
        ]


def test_each_parameter_counts_once():
    """Shared modules and shared Parameters: as often as they appear, one penalty and one gradient."""
    shared = nn.Conv2d(4, 4, 3)
    other = nn.Conv2d(4, 4, 3)
    net = randomised(nn.ModuleDict({"a": shared, "again": shared, "b": other, "c": nn.Conv2d(4, 4, 3)}))
    net["c"].weight = other.weight
    values = penalties(net)
    reg = OrthoRegularizer(net, 1.0)
    assert reg().item() == pytest.approx(values["a"] + values["b"], rel=1e-12)
    reg.accumulate_grad_()
    once = nn.Parameter(other.weight.detach().clone())
    reference.orthogonality_loss(once).backward()
    torch.testing.assert_close(other.weight.grad, once.grad, rtol=1e-12, atol=1e-10)
    rows = {row.name: row for row in reg.summary()}
    assert list(rows) == ["a", "b", "c"]
    assert rows["c"].excluded == "shares its weight" and rows["c"].value == 0
    assert rows["b"].value == pytest.approx(values["b"], rel=1e-12)


def test_parameters_shared_later_count_once_too():
    net = randomised(nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 3)}))
    reg = OrthoRegularizer(net, 1.0)
    assert reg().item() == pytest.approx(sum(penalties(net).values()), rel=1e-12)
    net["b"].weight = net["a"].weight
    assert reg().item() == pytest.approx(penalties(net)["a"], rel=1e-12)


def old_spectral_norm(conv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(conv)


PARAMETRIZED = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "old spectral_norm": old_spectral_norm,
}


def buffers(module):
    return {name: b.clone() for name, b in module.named_buffers()}


def use_everything(reg):
    value = reg()
    value.backward()
    reg.accumulate_grad_()
    reg.last  # noqa: B018
    str(reg.summary())
    return value.item()


@pytest.mark.parametrize("when", ["before", "after", "after the first call"])
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_parametrized_weight_is_skipped_with_a_warning_and_never_read(kind, when):
    """Reading a spectral norm in training would advance its power iteration."""
    net = randomised(nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 3)})).train()
    alone = penalties(net)["b"]
    change = PARAMETRIZED[kind]
    if when == "before":
        change(net["a"])
        with pytest.warns(UserWarning, match="leaves out 'a': parametrized"):
            reg = OrthoRegularizer(net, 1.0)
    else:
        reg = OrthoRegularizer(net, 1.0)
        if when == "after the first call":
            assert reg().item() > alone
        change(net["a"])
        net.zero_grad()
        with pytest.warns(UserWarning, match="leaves out 'a': parametrized"):
            reg()
    state = buffers(net)
    assert bool(state) == ("spectral" in kind)  # there is a power iteration to watch
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert use_everything(reg) == pytest.approx(alone, rel=1e-12)
    assert all(torch.equal(b, state[name]) for name, b in net.named_buffers())
    assert all(p.grad is None for p in net["a"].parameters())
    row = reg.summary()[0]
    assert (row.name, row.penalty, row.excluded, row.value) == ("a", None, "parametrized", 0.0)


def test_neither_filter_nor_coeff_is_asked_about_a_parametrized_weight():
    net = nn.ModuleDict({"a": parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))})

    def never(name, module):
        raise AssertionError(name)

    with pytest.warns(UserWarning, match="parametrized"):
        reg = OrthoRegularizer(net, coeff=never, filter=never)
    assert reg().item() == 0


def test_when_the_last_layer_is_parametrized_nothing_is_left():
    net = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3)})
    reg = OrthoRegularizer(net, 1.0)
    parametrizations.weight_norm(net["a"])
    with pytest.warns(UserWarning, match="'a'"):
        value = reg()
    value.backward()  # as before: a training loop goes on
    assert value.item() == 0 and reg.last.item() == 0 and reg.accumulate_grad_().item() == 0
    parametrize.remove_parametrizations(net["a"], "weight")


def test_a_warning_points_at_the_line_that_made_the_regularizer():
    net = nn.ModuleDict({"a": parametrizations.weight_norm(nn.Conv2d(4, 4, 3))})
    with pytest.warns(UserWarning) as caught:
        OrthoRegularizer(net)
    assert caught[0].filename == __file__


def test_summary_has_a_row_for_each_layer_in_the_order_of_the_network(device):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, bias=False),
        OrthoConv2d(8, 8, 1, penalty="matrix"),
        OrthoLinear(8, 5),
    ).to(device)
    with torch.no_grad():
        net[2].weight.copy_(torch.randn(net[2].weight.shape))
    rows = OrthoRegularizer(net, 0.25).summary()
    assert [row.name for row in rows] == ["0", "2", "3", "4"]
    assert [row.shape for row in rows] == [tuple(net[n].weight.shape) for n in (0, 2, 3, 4)]
    assert [row.penalty for row in rows] == [None, "isonet", "matrix", "isonet"]
    assert [row.excluded for row in rows] == ["filter", "", "", ""]
    assert [row.coeff for row in rows] == [0, 0.25, 0.25, 0.25]
    expected = reference.orthogonality_loss(net[2].weight.double(), stride=2).item()
    assert rows[1].value == pytest.approx(expected, rel=1e-4)
    assert (rows[0].value, rows[2].value, rows[3].value) == (0, 0, 0)
    # 3x3, stride 2, 4 rows (inputs), 8 columns: offsets 00, 02, 2-2, 20, 22 have 9, 3, 1, 3, 1 pairs of taps
    product = 2 * 4 * 4 * 8 / 1e9
    assert rows[1].gflop == pytest.approx(product * (2 * 9 + 3 * (3 + 1 + 3 + 1)), rel=1e-12)
    assert rows[2].gflop == pytest.approx(2 * 8**3 * 2 / 1e9, rel=1e-12)
    assert rows[3].gflop == pytest.approx(2 * 5 * 5 * 8 * 2 / 1e9, rel=1e-12)


def test_summary_prints_as_a_table():
    net = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "body": nn.Conv2d(4, 8, 3)})
    with torch.no_grad():
        net["body"].weight.zero_()  # penalty 4/2: four rows
    lines = str(OrthoRegularizer(net, 0.25).summary()).splitlines()
    assert lines[0].split() == ["layer", "weight", "penalty", "coeff", "value", "GFLOP", "isometry"]
    assert lines[1].split() == ["stem", "4x3x3x3", "excluded:", "filter"]
    assert lines[2].split()[:5] == ["body", "8x4x3x3", "isonet", "0.25", "2"] and lines[2].endswith("  columns")
    assert lines[3].split()[:2] == ["total", "2"] and len(lines) == 4


def test_summary_computes_the_penalty_now_and_counts_as_no_call():
    net = randomised(nn.Sequential(nn.Conv2d(4, 4, 3)))
    reg = OrthoRegularizer(net, interval=2)
    with torch.no_grad():
        net[0].weight.zero_()
    assert reg.summary()[0].value == 2
    assert (
        reg.state_dict() == {"calls": 0} and not reg.computed and not any(p.grad is not None for p in net.parameters())
    )


@pytest.mark.parametrize("residual", [False, True])
def test_every_penalised_layer_of_a_published_network_starts_at_its_delta(residual):
    """A delta with as many rows as it can fill scores 0; all convolutions but the stem are covered."""
    net = isonet_cifar(8, residual)
    rows = OrthoRegularizer(net).summary()
    assert [row.name for row in rows if row.excluded] == ["stem.conv", "head.fc"]
    assert len(rows) == (10 if residual else 8)
    assert all(row.value == 0 for row in rows)


def test_weights_on_two_devices_are_refused():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, device="meta"))
    reg = OrthoRegularizer(net)
    for call in (reg, reg.accumulate_grad_, reg):
        with pytest.raises(ValueError, match=r"on one device, they are on cpu, meta; make one for each .*filter="):
            call()
    net[1].to_empty(device="cpu")
    torch.nn.init.dirac_(net[1].weight)
    assert reg().isfinite()
