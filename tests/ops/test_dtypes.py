"""Mixtures of dtypes and kinds of tensors that are not plain: promoted as PyTorch does, or refused by name."""

import itertools

import pytest
import torch

from isonet_fast import functional, reference
from tests.cases import DTYPES

HALF = (torch.float16, torch.bfloat16)


def inputs(*dtypes, size=(4, 6, 5, 4)):
    torch.manual_seed(0)
    shapes = (size, size, (6,), (1,))
    return [torch.randn(s).to(d).requires_grad_() for s, d in zip(shapes, dtypes)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_shortcut_and_branch_promote_as_torch_add_does(first, second, inplace, autocast):
    shortcut, branch, bias = inputs(first, second, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = shortcut + branch
        y = functional.residual_srelu(shortcut, branch * 1, bias, inplace=inplace)
    assert y.dtype == total.dtype
    wide = torch.maximum(shortcut.double() + branch.double(), bias.to(y.dtype).double().view(6, 1, 1))
    torch.testing.assert_close(y.double(), wide.to(y.dtype).double(), rtol=0, atol=0)
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, (shortcut, branch, bias), g)
    passed = ~(y <= bias.to(y.dtype).view(6, 1, 1))
    for tensor, grad in zip((shortcut, branch), grads):
        assert grad.dtype == tensor.dtype and torch.equal(grad, (g * passed).to(tensor.dtype))
    exact = (g.double() * ~passed).sum((0, 2, 3))
    torch.testing.assert_close(grads[2].double(), exact, rtol=1e-5, atol=1e-5)


def test_written_over_the_branch_only_where_the_sum_has_its_dtype():
    shortcut, branch, bias = (t.detach() for t in inputs(torch.bfloat16, torch.float32, torch.float32))
    assert functional.residual_srelu(shortcut, branch, bias, inplace=True).data_ptr() == branch.data_ptr()
    kept = shortcut.clone()
    y = functional.residual_srelu(branch, shortcut, bias, inplace=True)
    assert y.dtype == torch.float32 and torch.equal(shortcut, kept)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("dtype", "parameters"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_parameters_do_not_promote(dtype, parameters, autocast):
    """y has the activations' dtype; the bias is rounded to it once, the gradients have the parameters' dtype."""
    shortcut, branch, bias, scale = inputs(dtype, dtype, parameters, parameters)
    rounded = bias.to(dtype).double().view(6, 1, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alone = functional.srelu(branch, bias)
        y = functional.residual_srelu(shortcut, branch, bias, scale)
    assert alone.dtype == y.dtype == dtype
    assert torch.equal(alone.double(), torch.maximum(branch.double(), rounded))
    exact = torch.maximum(shortcut.double() + scale.double() * branch.double(), rounded)
    rtol = {torch.float64: 1e-6, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=1e-6)
    grads = torch.autograd.grad(y.double().sum(), (shortcut, branch, bias, scale))
    assert [g.dtype for g in grads] == [dtype, dtype, parameters, parameters]
    passed = ~(y.double() <= rounded)
    rtol = max(1e-6, torch.finfo(parameters).eps)
    torch.testing.assert_close(grads[2].double(), (~passed).double().sum((0, 2, 3)), rtol=rtol, atol=0)
    torch.testing.assert_close(grads[3].double()[0], (branch.double() * passed).sum(), rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_parameters_with_half_inputs_are_the_promoted_result_rounded_once(dtype, compiled):
    """What plain PyTorch promotes to float32, rounded to the inputs' dtype: as its batch_norm, to the last bit."""
    shortcut, branch, bias, scale = inputs(dtype, dtype, torch.float32, torch.float32)
    b, h = bias.view(6, 1, 1), branch.float()
    promoted = (torch.maximum(branch, b), torch.maximum(shortcut + h, b), torch.maximum(shortcut + scale * h, b))
    assert all(y.dtype == torch.float32 for y in promoted)

    def ours(shortcut, branch, bias, scale):
        alone, join = functional.srelu(branch, bias), functional.residual_srelu(shortcut, branch, bias)
        over = functional.srelu(branch * 1, bias, inplace=True)
        joined_over = functional.residual_srelu(shortcut, branch * 1, bias, inplace=True)
        return alone, join, functional.residual_srelu(shortcut, branch, bias, scale), over, joined_over

    for autocast in (False, True):
        torch._dynamo.reset()
        call = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = call(shortcut, branch, bias, scale)
        for y, wanted in zip(got, (*promoted, *promoted[:2]), strict=True):
            assert y.dtype == dtype and torch.equal(y, wanted.to(dtype))


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float64], ids=str)
def test_a_large_bias_gradient_does_not_pass_through_float16(parameters):
    """Its 200,000 terms overflow float16, and rounded to it they would be 0.05 % off."""
    x = torch.full((200, 1, 1000), -1.0, dtype=torch.float16)
    bias = torch.zeros(1, dtype=parameters, requires_grad=True)
    functional.srelu(x, bias).sum(dtype=torch.float32).backward()
    assert bias.grad.item() == torch.tensor(200000.0).to(parameters).item()


def test_a_float64_bias_beyond_half_precision():
    bias = torch.tensor([float("inf"), -float("inf"), 1e300], dtype=torch.float64, requires_grad=True)
    y = functional.srelu(torch.zeros(2, 3, dtype=torch.float16), bias)
    assert y[0].tolist() == [float("inf"), 0, float("inf")]
    y.sum().backward()
    assert bias.grad.tolist() == [2, 0, 2]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_double_backward_is_summed_in_float32_and_rounded_once(dtype, scaled):
    """200,000 elements with float32 parameters: nothing overflows, no sum is rounded to half precision."""
    torch.manual_seed(0)
    tensors = [torch.randn(50, 4, 1000).to(dtype) for _ in range(3)]
    tensors[0] += 2
    shortcut, branch, g = tensors
    bias, scale = torch.full((4,), 0.1), torch.tensor([1.5])

    def second(f, inputs, g):
        inputs = [t.detach().requires_grad_() for t in inputs]
        g = g.detach().requires_grad_()
        first = torch.autograd.grad(f(*inputs), inputs, g, create_graph=True)
        weights = [1.0, 2.0, 30.0, 40.0]
        loss = sum(w * t.to(torch.promote_types(t.dtype, torch.float32)).sum() for w, t in zip(weights, first))
        return torch.autograd.grad(loss, [g, *inputs], allow_unused=True)

    chosen = [shortcut, branch, bias, scale] if scaled else [shortcut, branch, bias]
    y = functional.residual_srelu(*chosen)
    exact_inputs = [t.double() for t in chosen]
    total = exact_inputs[0] + (scale.double() if scaled else 1) * exact_inputs[1]
    near = (total - 0.1).abs() < 0.02  # there rounding may move the mask
    assert near.float().mean() < 0.02 and y.isfinite().all()
    g = g.masked_fill(near, 0)
    got, want = second(functional.residual_srelu, chosen, g), second(reference.residual_srelu, exact_inputs, g.double())
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        if b is None or a is None:
            assert a is None or not a.any()
            assert b is None or not b.any()
            continue
        a, b = a.double(), b.masked_fill(near, 0) if b.shape == near.shape else b
        a = a.masked_fill(near, 0) if a.shape == near.shape else a
        rtol = 1e-5 if a.numel() < 10 else torch.finfo(dtype).eps / 2 * 1.01
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6 * b.abs().max().item(), msg=f"{index}")


def negative(t):
    """The same values, with the negative bit: a lazily negated view of an imaginary part."""
    made = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert made.is_neg()
    return made


NEGATIVE = {"srelu": "x bias", "join": "shortcut branch bias", "scaled": "shortcut branch bias scale"}


@pytest.mark.parametrize("argument", ["x", "shortcut", "branch", "bias", "scale"])
@pytest.mark.parametrize("form", NEGATIVE)
def test_tensors_with_the_negative_bit(form, argument):
    names = NEGATIVE[form].split()
    if argument not in names:
        return
    drawn = dict(zip(["shortcut", "branch", "bias", "scale"], inputs(*[torch.float32] * 4)))
    plain = {name: drawn["branch" if name == "x" else name].detach() for name in names}
    f = functional.srelu if form == "srelu" else functional.residual_srelu
    mine = {name: negative(t) if name == argument else t.clone() for name, t in plain.items()}
    written = mine["x" if form == "srelu" else "branch"].clone() if argument not in ("x", "branch") else mine[argument]
    if form != "scaled":  # in place, nothing recorded
        y = f(**{**mine, "x" if form == "srelu" else "branch": written}, inplace=True)
        assert torch.equal(y, f(**plain)) and torch.equal(written, y)
        mine = {name: negative(t) if name == argument else t.clone() for name, t in plain.items()}
    y, expected = (f(**{name: t.requires_grad_() for name, t in values.items()}) for values in (mine, plain))
    assert torch.equal(y, expected)
    grad = torch.randn_like(expected)
    got, want = (
        torch.autograd.grad(y, mine.values(), negative(grad)),
        torch.autograd.grad(expected, plain.values(), grad),
    )
    assert all(map(torch.equal, got, want))


ODD = {
    "sparse_coo": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "complex64": lambda t: torch.complex(t, t).conj(),
    "int64": lambda t: t.long(),
    "qint8": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "float": lambda t: 1.5,
    "ndarray": lambda t: t.numpy(),
    "list": lambda t: [1.0],
}


@pytest.mark.parametrize("argument", ["x", "shortcut", "branch", "bias", "scale"])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:torch.quantize_per_tensor")
def test_what_is_no_dense_tensor_is_refused_by_name(kind, argument):
    shortcut, branch, bias, scale = (t.detach() for t in inputs(*[torch.float32] * 4))
    if argument == "x":
        f, values = functional.srelu, {"x": branch, "bias": bias}
    else:
        f, values = functional.residual_srelu, dict(shortcut=shortcut, branch=branch, bias=bias, scale=scale)
    values[argument] = ODD[kind](values[argument])
    expected = {"jagged": "nested", "sparse_coo": "sparse_coo", "float": "got float"}.get(kind, kind)
    with pytest.raises(TypeError, match=rf"^{argument} must be .*{expected}"):
        f(**values)
