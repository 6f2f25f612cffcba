"""Every public name has an example in its docstring, and the example prints what it says."""

from __future__ import annotations

import doctest
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import nn

import isonet_fast

from .public_names import public_names

API = (Path(__file__).parents[1] / "docs" / "api.md").read_text()


def documented() -> list[str]:
    """The dotted names of docs/api.md: the entries of mkdocstrings, and the members that they list."""
    names = []
    for entry in re.split(r"^::: isonet_fast\.", API, flags=re.MULTILINE)[1:]:
        name, members = entry.split()[0], re.search(r"members: \[(.*?)\]", entry)
        names += [f"{name}.{member}" for member in members[1].split(", ")] if members else [name]
    return names


def test_the_site_documents_every_public_name() -> None:
    assert set(public_names()) <= set(documented())


@pytest.mark.parametrize("name", documented())
def test_the_example_prints_what_it_says(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    docstring = attrgetter(name)(isonet_fast).__doc__
    known = {"torch": torch, "nn": nn, "isonet_fast": isonet_fast}
    test = doctest.DocTestParser().get_doctest(docstring, known, name, None, None)
    assert test.examples, f"the docstring of {name} has no example"
    printed: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=printed.append)
    assert result.failed == 0, "".join(printed)
