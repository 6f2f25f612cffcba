"""Where the GPU refuses the first launch: PyTorch's results, one launch, one warning, the reason (emulated_ops.py)."""

import ctypes
import warnings

import torch

from isonet_fast import functional, reference
from isonet_fast.ops import library


def main() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    bias, scale = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for op, arguments in (("srelu", (x, bias)), ("residual_srelu", (x, x.detach() + 1, bias, scale))):
            ours, expected = getattr(functional, op)(*arguments), getattr(reference, op)(*arguments)
            assert torch.equal(ours, expected)
            wanted = [a for a in arguments if a.requires_grad]
            for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (ours, expected)), strict=True):
                torch.testing.assert_close(a, b)
        functional.srelu(x.detach().clone(), bias.detach(), inplace=True)
    reason = "its first launch failed: no kernel image is available"
    assert library._refusal(x.device) == reason
    assert [str(w.message) for w in caught] == [f"isonet_fast: PyTorch serves SReLU on cpu: {reason}"]
    print(f"{ctypes.CDLL(str(library.COMPILED)).emulated_launches()} launches")


if __name__ == "__main__":
    main()
