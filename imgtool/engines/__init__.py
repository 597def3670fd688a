"""The engines by name. Adding one: a folder here and a line in ``SUMMARY``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from types import ModuleType

    from imgtool.engine import Engine

SUMMARY = {
    "lens": "Straighten photos that a lens bent.",
    "deblur": "Sharpen motion-blurred photos of any size.",
    "awb": "White balance: gains of red and blue from raw frames.",
    "isp": "RAW Bayer frames to photographs.",
    "filter": "Small networks that imitate classical filters.",
}


def load(name: str) -> Engine:
    """Import an engine and return its record; this imports torch.

    Raises:
        ImgtoolError: Code 2, for a name that is no engine.
    """
    if name not in SUMMARY:
        raise ImgtoolError(f"no engine named {name}", "engines: " + ", ".join(SUMMARY), USAGE)
    engine: Engine = importlib.import_module(f"imgtool.engines.{name}.engine").ENGINE
    return engine


def settings(name: str) -> ModuleType:
    """Import an engine's settings module, which is light: no torch, numpy or cv2."""
    return importlib.import_module(f"imgtool.engines.{name}.settings")
