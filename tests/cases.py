"""Sizes and corner cases that every op is tested with, and the tolerance that all share."""

import math

import torch

from tests import extents

DTYPES = tuple(getattr(torch, name) for name in extents.DTYPES)

# (N, C, ...): odd sizes, tails of every vector width, one, any number of trailing dimensions
SHAPES = (
    (3, 5, 7, 7),
    (4, 16, 8, 8),
    (2, 33, 9, 9),
    (4, 3, 33, 5),
    (1, 6, 40, 41),
    (2, 20, 3, 3),
    (3, 64, 1, 1),
    (1, 1, 3, 1),
    (1, 1, 1, 1),
    (5, 7),
    (5, 16),
    (2, 8, 13),
    (3, 7, 29),
    (2, 5, 3, 4, 5),
)
EMPTY = ((0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (0, 0))

OVER_FREQUENCIES = ((12, 9, 5, 5), 1, 1, 1)  # with Triton too
# Of the penalty: weight shape (O, I/g, k...), stride, dilation, groups
LAYERS = (
    ((16, 16, 3, 3), 1, 1, 1),
    ((32, 16, 3, 3), 2, 1, 1),
    ((16, 32, 1, 1), 1, 1, 1),
    ((32, 16, 1, 1), 2, 1, 1),
    ((8, 24, 5, 5), 2, 1, 1),
    ((9, 5, 7, 7), 3, 1, 1),
    ((8, 8, 1, 3), 1, 1, 1),
    ((8, 8, 2, 4), (1, 2), 1, 1),
    ((8, 4, 3, 3), 1, 2, 2),
    ((24, 4, 3, 3), 2, 2, 1),
    ((12, 1, 3, 3), 1, 1, 12),
    ((6, 5, 4), 3, 2, 1),
    ((5, 6, 2, 3, 2), (1, 2, 1), 1, 1),
    ((17, 33), 1, 1, 1),
    ((33, 17), 1, 1, 1),
    ((20, 4, 3, 3), 2, 1, 1),  # more rows than the operator has columns: "lorth" subtracts a constant
    ((16, 32, 3, 3), 2, 2, 1),
    ((10, 21, 2, 2), 1, 1, 1),
    ((33, 12, 1, 3), (1, 3), (1, 2), 1),
    ((12, 33, 3, 1), 1, 1, 1),
    ((20, 6, 3, 3), 1, 1, 2),
    ((12, 10, 3, 3), 2, 1, 4),
    ((1, 1, 3, 3), 1, 1, 1),
    ((1, 8, 3), 1, 1, 1),
    OVER_FREQUENCIES,
)
EMPTY_LAYERS = (((8, 0, 3, 3), 1, 1, 1), ((0, 8, 3, 3), 1, 1, 1))


def channels_last(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


# The same values in every memory order.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "batch innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),  # the first dimension for the last
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],  # gaps
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def layouts(x):
    """The same values in every memory order: (name, tensor)."""
    return ((name, lay(x)) for name, lay in LAYOUTS.items())


def per_channel(bias, x):
    """The bias in the dtype of x, in a shape that broadcasts over x (N, C, ...)."""
    return bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def activations(shape, dtype, device, bias_dtype=None):
    """Values with ties with the bias, NaN, both infinities and both zeros sprinkled in; and the bias, of x's dtype or
    another."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    bias = (torch.randn(shape[1], dtype=torch.float64, generator=generator) * 0.5).to(bias_dtype or dtype)
    flat = x.view(-1)
    flat[::3] = per_channel(bias.to(dtype), x).expand(shape).reshape(-1)[::3]
    for n, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0)):
        flat[7 * n + 1 :: 41] = value
    return x.to(device, dtype), bias.to(device)


def random_weight(shape):
    """A weight of a trained layer's size."""
    return torch.randn(shape) / max(1, math.prod(shape[1:])) ** 0.5


def assert_accurate(actual, reference, plain, message=""):
    """Against the float64 reference the error may be twice that of plain PyTorch in the same dtype, plus 1e-6 of the
    largest reference value. NaN must match NaN and infinities must match exactly."""
    assert actual.shape == reference.shape, (message, actual.shape, reference.shape)
    actual, plain, reference = (t.detach().double().cpu() for t in (actual, plain, reference))
    assert torch.equal(actual.isnan(), reference.isnan()), f"{message}: NaN in other places"
    finite = reference.isfinite()
    # an infinity of the reference may be reached by rounding to half precision as well
    assert torch.equal(actual[~finite & ~reference.isnan()], reference[~finite & ~reference.isnan()]), message
    if not finite.any():
        return
    error = (actual - reference)[finite].abs().nan_to_num(nan=float("inf"))
    allowed = 2 * (plain - reference)[finite].abs().max() + 1e-6 * reference[finite].abs().max()
    assert error.max() <= allowed, f"{message}: error {error.max():.3e}, allowed {allowed:.3e}"
