"""OrthoRegularizer on a network that changes after it was made: layers replaced, added, removed, made or freed."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from isonet_fast import OrthoConv2d, OrthoLinear, OrthoRegularizer, reference

DOUBLE = torch.float64


def conv(inputs=4, outputs=4, kernel=3, **arguments):
    made = nn.Conv2d(inputs, outputs, kernel, **arguments).double()
    nn.init.normal_(made.weight, std=0.4)
    return made


def network():
    torch.manual_seed(0)
    return nn.Sequential(conv(), nn.Sequential(conv(), nn.ReLU()), nn.ModuleList(), nn.ModuleDict({"out": conv(4, 8)}))


def penalty(net):
    """The reference's penalty of every convolution and OrthoLinear that has a weight of its own."""
    total = torch.zeros((), dtype=DOUBLE)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, OrthoLinear)) and "weight" in module._parameters:
            stride = getattr(module, "stride", 1)
            total = total + reference.orthogonality_loss(module.weight, stride=stride)
    return total


def assert_follows(reg, net, *gone):
    """Value, gradients, rows; the layers that went are left alone."""
    net.zero_grad()
    for p in (p for module in gone for p in module.parameters()):
        p.grad = None
    expected = penalty(net)
    expected.backward()
    want = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for form in ("reg()", "accumulate_grad_()"):
        net.zero_grad()
        value = reg() if form == "reg()" else reg.accumulate_grad_()
        if form == "reg()":
            value.backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        got = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        assert got.keys() == want.keys()
        for name, grad in got.items():
            torch.testing.assert_close(grad, want[name], rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for module in gone for p in module.parameters())
    assert {f"{row.name}.weight" for row in reg.summary() if not row.excluded} == want.keys()


def replace_top(net):
    net[0] = conv(4, 6, stride=2)


def replace_nested(net):
    net[1][0] = OrthoConv2d(4, 4, 1).double()


def replace_by_setattr(net):
    setattr(net[3], "out", conv(4, 4, 5))  # noqa: B010


def replace_in_the_dictionary(net):
    """As convert() and nn.Sequential.insert do it, past every hook of PyTorch."""
    net[1]._modules["0"] = conv(2, 4)


def replace_a_container(net):
    net[1] = nn.Sequential(conv(4, 4), nn.Sequential(conv(4, 2)))


def append(net):
    net.append(conv())


def append_to_an_empty_list(net):
    net[2].append(conv())


def add_below_a_layer(net):
    net[1][1].extra = conv()


def add_a_linear_layer(net):
    net[3]["head"] = OrthoLinear(5, 3).double()


def remove(net):
    del net[0]


def remove_all_but_one(net):
    del net[0:3]


CHANGES = [
    replace_top,
    replace_nested,
    replace_by_setattr,
    replace_in_the_dictionary,
    replace_a_container,
    append,
    append_to_an_empty_list,
    add_below_a_layer,
    add_a_linear_layer,
    remove,
    remove_all_but_one,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("called", [True, False], ids=["after a call", "before any call"])
def test_a_change_of_the_layers_is_followed(change, called):
    net = network()
    reg = OrthoRegularizer(net, 1.0)
    before = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    if called:
        assert_follows(reg, net)
    change(net)
    gone = [module for module in before if module not in set(net.modules())]
    assert_follows(reg, net, *gone)


def test_two_layers_that_change_places_keep_their_answers():
    net = network()
    asked = []
    reg = OrthoRegularizer(net, 1.0, filter=lambda name, module: asked.append(name) or True)
    net[0], net[1][0] = net[1][0], net[0]
    assert_follows(reg, net)
    assert asked == ["0", "1.0", "3.out"]  # of a layer that it knows nobody is asked again


def test_new_layers_are_asked_about_and_old_ones_keep_their_coefficient():
    net = network()
    coefficients = {"0": 1.0, "1.0": 2.0, "3.out": 3.0}
    reg = OrthoRegularizer(net, lambda name, module: coefficients[name], filter=lambda name, module: name != "4")
    reg()
    coefficients.clear()
    coefficients["5"] = 5.0
    net.append(conv())  # "4": the filter says no
    net.append(conv())
    rows = {row.name: (row.coeff, row.excluded) for row in reg.summary()}
    assert rows == {"0": (1, ""), "1.0": (2, ""), "3.out": (3, ""), "4": (0, "filter"), "5": (5, "")}


def test_a_shape_that_an_earlier_layer_had_with_another_stride_is_not_taken_for_it():
    net = nn.Sequential(conv(4, 4))
    reg = OrthoRegularizer(net, 1.0)
    assert_follows(reg, net)
    net[0] = conv(4, 4, stride=2)
    assert_follows(reg, net)


def test_a_copy_of_model_and_regularizer_follows_the_copy():
    net = network()
    reg = OrthoRegularizer(net, 1.0)
    reg()
    other, its = copy.deepcopy((net, reg))
    replace_top(other)
    assert_follows(its, other)
    assert_follows(reg, net)


@pytest.mark.parametrize(
    "change", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=["weight_norm", "spectral_norm"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_parametrization_removed_later_frees_the_layer(change, when):
    net = network()
    if when == "before":
        change(net[0])
        with pytest.warns(UserWarning, match="leaves out '0': parametrized"):
            reg = OrthoRegularizer(net, 1.0)
    else:
        reg = OrthoRegularizer(net, 1.0)
        reg()
        change(net[0])
        with pytest.warns(UserWarning, match="leaves out '0': parametrized"):
            reg()
    parametrize.remove_parametrizations(net[0], "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_follows(reg, net)
    change(net[0])
    with pytest.warns(UserWarning, match="leaves out '0': parametrized"):  # it was penalised in between
        assert_follows(reg, net)


def test_weight_norm_by_hooks_removed_later_frees_the_layer():
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net[0])
        reg = OrthoRegularizer(net, 1.0)
        nn.utils.remove_weight_norm(net[0])
    assert_follows(reg, net)


def test_lazy_layers_are_penalised_once_they_have_a_shape():
    net = nn.Sequential(nn.LazyConv2d(4, 3, dtype=DOUBLE), nn.LazyConv2d(8, 3, stride=2, dtype=DOUBLE))
    asked = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is nothing to penalise yet: no reason to warn
        reg = OrthoRegularizer(net, 1.0, filter=lambda name, module: asked.append(module.weight.shape) or True)
        assert [(row.shape, row.excluded) for row in reg.summary()] == [((), "lazy, without a shape yet")] * 2
        value = reg()
        value.backward()
        assert value.item() == 0 and reg.accumulate_grad_().item() == 0 and not asked
        net(torch.zeros(1, 2, 9, 9, dtype=DOUBLE))
        assert_follows(reg, net)
    assert asked == [(4, 2, 3, 3), (8, 4, 3, 3)]


def test_a_weight_of_a_foreign_kind_is_left_out_as_long_as_it_is_one():
    net = network()
    reg = OrthoRegularizer(net, 1.0)
    reg()
    net[0].weight = nn.Parameter(net[0].weight.detach().to(torch.complex128))
    with pytest.warns(UserWarning, match="leaves out '0': complex128 weight"):
        value = reg()
    assert value.item() == pytest.approx(penalty(nn.Sequential(net[1], net[3])).item(), rel=1e-12)
    net[0].weight = nn.Parameter(net[0].weight.detach().real.clone())
    assert_follows(reg, net)


@pytest.fixture(scope="module")
def group():
    """A real process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


WRONG_ORDER = r"accumulate_grad_\(\) with work_group must come before the backward"
EXCHANGES = {
    "assign=True": lambda net: net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True),
    "a new layer": lambda net: net.__setitem__(0, conv()),
    "a new Parameter": lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach().clone())),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_order_is_checked_of_exchanged_weights_too(group, exchange):
    net = nn.Sequential(conv(), conv())
    reg = OrthoRegularizer(net, 1.0, work_group=group)
    EXCHANGES[exchange](net)
    net(torch.ones(1, 4, 9, 9, dtype=DOUBLE)).square().sum().backward()
    with pytest.raises(RuntimeError, match=WRONG_ORDER):
        reg.accumulate_grad_()
    net.zero_grad()
    for _ in range(2):
        reg.accumulate_grad_()  # in the right order it is right
        net(torch.ones(1, 4, 9, 9, dtype=DOUBLE)).square().sum().backward()
        net.zero_grad()
    reg.accumulate_grad_()
    net(torch.ones(1, 4, 9, 9, dtype=DOUBLE)).square().sum().backward()
    with pytest.raises(RuntimeError, match=WRONG_ORDER):
        reg.accumulate_grad_()


def test_a_regularizer_of_shares_leaves_the_model_copyable(group):
    """Averaged models are deep copies; a process group cannot be copied."""
    net = nn.Sequential(conv(), conv())
    reg = OrthoRegularizer(net, 1.0, work_group=group)
    reg()
    copied = copy.deepcopy(net)
    assert torch.equal(copied[0].weight, net[0].weight)
