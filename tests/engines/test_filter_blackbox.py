"""Targets of the user: functions, checked as they run, and folders of pairs, their faults named."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from imgtool.engines.filter import blackbox, targets
from imgtool.errors import FAILED, USAGE, ImgtoolError

CODE = """
import numpy as np
from tones_of_mine import DARK

LEVEL = 3

def negative(photo):
    return 255 - photo

def red(photo):
    photo[..., 1:] = 0
    return photo[..., 0] / 255 * DARK

def fails(photo):
    raise ValueError("no such colour")

def sometimes(photo):
    return photo[:48, :64]

def nothing(photo):
    return None

def whole(photo):
    return photo.astype(np.int32)

def levels(photo):
    return photo.astype(np.float32)

def infinite(photo):
    return np.full(photo.shape, np.inf)

def _hidden(photo):
    return photo
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder with filters_of_mine.py, whose traces in the interpreter are wiped afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "filters_of_mine.py").write_text(CODE)
    (tmp_path / "tones_of_mine.py").write_text("DARK = 0.5\n")
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    yield tmp_path
    blackbox._function.cache_clear()
    for name in ("filters_of_mine", "tones_of_mine"):
        sys.modules.pop(name, None)


def photo(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def refused(spec: str, folder: Path, code: int, *words: str) -> None:
    with pytest.raises(ImgtoolError) as caught:
        blackbox.resolve(spec, folder)
    told = f"{caught.value.what} | {caught.value.hint}"
    assert caught.value.code == code
    assert [word for word in (*words, spec) if word not in told] == []


# --- functions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["filters_of_mine", "filters_of_mine.py", "{}/filters_of_mine.py"])
def test_a_function_is_a_target(where: str, folder: Path) -> None:
    spec = f"{where.format(folder)}:negative"
    target = blackbox.resolve(spec, folder)
    assert (target.spec, target.channels, target.finish, target.local) == (spec, 3, None, None)
    found = target(photo())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1 - photo() / 255, atol=1e-6)
    np.testing.assert_allclose(target((photo() / 255).astype(np.float32)), found, atol=1e-6)
    assert np.array_equal(pickle.loads(pickle.dumps(target))(photo()), found)


def test_a_function_of_the_current_folder_may_return_one_channel_and_spoil_its_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    target = blackbox.resolve("filters_of_mine:red")
    picture = photo()
    found = target(picture)
    assert target.channels == 1
    np.testing.assert_allclose(found, photo()[..., 0] / 510, atol=1e-6)
    assert np.array_equal(picture, photo())


def test_a_filters_name_wins(folder: Path) -> None:
    for spec in ("bilateral", "random_conv:seed=3", "sobel_3"):
        assert blackbox.resolve(spec, folder).spec == targets.parse(spec).spec
    (folder / "median.py").write_text(CODE)
    with pytest.raises(ImgtoolError, match="median has no parameter negative"):
        blackbox.resolve("median:negative", folder)
    for spec in ("bilatral", "bilatral:d=5"):
        with pytest.raises(ImgtoolError, match="no filter named bilatral"):
            blackbox.resolve(spec, folder)


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("filters_of_mine:gone", USAGE, ("gone is not there", "negative, red")),
        ("filters_of_mine:LEVEL", USAGE, ("LEVEL is no function",)),
        ("filters_of_mine:two words", USAGE, ("names no function",)),
        ("filters_of_mine:", USAGE, ("names no function",)),
        ("no_such_file.py:negative", USAGE, ("cannot import", "no such file")),
        ("no_such_module_here:negative", USAGE, ("cannot import", "No module named")),
        ("broken:negative", USAGE, ("cannot import", "no_such_module_at_all")),
        ("leaves.py:negative", USAGE, ("cannot import", "SystemExit")),
        ("filters_of_mine:fails", FAILED, ("ValueError: no such colour", "64x48")),
        ("filters_of_mine:nothing", FAILED, ("NoneType",)),
        ("filters_of_mine:whole", FAILED, ("int32",)),
        ("filters_of_mine:levels", FAILED, ("up to 255", "floats of 0..1")),
        ("filters_of_mine:infinite", FAILED, ("not finite",)),
        ("pairs:folder", USAGE, ("no function",)),
    ],
)
def test_what_is_no_sound_function_is_refused(
    spec: str, code: int, words: tuple[str, ...], folder: Path
) -> None:
    refused(spec, folder, code, *words)


def test_a_function_is_checked_on_every_photo(folder: Path) -> None:
    target = blackbox.resolve("filters_of_mine:sometimes", folder)
    with pytest.raises(ImgtoolError, match=r"sometimes returned the shape \(48, 64, 3\)") as caught:
        target(photo(60, 70))
    assert caught.value.code == FAILED


# --- pairs --------------------------------------------------------------------------------------


def save(path: Path, height: int = 6, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), photo(height, width))
    return path


def test_pairs_lie_in_two_folders(tmp_path: Path) -> None:
    names = (("b.png", "b.jpg"), ("a/c.png", "a/c.png"))
    for before, after in names:
        save(tmp_path / "input" / before)
        save(tmp_path / "output" / after)
    (tmp_path / "input" / "notes.txt").write_text("no photo")
    wanted = sorted((tmp_path / "input" / before, tmp_path / "output" / after) for before, after in names)
    assert blackbox.pairs_in(tmp_path) == wanted


def test_pairs_lie_side_by_side(tmp_path: Path) -> None:
    wanted = [
        (save(tmp_path / f"{name}.png"), save(tmp_path / f"{name}_out.jpg"))
        for name in ("a.1", "a.2", "sub/b")
    ]
    assert blackbox.pairs_in(tmp_path) == wanted


def test_faults_of_pairs_are_named(tmp_path: Path) -> None:
    good = (save(tmp_path / "good.png"), save(tmp_path / "good_out.png"))
    save(tmp_path / "alone.png")
    save(tmp_path / "made_out.png")
    save(tmp_path / "wide.png")
    save(tmp_path / "wide_out.png", 6, 9)
    save(tmp_path / "twice.png")
    save(tmp_path / "twice.jpg")
    save(tmp_path / "twice_out.png")
    save(tmp_path / "broken.png").write_bytes(b"no photo")
    save(tmp_path / "broken_out.png")
    pairs, faults = blackbox.check_pairs(tmp_path)
    assert pairs == [good]
    told = "\n".join(faults)
    assert len(faults) == 5
    assert f"{tmp_path / 'alone.png'} has no output" in told
    assert f"{tmp_path / 'made_out.png'} has no input" in told
    assert f"{tmp_path / 'wide.png'} is 8x6, its output 9x6" in told
    assert "twice.jpg" in told
    assert "broken.png" in told
    with pytest.raises(ImgtoolError, match="and 2 more") as caught:
        blackbox.pairs_in(tmp_path)
    assert caught.value.code == FAILED


def test_a_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ImgtoolError) as caught:
            blackbox.pairs_in(folder)
        assert caught.value.code == USAGE
    (tmp_path / "input").mkdir()
    (tmp_path / "output").mkdir()
    with pytest.raises(ImgtoolError, match="no pair"):
        blackbox.pairs_in(tmp_path)
