"""The tiles that the kernels are launched with, on each kind of GPU, and their meta-parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

PACK_ROWS, PACK_COLUMNS = 32, 64
PATCH_COLUMNS, TAPS = 64, 16  # of the transforms; 16 taps at a time, the fewest that a product takes
THERE_ROWS, THERE_FREQUENCIES = 1, 32
BACK_ROWS, BACK_FREQUENCIES = 2, 16


class GramTile(NamedTuple):
    """How one size of gram tile is launched."""

    block: int  # rows and columns of G
    chunk: int  # columns of A contracted per step
    num_warps: int
    num_stages: int


class GradTile(NamedTuple):
    """How one size of gradient tile is launched; `cost` is its time per multiply-add, the largest tile's being 1."""

    rows: int
    columns: int
    depth: int  # rows of A contracted per step
    num_warps: int
    num_stages: int
    cost: float


class Variant(NamedTuple):
    """A set of tiles, largest first, and how they read memory."""

    tma: bool
    products: int  # 3 of bf16 planes, or 1 of IEEE float32
    gram: tuple[GramTile, ...]
    grad: tuple[GradTile, ...]


VARIANTS = {
    # sm_90, sm_100: descriptors, up to 227 KB of shared memory
    "tma": Variant(
        True,
        3,
        (GramTile(128, 64, 8, 3), GramTile(64, 64, 4, 3)),
        (GradTile(128, 256, 64, 8, 4, 1.0), GradTile(64, 128, 64, 4, 4, 1.5)),
    ),
    # sm_80, 86, 89, 120: pointers, within 99 KB
    "pointer": Variant(
        False,
        3,
        (GramTile(128, 32, 8, 4), GramTile(64, 64, 4, 4)),
        (GradTile(128, 128, 64, 8, 4, 1.0), GradTile(64, 128, 64, 4, 4, 1.5)),
    ),
    # precision="highest": IEEE float32 has no tensor cores; operands are held in registers, so steps are short
    "highest": Variant(
        False,
        1,
        (GramTile(64, 16, 4, 4),),
        (GradTile(64, 64, 16, 4, 4, 1.0),),
    ),
}


def pack_options(variant: Variant) -> dict[str, Any]:
    """Meta-parameters: orthogonality.py launches with them, tools/lower_triton.py compiles with them."""
    return {"ROWS": PACK_ROWS, "COLUMNS": PACK_COLUMNS, "SPLIT": variant.products == 3, "num_warps": 4}


def transform_options(split: bool) -> dict[str, Any]:
    return _patch_options(THERE_ROWS, THERE_FREQUENCIES) | {"SPLIT": split}


def transform_back_options(accumulate: bool) -> dict[str, Any]:
    return _patch_options(BACK_ROWS, BACK_FREQUENCIES) | {"ACCUMULATE": accumulate}


def _patch_options(rows: int, frequencies: int) -> dict[str, Any]:
    """One stage: loads that run ahead would take more registers than there are."""
    sizes = {"ROWS": rows, "COLUMNS": PATCH_COLUMNS, "FREQUENCIES": frequencies, "TAPS": TAPS}
    return sizes | {"num_warps": 4, "num_stages": 1}


def gram_options(variant: Variant, tile: GramTile, save: bool) -> dict[str, Any]:
    sizes = {"BLOCK": tile.block, "CHUNK": tile.chunk, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return sizes | {"PRODUCTS": variant.products, "TMA": variant.tma, "SAVE": save}


def grad_options(variant: Variant, tile: GradTile, accumulate: bool) -> dict[str, Any]:
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    sizes |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    sizes |= {"IEEE": variant.products == 1, "TMA": variant.tma}
    if variant.products == 1:  # left to itself, ptxas takes 128 registers on sm_120, and spills
        sizes["maxnreg"] = 192
    return sizes | {"ACCUMULATE": accumulate, "REDUCE": accumulate and variant.tma}


FINISH_OPTIONS = {"LAYERS": 128, "PARTIALS": 32, "num_warps": 8}
