"""The quick part of `make faults`: every fault a few times; the long part is `python -m tests.faults`."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from . import __main__ as command
from .faults import FAULTS, Fault, Impossible
from .lab import Lab

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork and SIGKILL are POSIX")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("faults"), random.randrange(10**6)) as made:
        yield made


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.quick], ids=lambda fault: fault.inject.__name__)
def test_nothing_is_lost_but_what_is_promised(fault: Fault, lab: Lab) -> None:
    print(f"seed {lab.seed}")  # pytest shows it when the test fails
    try:
        row = command.inject(fault, lab, fault.quick)
    except Impossible as reason:
        pytest.skip(str(reason))
    assert int(row[1]) >= fault.quick


def test_the_document_has_every_fault() -> None:
    """`python -m tests.faults --write` makes the table anew."""
    (written,) = command.MARKED.finditer(command.DOCUMENT.read_text())
    rows = [line.removeprefix("| ").split(" | ") for line in written[0].splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [fault.name for fault in FAULTS]
    assert [row[2] for row in rows] == [fault.promise for fault in FAULTS]
    assert all(int(row[1]) >= fault.full or row[3] == "not tried" for row, fault in zip(rows, FAULTS, strict=True))
