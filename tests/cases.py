"""Sizes and corner cases that every op is tested with, and the tolerance that all share."""

import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# (N, C, ...): odd sizes, tails of every vector width, one, none, any number of trailing dimensions
SHAPES = (
    (2, 3, 5, 7),
    (4, 16, 8, 8),
    (2, 33, 9, 9),
    (1, 1, 1, 1),
    (3, 64, 1, 1),
    (5, 7),
    (2, 8, 13),
    (2, 5, 3, 4, 5),
    (0, 4, 3, 3),
    (2, 0, 3, 3),
    (2, 4, 0, 3),
)


def layouts(x):
    """The same values in every memory format: (name, tensor)."""
    yield "contiguous", x.contiguous()
    if x.dim() == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        yield "channels_last_3d", x.contiguous(memory_format=torch.channels_last_3d)
    yield "permuted", x.movedim(0, -1).contiguous().movedim(-1, 0)  # dense, batch innermost
    yield "sliced", torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield "misaligned", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    yield "flipped channels", x.flip(1).contiguous().flip(1)


def activations(shape, dtype, device):
    """Values with ties with the bias, NaN, both infinities and both zeros sprinkled in; and the bias."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    x = torch.randn(shape, generator=generator)
    bias = torch.randn(shape[1], generator=generator) * 0.5
    flat = x.view(-1)
    ties = torch.rand(shape, generator=generator) < 0.1
    x = torch.where(ties, bias.to(dtype).float().view(-1, *[1] * (len(shape) - 2)), x)
    flat = x.view(-1)
    for n, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0)):
        flat[7 * n + 3 :: 41] = value
    return x.to(device, dtype), bias.to(device, dtype)


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
