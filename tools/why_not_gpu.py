"""Why these targets of the Makefile can't run here, in one line; "none" if they can: `python why_not_gpu.py test-gpu`.

The Makefile asks before it does anything else. A GPU is looked for last: what is not installed is the likelier cause.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Collection

NEEDS_PYTEST = {"test-gpu", "sanitize-gpu"}


def why_not(targets: Collection[str]) -> str | None:
    if importlib.util.find_spec("torch") is None:
        return f"PyTorch is not installed for {sys.executable}; choose another Python with PYTHON=..."
    if NEEDS_PYTEST & set(targets) and importlib.util.find_spec("pytest") is None:
        return f"pytest is not installed for {sys.executable}"
    if "sanitize-gpu" in targets and shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
    return no_gpu()


def no_gpu() -> str | None:
    """The reason that PyTorch gives for finding no GPU, or None."""
    import torch

    try:
        torch.cuda.init()
        return None if torch.cuda.device_count() else f"PyTorch {torch.__version__} finds no GPU"
    except Exception as error:  # no driver, no device, a torch without CUDA: each says so in its own type
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"PyTorch {torch.__version__} can use no GPU: {lines[0]}"


if __name__ == "__main__":
    print(why_not(sys.argv[1:]) or "none")
