"""The CUDA kernels compile without spills, with 16-byte accesses; see tools/lower_cuda.py."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

TOOL = pathlib.Path(__file__).resolve().parents[2] / "tools" / "lower_cuda.py"


@pytest.mark.parametrize("arch", [90, 120])
def test_every_kernel_passes_the_gates(arch: int) -> None:
    """What the targets are measured on, and the architecture that spills first; `make kernels` compiles for all."""
    spec = importlib.util.spec_from_file_location("lower_cuda", TOOL)
    assert spec is not None and spec.loader is not None
    lower_cuda = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lower_cuda)
    reason = lower_cuda.why_not()
    if reason:
        pytest.skip(reason)
    rows, failures = lower_cuda.rows((arch,))
    assert not failures, "\n".join(failures)
    formulas = lower_cuda.ACCESSES
    assert formulas["SReLUForward"] == (4, 4) and formulas["ResidualSReLUBackward"] == (6, 4)
    # Two kernels in four dtypes, vectors and scalars, for each formula; a last pass per file and sum type.
    assert len(rows) == 2 * 4 * 2 * len(formulas) + 2 * len(lower_cuda.SOURCES)
    assert {row["arch"] for row in rows} == {f"sm_{arch}"} and all(row["registers"] > 0 for row in rows)
    wrong = {"kernel": "k<float32, 4, SReLUBackward>", "arch": "sm_90", "spills": 8, "stack": 8, "vector": 4}
    wrong |= {"loads_128": 3, "stores_128": 1, "last_loads": 0, "grid": "waits", "registers": 81}
    assert len(lower_cuda.gate(wrong)) == 7
    right = {"kernel": "k<float32, 4, SReLUForward>", "arch": "sm_90", "spills": 0, "stack": 0, "vector": 4}
    right |= {"loads_128": 4, "stores_128": 4, "last_loads": 0, "grid": "", "registers": 64}
    assert lower_cuda.gate(right) == []
    (failure,) = lower_cuda.gate(right | {"registers": 65})
    assert failure.endswith("65 registers leave 3 blocks, not 4")
