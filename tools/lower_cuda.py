"""Compile the CUDA kernels of csrc/ without a GPU and read what came out: registers, spills, 16-byte accesses.

`rows()` returns one row per kernel and architecture, and what failed the gate: a spill, a stack frame, or a kernel for
16-byte vectors that does not access memory 16 bytes at a time or leaves a multiprocessor too few blocks.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted(path.name for path in (ROOT / "csrc").glob("*.cu"))
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # those of the release list


def accesses() -> dict[str, tuple[int, int]]:
    """16-byte loads and stores of a kernel, by its formula: tensors read and written, times kRounds."""
    declared = r"^struct (\w+) \{\n  static constexpr int kReads = (\d);.*\n  static constexpr int kWrites = (\d);"
    found = {}
    for header in sorted((ROOT / "csrc").glob("*.h")):
        for name, reads, writes in re.findall(declared, header.read_text(), re.MULTILINE):
            rounds = 4 if reads == "1" else 2
            found[name] = int(reads) * rounds, int(writes) * rounds
    return found


ACCESSES = accesses()


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if nvcc() is None:
        return "nvcc was not found"
    if cuobjdump() is None:
        return "cuobjdump was not found (CUDA's toolkit and Triton's package have it)"
    if shutil.which("g++") is None:
        return "g++ was not found (nvcc compiles the host's part with it)"
    return None


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        tool = pathlib.Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        if tool.exists():
            return str(tool)
    return shutil.which("cuobjdump")


def rows(architectures: tuple[int, ...] = ARCHITECTURES) -> tuple[list[dict], list[str]]:
    """One dict per kernel: kernel, arch, registers, shared, spills, loads_128, stores_128, tensor_core, async_loads."""
    reason = why_not()
    if reason:
        return [], [reason]
    jobs = [(source, arch) for arch in architectures for source in SOURCES]
    with concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        compiled = list(pool.map(lambda job: lower(*job), jobs))
    table = [row for part in compiled for row in part]
    failures = [failure for row in table for failure in gate(row)]
    for row in table:
        for column in ("stack", "vector", "last_loads", "grid"):
            del row[column]
    return table, failures


def lower(source: str, arch: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as directory:
        cubin = pathlib.Path(directory) / "kernels.cubin"
        command = [nvcc(), "-std=c++17", "-O3", "-DISONET_FAST_CUDA", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run([*command, "-o", cubin, ROOT / "csrc" / source], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source} for sm_{arch}:\n{done.stderr}")
        # Triton's cuobjdump calls the nvdisasm beside it.
        environment = dict(os.environ, PATH=f"{pathlib.Path(str(cuobjdump())).parent}:{os.environ['PATH']}")
        sass = subprocess.run(
            [cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True, env=environment
        ).stdout
    return [{**row, **instructions(sass, mangled)} for mangled, row in resources(done.stderr, arch).items()]


def resources(log: str, arch: int) -> dict[str, dict]:
    """What `ptxas -v` says of each kernel, by its mangled name."""
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for mangled, stack, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernel, vector = readable(mangled)
        found[mangled] = {
            "kernel": kernel,
            "arch": f"sm_{arch}",
            "registers": int(registers),
            "shared": int(shared.group(1)) if shared else 0,  # static; the launchers ask for at most 9 KB more
            "spills": int(stores) + int(loads),
            "stack": int(stack),
            "vector": vector,
        }
    assert found, f"no kernels in ptxas's output:\n{log}"
    return found


def readable(mangled: str) -> tuple[str, int]:
    """`planes_kernel<bfloat16, 8, SReLUBackward>` and its vector width (0 for `finish_kernel`, which has none)."""
    types = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
    names = re.match(
        r"_ZN11isonet_fast\d+([a-z]+_kernel)I(f|d|6__half|13__nv_bfloat16)(?:Li(\d+)ENS_\d+(\w+?)EE)?", mangled
    )
    assert names is not None, mangled
    kernel, element, vector, formula = names.groups()
    if vector is None:
        return f"{kernel}<{types[element]}>", 0
    return f"{kernel}<{types[element]}, {vector}, {formula}>", int(vector)


def instructions(sass: str, mangled: str) -> dict:
    body = sass.split(f"Function : {mangled}\n", 1)[1].split("Function : ", 1)[0]
    return {
        "loads_128": len(re.findall(r"\bLDG\.E\.128\b|\bLDG\.E\.\w+\.128\b|\bLDG\.E\.128\.", body)),
        "stores_128": len(re.findall(r"\bSTG\.E\.128\b|\bSTG\.E\.\w+\.128\b", body)),
        "last_loads": len(re.findall(r"\bLDG\.E\.EF\.128\b", body)),  # evicted first
        "grid": "waits" if "ACQBULK" in body else "lets the next one start" if "PREEXIT" in body else "",
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|IMMA)\b", body)),
        "async_loads": len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", body)),
    }


def gate(row: dict) -> list[str]:
    name = f"{row['kernel']} on {row['arch']}"
    failures = []
    if row["spills"]:
        failures.append(f"{name} spills {row['spills']} bytes")
    if row["stack"]:
        failures.append(f"{name} has a stack frame of {row['stack']} bytes")
    if row["vector"] > 1:
        expected = ACCESSES[row["kernel"].split(", ")[2].rstrip(">")]
        for found, wanted, what in zip((row["loads_128"], row["stores_128"]), expected, ("loads", "stores")):
            if found < wanted:
                failures.append(f"{name}: {found} {what} of 16 bytes, {wanted} expected")
        if "Backward" in name and row["last_loads"] < expected[0]:
            failures.append(f"{name}: only {row['last_loads']} loads leave the cache first")
        least = 3 if "Backward" in name else 4  # kFullGrid of csrc/partition.h counts on four
        if int(row["arch"].removeprefix("sm_")) >= 80 and resident_blocks(row) < least:
            failures.append(f"{name}: {row['registers']} registers leave {resident_blocks(row)} blocks, not {least}")
    return failures + [f"{name}: {failure}" for failure in _early_launch(row)]


def resident_blocks(row: dict) -> int:
    """Blocks of 256 threads whose registers, taken by eights, a multiprocessor holds at once."""
    return 65536 // (256 * 8 * -(-row["registers"] // 8))


def _early_launch(row: dict) -> list[str]:
    """From sm_90 on the finish kernel is launched while the backward before it runs: it must wait for its results."""
    if int(row["arch"].removeprefix("sm_")) < 90:
        return ["touches the grids around it, which this chip can't"] if row["grid"] else []
    wanted = (
        "waits" if row["kernel"].startswith("finish") else "lets the next one start" * ("Backward" in row["kernel"])
    )
    return [] if row["grid"] == wanted else [f"{row['grid'] or 'nothing'} where it should: {wanted or 'nothing'}"]
