"""What every test stands on: no settings of the person who runs it, no busy waiting, no stopwatch."""

from __future__ import annotations

import os

import hypothesis
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

# The same examples in every run, and no deadline: a busy machine must not fail a test.
hypothesis.settings.register_profile(
    "imgtool", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("imgtool")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEVICE", "CACHE", "THREADS", "CONFIG"):
        monkeypatch.delenv(f"IMGTOOL_{name}", raising=False)
