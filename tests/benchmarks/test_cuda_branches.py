"""What the benchmarks do on a GPU only and the rehearsal can't: its tensors stay on the CPU."""

import importlib.util
import types

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import bench_orthogonality, bench_step, breakdown, harness, providers, rows, run_all


def test_every_table_knows_both_devices():
    tables = (harness.SECONDS, bench_step.SECONDS, bench_orthogonality.TOLERANCE, run_all.PARTS, run_all.LIMIT)
    for table in tables:
        assert set(table) == {"cpu", "cuda"}


@pytest.mark.parametrize(("printed", "driver"), [("echo 580.65.06; echo 580.65.06", "580.65.06"), ("exit 9", "?")])
def test_rows_name_gpu_and_driver(monkeypatch, tmp_path, printed, driver):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{printed}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    machine = rows.machine.__wrapped__("cuda")
    assert (machine["device"], machine["driver"]) == ("some GPU", f"{driver}, CUDA {torch.version.cuda}")


def test_the_official_penalty_is_its_own_on_a_gpu():
    parameter = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    network = types.SimpleNamespace(parameters=lambda: iter([parameter]), ortho=lambda: "theirs")
    assert providers.OfficialRepo.penalty(None, network) == "theirs"


def operator(name, device_us=0.0, parent=None, sequence_nr=-1):
    return types.SimpleNamespace(
        name=name, device_type=DeviceType.CPU, cpu_parent=parent, sequence_nr=sequence_nr,
        self_device_time_total=device_us, self_cpu_time_total=1e9,
    )  # fmt: skip


def kernel(name, us):
    span = types.SimpleNamespace(elapsed_us=lambda: us)
    return types.SimpleNamespace(name=name, device_type=DeviceType.CUDA, time_range=span)


def test_a_profile_counts_the_time_of_kernels():
    """A backward operator belongs to its forward one; a kernel that Python launched belongs to no operator."""
    engine = operator("autograd::engine::evaluate_function: ConvolutionBackward0", sequence_nr=1)
    srelu = operator("bench:SReLU")
    events = [
        operator("aten::conv2d", 3000, sequence_nr=1),
        *(engine, operator("aten::mm", 5000, engine)),
        *(srelu, operator("isonet_fast::srelu", 2000, srelu)),
        operator("Optimizer.step#SGD.step", 1000),
        *(kernel("sm90_gemm", 8000), kernel("void isonet_fast::cuda::planes_kernel<float, 4, SReLUForward>", 2000)),
        *(kernel("multi_tensor_apply_kernel", 1000), kernel("gram_kernel", 400), kernel("finish_kernel", 7)),
        kernel("bench:penalty", 1e9),  # the profiler shows ranges on the device too
    ]
    found = breakdown.tally(events, cuda=True)
    assert found == pytest.approx({"convolution": 8, "SReLU": 2, "penalty": 0.407, "optimizer": 1, "rest": 0})


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_triton_kernel_belongs_to_the_penalty(monkeypatch):
    monkeypatch.syspath_prepend(str(rows.ROOT / "tools"))
    import lower_triton

    names = {case.kernel.__name__ for case in lower_triton.cases(90)}
    assert len(names) == 6
    assert {name: breakdown.category([name]) for name in names} == dict.fromkeys(names, "penalty")
    assert breakdown.category(["void isonet_fast::cuda::finish_kernel<float>"]) != "penalty"
