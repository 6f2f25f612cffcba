"""pytest, where isonet_fast must be the copy in this directory whose kernels the emulator runs; counts the launches."""

import ctypes
import pathlib
import sys

import pytest

from isonet_fast.ops import library  # before pytest puts the repository first on sys.path


def main() -> int:
    assert library.COMPILED == pathlib.Path.cwd() / "isonet_fast" / "_C.so", library.COMPILED
    assert library.why_not_compiled is None, library.why_not_compiled
    code = pytest.main(sys.argv[1:])
    print(f"{ctypes.CDLL(str(library.COMPILED)).emulated_launches()} launches")
    return code


if __name__ == "__main__":
    sys.exit(main())
