"""What a build of the emulator must pass: every launcher against numpy, to the bit where the op is exact.

`run_all(module)` is one full run. As a script (`python emulator_checks.py MODULE_PATH [options]`) it serves the builds
that need a process of their own: AddressSanitizer wants to be loaded first, and a planted bug may end the process.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import itertools
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np

from tests.extents import DTYPES, EXTENTS

ORDERS = (0, 1, 2, 3)
NUMPY = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": np.uint16}


def load(path: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("emulator", path)
    spec = importlib.util.spec_from_loader("emulator", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def store(values: np.ndarray, dtype: str) -> np.ndarray:
    """float values rounded to nearest-even in `dtype`; bfloat16 as its uint16 bits. NaN stays NaN."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(NUMPY[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def value(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers behind `stored`, as float32 (float64 for float64): exact."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored if dtype == "float64" else stored.astype(np.float32)


def empty(shape: Any, dtype: str, misaligned: bool = False) -> np.ndarray:
    """Uninitialised (poisoned), starting on 16 bytes, or one element after. The allocation ends with the array."""
    item = np.dtype(NUMPY[dtype]).itemsize
    size = int(np.prod(shape)) * item
    raw = np.full(size + 16 + item, 0xFF, np.uint8)
    start = -raw.ctypes.data % 16 + (item if misaligned else 0)
    if not misaligned and raw.ctypes.data % 16 == 0:  # then nothing lies between the array and the red zone
        raw, start = np.full(max(size, 1), 0xFF, np.uint8), 0
        if raw.ctypes.data % 16:
            return empty(shape, dtype)
    return raw[start : start + size].view(NUMPY[dtype]).reshape(shape)


class Inputs:
    """One extent, dtype and parameter dtype: inputs with ties, NaN and infinities, and what must come out."""

    def __init__(self, extent: tuple, dtype: str, parameter_dtype: str, misaligned: bool = False) -> None:
        self.extent, self.dtype, self.parameter_dtype, self.misaligned = extent, dtype, parameter_dtype, misaligned
        self.random = np.random.default_rng(hash((*extent, len(dtype))) % 2**32)
        _, channels, _ = extent
        self.bias = store(self.random.normal(-0.2, 0.5, channels), parameter_dtype)
        self.b = value(store(value(self.bias, parameter_dtype), dtype), dtype)[None, :, None]
        self.scale = store(np.array([0.7]), parameter_dtype)
        self.s = value(self.scale, parameter_dtype).astype(self.b.dtype)[0]

    def tensor(self, special: bool = True) -> np.ndarray:
        x = self.random.standard_normal(self.extent)
        if special and x.size:
            flat = x.reshape(-1)
            flat[:: max(1, x.size // 5)] = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 2.0])[
                : len(flat[:: max(1, x.size // 5)])
            ]
        out = empty(self.extent, self.dtype, self.misaligned)
        out[:] = store(x, self.dtype)
        if special and x.size:  # ties
            out[:, :, ::7] = store(np.broadcast_to(self.b, x.shape)[:, :, ::7], self.dtype)
        return out

    def new(self) -> np.ndarray:
        return empty(self.extent, self.dtype, self.misaligned)

    def parameter(self, size: int) -> np.ndarray:
        return empty((size,), self.parameter_dtype)

    def equal(self, got: np.ndarray, expected: np.ndarray, what: str) -> None:
        """Same bits, except for the payload of a NaN."""
        got, expected = value(got, self.dtype), value(store(expected, self.dtype), self.dtype)
        wrong = ~((got == expected) | (np.isnan(got) & np.isnan(expected)))
        assert not wrong.any(), f"{what} of {self}: {wrong.sum()} of {wrong.size} elements are wrong"

    def close(self, got: np.ndarray, terms: np.ndarray, axes: tuple, what: str) -> None:
        """A sum of at most a few dozen partial sums, each of a few dozen terms, in float32, rounded once."""
        terms = terms.astype(np.float64)
        expected, magnitude = terms.sum(axes), np.abs(terms).sum(axes)
        unit = 2.0**-53 if self.dtype == "float64" else 2.0**-24
        rounding = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}
        bound = (
            16 * unit * magnitude
            + rounding[self.parameter_dtype] * np.abs(expected)
            + 1e-7 * (self.parameter_dtype == "float16")
        )
        error = np.abs(value(got, self.parameter_dtype).astype(np.float64).reshape(expected.shape) - expected)
        assert (error <= bound).all(), f"{what} of {self}: error {error.max():.2e}, allowed {np.max(bound):.2e}"

    def __repr__(self) -> str:
        return f"{self.extent} {self.dtype}, parameters {self.parameter_dtype}{', misaligned' * self.misaligned}"


def traffic(module: ModuleType, case: Inputs, reads: int, writes: int, workspace: int, what: str) -> None:
    """Inputs once, outputs once, partial sums once: an extra pass over a tensor cannot slip in."""
    counted = module.traffic()
    size = int(np.prod(case.extent)) * np.dtype(NUMPY[case.dtype]).itemsize
    assert counted["read"] == reads * size, f"{what} of {case} reads {counted['read']} B of its inputs' {reads * size}"
    assert counted["written"] == writes * size, (
        f"{what} of {case} writes {counted['written']} B, outputs {writes * size}"
    )
    assert counted["partials_written"] <= workspace, f"{what} of {case}: partial sums overflow the workspace"
    assert counted["partials_read"] <= counted["partials_written"], f"{what} of {case} reads partial sums twice"
    assert counted["launches"] <= (2 if workspace else 1), f"{what} of {case}: {counted['launches']} launches"


def check_srelu(module: ModuleType, case: Inputs) -> list[bytes]:
    module.traffic()
    shape, parameters = (case.dtype, case.extent), (case.bias, case.parameter_dtype)
    x, y, g, grad_x = case.tensor(), case.new(), case.tensor(special=False), case.new()
    grad_bias = case.parameter(case.extent[1])
    module.srelu(*shape, [x], [y], *parameters)
    traffic(module, case, 1, 1, 0, "srelu")
    xv = value(x, case.dtype)
    case.equal(y, np.where((xv > case.b) | np.isnan(xv), xv, case.b), "srelu")
    module.srelu(*shape, [x], [x], *parameters)
    case.equal(x, value(y, case.dtype), "srelu_")
    module.traffic()
    workspace = module.srelu_backward(*shape, [g, y], [grad_x], *parameters, grad_bias=grad_bias)
    traffic(module, case, 2, 1, workspace, "srelu_backward")
    gv, passes = value(g, case.dtype), ~(value(y, case.dtype) <= case.b)
    case.equal(grad_x, np.where(passes, gv, 0), "grad_x")
    case.close(grad_bias, np.where(passes, 0, gv), (0, 2), "grad_bias")
    return [y.tobytes(), grad_x.tobytes(), grad_bias.tobytes()]


def check_residual_srelu(module: ModuleType, case: Inputs) -> list[bytes]:
    shape, parameters = (case.dtype, case.extent), (case.bias, case.parameter_dtype)
    shortcut, branch, y, g = case.tensor(), case.tensor(special=False), case.new(), case.tensor(special=False)
    sv, hv = value(shortcut, case.dtype), value(branch, case.dtype)
    for scale, s in ((None, sv.dtype.type(1)), (case.scale, case.s)):
        module.traffic()
        module.residual_srelu(*shape, [shortcut, branch], [y], *parameters, scale)
        traffic(module, case, 2, 1, 0, "residual_srelu")
        with np.errstate(invalid="ignore"):
            total = sv + s * hv
        case.equal(y, np.where((total > case.b) | np.isnan(total), total, case.b), "residual_srelu")
    over = case.new()
    over[:] = branch
    module.residual_srelu(*shape, [shortcut, over], [over], *parameters, case.scale)
    case.equal(over, value(y, case.dtype), "residual_srelu_")
    module.traffic()
    grad_shortcut, grad_branch = case.new(), case.new()
    grad_bias, grad_scale = case.parameter(case.extent[1]), case.parameter(1)
    workspace = module.residual_srelu_backward(
        *shape, [g, y, branch], [grad_shortcut, grad_branch], *parameters, case.scale, grad_bias, grad_scale
    )
    traffic(module, case, 3, 2, workspace, "residual_srelu_backward")
    gv, passes = value(g, case.dtype), ~(value(y, case.dtype) <= case.b)
    case.equal(grad_shortcut, np.where(passes, gv, 0), "grad_shortcut")
    case.equal(grad_branch, case.s * np.where(passes, gv, 0), "grad_branch")
    case.close(grad_bias, np.where(passes, 0, gv), (0, 2), "grad_bias")
    case.close(grad_scale, np.where(passes, gv, 0).astype(np.float64) * hv, (0, 1, 2), "grad_scale")
    return [y.tobytes(), grad_shortcut.tobytes(), grad_branch.tobytes(), grad_bias.tobytes(), grad_scale.tobytes()]


def cases() -> list[tuple]:
    """Every extent in every dtype; float32 masters beside half tensors and misaligned pointers on some."""
    plain = [(e, d, d, False) for e, d in itertools.product(EXTENTS, DTYPES)]
    masters = [(e, d, "float32", False) for e in EXTENTS[4:6] for d in ("float16", "bfloat16", "float64")]
    misaligned = [(e, d, d, True) for e in (EXTENTS[0], EXTENTS[6], EXTENTS[8]) for d in DTYPES]
    return plain + masters + misaligned


def check(module: ModuleType, case: tuple) -> None:
    """One case in every order of threads: right each time, and the same bits."""
    results = []
    for order in ORDERS:
        module.set_order(order)
        results.append(check_srelu(module, Inputs(*case)) + check_residual_srelu(module, Inputs(*case)))
        assert results[-1] == results[0], f"{Inputs(*case)}: the bits depend on the order of the threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--extents", type=int, nargs="*", default=None, help="indices into EXTENTS")
    options = parser.parse_args()
    module = load(options.module)
    chosen = [
        case
        for case in cases()
        if options.dtype in (None, case[1]) and (options.extents is None or EXTENTS.index(case[0]) in options.extents)
    ]
    for case in chosen:
        check(module, case)
    print(f"passed {len(chosen)} cases", flush=True)
    os._exit(0)  # fibers that a planted bug left behind are no concern of the interpreter's shutdown


if __name__ == "__main__":
    sys.exit(main())
