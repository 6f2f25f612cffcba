"""The emulator, built once per session into build/emulator of the repository."""

from __future__ import annotations

import pathlib

import pytest
from emulator_build import ROOT, build, why_not


@pytest.fixture(scope="session")
def emulator_build() -> pathlib.Path:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    return build(ROOT / "build" / "emulator", targets=("emulator", "emulator_asan"))
