"""The way from the launchers to the driver, Triton's own code included, with a driver that launches nothing: it refuses
what the CUDA driver would refuse of tensor maps and launches (tools/null_driver.c)."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.usefixtures("compiler")

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the null driver would hide this machine's GPU", allow_module_level=True)


@pytest.fixture(scope="module")
def launched(compiler):
    run = subprocess.run([sys.executable, HERE / "launched.py", "90"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_every_call_launches_a_fixed_number_of_kernels(launched):
    expected = {"loss": (5, 4), "loss, saved": (5, 4), "gradient": (4, 9), "accumulate": (9, 13)}
    expected["gradient of an element"] = expected["gradient"]
    for call, counts in launched["launches"].items():
        name, precision, _ = call.rsplit(", ", 2)
        launches, maps = expected[name]
        if precision == "highest":  # one tile size, and pointers
            launches, maps = {5: 4, 4: 3, 9: 7}[launches], 0
        assert counts == [launches, maps], call


def test_what_is_launched_is_what_was_lowered(launched):
    """The gates of test_triton_lowering hold for the code that runs: Triton specialises it for its arguments."""
    lowered = launched["lowered"]
    assert [name for key, name in launched["kernels"].items() if key not in lowered] == []
    assert [name for key, name in lowered.items() if key not in launched["kernels"]] == []


def test_the_driver_refuses_an_illegal_tensor_map():
    code = """
import torch, null_driver
driver = null_driver.activate(90)
fill = getattr(driver.utils, "fill_tma_descriptor_tiled", None) or driver.utils.fill_tma_descriptor  # Triton 3.8, 3.6
base = torch.zeros(1024, 256, dtype=torch.bfloat16).data_ptr()
legal = [base, 3, 2, 9, [64, 64], [1024, 256], [256, 1], 0]  # 128-byte swizzle, bf16
fill(*legal)
for at, value in ((0, base + 2), (4, [64, 128]), (4, [512, 64]), (5, [0, 256]), (6, [252, 1])):
    try:
        fill(*legal[:at], value, *legal[at + 1:])
    except RuntimeError:
        continue
    raise SystemExit(f"accepted {value} as argument {at}")
"""
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "tools")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
