"""Targets that are not ours: a Python function of the user, or pairs of input and output of anything."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from imgtool import images
from imgtool.engines.filter import targets
from imgtool.engines.filter.pixels import Floats, Pixels, eight_bit
from imgtool.engines.filter.targets import Target
from imgtool.errors import USAGE, ImgtoolError
from imgtool.samples import pictures_in

PAIRS = "pairs"
"""How a target begins that is a folder of pairs."""

ENDING = "_out"
"""How the stems of results end beside their photos."""

LARGEST = 16.0
"""Magnitude above which a float is taken for one of 0..255."""

WRITE = "a function is written module:function or path/to/file.py:function"
LAYOUTS = f"pairs are input/ and output/ with equal names, or photo.png beside photo{ENDING}.png"


# --- functions -------------------------------------------------------------------------------


def resolve(spec: str, beside: Path | None = None) -> Target:
    """Make a target of a filter's name, ``module:function`` or ``path/to/file.py:function``.

    A known filter's name wins. A function takes ``(H, W, 3)`` uint8 RGB and returns ``(H, W)`` or
    ``(H, W, 3)``, uint8 or floats of 0..1; a small picture tells which. Its results are not taken for slow,
    for what is kept of them would outlive a change of its code.

    Args:
        spec: What the command line says.
        beside: Folder of relative paths and of modules; the current one by default.

    Raises:
        ImgtoolError: Code 2: no such filter, module or function, or a folder of pairs; 1: the function fails.
    """
    where, _, name = spec.rpartition(":")
    word = spec.partition(":")[0]
    if word == PAIRS:
        raise ImgtoolError(f"{spec} is no function", "its results exist for its own photos only", USAGE)
    if spec.endswith((".py", ":")):
        raise ImgtoolError(f"{spec} names no function", WRITE, USAGE)
    if word in targets.KINDS or not where or "=" in name:
        return targets.parse(spec)
    if not name.isidentifier():
        raise ImgtoolError(f"{spec}: {name!r} names no function", WRITE, USAGE)
    folder = (beside or Path.cwd()).resolve()
    run = partial(_checked, spec, folder)
    found = run(_probe())
    return Target(spec, run, 1 if found.ndim == 2 else 3)


def _probe() -> Pixels:
    """Return a picture of all tones with edges, ``(48, 64, 3)`` uint8."""
    y, x = np.mgrid[:48, :64]
    return np.stack([4 * x, 5 * y, 255 * ((x // 8 + y // 8) % 2)], axis=-1).astype(np.uint8)


def _checked(spec: str, folder: Path, image: Pixels) -> Floats:
    """Run a function on a copy of a photo, and check what it returns."""
    try:
        found = _function(spec, folder)(eight_bit(image).copy())
    except ImgtoolError:
        raise
    except Exception as fault:  # anything can be wrong in a user's function
        height, width = image.shape[:2]
        raise ImgtoolError(
            f"{spec} failed on a photo of {width}x{height}: {_words(fault)}", "try the function by itself"
        ) from fault
    wrong = _fault(found, image)
    if wrong:
        hint = "it takes (H, W, 3) uint8 and returns (H, W) or (H, W, 3), uint8 or floats of 0..1"
        raise ImgtoolError(f"{spec} returned {wrong}", hint)
    values = targets.unit(found)
    return np.array(values, np.float32, order="C")


def _fault(found: object, image: Pixels) -> str:
    if not isinstance(found, np.ndarray):
        return f"{type(found).__name__}, not an array"
    if found.dtype != np.uint8 and found.dtype.kind != "f":
        return f"values of the type {found.dtype}"
    if found.shape not in (image.shape[:2], image.shape):
        return f"the shape {found.shape} for a photo of the shape {image.shape}"
    if not np.isfinite(found).all():
        return "values that are not finite"
    if found.dtype.kind == "f" and np.abs(found).max() > LARGEST:
        return f"floats of up to {np.abs(found).max():g}"
    return ""


def _words(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {fault}" if str(fault) else type(fault).__name__


@lru_cache(maxsize=16)
def _function(spec: str, folder: Path) -> Callable[[Pixels], Any]:
    """Import a function once in each process."""
    where, _, name = spec.rpartition(":")
    try:
        module = _of_file(folder / where) if where.endswith(".py") else _of_name(where, folder)
    except (Exception, SystemExit) as fault:  # a module may do anything when it is imported
        hint = WRITE if isinstance(fault, ModuleNotFoundError | FileNotFoundError) else f"look into {where}"
        raise ImgtoolError(f"{spec}: cannot import {where}: {_words(fault)}", hint, USAGE) from fault
    found = getattr(module, name, None)
    if not callable(found):
        there = "is no function" if hasattr(module, name) else "is not there"
        hint = f"functions of {where}: {', '.join(_functions(module)) or 'none'}"
        raise ImgtoolError(f"{spec}: {name} {there}", hint, USAGE)
    function: Callable[[Pixels], Any] = found
    return function


def _functions(module: ModuleType) -> list[str]:
    own = [name for name, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__]
    return [name for name in own if callable(getattr(module, name)) and not name.startswith("_")]


def _of_name(name: str, folder: Path) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    if str(path.parent) not in sys.path:  # for the modules that the file imports
        sys.path.insert(0, str(path.parent))
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


# --- pairs -----------------------------------------------------------------------------------


def pairs_in(folder: Path) -> list[tuple[Path, Path]]:
    """List the pairs of a folder, sorted: input and output of the black box.

    Two layouts: ``input/`` and ``output/`` with the same names below them, or ``X.png`` beside ``X_out.png``
    at any depth. Suffixes may differ.

    Raises:
        ImgtoolError: Code 2: no such folder, or no pair; 1: a photo without its partner, several for one, or
            sizes that differ, all of them counted and the first three named.
    """
    found, faults = check_pairs(folder)
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ImgtoolError(f"{folder}: {'; '.join(faults[:3])}{more}", LAYOUTS)
    return found


def check_pairs(folder: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """List the pairs of a folder that are sound, sorted, and what is wrong with the others.

    Raises:
        ImgtoolError: Code 2: no such folder, or neither a pair nor a fault in it.
    """
    sides = _sides(folder)
    pairs, faults = [], []
    for key in sorted(sides[0].keys() | sides[1].keys()):
        before, after = (side.get(key, []) for side in sides)
        wrong = _wrong(before, after)
        if wrong:
            faults.append(wrong)
        else:
            pairs.append((before[0], after[0]))
    if not pairs and not faults:
        raise ImgtoolError(f"no pair in {folder}", LAYOUTS, USAGE)
    return pairs, faults


Side = dict[str, list[Path]]


def _sides(folder: Path) -> tuple[Side, Side]:
    """Return inputs and outputs by what their names have in common."""
    sides: tuple[Side, Side] = ({}, {})
    if (folder / "input").is_dir() and (folder / "output").is_dir():
        for side, root in zip(sides, (folder / "input", folder / "output"), strict=True):
            for path in pictures_in(root):
                side.setdefault(str(path.relative_to(root).with_suffix("")), []).append(path)
        return sides
    for path in pictures_in(folder):
        made = path.stem.endswith(ENDING)
        key = str(path.with_name(path.stem.removesuffix(ENDING) + "."))
        sides[made].setdefault(key, []).append(path)
    return sides


def _wrong(before: list[Path], after: list[Path]) -> str:
    if len(before) != 1 or len(after) != 1:
        several = before if len(before) > 1 else after
        if len(several) > 1:
            return f"{several[0]} and {several[1]} have the same name"
        return f"{(before or after)[0]} has no {'output' if before else 'input'}"
    try:
        sizes = [images.size(path) for path in (before[0], after[0])]
    except ImgtoolError as fault:
        return fault.what
    if None not in sizes and sizes[0] != sizes[1]:
        shown = [f"{size[0]}x{size[1]}" for size in sizes if size]
        return f"{before[0]} is {shown[0]}, its output {shown[1]}"
    return ""
