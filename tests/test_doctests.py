"""Every public name has an example in its docstring, and the example prints what it says."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

import isonet_fast

from .public_names import documented_names, public_methods, public_names

DOCUMENTED = documented_names()
METHODS = {
    name: method
    for value in DOCUMENTED.values()
    if isinstance(value, type)
    for name, method in public_methods(value).items()
}
EXAMPLES = DOCUMENTED | METHODS


def test_the_site_documents_every_public_name() -> None:
    documented = list(DOCUMENTED.values())
    assert not [name for name, value in public_names().items() if value not in documented]


def test_the_methods_that_users_call_are_among_the_examples() -> None:
    assert {"OrthoRegularizer.accumulate_grad_", "OrthoRegularizer.summary", "SharedScale.fold"} <= METHODS.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_prints_what_it_says(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(EXAMPLES[name], ModuleNotFoundError):
        pytest.skip(str(EXAMPLES[name]))
    docstring = EXAMPLES[name].__doc__
    known = {"torch": torch, "nn": nn, "isonet_fast": isonet_fast}
    test = doctest.DocTestParser().get_doctest(docstring, known, name, None, None)
    assert test.examples, f"the docstring of {name} has no example"
    printed: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=printed.append)
    assert result.failed == 0, "".join(printed)
