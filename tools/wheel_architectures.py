"""Which GPUs a wheel holds kernels for, read back from its library: `python tools/wheel_architectures.py dist/*.whl`.

Fails where a wheel with CUDA kernels lacks an architecture of the release list (csrc/architectures.cmake) or its PTX,
without which later GPUs run nothing.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import lower_cuda

LIBRARY = "isonet_fast/_C.so"


def release() -> tuple[set[str], set[str]]:
    """(machine code, PTX) of the release list, as sm_80."""
    text = (lower_cuda.ROOT / "csrc" / "architectures.cmake").read_text()
    (names,) = re.findall(r"set\(release_architectures ([^)]+)\)", text)
    return listed(names.split())


def listed(names: list[str]) -> tuple[set[str], set[str]]:
    """(machine code, PTX) that CMake's list of architectures asks for."""
    plain = {name: name.removesuffix("-real").removesuffix("-virtual") for name in names}
    return (
        {f"sm_{number}" for name, number in plain.items() if not name.endswith("-virtual")},
        {f"sm_{number}" for name, number in plain.items() if not name.endswith("-real")},
    )


def compiled(library: pathlib.Path) -> tuple[set[str], set[str]]:
    """(machine code, PTX) in a library; two empty sets if it has no kernels."""
    tool = lower_cuda.cuobjdump()
    if tool is None:
        raise SystemExit("cuobjdump was not found (CUDA's toolkit and Triton's package have it)")

    def architectures(option: str) -> set[str]:
        printed = subprocess.run([tool, option, str(library)], capture_output=True, text=True, check=False).stdout
        return set(re.findall(r"\.(sm_\d+)a?\.(?:cubin|ptx)", printed))

    return architectures("--list-elf"), architectures("--list-ptx")


def check(wheel: pathlib.Path) -> str | None:
    """What is wrong with a wheel, or None; prints what it holds."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        if LIBRARY not in archive.namelist():
            print(f"{wheel.name}: no compiled kernels")
            return None
        code, ptx = compiled(pathlib.Path(archive.extract(LIBRARY, folder)))
    print(
        f"{wheel.name}: {' '.join(sorted(code)) or 'no CUDA kernels'}{', PTX ' if ptx else ''}{' '.join(sorted(ptx))}"
    )
    if not code and not ptx:
        return None
    missing = [*(release()[0] - code), *(f"PTX of {name}" for name in release()[1] - ptx)]
    return f"{wheel.name} lacks {', '.join(sorted(missing))}" if missing else None


def main() -> int:
    wrong = [problem for wheel in sys.argv[1:] if (problem := check(pathlib.Path(wheel)))]
    for problem in wrong:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
