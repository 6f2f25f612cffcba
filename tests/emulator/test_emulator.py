"""The CUDA sources of csrc/, run on the CPU: results, determinism in any order of threads, bytes moved, addresses."""

from __future__ import annotations

import pathlib
import random
from types import ModuleType

import emulator_checks as checks
import pytest
from emulator_build import run_checks

from tests.extents import DTYPES, EXTENTS


@pytest.fixture(scope="session")
def emulator(emulator_build: pathlib.Path) -> ModuleType:
    return checks.load(str(emulator_build / "emulator.so"))


@pytest.mark.parametrize("extent", EXTENTS, ids=str)
def test_kernels_agree_with_numpy_in_every_order_of_threads(emulator: ModuleType, extent: tuple) -> None:
    """Against numpy in four orders of threads, with the bytes of every launch counted; see emulator_checks.check."""
    mine = [case for case in checks.cases() if case[0] == extent]
    assert len(mine) >= len(DTYPES)
    for case in mine:
        checks.check(emulator, case)


def test_no_access_is_outside_its_memory(emulator_build: pathlib.Path) -> None:
    """The emulator's tests under AddressSanitizer: no access outside a tensor, the workspace or shared memory."""
    done = run_checks(emulator_build / "emulator_asan.so")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


def test_division_by_multiplication(emulator: ModuleType) -> None:
    generator = random.Random(0)
    divisors = [1, 2, 3, 7, 49, 3136, 2**31 - 1, 2**31, 2**32 + 1, 2**62 - 1, 2**62]
    divisors += [generator.randrange(1, 2 ** generator.randrange(2, 62)) for _ in range(200)]
    for divisor in divisors:
        numbers = [
            0,
            1,
            divisor - 1,
            divisor,
            divisor + 1,
            2**63 - 1,
            (2**63 - 1) // divisor * divisor,
            (2**63 - 1) // divisor * divisor - 1,
        ]
        numbers += [generator.randrange(2**63) for _ in range(20)]
        for n in numbers:
            assert emulator.divide(n, divisor) == n // divisor, (n, divisor)


@pytest.mark.parametrize("vector", [1, 2, 4, 8])
@pytest.mark.parametrize("sums", [False, True])
def test_partition_of_any_size(emulator: ModuleType, vector: int, sums: bool) -> None:
    """Every element is in some block and a launch fits the GPU, up to 2^40 elements."""
    generator = random.Random(vector)
    extents = [
        (256, 64, 112 * 112),
        (256 * 56 * 56, 64, 1),
        (256, 2048, 49),
        (1, 3, 2**38),
        (2**38, 3, 1),
        (1, 1, 2**40),
        (1, 2**20, 1),
    ]
    extents += [tuple(generator.randrange(1, 2 ** generator.randrange(1, 13)) for _ in range(3)) for _ in range(300)]
    for extent in extents:
        outer, channels, inner = extent
        numel = outer * channels * inner
        p = emulator.partition(list(extent), vector, sums)
        assert p["splits"] * p["span"] >= p["length"] > (p["splits"] - 1) * p["span"], (extent, p)
        assert 32 <= p["threads"] <= 256 and p["threads"] % 32 == 0, (extent, p)
        assert 0 < p["splits"] * p["tiles"] < 2**31, (extent, p)
        assert p["shared_values"] * 8 <= 48 << 10, (extent, p)
        if p["planes"]:
            assert p["length"] * vector == outer * inner and p["tiles"] == channels, (extent, p)
        else:
            assert p["tiles"] * p["tile_columns"] >= p["columns"] > (p["tiles"] - 1) * p["tile_columns"], (extent, p)
            assert p["length"] * p["columns"] * vector >= numel, (extent, p)
            assert p["tile_columns"] * p["tile_rows"] <= p["threads"], (extent, p)
            if p["length"] > 1:  # a thread's columns keep their channels from row to row
                assert p["columns"] * vector % (channels * inner) == 0, (extent, p)
        partial_rows = p["splits"] * p["tiles"] * p["slots"]
        if sums and numel >= 2**19:  # a small part of the traffic, unless the gradient of the bias itself is not
            assert partial_rows <= max(numel / 16, 2 * channels), (extent, p)


@pytest.mark.parametrize("extent", [(2, 2, 9216), (1100, 64, 1)], ids=str)
def test_the_first_block_takes_the_end_of_the_tensor(emulator: ModuleType, extent: tuple) -> None:
    """It reads what was written last and is still in the cache. One extent for each of the two kernels."""
    case = checks.Inputs(extent, "bfloat16", "bfloat16")
    x, y = case.tensor(special=False), case.new()
    untouched = y.copy()
    emulator.set_blocks(1)
    try:
        emulator.srelu("bfloat16", extent, [x], [y], case.bias, "bfloat16")
    finally:
        emulator.set_blocks(2**32 - 1)
    written = (y != untouched).ravel()
    assert written[-1] and not written[0] and 0 < written.sum() < written.size


def test_a_small_forward_reaches_every_multiprocessor(emulator: ModuleType) -> None:
    """An H200 has 132. A large forward gets no more blocks for it."""
    for extent in ((128 * 49, 256, 1), (4, 96, 56 * 56)):  # 3.2 and 2.4 MB of bfloat16
        partition = emulator.partition(list(extent), 8, False)
        assert partition["splits"] * partition["tiles"] >= 132, (extent, partition)
    partition = emulator.partition([256 * 56 * 56, 256, 1], 8, False)  # 411 MB, 8 vectors per thread
    assert 12000 <= partition["splits"] * partition["tiles"] <= 13000
