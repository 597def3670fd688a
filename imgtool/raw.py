"""Camera RAW: rendered to sRGB by LibRaw, the same way every time.

LibRaw can crash on broken files, so it runs in a child process: ``python -m imgtool.raw IN OUT [GAINS]``.
A crash there is an error message here.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgtool import files
from imgtool.errors import FAILED, ImgtoolError

if TYPE_CHECKING:
    import rawpy

SUFFIXES = files.RAW
"""Suffixes of camera RAW files, in lower case. ``.raw`` is read only where the file has a header."""

SIGNATURES = (
    (0, b"FUJIFILMCCD-RAW"),
    (0, b"IIU\0"),  # Panasonic and Leica
    (0, b"IIRO"),
    (0, b"IIRS"),
    (0, b"MMOR"),  # Olympus
    (0, b"FOVb"),  # Sigma
    (0, b"\0MRM"),  # Minolta
    (6, b"HEAPCCDR"),  # Canon CRW
    (8, b"CR\x02"),  # Canon CR2
    (4, b"ftypcrx"),  # Canon CR3
)
"""(offset, bytes) that only a camera RAW file begins with."""

TIMEOUT = 300.0
"""Seconds after which a decoding that does not end is given up: far more than 100 MP take."""

_CRASHED = "convert it to DNG or TIFF with the camera maker's software"
_HOPELESS = 2.0


def has_signature(head: bytes) -> bool:
    """Tell whether a file's first bytes are those of a camera RAW that is no plain TIFF."""
    return any(head[offset : offset + len(mark)] == mark for offset, mark in SIGNATURES)


def render(path: Path, gains: Sequence[float] = ()) -> npt.NDArray[np.uint16]:
    """Render a camera RAW file as LibRaw does, with the camera's white balance or with another.

    No automatic brightness and no adjusted white level, both of which shift the exposure from
    photo to photo. X-Trans and other sensors that LibRaw knows are fine.

    Args:
        path: The file.
        gains: Of red, green and blue, above 0; what they lift above white is clipped, the least lifts
            nothing. () takes the camera's own.

    Returns:
        ``(H, W, 3)`` sRGB, upright, 16 bit.

    Raises:
        ImgtoolError: Truncated, not a supported RAW, corrupt, or the decoder crashed.
    """
    refuse_headerless(path)
    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        target = Path(folder, "pixels.npy")
        command = [sys.executable, "-m", "imgtool.raw", str(path.absolute()), str(target)]
        run([*command, *(str(float(gain)) for gain in gains)], path)
        pixels: npt.NDArray[np.uint16] = np.load(target, allow_pickle=False)
    return pixels


def run(command: Sequence[str], path: Path, timeout: float = TIMEOUT) -> None:
    """Run the decoder's process.

    Args:
        command: Program and arguments.
        path: The file it decodes, for messages.
        timeout: Seconds until it is killed.

    Raises:
        ImgtoolError: The fault that the child reported, or that it crashed or did not end.
    """
    package = str(Path(__file__).resolve().parent.parent)
    search = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=timeout,
            check=False,
            env=os.environ | {"PYTHONPATH": search},
        )
    except subprocess.TimeoutExpired:
        raise ImgtoolError(f"cannot decode {path}: no end after {timeout:g} s", _CRASHED) from None
    if done.returncode:
        raise _reported(done.stdout) or ImgtoolError(f"cannot decode {path}: decoding crashed", _CRASHED)


def _reported(stdout: bytes) -> ImgtoolError | None:
    """Read the fault that the child printed as its last line, None where it printed none."""
    lines = stdout.decode("utf-8", "replace").strip().splitlines()
    try:
        report = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return ImgtoolError(report["what"], report["hint"]) if isinstance(report, dict) else None


def refuse_headerless(path: Path) -> None:
    """Refuse a ``.raw`` without a header: LibRaw would guess a camera from its size.

    Raises:
        ImgtoolError: So; or there is no such file, or it is empty.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as fault:
        raise files.unreadable(path, fault) from None
    if not head:
        raise ImgtoolError(f"{path} is empty", "copy the file again")
    if path.suffix.lower() == ".raw" and not has_signature(head) and head[:4] not in (b"II*\0", b"MM\0*"):
        what = f"{path} has no header: its size, pattern and levels are unknown"
        raise ImgtoolError(what, "give the camera's own file (DNG, CR2, NEF, ...) or a rendered photo")


# What follows runs in the child.


def _white_balance(raw: rawpy.RawPy) -> dict[str, Any]:
    """Choose the camera's white balance, daylight's where it is missing, grey-world's where both are."""
    colours = max(3, raw.num_colors)
    if _usable(raw.camera_whitebalance[:colours]):
        return {"use_camera_wb": True}
    daylight = list(raw.daylight_whitebalance)
    if _usable(daylight[:colours]):
        return {"user_wb": [*daylight[:3], daylight[3] or daylight[1]]}
    return {"use_auto_wb": True}


def _usable(gains: Sequence[float]) -> bool:
    return all(math.isfinite(gain) and gain > 0 for gain in gains)


def _check_levels(raw: rawpy.RawPy, path: Path) -> None:
    """Refuse levels and values that no sensor gives: a truncated DNG decodes to noise without an error."""
    white = raw.white_level
    black = max(raw.black_level_per_channel, default=0)
    values = raw.raw_image_visible
    # A sensor may pass the white level that LibRaw's table says, but not by a factor of two.
    top = float(np.percentile(values[::4, ::4], 99.9)) if values.ndim == 2 else 0.0
    if white and (black >= white or top > _HOPELESS * white):
        what = f"{path} is corrupt: black level {black:g}, white level {white:g}, values to {top:g}"
        raise ImgtoolError(what, "copy the file again from the card")


@contextmanager
def faults(path: Path) -> Iterator[None]:
    """Turn what LibRaw raises of a file into ``ImgtoolError`` in our words."""
    import rawpy

    try:
        yield
    except rawpy.LibRawFileUnsupportedError:
        hint = "convert it to DNG, TIFF or JPEG with the camera maker's software"
        raise ImgtoolError(f"{path} is not a camera RAW that LibRaw knows, or is cut short", hint) from None
    except rawpy.LibRawIOError:
        raise ImgtoolError(f"{path} is truncated", "copy the file again from the card") from None
    except rawpy.LibRawError as fault:
        said = fault.args[0] if fault.args else type(fault).__name__
        words = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        raise ImgtoolError(
            f"cannot decode {path}: {words.lower()}", "copy the file again, or convert it"
        ) from None


def develop(path: Path, gains: Sequence[float] = ()) -> npt.NDArray[np.uint16]:
    """Render in this process, which a broken file may crash; see ``render``.

    Args:
        path: The file.
        gains: As for ``render``.

    Returns:
        ``(H, W, 3)`` sRGB, upright, 16 bit.

    Raises:
        ImgtoolError: Truncated, not a supported RAW, or corrupt.
    """
    import rawpy

    with faults(path), rawpy.imread(str(path)) as raw:
        _check_levels(raw, path)
        balance = {"user_wb": [*gains, gains[1]]} if gains else _white_balance(raw)
        pixels: npt.NDArray[Any] = raw.postprocess(
            **balance,
            no_auto_bright=True,
            adjust_maximum_thr=0.0,
            gamma=(2.4, 12.92),
            output_color=rawpy.ColorSpace.sRGB,
            output_bps=16,
        )
    return pixels


def main(source: str, target: str, *gains: str) -> int:
    """Render ``source`` into ``target`` (.npy); a fault is one line of JSON on standard output."""
    try:
        np.save(target, develop(Path(source), [float(gain) for gain in gains]))
    except ImgtoolError as fault:
        return _report(fault)
    except OSError as fault:
        what = f"cannot keep the pixels of {source}: {(fault.strerror or str(fault)).lower()}"
        return _report(ImgtoolError(what, "free some space in the folder for temporary files, or set TMPDIR"))
    except MemoryError:
        return _report(ImgtoolError(f"not enough memory to decode {source}", "close other programs"))
    return 0


def _report(fault: ImgtoolError) -> int:
    sys.stdout.write(json.dumps({"what": fault.what, "hint": fault.hint}) + "\n")
    return FAILED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
