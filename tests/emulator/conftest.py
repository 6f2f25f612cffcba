"""The emulator, built once per session into build/emulator of the repository."""

from __future__ import annotations

import pathlib

import pytest
from emulator_build import ROOT, build, obstacle


@pytest.fixture(scope="session")
def emulator_build() -> pathlib.Path:
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    return build(ROOT / "build" / "emulator")
