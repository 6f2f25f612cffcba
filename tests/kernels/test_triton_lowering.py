"""The kernels that the launchers choose, compiled with no GPU: the gates of tools/lower_triton.py.

All of sm_90's default kernels; of the other architectures the largest gram tile (`make kernels` compiles everything).
"""

import importlib.util
import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tools"))

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import lower_triton

CASES = [(90, c) for c in lower_triton.cases(90) if "float32" not in c.name and "loss only" not in c.name]
CASES += [(arch, c) for arch in (80, 100, 120) for c in lower_triton.cases(arch) if c.name == "gram 128x128"]
CASES += [(120, c) for c in lower_triton.cases(120) if c.name == "grad 64x64 accumulate float32"]


@pytest.mark.parametrize("arch, case", CASES, ids=[f"sm_{arch} {case.name}" for arch, case in CASES])
def test_every_kernel_passes_the_gates(arch, case):
    row, failures = lower_triton.inspect(case, arch)
    assert not failures, (row, failures)


def test_a_drain_is_noticed():
    """The parser sees what it is there for: only a wait inside the innermost loop counts."""
    loop = "scf.for i = a to b {\n scf.if c {\n }\n wait {pendings = %d : i32}\n}\nwait {pendings = 0 : i32}"
    assert not lower_triton.pipelining(loop % 3)[1]
    assert lower_triton.pipelining(loop % 0)[1]
    assert lower_triton.pipelining("%x = ttg.local_alloc : () -> !ttg.memdesc<3x64x64xbf16, #s>")[0] == [3]


def test_a_piece_that_is_counted_too_early_is_noticed():
    store, barrier, count = "st.global.v4.b32 [%rd1], {%r1};", "bar.sync 0;", "atom.global.gpu.acq_rel.add.u32 %r2"
    assert lower_triton.counts_late("\n".join([store, barrier, count, store]))
    assert not lower_triton.counts_late("\n".join([barrier, store, count, store]))
    assert not lower_triton.counts_late("\n".join([store, barrier, count.replace("acq_rel", "relaxed")]))


def test_a_product_into_the_accumulator_of_another_is_noticed():
    """The tiles of sm_80 have such a pair, for want of registers: no chip that multiplies by tcgen05 may get them."""
    (pair,) = (case for case in lower_triton.cases(80) if case.name == "gram 64x64")
    assert any("another one" in failure for failure in lower_triton.inspect(pair, 100)[1])


def test_additions_of_4_bytes_are_noticed():
    """sm_80 has no wider ones: pieces of a tile, which are stored 16 bytes at a time, must not stand in for them."""
    (case,) = (case for case in lower_triton.cases(80) if case.name == "grad 64x64 accumulate float32")
    case = case._replace(options=case.options | {"REDUCE": True})
    assert lower_triton.inspect(case, 80)[1] == [f"{case.name} sm_80: 32 additions of 16 bytes (found 0)"]
