"""`make test-gpu bench-gpu`, rehearsed without a GPU: see rehearsal.py."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import rows, run_all, table, targets

HERE = pathlib.Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the driver that launches nothing"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: no rehearsal is needed"),
]


def rehearse(folder, *command, **more):
    environment = {**os.environ, "REHEARSAL": str(folder), "REHEARSAL_PYTHON": sys.executable, **more}
    environment.pop("MAKEFLAGS", None)
    return subprocess.run(command, cwd=rows.ROOT, env=environment, capture_output=True, text=True, check=False)


def stored():
    """What a benchmark might overwrite."""
    files = [*rows.RESULTS.glob("*"), *table.PAGES, rows.ROOT / "docs" / "accuracy.png"]
    return {path: path.stat().st_mtime_ns for path in files}


def test_failing_tests_a_part_that_hangs_and_one_that_crashes(tmp_path):
    """Each is reported and costs the rest nothing: every other part leaves its rows, and the end is an error."""
    before = stored()
    python = f"PYTHON={HERE / 'rehearsal'}"
    fails = {"REHEARSAL_HANGS": "bench_host", "REHEARSAL_FAILS": "bench_scaling"}
    done = rehearse(tmp_path, "make", "test-gpu", "bench-gpu", python, "SECONDS=200", **fails)
    assert done.returncode == 2 and "test-gpu] Error" in done.stderr and "bench-gpu] Error" in done.stderr, done.stderr
    names = {part.module for part in run_all.PARTS["cuda"]}
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip()]
    outcomes = {first: rest[0] for first, *rest in lines if first in names}
    assert outcomes.pop("bench_host").startswith("ended after")
    assert outcomes.pop("bench_scaling") == "failed, status -6"
    assert len(outcomes) == 4 and set(outcomes.values()) == {"complete"}, done.stderr[-4000:]
    assert "FAILED" not in done.stderr
    found = rows.read(tmp_path / "results")
    assert {row["device"] for row in found} == {"Rehearsed GPU"}
    providers = {row["provider"] for row in found}
    assert providers >= {"copy", "matmul", "official", "compile", "isonet_fast", "bare", "isonet_fast without penalty"}
    measured = {target.what for target, outcome in targets.evaluate(found) if outcome is not None}
    assert len(measured) >= 4, measured
    assert "Rehearsed GPU" in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert stored() == before


@pytest.mark.parametrize("part", ["bench_host", "bench_scaling"])
def test_the_parts_that_fail_above(part, tmp_path):
    command = [str(HERE / "rehearsal"), "-m", f"benchmarks.{part}", "--quick", "--device", "cuda", "--budget", "100"]
    done = rehearse(tmp_path, *command)
    assert done.returncode == 0, done.stderr[-4000:]
    assert any(row["provider"] == "isonet_fast" for row in rows.read(tmp_path / "results"))


def test_a_failing_probe_and_a_failing_provider(tmp_path):
    """Without a C compiler neither the penalty's kernels nor torch.compile work: everybody else leaves rows."""
    reason = "Failed to find C compiler"
    for command in (["bench_step", "--quick", "--device", "cuda"], ["accuracy"]):
        command = [str(HERE / "rehearsal"), "-m", f"benchmarks.{command[0]}", *command[1:]]
        done = rehearse(tmp_path, *command, REHEARSAL_REFUSES=reason)
        assert done.returncode == 3, done.stderr[-4000:]
        failed = [line for line in done.stderr.splitlines() if "FAILED" in line]
        assert failed and all(reason in line for line in failed), failed
    found = rows.read(tmp_path / "results")
    timed = {row["provider"] for row in found if row["op"] == "step"}
    assert timed >= {"official", "bare", "isonet_fast without penalty"} and not timed & {"isonet_fast", "compile"}
    exact = {row["provider"] for row in found if row["op"] == "orthogonality_accuracy"}
    assert exact >= {"tf32", "bf16x3", "official"} and not exact & {"isonet_fast", "isonet_fast highest"}
