"""Folders of pairs looked through: every fault in one list, and plots of what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from imgtool.engine import Watch
from imgtool.engines.isp import check, layouts
from imgtool.engines.isp.settings import Check, Stats
from imgtool.errors import USAGE, ImgtoolError
from imgtool.mosaic import PATTERNS, Mosaic
from tests import dng

Picture = npt.NDArray[Any]

EDGE = 48


def scene(seed: int, edge: int = EDGE) -> npt.NDArray[np.uint8]:
    """Soft tones with edges: something to align by."""
    rng = np.random.default_rng(seed)
    small = rng.uniform(20, 230, (edge // 4, edge // 4, 3))
    wide = cv2.resize(small, (edge, edge), interpolation=cv2.INTER_CUBIC)
    return np.clip(wide, 0, 255).astype(np.uint8)


def raw_of(photo: npt.NDArray[np.uint8], pattern: str = "RGGB", black: int = 64) -> npt.NDArray[np.uint16]:
    """A mosaic of a photo in linear light, 10 bits."""
    linear = (photo / 255.0) ** 2.2
    values: npt.NDArray[np.uint16] = np.rint(black + dng.mosaic(linear, pattern) * (1000 - black)).astype(
        np.uint16
    )
    return values


def put(path: Path, pixels: Picture) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    return path


def mai21(folder: Path, **counts: int) -> Path:
    seed = 0
    for split, count in counts.items():
        for number in range(count):
            seed += 1
            put(folder / split / "mediatek_raw" / f"{number}.png", raw_of(scene(seed)))
            put(folder / split / "fujifilm" / f"{number}.png", scene(seed))
    return folder


def checked(folder: Path) -> dict[str, Any]:
    return dict(check.check(Check(folder=folder), Watch()))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_green_is_the_mosaics_own_and_the_mean_of_four_between(pattern: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1000, (9, 12)).astype(np.uint16)
    found = check.green(Mosaic(values, pattern, (0.0,) * 4, 1000.0))
    assert found.shape == values.shape
    for row in range(1, 8):
        for column in range(1, 11):
            own = pattern[2 * (row % 2) + column % 2] == "G"
            around = [values[row - 1, column], values[row + 1, column], values[row, column - 1],
                      values[row, column + 1]]  # fmt: skip
            wanted = values[row, column] if own else np.mean(around)
            assert found[row, column] * 1000 == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("move", [(0, 0), (2, 0), (0, -3), (1, 1)])
@pytest.mark.parametrize("pattern", ["RGGB", "GRBG"])
def test_the_shift_of_a_photograph_is_found(move: tuple[int, int], pattern: str) -> None:
    large = scene(3, 96)
    across, down = move
    values = raw_of(np.ascontiguousarray(large[16:80, 16:80]), pattern)
    target = large[16 - down : 80 - down, 16 - across : 80 - across]
    frame = Mosaic(values, pattern, (64.0,) * 4, 1000.0)
    found = check.shift(frame, target)
    assert found is not None
    np.testing.assert_allclose(found, move, atol=0.25)


def test_where_nothing_is_to_be_seen_there_is_no_shift() -> None:
    frame = Mosaic(np.full((32, 32), 500, np.uint16), "RGGB", (64.0,) * 4, 1000.0)
    assert check.shift(frame, np.full((32, 32, 3), 99, np.uint8)) is None


def test_a_sound_folder_has_no_faults(tmp_path: Path) -> None:
    record = checked(mai21(tmp_path, train=6, val=2))
    assert record["faults"] == []
    assert record["layouts"] == {"mai21": 8}
    assert record["splits"] == {
        "train": {"mosaics": 6, "pairs": 6, "usable": 6}, "val": {"mosaics": 2, "pairs": 2, "usable": 2},
    }  # fmt: skip
    assert record["sizes"] == {"48x48": 8}
    assert record["shift"]["measured"] == 8
    assert record["shift"]["median"] < 0.2
    assert (record["levels"]["black"], record["levels"]["white"]) == (58, 1023)
    assert 64 <= record["levels"]["least"] <= record["levels"]["largest"] <= 1000
    json.dumps(record)


def test_every_fault_is_in_the_list(tmp_path: Path) -> None:
    mai21(tmp_path, train=6, val=2)
    train, val = tmp_path / "train", tmp_path / "val"
    (train / "fujifilm" / "0.png").unlink()
    (train / "mediatek_raw" / "1.png").unlink()
    put(train / "fujifilm" / "2.png", scene(0, 32))
    (train / "mediatek_raw" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (val / "mediatek_raw" / "0.png").write_bytes((train / "mediatek_raw" / "4.png").read_bytes())
    put(val / "mediatek_raw" / "1.png", raw_of(scene(8)) + np.uint16(100))
    record = checked(tmp_path)
    assert record["splits"]["train"] == {"mosaics": 5, "pairs": 4, "usable": 2}
    assert record["duplicates"] == 1
    wanted = [
        f"{train / 'mediatek_raw' / '0.png'}: no partner",
        f"{train / 'fujifilm' / '1.png'}: no partner",
        f"sizes differ: {train / 'mediatek_raw' / '2.png'} has 48x48",
        f"{train / 'mediatek_raw' / '3.png'} is truncated",
        f"{val / 'mediatek_raw' / '0.png'}: the same as {train / 'mediatek_raw' / '4.png'}, of another split",
        f"{val / 'mediatek_raw' / '1.png'}: values to",
    ]
    assert len(record["faults"]) == len(wanted)
    for words in wanted:
        assert sum(fault.startswith(words) for fault in record["faults"]) == 1, words


def test_a_test_split_without_photographs_is_no_fault_and_one_that_lacks_some_is(tmp_path: Path) -> None:
    mai21(tmp_path, train=2, test=2)
    (tmp_path / "test" / "fujifilm" / "0.png").unlink()
    assert len(checked(tmp_path)["faults"]) == 1
    (tmp_path / "test" / "fujifilm" / "1.png").unlink()
    record = checked(tmp_path)
    assert record["faults"] == []
    assert record["splits"]["test"] == {"mosaics": 2, "pairs": 0, "usable": 0}


def test_black_that_is_subtracted_already_is_seen(tmp_path: Path) -> None:
    mai21(tmp_path, train=3)
    for number in range(3):
        values = raw_of(scene(number), black=0)
        values[:8, :8] = 0
        put(tmp_path / "train" / "mediatek_raw" / f"{number}.png", values)
    (fault,) = checked(tmp_path)["faults"]
    assert "below black 58, from 0; 3 such mosaics" in fault


def test_photographs_that_are_all_shifted_are_seen(tmp_path: Path) -> None:
    mai21(tmp_path, train=check.FEWEST)
    for number in range(check.FEWEST):
        photo = scene(20 + number, 64)
        put(tmp_path / "train" / "mediatek_raw" / f"{number}.png", raw_of(photo[8:56, 8:56]))
        put(tmp_path / "train" / "fujifilm" / f"{number}.png", photo[8:56, 7:55])
    (fault,) = checked(tmp_path)["faults"]
    assert "pixels across" in fault
    assert fault.startswith("the photographs lie +1")


def test_what_is_looked_at_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    check.check(Check(folder=mai21(tmp_path, train=3)), Watch(lambda *numbers: told.append(numbers)))
    assert told == [(1, 3), (2, 3), (3, 3)]


PLOTS = ["levels.png", "targets.png", "colours.png", "noise.png", "alignment.png"]


@pytest.mark.slow
def test_the_plots_of_a_folder_are_written_beside_its_pairs(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / "raw" / f"{name}.png", raw_of(scene(1)))
        put(tmp_path / "rgb" / f"{name}.png", scene(1))
    (tmp_path / "raw" / "b.png").write_bytes(b"nothing")
    (tmp_path / "samples.jsonl").write_text(json.dumps({"name": "a", "shot": 1e-3, "read": 1e-6}))
    record = check.stats(Stats(folder=tmp_path), Watch())
    assert record["drawn"] == 1
    assert len(record["faults"]) == 1  # type: ignore[arg-type]
    assert record["files"] == [str(tmp_path / "stats" / name) for name in PLOTS]
    for name in PLOTS:
        assert cv2.imread(str(tmp_path / "stats" / name)) is not None
    json.dumps(record)


def test_the_plots_tell_the_levels_that_training_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        "imgtool.plots.histogram", lambda values, path, **_: drawn.update({path.stem: values})
    )
    monkeypatch.setattr("imgtool.plots.scatter", lambda values, path, **_: drawn.update({path.stem: values}))
    values = np.full((16, 16), 1023, np.uint16)
    values[::2, ::2] = 58  # red: black
    values[1::2, 1::2] = round(62 + (1023 - 62) / 2)
    put(tmp_path / "train" / "mediatek_raw" / "a.png", values)
    put(tmp_path / "train" / "fujifilm" / "a.png", np.full((16, 16, 3), 51, np.uint8))
    record = check.stats(Stats(folder=tmp_path, out=tmp_path / "plots"), Watch())
    assert record["levels"] == {"R": 0, "Gr": 1, "Gb": 1, "B": pytest.approx(0.5, abs=1e-3)}
    assert record["brightness"] == pytest.approx(0.2, abs=1e-4)
    assert record["shift"] is None
    assert list(drawn) == ["levels", "targets"]
    assert (drawn["levels"]["Gr"] == 1).all()
    put(tmp_path / "train" / "mediatek_raw" / "a.png", np.full((16, 16), 1023, np.uint16))
    check.stats(Stats(folder=tmp_path, out=tmp_path / "plots"), Watch())
    np.testing.assert_allclose(drawn["colours"]["red / green"], [[0, 0]], atol=1e-6)


@pytest.mark.parametrize("out", ["", "train/fujifilm"])
def test_plots_do_not_go_among_the_pairs(tmp_path: Path, out: str) -> None:
    mai21(tmp_path, train=1)
    with pytest.raises(ImgtoolError, match="holds the pairs") as refused:
        check.stats(Stats(folder=tmp_path, out=tmp_path / out), Watch())
    assert refused.value.code == USAGE
    assert len(layouts.files_of(tmp_path)) == 1


def test_a_folder_of_which_nothing_can_be_read_has_no_plots(tmp_path: Path) -> None:
    mai21(tmp_path, train=1)
    (tmp_path / "train" / "mediatek_raw" / "0.png").write_bytes(b"nothing")
    with pytest.raises(ImgtoolError, match="can be read"):
        check.stats(Stats(folder=tmp_path), Watch())


def test_pictures_that_have_nothing_in_common_have_no_shift() -> None:
    rng = np.random.default_rng(0)
    frame = Mosaic(rng.integers(0, 4096, (128, 128)).astype(np.uint16), white=4095.0)
    assert check.shift(frame, rng.integers(0, 256, (128, 128, 3)).astype(np.uint8)) is None
