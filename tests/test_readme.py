"""The README and the documentation: their Python runs, their links lead somewhere, and the site builds."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .public_names import documented_names

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_the_python_of_a_page_runs(page, capsys, monkeypatch, tmp_path):
    """Each block continues those above it."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        try:
            exec(compile(block.replace("path/to/isonet_fast", str(ROOT)), page, "exec"), names)
        except ModuleNotFoundError as error:
            if error.name is not None:
                raise
            pytest.skip(str(error))  # a sentence of this package says what to install


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_picture_is_linked():
    pages = "".join(page.read_text() for page in PAGES)
    for picture in ROOT.glob("docs/**/*.png"):
        assert picture.name in pages, f"docs/{picture.name} is linked from no page"


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="mkdocstrings is not installed")
def test_the_site_builds_without_a_warning_and_shows_every_name(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]  # --quiet counts none
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    shown = re.findall(r'<h3 id="(isonet_fast\..*?)"', (tmp_path / "api" / "index.html").read_text())
    assert sorted(shown) == sorted(documented_names())
