"""The GPU targets: one line and nothing else where they can't run; where they can, nothing hides a failure."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TARGETS = ("test-gpu", "bench-gpu", "sanitize-gpu")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments, python, **environment):
    command = ["make", "--no-print-directory", f"PYTHON={python}", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    environment.pop("MAKEFLAGS", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def files():
    folders = ("benchmarks", "docs", "isonet_fast")  # other tests build in build
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
    return {path: path.stat().st_mtime_ns for path in [*found, *ROOT.glob("*")] if path.is_file()}


def refused(result, reason):
    """One line from make, which did nothing."""
    assert result.returncode == 2 and result.stdout == "", result
    (line,) = result.stderr.splitlines()
    assert line.startswith("Makefile:") and reason in line, line


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS[:2]), TARGETS[:2]], ids="+".join)
def test_without_a_gpu_make_does_nothing(targets):
    before = files()
    refused(make(*targets, python=sys.executable), "can use no GPU: ")
    assert files() == before


def fake(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_what_is_not_installed_is_named(tmp_path):
    """A Python in whose path torch, or pytest, is hidden; no Python; and a PATH without compute-sanitizer."""
    hidden = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == {0!r} else f(n, *a)"
    for package in ("torch", "pytest"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "sitecustomize.py").write_text(hidden.format(package))
        result = make("test-gpu", python=sys.executable, PYTHONPATH=str(tmp_path / package))
        refused(result, {"torch": "PyTorch is not installed for", "pytest": "pytest is not installed for"}[package])
    refused(make("bench-gpu", python=tmp_path / "nothing"), f"{tmp_path}/nothing does not run")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "sh", "sed"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    result = make("sanitize-gpu", "SHELL=/bin/sh", python=sys.executable, PATH=str(tools))
    refused(result, "compute-sanitizer is not on the PATH")


@pytest.fixture
def pretended(tmp_path):
    """A Python for which there is a GPU, and whose parts fail where $FAILS matches their arguments."""
    log = tmp_path / "log"
    script = f"""case "$*" in
*why_not_gpu.py*) echo none; exit;;
*xdist*) exit 1;;
esac
echo "$@" >> {log}
case "$*" in $FAILS) exit 1;; esac"""
    return fake(tmp_path, "python", script), log


@pytest.mark.parametrize("fails", ["*test_clocks.py", "*continue-on-collection-errors*", "*run_all*", "nothing"])
def test_a_failure_is_kept_and_the_rest_still_runs(pretended, fails):
    python, log = pretended
    result = make("test-gpu", "bench-gpu", python=python, FAILS=fails)
    assert (result.returncode == 0) == (fails == "nothing"), result
    install, clocks, tests, benchmarks = log.read_text().splitlines()
    assert install.startswith("-m pip install") and clocks.endswith("tests/benchmarks/test_clocks.py")
    assert "--ignore tests/benchmarks/test_clocks.py" in tests and "--device cuda" in tests
    assert benchmarks == "-m benchmarks.run_all --device cuda --seconds 380"


@pytest.mark.parametrize("fails", ["*memcheck*", "*racecheck*", "nothing"])
def test_the_sanitizer_runs_every_tool(pretended, tmp_path, fails):
    python, log = pretended
    fake(tmp_path, "compute-sanitizer", f'echo "$@" >> {log}; case "$*" in $FAILS) exit 9;; esac')
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    result = make("sanitize-gpu", python=python, FAILS=fails, PATH=path)
    assert (result.returncode == 0) == (fails == "nothing"), result
    _, *tools = log.read_text().splitlines()
    assert [line.split()[1] for line in tools] == ["memcheck", "racecheck"]


def test_a_wheel_is_built_for_the_release_list_and_read_back(tmp_path):
    """Not for the GPU of the machine that builds it. setup.py passes the list on (test_packaging.py)."""
    environment, log = tmp_path / "environment", tmp_path / "log"
    (environment / "bin").mkdir(parents=True)
    fake(environment / "bin", "python", f'echo "${{ISONET_FAST_CUDA_ARCHS:-here}} $@" >> {log}')
    (environment / ".ready").touch()
    result = make("wheel", f"VENV={environment}", python=sys.executable)
    assert result.returncode == 0, result
    build, read = log.read_text().splitlines()
    assert build == "release -m build --wheel --no-isolation"
    assert read.startswith("here tools/wheel_architectures.py dist/")
