"""Compile the Triton kernels for each architecture with no GPU, and check what the machine code promises.

    python tools/lower_triton.py [sm ...]

The real kernels, with the meta-parameters that the launchers choose. Gates: no spills; shared memory within the
chip's limit; both operands of every product in at least three buffers; no wait in a loop that drains all products or
copies in flight; tensor-core instructions and asynchronous loads; a piece of a tile is counted behind a barrier; every
store of a whole tile takes 16 bytes at a time, and so does every addition from sm_90 on.
`rows()` returns the table and the failed gates.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from isonet_fast.kernels import tiles
    from isonet_fast.kernels.finish import finish_kernel
    from isonet_fast.kernels.grad import grad_kernel
    from isonet_fast.kernels.gram import gram_kernel
    from isonet_fast.kernels.pack import pack_kernel
    from isonet_fast.kernels.transform import transform_back_kernel, transform_kernel
except ImportError:  # not for this platform
    triton = None

ARCHITECTURES = (80, 90, 100, 120)
POINTER_LIMIT = 101_376  # of sm_86, 89 and 120, which run the tiles of sm_80
SHARED_LIMIT = {80: POINTER_LIMIT, 90: 232_448, 100: 232_448, 120: POINTER_LIMIT}
TENSOR_CORE = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA", 120: r"HMMA"}
ASYNC_LOAD = {80: r"LDGSTS", 90: r"UTMALDG", 100: r"UTMALDG", 120: r"LDGSTS"}
NARROW = ("finish", "transform back")  # kernels that store 4 bytes at a time
DRAIN = re.compile(r"pendings = 0\b|async_wait[^:]*\bnum = 0\b")


class Compilation(NamedTuple):
    """One kernel as one launcher calls it; operands: loads that must run ahead, in all its loops together."""

    name: str
    kernel: Any
    signature: dict[str, str]
    options: dict[str, Any]
    operands: int = 0
    tensor_core: bool = False


def cases(arch: int) -> Iterator[Compilation]:
    """Every kernel that a device of this architecture launches."""
    for key in ("tma" if arch in (90, 100) else "pointer", "highest"):
        variant = tiles.VARIANTS[key]
        yield from _variant_cases(variant, "" if key != "highest" else " float32")
    signature = {"loss": "*fp32", "losses": "*fp32", "partials": "*fp32", "ranges": "*i32", "shares": "*fp64"}
    signature |= {"constants": "*fp64", "coefficients": "*fp64", "layers": "i32", "longest": "i32"}
    yield Compilation("finish", finish_kernel, signature, tiles.FINISH_OPTIONS)
    signature = {"spectrum": "*fp32", "tiles": "*i32", "waves": "*fp32", "views": "*i64", "scale": "fp32"}
    for accumulate in (False, True):
        name = "transform back" + (" accumulate" if accumulate else "")
        flat = {} if accumulate else {"out": "*fp32"}
        yield Compilation(name, transform_back_kernel, signature | flat, tiles.transform_back_options(accumulate))


def _variant_cases(variant: tiles.Variant, suffix: str) -> Iterator[Compilation]:
    element = "bf16" if variant.products == 3 else "fp32"
    fast = variant.products == 3

    def plane(rows: int, columns: int) -> str:
        return f"tensordesc<{element}[{rows}, {columns}]>" if variant.tma else f"*{element}"

    signature = {"hi": f"*{element}", "lo": f"*{element}", "tiles": "*i32", "views": "*i64"}
    signature |= {"arrivals": "*i32", "counted": "i32"}
    yield Compilation(f"pack{suffix}", pack_kernel, signature, tiles.pack_options(variant))
    options = tiles.transform_options(fast)
    yield Compilation(f"transform{suffix}", transform_kernel, signature | {"waves": "*fp32"}, options)
    for gram in variant.gram:
        box = plane(gram.block, gram.chunk)
        signature = {"hi": box, "lo": box, "residual": f"*{element}", "partials": "*fp32", "tiles": "*i32"}
        signature |= {"parts": "*fp32", "arrivals": "*i32"}
        for save in (True, False):
            name = f"gram {gram.block}x{gram.block}" + ("" if save else " loss only") + suffix
            options = tiles.gram_options(variant, gram, save)
            yield Compilation(name, gram_kernel, signature, options, 6 if fast else 2, fast)
    for grad in variant.grad:
        signature = {
            "parts": "*fp32",
            "arrivals": "*i32",
            "residual": plane(grad.rows, grad.depth),
            "residual_t": plane(grad.depth, grad.rows),
            "hi": plane(grad.depth, grad.columns),
            "tiles": "*i32",
            "runs": "*i32",
            "views": "*i64",
            "coefficients": "*fp64",
            "scale": "fp32",
        }
        for accumulate in (False, True):
            flat = {} if accumulate else {"out": "*fp32", "grad_output": "*fp32"}
            name = f"grad {grad.rows}x{grad.columns}" + (" accumulate" if accumulate else "") + suffix
            options = tiles.grad_options(variant, grad, accumulate)
            yield Compilation(name, grad_kernel, signature | flat, options, 4, fast)


def compile_case(case: Compilation, arch: int) -> Any:
    """What `kernel[grid](...)` compiles: pointers aligned to 16 bytes, absent arguments None. A test compares."""
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    constants = {name: case.options.get(name) for name, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (i,): [] if param.do_not_specialize_on_alignment else [["tt.divisibility", 16]]
        for i, (kind, param) in enumerate(zip(signature.values(), case.kernel.params, strict=True))
        if kind.startswith("*")
    }
    options = {name: case.options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in case.options}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(case: Compilation, arch: int) -> tuple[dict[str, Any], list[str]]:
    """One row, and the gates that this kernel fails."""
    built = compile_case(case, arch)
    sass, usage = _disassemble(built.asm["cubin"])

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}", sass))

    stores, additions = count(r"STG\S*\.128"), count(r"REDG\S*F32x4")
    least_stores, least_additions = wide_stores(case)
    row = {
        "kernel": case.name,
        "arch": f"sm_{arch}",
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        "shared": built.metadata.shared,
        "spills": count("LDL") + count("STL"),
        "loads_128": count(r"LDG\S*\.128"),
        "stores_128": stores + additions,
        "tensor_core": count(TENSOR_CORE[arch]),
        "async_loads": count(ASYNC_LOAD[arch]) or count("LDGSTS"),
    }
    chained = arch == 100 and chains(built.asm["ttir"])
    buffers, drained = pipelining(built.asm["ttgir"])
    gates = {
        "spills": row["spills"] == 0,
        f"shared memory above {SHARED_LIMIT[arch]}": row["shared"] <= SHARED_LIMIT[arch],
        f"{case.operands} operands in 3 buffers (found {buffers})": len([b for b in buffers if b >= 3])
        >= case.operands,
        "a wait in the loop drains everything": not drained or not case.operands,
        "a product into the accumulator of another one, which Triton miscompiles for tcgen05": not chained,
        "tensor-core instructions": row["tensor_core"] > 0 or not case.tensor_core,
        "a piece of a tile is counted before all of it is stored": not case.operands or counts_late(built.asm["ptx"]),
        "asynchronous loads": row["async_loads"] > 0 or not case.operands,
        f"{least_stores} stores of 16 bytes (found {stores})": stores >= least_stores,
        f"{least_additions} additions of 16 bytes (found {additions})": additions >= least_additions,
    }
    return row, [f"{case.name} sm_{arch}: {gate}" for gate, holds in gates.items() if not holds]


def wide_stores(case: Compilation) -> tuple[int, int]:
    """Stores and additions of 16 bytes that a kernel must hold. A gradient's: for a piece of a split tile; and, along
    rows and along columns, for a whole tile and for 64 columns of one whose pieces were added up."""
    options = case.options
    if "REDUCE" not in options:
        return int(options.get("SAVE", True) and not case.name.startswith(NARROW)), 0
    elements = 4 * 32 * options["num_warps"]  # that all threads store at once
    piece = options["ROWS"] * options["COLUMNS"] // elements
    result = 2 * options["ROWS"] * (options["COLUMNS"] + 64) // elements
    return (piece, result) if options["REDUCE"] else (piece + result, 0)


def chains(ttir: str) -> bool:
    """Whether a product adds to what another one has just computed, not to what its loop carries (triton #10821)."""
    products = dict(re.findall(r"(%\S+) = tt\.dot %\S+, %\S+, (%[^\s,]+)", ttir))
    return any(accumulator in products for accumulator in products.values())


def counts_late(ptx: str) -> bool:
    """Whether split_k.py counts a piece by an addition that releases and acquires, and a barrier after the stores."""
    before, *after = re.split(r"atom\.global\.gpu\.acq_rel\.add\.u32", ptx)
    return len(after) == 1 and "bar.sync" in before.rpartition("st.global")[2]


def pipelining(ttgir: str) -> tuple[list[int], bool]:
    """Buffers of every operand tile (bf16 or float32, more than one), and whether an innermost loop drains."""
    buffers = [int(n) for n in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x(?:bf16|f32)", ttgir)]
    drained = any(DRAIN.search(body) for body in _innermost_loops(ttgir))
    return buffers, drained


def _innermost_loops(ttgir: str) -> Iterator[str]:
    open_loops: list[list[Any]] = []  # [depth, lines, has a loop inside]
    depth = 0
    for line in ttgir.splitlines():
        code = line.split(" loc(")[0]
        for loop in open_loops:
            loop[1].append(code)
        before = depth
        depth += code.count("{") - code.count("}")
        if "scf.for" in code:
            for loop in open_loops:
                loop[2] = True
            open_loops.append([before, [], False])
        while open_loops and depth <= open_loops[-1][0]:
            _, lines, outer = open_loops.pop()
            if not outer:
                yield "\n".join(lines)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        ]
    return outputs[0], outputs[1]


def rows(architectures: Sequence[int] = ARCHITECTURES) -> tuple[list[dict[str, Any]], list[str]]:
    """The table of every kernel on every architecture, and the gates that fail."""
    table: list[dict[str, Any]] = []
    failures: list[str] = []
    if triton is None:
        print("Triton is not installed: its kernels are not compiled", file=sys.stderr)
        return table, failures
    for arch in architectures:
        for case in cases(arch):
            row, failed = inspect(case, arch)
            table.append(row)
            failures += failed
    return table, failures


def main() -> int:
    table, failures = rows([int(a.removeprefix("sm_")) for a in sys.argv[1:]] or ARCHITECTURES)
    for index, row in enumerate(table):
        if index == 0:
            print("  ".join(f"{name:>26}" if name == "kernel" else f"{name:>11}" for name in row))
        print("  ".join(f"{value:>26}" if name == "kernel" else f"{value:>11}" for name, value in row.items()))
    for failure in failures:
        print("gate failed:", failure)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
