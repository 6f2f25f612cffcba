"""The differentiable functions. They check their arguments and call the operators of `isonet_fast.ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .activation_arguments import channel_axis, check_device, check_join, check_tensor, flag, kernel_parameter
from .geometry import Penalty, Precision, check_penalty
from .inplace import check_apart, may_write
from .ops import orthogonality as _orthogonality
from .ops import standard
from .ops.residual_srelu import ResidualSReLU
from .ops.srelu import SReLU
from .penalty_arguments import check_precision, checked_layer, listed, per_layer
from .problem import Problem

__all__ = ["orthogonality_loss", "residual_srelu", "srelu"]


def srelu(
    x: Tensor,  # (N, C, ...)
    bias: Tensor,  # C values
    inplace: bool = False,
    spatial_dims: int | str | None = None,
) -> Tensor:
    """Shifted ReLU: y = max(x, b) with one learnable b per channel (Qi et al., ICML 2020, section 3.2).

    dx = g m and db = sum of g (1 - m) over every axis but C, with m = not (y <= b): a tie gives its gradient to b,
    NaN in x or b propagates and passes its gradient. Twice differentiable. Only y and b are kept for the backward.

    x: float32, float64, float16 or bfloat16, (N, C, ...). With `spatial_dims`, the number of dimensions behind C, an
    unbatched x is understood too: (C, H, W) with 2. The layers' default is "inferred": see `isonet_fast.SReLU`.

    y has x's dtype, under autocast too. The bias is a parameter and does not promote: it is rounded to x's dtype once,
    as autocast rounds the parameters of a convolution, so y is the result that PyTorch promotes, rounded once. b: C
    values of any shape and of any dtype that x may have; its gradient has b's dtype and is accumulated in float32
    (float64 for a float64 x).

    `inplace=True` allows y to be written over x. This saves the memory of one activation after an operation that does
    not need its own output for its backward, such as a convolution. Use only the returned tensor, because y is not
    always written over x: it is a new tensor in transforms of torch.func, in exports, and where x is a view that a
    custom Function returned (for example in a module with a full backward hook).

    Transforms of torch.func and forward-mode AD use the formulas of the reference. torch.export and torch.jit.trace
    record a maximum. If you train such a graph, a tie gives half of its gradient to x and half to b. torch.compile
    refuses a second backward through any compiled network. To compile a gradient penalty (R1), compile it as a whole
    and take its inner gradient with torch.func: `torch.compile(lambda x: grad(lambda x: net(x).sum())(x)...)`.

    Raises TypeError for what is no dense tensor of these dtypes; ValueError for a shape without C channels, a bias on
    another device, and for `inplace`, before the data change: on a leaf that requires grad, on an inference tensor, on
    elements that share memory, and on views whose change autograd cannot record (of chunk and unbind, of no_grad).

    Examples:
        >>> x = torch.tensor([[-2.0, 0.5]])
        >>> isonet_fast.functional.srelu(x, bias=torch.tensor([-1.0, 0.0]))
        tensor([[-1.0000,  0.5000]])
    """
    if has_torch_function_variadic(x, bias):
        return handle_torch_function(srelu, (x, bias), x, bias, inplace, spatial_dims)
    check_tensor("x", x)
    check_tensor("bias", bias)
    check_device("bias", bias, "x", x)
    inplace = inplace if inplace is False else flag("inplace", inplace)
    if channel_axis("x", x, bias, spatial_dims) == 0:
        return srelu(x.unsqueeze(0), bias, inplace, x.dim() - 1).squeeze(0)
    if standard.wanted():
        return standard.srelu(x, bias)
    bias = kernel_parameter(bias, x)
    if not inplace:
        return SReLU.apply(x, bias, False)
    compiling = torch.compiler.is_compiling()
    if not may_write("x", x, bias, None, compiling):
        return SReLU.apply(x, bias, False)
    if compiling or x.is_neg() or bias.is_neg():
        return x.copy_(SReLU.apply(x, bias, False))  # see residual_srelu
    return SReLU.apply(x, bias, True)


def residual_srelu(
    shortcut: Tensor,  # (N, C, ...)
    branch: Tensor,  # (N, C, ...)
    bias: Tensor,  # C values
    scale: Tensor | None = None,  # one value
    inplace: bool = False,
    spatial_dims: int | str | None = None,
) -> Tensor:
    """The join of a residual block: y = max(shortcut + s * branch, b) (Qi et al., section 3.4).

    dshortcut = g m, dbranch = s g m, ds = sum of g m branch, db = sum of g (1 - m), m = not (y <= b). The sum is formed
    in float32 (float64 for float64) and rounded once. Ties, NaN, shapes and transforms as in `srelu`; twice
    differentiable.

    y has the dtype of `shortcut + branch`; autocast does not change it. For a float32 and a bfloat16 tensor this is
    float32, and for a float16 and a bfloat16 tensor too. Bias and scale are parameters and do not take part in type
    promotion. The scale is not rounded.

    `inplace=True` allows y to be written over the branch (saves one activation), if y has the branch's dtype. It needs
    scale=None, because the gradient of the scale is formed with the branch. See `srelu`.

    Raises as `srelu` does; ValueError where shortcut and branch differ in shape or device, where they overlap partly
    and `inplace` is given, and for a scale of more than one value.

    Examples:
        >>> shortcut, branch = torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 0.5]])
        >>> bias, scale = torch.tensor([-1.0, -1.0]), torch.tensor(0.5)
        >>> isonet_fast.functional.residual_srelu(shortcut, branch, bias, scale)
        tensor([[ 2., -1.]])
    """
    tensors = (shortcut, branch, bias) if scale is None else (shortcut, branch, bias, scale)
    if has_torch_function_variadic(*tensors):
        arguments = (shortcut, branch, bias, scale, inplace, spatial_dims)
        return handle_torch_function(residual_srelu, tensors, *arguments)
    check_tensor("shortcut", shortcut)
    for name, tensor in zip(("branch", "bias", "scale"), tensors[1:]):
        check_tensor(name, tensor)
        check_device(name, tensor, "shortcut", shortcut)
    inplace = inplace if inplace is False else flag("inplace", inplace)
    check_join(shortcut, branch, scale, inplace)
    if channel_axis("shortcut", shortcut, bias, spatial_dims) == 0:
        batch = shortcut.unsqueeze(0), branch.unsqueeze(0)
        return residual_srelu(*batch, bias, scale, inplace, shortcut.dim() - 1).squeeze(0)
    if branch.dtype != shortcut.dtype:
        dtype = torch.float64 if torch.float64 in (shortcut.dtype, branch.dtype) else torch.float32
        inplace = inplace and branch.dtype == dtype
        shortcut, branch = shortcut.to(dtype), branch.to(dtype)
    if standard.wanted():
        return standard.residual_srelu(shortcut, branch, bias, scale)
    bias = kernel_parameter(bias, shortcut)
    if scale is not None:
        scale = kernel_parameter(scale, shortcut)
    if not inplace:
        return ResidualSReLU.apply(branch, shortcut, bias, scale, False)
    compiling = torch.compiler.is_compiling()
    if not may_write("branch", branch, bias, shortcut, compiling):
        return ResidualSReLU.apply(branch, shortcut, bias, scale, False)
    # Two cases compute out of place and then copy. (1) torch.compile may reorder a Function's inputs. But autograd
    # takes the first one as the tensor that is written over, which matters if that tensor is a view. The compiler
    # allocates the buffers itself and removes the copy. (2) If an op returns nothing, PyTorch resolves no negative bit.
    if compiling or branch.is_neg() or shortcut.is_neg() or bias.is_neg():
        return branch.copy_(ResidualSReLU.apply(branch, shortcut, bias, None, False))
    check_apart("branch", branch, "shortcut", shortcut)
    return ResidualSReLU.apply(branch, shortcut, bias, None, True)


def orthogonality_loss(
    weights: Tensor | Sequence[Tensor],  # (O, I/g, k...) each; (O, I) for a linear layer
    *,
    stride: int | Sequence[int | Sequence[int]] = 1,
    dilation: int | Sequence[int | Sequence[int]] = 1,
    groups: int | Sequence[int] = 1,
    penalty: Penalty = "isonet",
    precision: Precision | None = None,
) -> Tensor:
    """How far convolutions are from an isometry, summed over the weights: one 0-dim tensor.

        1/2 * sum over t in T of || G_t - [t = 0] I ||_F^2  -  c        (summed over groups)
        G_t[m, m'] = sum over n, u of A_u[m, n] A_{u+t}[m', n],  A_u the matrix of tap u
        T = { t : |t_i| <= k_i - 1 and dilation_i t_i divisible by stride_i }

    penalty: "isonet" is the official penalty (Qi et al., ICML 2020, eq. 5). Its rows are the inputs where I/g < O/g.
    "lorth" (after Achour et al., JMLR 2022) is 0 exactly where the operator is row- or column-orthogonal on the inputs
    that its taps reach. It is the right choice for strided layers and for your own networks. A kernel smaller than its
    stride does not read all inputs; `existence.isometry` says what a shape allows. "matrix" is 1/2 ||K K^T - I||^2 of
    the flattened kernel K.

    One tensor or a list. For a list, `stride`, `dilation` and `groups` may be *lists* with one entry per weight; an int
    or a tuple (one value per spatial dimension) serves all. All weights on one device; half precision is computed in
    float32, under autocast too. precision: with None, the Triton kernels replace each float32 product by bf16 products,
    three of them for G; the CPU computes in float32. "highest" computes in IEEE float32. "lorth" layers with more rows
    than the operator has columns always use "highest", because their residual does not vanish at the optimum. float64
    is always computed in float64.

    This function is differentiable once. `reference.orthogonality_loss` is differentiable at every order, and
    transforms of torch.func and forward-mode AD use it.

    Raises TypeError for something that is no tensor, a sparse or nested one, or an integer or complex dtype; ValueError
    for a rank outside 2 to 5, an unknown penalty or precision, groups that do not divide the outputs, a stride or
    dilation that is no positive int or of the wrong length, lists of different lengths, weights on two devices.

    Examples:
        >>> linear, convolution = 2 * torch.eye(4), torch.zeros(8, 4, 3, 3)
        >>> isonet_fast.functional.orthogonality_loss(linear)  # 1/2 || 4 I - I ||^2
        tensor(18.)
        >>> isonet_fast.functional.orthogonality_loss([linear, convolution], stride=[1, 2], penalty="lorth")
        tensor(22.)
    """
    weights = listed(weights)
    check_penalty(penalty)
    check_precision(precision)
    if not weights:
        return torch.zeros(())
    named = {"stride": stride, "dilation": dilation, "groups": groups}
    geometry = [per_layer(name, value, len(weights)) for name, value in named.items()]
    layers = tuple(checked_layer(w, s, e, g, penalty) for w, s, e, g in zip(weights, *geometry, strict=True))
    for w in weights[1:]:
        check_device("every weight", w, "the first", weights[0])
    if standard.wanted():
        return standard.orthogonality_loss(weights, geometry[0], geometry[1], geometry[2], penalty)
    problem = Problem(layers, (1.0,) * len(layers), precision)
    return _orthogonality.loss(weights, problem)[0]
