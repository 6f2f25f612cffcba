"""What an installation holds, and the README's commands in a new environment."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import types
import venv
from pathlib import Path

import pytest
import yaml

import isonet_fast

ROOT = Path(__file__).parents[1]
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "runs", "site", "*.so", "*.egg-info", "__pycache__", ".*_cache", "_C.txt"
)


@pytest.fixture
def sources(tmp_path):
    """A copy of the sources without anything built, in a folder whose name has a space."""
    return shutil.copytree(ROOT, tmp_path / "the sources", ignore=NOT_SOURCES)


def run(command, folder, **environment):
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "PYTHONPATH": "", **environment},
    )


def setup(sources, *arguments, **environment):
    return run([sys.executable, "setup.py", "-q", *arguments], sources, **environment)


def test_a_module_deleted_from_the_sources_does_not_come_back_from_an_earlier_build(sources):
    gone = sources / "build" / "isonet_fast" / "gone.py"
    gone.parent.mkdir(parents=True)
    gone.touch()
    assert setup(sources, "build_py", "--build-lib", "build").returncode == 0
    assert not gone.exists() and (gone.parent / "functional.py").exists()


def test_a_build_without_kernels_keeps_no_library_of_an_earlier_one_and_says_why(sources):
    stale = sources / "isonet_fast" / "_C.so"
    stale.write_bytes(b"of an earlier build")
    result = setup(sources, "build_ext", "--inplace", ISONET_FAST_KERNELS="0")
    assert result.returncode == 0 and not stale.exists()
    assert "installing without compiled kernels (ISONET_FAST_KERNELS=0)" in result.stderr
    code = "from isonet_fast.ops import library; print(library.why_not_compiled)"
    said = run([sys.executable, "-c", code], sources).stdout
    assert said.startswith("built without the compiled kernels: ISONET_FAST_KERNELS=0 (")


def test_setuptools_that_cannot_build_wheels_says_what_to_install(sources):
    code = (
        "import sys, runpy; sys.modules.update({'setuptools.command.bdist_wheel': None, 'wheel': None});"
        "sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')"
    )
    result = run([sys.executable, "-c", code], sources)
    assert result.returncode == 1 and "pip install --upgrade 'setuptools<82' wheel" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_build_without_cmake_names_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("ISONET_FAST_KERNELS", raising=False)
    monkeypatch.chdir(ROOT)
    names = runpy.run_path("setup.py")
    names["why_not"].__globals__["executable"] = lambda name: None if name == "cmake" else name
    assert names["why_not"]() == "cmake was not found"


@pytest.mark.parametrize("version, field", [("65.5.0", "license"), ("77.0.3", "license_expression")])
def test_the_licence_has_the_form_that_setuptools_reads(monkeypatch, version, field):
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    names = runpy.run_path("setup.py")
    monkeypatch.setattr(names["setuptools"], "__version__", version)
    assert names["licence"]() == {field: "MIT"}


@pytest.mark.parametrize("torch_cuda, asked, expected", [
    (None, None, "OFF"), ("13.0", None, "AUTO"), (None, "1", "ON"), ("13.0", "0", "OFF"),
])  # fmt: skip
def test_cuda_kernels_are_built_for_a_cuda_torch_or_on_request(tmp_path, monkeypatch, torch_cuda, asked, expected):
    (tmp_path / "version.py").write_text(f"cuda = {torch_cuda!r}\n")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    names = runpy.run_path("setup.py")
    names["cuda"].__globals__["torch_folder"] = lambda: tmp_path
    monkeypatch.delenv("ISONET_FAST_CUDA", raising=False)
    if asked:
        monkeypatch.setenv("ISONET_FAST_CUDA", asked)
    assert names["cuda"]() == expected


@pytest.mark.parametrize("asked", [None, "release"])
def test_cmake_is_told_which_gpus_to_build_for(tmp_path, monkeypatch, asked):
    commands = []
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("ISONET_FAST_CUDA_ARCHS", raising=False)
    if asked:
        monkeypatch.setenv("ISONET_FAST_CUDA_ARCHS", asked)
    build = runpy.run_path("setup.py")["BuildKernels"]
    build.cmake.__globals__["executable"] = lambda name: name
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    build.cmake(types.SimpleNamespace(build_temp=tmp_path), tmp_path, "ON")
    told = [option for option in commands[0] if option.startswith("-DCMAKE_CUDA_ARCHITECTURES=")]
    assert told == ([f"-DCMAKE_CUDA_ARCHITECTURES={asked}"] if asked else [])


def test_published_wheels_are_built_for_the_release_list_and_read_back():
    """As `make wheel` does it (test_makefile.py)."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())
    (settings,) = (step["env"] for step in workflow["jobs"]["kernels"]["steps"] if "env" in step)
    assert "ISONET_FAST_CUDA_ARCHS=release" in settings["CIBW_ENVIRONMENT"].split()
    assert settings["CIBW_REPAIR_WHEEL_COMMAND"].startswith(
        "python tools/wheel_architectures.py {wheel} && auditwheel "
    )


def test_the_source_distribution_is_whole_and_holds_no_binary(sources):
    (sources / "isonet_fast" / "_C.so").write_bytes(b"built here")
    assert setup(sources, "sdist", "--dist-dir", "out").returncode == 0
    (archive,) = (sources / "out").iterdir()
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    tracked = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/*.py")}
    tracked |= {f"csrc/{path.name}" for path in ROOT.glob("csrc/*")}
    assert tracked <= held
    assert {"Makefile", "CHANGELOG.md", "CMakeLists.txt", "LICENSE", "README.md", ".ci/run", "docs/training.md"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_links_of_the_readme_work_on_the_page_of_a_package_index(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    text = runpy.run_path("setup.py")["readme"]()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and all(target.startswith(("https://", "#")) for target in targets)


def installed_files(package):
    """The top-level names in site-packages of a package and of everything that it needs, setuptools excepted."""
    names, waiting = set(), [package]
    seen = {"setuptools", "triton"}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform or an extra
            continue
        names |= {path.parts[0] for path in found.files or () if path.parts[0] not in ("..", "__pycache__")}
        waiting += [re.match(r"[\w.-]+", line)[0].lower() for line in found.requires or () if "extra ==" not in line]
    return names


def test_the_commands_of_the_readme_install_the_kernels_in_a_new_environment(sources, tmp_path):
    """It has no wheel, and an old setuptools or none. Only torch and what `demo` needs are lent to it."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    (site,) = (home / "lib").glob("python*/site-packages")
    own = Path(importlib.metadata.distribution("torch").locate_file(""))
    for package in ("torch", "numpy", "pyyaml", "tqdm", "scikit-learn", "matplotlib"):
        for name in installed_files(package):
            if not (site / name).exists():
                (site / name).symlink_to(own / name)
    (block,) = re.findall(r"```sh\n(pip install .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = [line for line in block.splitlines() if "isonet-fast demo" not in line]
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = run(["bash", "-ec", "\n".join(commands)], sources, PATH=path, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if re.search("Temporary failure in name resolution|Network is unreachable|No matching distribution", result.stderr):
        pytest.skip("no package index is reached")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert re.search(r"srelu, residual_srelu on cpu +C\+\+ kernels", result.stdout), result.stdout


def test_pre_commit_runs_the_commands_of_make_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert [hook["entry"] for hook in hooks] == commands


def test_the_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == isonet_fast.__version__
