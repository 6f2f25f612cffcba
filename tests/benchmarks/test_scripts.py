"""Every script, through every provider and every row writer, on shapes of a few elements."""

import importlib
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch

from benchmarks import bench_orthogonality, bench_srelu, breakdown, clocks, providers, rows, run_all, step, table
from benchmarks.harness import Session, parser
from isonet_fast import functional
from isonet_fast.models.official import bare, official, official_penalty
from isonet_fast.nn import SReLU
from isonet_fast.ops import library

compiled = pytest.mark.skipif(not library.compiled_for("cpu"), reason="needs the compiled library")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def folder_for_rows(tmp_path, monkeypatch):
    """Dry runs keep their rows in a temporary folder: one that pytest removes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def stored():
    return {path: path.stat().st_mtime_ns for path in rows.RESULTS.glob("*")}


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("bench_srelu", [], {"copy", "official", "compile", "isonet_fast"}),
        ("bench_orthogonality", [], {"matmul", "copy", "official", "compile", "isonet_fast"}),
        (
            "bench_step",
            ["--profile"],
            {"matmul", "official", "compile", "isonet_fast", "isonet_fast without penalty", "bare"},
        ),
        pytest.param("bench_small", [], {"overlap", "frequency"}, marks=compiled),
        ("bench_interval", [], {"every step", "every 4th step", "every 16th step", "no penalty"}),
        ("bench_scaling", [], {"matmul", "official", "isonet_fast", "bare"}),
        ("bench_peers", [], {"none", "official", "isonet_fast", "OCNN kernel", "OCNN convolution", "torch orthogonal"}),
    ],
)
def test_a_dry_run_times_every_provider_and_keeps_no_rows(script, options, expected):
    before = stored()
    session = importlib.import_module(f"benchmarks.{script}").main(["--dry-run", *options])
    assert session.finish() == 0 and session.skipped == 0
    written = rows.read(session.path.parent)  # raises for other columns
    assert expected <= {row["provider"] for row in written}
    profiled = ("profile", "step, lines")
    timed = [row for row in written if row["op"] not in profiled and row["mode"] not in ("largest", "smallest")]
    assert all(float(row["p50_ms"]) >= 0 for row in timed)
    assert all(float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in timed)
    if script not in ("bench_scaling", "bench_peers", "bench_interval"):  # those measure cost, not errors
        ours = [row for row in timed if row["provider"] in ("isonet_fast", "overlap", "frequency")]
        assert ours and all(float(row["error"]) < 0.1 for row in ours)
    if "--profile" in options:
        check_profile(written)
    assert stored() == before


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would hide this machine's GPU")
@pytest.mark.usefixtures("compiler")
def test_dry_run_of_the_host():
    """In a process of its own, whose driver launches nothing."""
    code = "from benchmarks import bench_host; session = bench_host.main(['--dry-run']); print(session.path)"
    command = [sys.executable, "-c", f"{code}; raise SystemExit(session.finish())"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=rows.ROOT)
    assert run.returncode == 0, run.stderr
    written = rows.read(pathlib.Path(run.stdout.strip()).parent)
    assert [row["mode"] for row in written] == ["accumulate_grad_", "accumulate_grad_ moved", "loss", "gradient"]
    assert all(0 < float(row["p50_ms"]) for row in written)


def check_profile(written):
    lines = {row["provider"]: float(row["p50_ms"]) for row in written if row["op"] == "step, lines"}
    del lines[breakdown.PROFILER]  # within the noise
    assert list(lines) == [line for line, _ in breakdown.LINES]
    assert all(ms > 0 for line, ms in lines.items() if "compiled" not in line or library.compiled_for("cpu"))
    assert "the rest" in table.lines_table(written)
    shares = []
    for provider in ("official", "isonet_fast"):
        profiled = [row for row in written if row["op"] == "profile" and row["provider"] == provider]
        parts = {row["mode"]: float(row["p50_ms"]) for row in profiled}
        assert set(parts) == {"convolution", "SReLU", "penalty", "optimizer", "rest"}
        assert all(ms > 0 for ms in parts.values())
        shares.append(parts["rest"] / sum(parts.values()))
    assert min(shares) < 0.5, shares  # one operator that waits for a processor can be most of so short a step


def test_shapes_are_those_of_the_paper():
    shapes = bench_srelu.activation_shapes("isonet50", SReLU, 2)
    assert len(shapes) == 12
    assert {(2, 64, 112, 112), (2, 256, 56, 56), (2, 128, 56, 56), (2, 512, 14, 14), (2, 2048, 7, 7)} <= set(shapes)


@pytest.mark.parametrize("network", ["isonet18", "risonet18"])
def test_official_form_agrees_with_ours_in_float64(network):
    """The official stem pools last, scales and joins in passes of their own."""
    model = providers.perturb(providers.build(network)).double()
    x, y = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2])
    ours, theirs = (step.Step(net, False).measured(x, y) for net in (model, official(model)))
    assert step.deviation(ours, theirs) < 1e-10


def test_a_wrong_step_is_seen():
    model = providers.perturb(providers.build("cifar8"))
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    truth = step.truth(model, x, y)
    assert step.Step(model, False, regularize=True).error(x, y, truth) < 1e-4
    assert step.Step(model, False).error(x, y, truth) > 0.5  # without its penalty
    with pytest.raises(ArithmeticError, match="srelu_bias"):
        step.Step(bare(model), False, official_penalty).error(x, y, truth)


def test_a_part_that_fails_or_overruns_is_reported(monkeypatch, tmp_path):
    fake = tmp_path / "python"
    become = "*.slow) sleep 60;; *.wrong) exit 3;; *.broken) exit 1;;"
    fake.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/log\ncase $2 in {become} esac\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(run_all, "GRACE", -6.0)
    assert run_all.run(run_all.Part("fine", 7), [], 100) == "complete"
    assert run_all.run(run_all.Part("wrong", 7), [], 100).startswith("complete, but a provider failed")
    assert run_all.run(run_all.Part("broken", 7), [], 100) == "failed, status 1"
    assert run_all.run(run_all.Part("slow", 7), [], 100) == "ended after 1 s"
    assert run_all.run(run_all.Part("fine", 7), [], -5) == "not started: no time left"
    run_all.run(run_all.Part("fine", 9, ("--profile",)), ["--quick"], 100)
    run_all.run(run_all.Part("fine", 9, plain=True), ["--quick"], 100)
    log = (tmp_path / "log").read_text().splitlines()
    assert log[-2:] == ["-m benchmarks.fine --quick --profile --budget 9", "-m benchmarks.fine"]


def test_rounding_fails_nobody_at_a_scale():
    """The official arithmetic multiplies gradient and branch in bfloat16, and rounds the sum to it: up to 0.002 off,
    where the check allows 0.001."""
    for seed in range(4):
        case = bench_srelu.ActivationCase("residual_srelu, scale", (64, 8, 4, 4), torch.bfloat16, "nchw")
        inputs = bench_srelu.Inputs(case, torch.device("cpu"), seed)
        assert bench_srelu.check(providers.official_join, inputs, case.op) < 1e-5


@pytest.mark.parametrize("mode", ["forward", "backward", "forward+backward"])
def test_providers_of_an_activation_share_memory_and_no_leaves(mode):
    """A leaf that two share would have one node in autograd, on the stream that first captured it."""
    case = bench_srelu.ActivationCase("srelu", (2, 8, 4, 4), torch.float32, "channels_last")
    seen = []

    def provider(*arguments):
        seen.append(arguments)
        return functional.srelu(*arguments)

    sets = [bench_srelu.Inputs(case, torch.device("cpu"), 0)]
    for _ in range(2):
        bench_srelu.caller(provider, sets, mode)()
    for first, second in zip(*seen, strict=True):
        assert first is not second and first.data_ptr() == second.data_ptr() and first.stride() == second.stride()
        assert first.is_leaf and second.is_leaf and first.requires_grad and second.requires_grad


def test_every_mode_of_a_small_tensor_is_one_launch(monkeypatch):
    """Else the host's path through autograd would be timed. The forward of a captured backward is made on the stream
    that captures, as autograd runs the one where it ran the other."""
    made, forwards = [], []

    def graph(self, call):
        before = len(forwards)
        call()
        made.append(len(forwards) - before)
        return call

    def counted(*arguments):
        forwards.append(arguments)
        return functional.srelu(*arguments)

    monkeypatch.setattr(clocks.Clock, "graph", graph)
    op = bench_srelu.OPS["srelu"]._replace(official=counted, ours=counted)
    monkeypatch.setitem(bench_srelu.OPS, "srelu", op)
    monkeypatch.setattr(bench_srelu, "check", lambda *arguments: 0.0)
    session = Session("srelu", parser("").parse_args(["--dry-run"]))
    bench_srelu.run_case(session, bench_srelu.ActivationCase("srelu", (2, 5, 3, 4), torch.float32, "nchw"))
    assert made == [1] * 6  # two providers, three modes; the first call of each is the one that captures
    assert session.failures == 0


def test_warming_a_graph_up_does_not_count_as_a_wrong_gradient(monkeypatch):
    """A capture makes calls of its own, each of which adds to the gradients."""
    monkeypatch.setattr(clocks.Clock, "graph", lambda self, call: [call() for _ in range(3)] and call)
    session = Session("orthogonality", parser("").parse_args(["--dry-run"]))
    bench_orthogonality.PenaltyBenchmark(session, "cifar8", providers.build("cifar8")).compare("loss+gradient graph")
    assert "isonet_fast" in {row["provider"] for row in rows.read(session.path.parent)}
    assert session.failures == 0


def test_nothing_starts_without_a_gpu(monkeypatch):
    """Parts without options of their own would measure the CPU, and overwrite its rows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run_all, "run", lambda *args: pytest.fail("a part was started"))
    with pytest.raises(SystemExit, match="PyTorch finds no GPU"):
        run_all.main(["--device", "cuda"])


@pytest.mark.parametrize("seconds", [380, 560, 100])
def test_parts_are_scaled_to_a_total(seconds):
    parts = run_all.scaled(run_all.PARTS["cuda"], seconds)
    assert [part.seconds for part in parts if part.plain] == [40]
    assert sum(part.seconds + run_all.GRACE for part in parts) == pytest.approx(max(seconds, 112))


@pytest.mark.parametrize(("machine", "minutes"), [("cpu", 10), ("cuda", 7)])
def test_all_parts_end_within_the_limit(machine, minutes):
    parts = run_all.PARTS[machine]
    assert sum(part.seconds + run_all.GRACE for part in parts) <= run_all.LIMIT[machine] < 60 * minutes - 20
    for part in parts:
        assert importlib.util.find_spec(f"benchmarks.{part.module}"), part.module
