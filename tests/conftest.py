"""What every test stands on: no settings of the person who runs it, no busy waiting, no stopwatch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job in the background ignores Ctrl-C, and so would every command that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no deadline: a busy machine must not fail a test.
hypothesis.settings.register_profile(
    "imgtool", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("imgtool")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEVICE", "CACHE", "THREADS", "CONFIG"):
        monkeypatch.delenv(f"IMGTOOL_{name}", raising=False)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight small photographs: soft tones, hard edges, a white lamp."""
    import cv2
    import numpy as np

    folder = tmp_path_factory.mktemp("photographs")
    for number in range(8):
        rng = np.random.default_rng(number)
        tones = cv2.resize(rng.uniform(0, 200, (4, 5, 3)), (112, 88), interpolation=cv2.INTER_CUBIC)
        picture = np.clip(tones, 0, 255).astype(np.uint8)
        for _ in range(12):
            top, left = int(rng.integers(80)), int(rng.integers(100))
            picture[top : top + 12, left : left + 7] = rng.integers(0, 256, 3)
        picture[5:9, 5:9] = 255
        cv2.imwrite(str(folder / f"photo-{number}.png"), picture)
    return folder
