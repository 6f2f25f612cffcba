"""Where the GPU refuses the first launch: PyTorch's results, one launch, one warning, the reason (emulated_ops.py)."""

import contextlib
import ctypes
import io
import warnings
from unittest import mock

import torch

import isonet_fast
from isonet_fast import environment, functional, reference
from isonet_fast.ops import library


class Torch:
    """torch, which makes the tensors of a GPU on the CPU."""

    def __getattr__(self, name):
        found = getattr(torch, name)
        return (lambda *values, device: found(*values)) if name in ("zeros", "tensor", "full") else found


def info() -> str:
    """What isonet_fast.info() prints where the emulator is a GPU."""
    gpu = {"is_available": lambda: True, "current_device": lambda: 0, "get_device_name": lambda: "emulator"}
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        mock.patch.multiple(torch.cuda, **gpu),
        mock.patch.multiple(library, torch=Torch(), compiled_for=lambda device_type: True),
        mock.patch.multiple(environment, torch=Torch(), _matrix=str, _launch_matrix=str),  # the penalty is not asked
    ):
        isonet_fast.info()
    return printed.getvalue()


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
    rows = dict(line.split("  ", 1) for line in info().splitlines())
    assert rows["srelu, residual_srelu on cuda"].strip() == f"PyTorch: {reason}", rows
    print(f"{ctypes.CDLL(str(library.COMPILED)).emulated_launches()} launches")


if __name__ == "__main__":
    main()
