"""Triton's launchers without a GPU: a driver that checks what it is asked for and launches nothing.

    driver = null_driver.activate(90)

Kernels are compiled, loaded and launched by Triton's own code, on tensors of the CPU. They compute nothing. Until a
launch returns, the host does what it does on a GPU, except for the driver's own work. Use it in a process of its own,
because Triton keeps what it has compiled for a device.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver as runtime

SOURCE = pathlib.Path(__file__).with_name("null_driver.c")


class NullDriver(nvidia.CudaDriver):  # type: ignore[misc]
    """One device of the given architecture, with what Triton asks PyTorch for answered without PyTorch."""

    def __init__(self, arch: int, library: ctypes.CDLL) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device=0: divmod(arch, 10)
        self._arch, self._library = arch, library

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def _count(self, name: str) -> int:
        return ctypes.c_longlong.in_dll(self._library, f"null_driver_{name}").value

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return self._count("launches")

    @property
    def tensor_maps(self) -> int:
        """Tensor maps (TMA descriptors) encoded so far."""
        return self._count("tensor_maps")


def activate(arch: int = 90) -> NullDriver:
    """Make it this process's driver. Raises RuntimeError on a machine with a GPU, whose driver it would hide."""
    if torch.cuda.is_available():
        raise RuntimeError("the null driver is for machines without a GPU")
    folder = tempfile.TemporaryDirectory()
    path = os.path.join(folder.name, "libcuda.so.1")
    include = pathlib.Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["cc", "-shared", "-fPIC", "-O1", f"-I{include}", str(SOURCE), "-Wl,-soname,libcuda.so.1", "-o", path]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # whoever asks for libcuda.so.1 now gets this one
    triton.knobs.nvidia.libcuda_path = folder.name
    driver = NullDriver(arch, library)
    driver.folder = folder  # launchers are linked against what is in it
    runtime.set_active(driver)
    return driver
