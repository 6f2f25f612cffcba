"""Type checkers see the package as its users do: what is right passes, what is wrong is found on its line."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from isonet_fast import reference
from isonet_fast.geometry import PENALTIES, Penalty

from .public_names import public_names

HERE = Path(__file__).parent
RIGHT, WRONG = HERE / "typing" / "right.py", HERE / "typing" / "wrong.py"
EXPECTED = {n for n, line in enumerate(WRONG.read_text().splitlines(), 1) if line.endswith("  # wrong")}
needs_mypy = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
needs_pyright = pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not on the PATH")


def run(folder: Path, *command: str | Path) -> str:
    """What a checker prints that runs in a user's folder and finds the package as an installed one."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    # pyright takes the first python there, which must be the one with torch
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.stdout


def examples() -> str:
    """The examples of all docstrings, each as the body of a function."""
    text = "import torch\nfrom torch import nn\nimport isonet_fast\n"
    for name, value in public_names().items():
        body = "".join(example.source for example in doctest.DocTestParser().get_examples(value.__doc__))
        text += f"def {name.replace('.', '_')}() -> None:\n{textwrap.indent(body, '    ')}"
    return text


def test_what_is_checked_uses_every_public_name() -> None:
    used = RIGHT.read_text() + examples()
    assert not [name for name in public_names() if not re.search(rf"\b{re.escape(name)}\(", used)]


def test_the_types_name_every_penalty() -> None:
    """The specification, which imports no other module, writes its own."""
    written = get_type_hints(reference.orthogonality_loss)["penalty"]
    assert get_args(Penalty) == get_args(written) == tuple(PENALTIES)


@needs_mypy
def test_mypy_accepts_right_calls_and_refuses_wrong_ones(tmp_path, pytestconfig) -> None:
    cache = pytestconfig.cache.mkdir("mypy")
    (tmp_path / "examples.py").write_text(examples())
    command = ["-m", "mypy", "--strict", "--config-file=", "--cache-dir", cache, RIGHT, WRONG, "examples.py"]
    printed = run(tmp_path, sys.executable, *command)
    errors = re.findall(r"^(.*?):(\d+): error: (.*)$", printed, re.MULTILINE)
    assert not [error for error in errors if not error[0].endswith(WRONG.name)]
    assert {int(line) for _, line, _ in errors} == EXPECTED
    assert printed.count(f"Literal{list(PENALTIES)}") >= 6  # the message says what is allowed


@needs_pyright
def test_pyright_accepts_right_calls_and_refuses_wrong_ones(tmp_path) -> None:
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    for file in (RIGHT, WRONG):
        shutil.copy(file, tmp_path)
    report = json.loads(run(tmp_path, "pyright", "--pythonpath", sys.executable, "--outputjson", "."))
    errors = {(Path(e["file"]).name, e["range"]["start"]["line"] + 1) for e in report["generalDiagnostics"]}
    assert errors == {(WRONG.name, line) for line in EXPECTED}


@needs_pyright
def test_nearly_every_public_symbol_has_a_known_type(tmp_path) -> None:
    printed = run(tmp_path, "pyright", "--verifytypes", "isonet_fast", "--ignoreexternal", "--outputjson")
    assert json.loads(printed)["typeCompleteness"]["completenessScore"] >= 0.95
