"""Settings: where they come from, what is refused, and the way through TOML and back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from imgtool.engines.deblur.settings import ACTIONS, Bench, Check, Infer, Synth, Train
from imgtool.errors import USAGE, ImgtoolError
from imgtool.flags import _kind, commands
from imgtool.settings import PANELS, declared
from imgtool.settings.sources import presets, resolve, to_toml


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fault(*arguments: Any, **named: Any) -> ImgtoolError:
    with pytest.raises(ImgtoolError) as caught:
        resolve(*arguments, **named)
    assert caught.value.code == USAGE
    return caught.value


def test_each_source_overrides_the_one_below(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def device_threads_batch(**named: Any) -> tuple[str, int, int]:
        found = resolve(Train, "train", "deblur", named.pop("flags", {}), **named)
        return found.device, found.threads, found.batch

    assert device_threads_batch() == ("auto", 0, 16)
    assert device_threads_batch(preset="cpu") == ("auto", 0, presets()["cpu"]["train"]["deblur"]["batch"])
    (here / "imgtool.toml").write_text("[train.deblur]\nbatch = 2\nthreads = 2\ndevice = 'two'\n")
    assert device_threads_batch(preset="cpu") == ("two", 2, 2)
    config = here / "mine.toml"
    config.write_text("[train.deblur]\nthreads = 3\ndevice = 'three'\n")
    assert device_threads_batch(config=config) == ("three", 3, 2)
    monkeypatch.setenv("IMGTOOL_CONFIG", str(config))
    assert device_threads_batch() == ("three", 3, 2)
    monkeypatch.setenv("IMGTOOL_THREADS", "4")
    monkeypatch.setenv("IMGTOOL_DEVICE", "four")
    assert device_threads_batch() == ("four", 4, 2)
    assert device_threads_batch(flags={"device": "five"}) == ("five", 4, 2)


def test_config_flag_replaces_the_environments_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a.toml").write_text("[train.deblur]\nbatch = 1\n")
    (here / "b.toml").write_text("[train.deblur]\nseed = 2\n")
    monkeypatch.setenv("IMGTOOL_CONFIG", "a.toml")
    found = resolve(Train, "train", "deblur", {}, Path("b.toml"))
    assert (found.batch, found.seed) == (16, 2)


def test_only_what_was_given_counts_as_set(here: Path) -> None:
    assert resolve(Train, "train", "deblur", {"steps": 5}).model_fields_set == {"steps"}


@pytest.mark.parametrize(
    ("toml", "what", "hint"),
    [
        ("[train.deblur]\nbach = 1", "unknown setting bach in imgtool.toml", "did you mean batch?"),
        ("[train.deblr]\nbatch = 1", "unknown table [train.deblr]", "did you mean train.deblur?"),
        ("[trian.deblur]\nbatch = 1", "unknown table [trian]", "did you mean train?"),
        ("[data.synt.deblur]\ncount = 1", "unknown table [data.synt]", "did you mean data.synth?"),
        (
            "[data.synth.blur]\ncount = 1",
            "unknown table [data.synth.blur]",
            "did you mean data.synth.deblur?",
        ),
        ("[train.deblur]\nsteps = 'many'", "imgtool.toml: steps: input should be a valid integer", "steps: "),
        ("[train.deblur]\nsteps = 0", "greater than or equal to 1, not 0", "steps: "),
        ("[train.deblur]\nloss = 'l2'", "imgtool.toml: loss: input should be 'relative-mse'", "loss: "),
        ("[train.deblur]\ncrop = 250", "multiple of 16, not 250", "crop: "),
        ("train = 3", "[train] in imgtool.toml is not a table", "[train."),
        ("[train]\ndeblur = 3", "train.deblur in imgtool.toml is not a table", "[train.deblur]"),
        ("[train.deblur", "imgtool.toml is not valid TOML", "--dry-run"),
    ],
)
def test_faults_of_a_file_name_file_and_key(here: Path, toml: str, what: str, hint: str) -> None:
    (here / "imgtool.toml").write_text(toml)
    found = fault(Train, "train", "deblur", {})
    assert what in found.what
    assert hint in found.hint


def test_missing_and_unreadable_files(here: Path) -> None:
    assert "no such settings file: nope.toml" in fault(Train, "train", "deblur", {}, Path("nope.toml")).what
    assert "cannot read" in fault(Train, "train", "deblur", {}, here).what
    (here / "latin.toml").write_bytes(b"[train.deblur]\nfreeze = '\xe9'\n")
    assert "cannot read" in fault(Train, "train", "deblur", {}, Path("latin.toml")).what


def test_faults_of_flags_environment_and_presets(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault(Train, "train", "deblur", {"epoch_steps": "0"}).what.startswith("--epoch-steps: input")
    assert fault(Infer, "infer", "deblur", {}).what == "infer deblur needs INPUTS"
    assert "INPUTS" in fault(Infer, "infer", "deblur", {"inputs": ()}).what
    assert fault(Synth, "data", "synth.deblur", {"photos": ("a",)}).what == "data synth deblur needs --out"
    unknown = fault(Train, "train", "deblur", {}, preset="a10")
    assert (unknown.what, unknown.hint) == ("no preset named a10", "did you mean a100?")
    monkeypatch.setenv("IMGTOOL_THREADS", "all")
    assert fault(Train, "train", "deblur", {}).what.startswith("IMGTOOL_THREADS: threads: ")


def test_a_part_of_the_required_settings_may_come_from_a_file(here: Path) -> None:
    (here / "imgtool.toml").write_text("[data.synth.deblur]\nout = 'pairs'\ncount = 3\n")
    found = resolve(Synth, "data", "synth.deblur", {"photos": ["x"]})
    assert (found.out, found.count, found.photos) == (Path("pairs"), 3, (Path("x"),))


def test_preset_without_a_table_for_the_command_changes_nothing(here: Path) -> None:
    assert resolve(Bench, "bench", "deblur", {}, preset="a100") == Bench()
    assert resolve(Check, "data", "check.deblur", {"folder": "x"}, preset="a100") == Check(folder=Path("x"))


def test_every_preset_is_valid(here: Path) -> None:
    for name, tables in presets().items():
        found = resolve(Train, "train", "deblur", {}, preset=name)
        stated = tables.get("train", {}).get("deblur", {})
        assert {key: getattr(found, key) for key in stated} == stated


def test_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    found = Train(photos=(Path("~/a"), Path("b~")), out=Path("~/runs"))
    assert (found.photos, found.out) == ((Path("/home/somebody/a"), Path("b~")), Path("/home/somebody/runs"))
    assert Infer(inputs=("~/*.jpg", "-"), out="~/x.png").inputs == ("/home/somebody/*.jpg", "-")
    assert Train(out=Path("~nobody-of-that-name/x")).out == Path("~nobody-of-that-name/x")


def test_settings_are_frozen_and_changed_by_copy() -> None:
    first = Train(steps=3)
    with pytest.raises(ValueError, match="frozen"):
        first.steps = 4  # type: ignore[misc]
    assert (first.steps, first.changed(steps=4).steps) == (3, 4)
    with pytest.raises(ValueError, match="greater"):
        first.changed(steps=0)


@pytest.mark.parametrize("command", list(commands()), ids=lambda command: command.words)
def test_every_setting_is_explained_and_every_panel_known(command: Any) -> None:
    assert command.settings.example.startswith(f"imgtool {command.words}")
    shorts = [declared(info)["short"] for info in command.settings.model_fields.values()]
    assert len([s for s in shorts if s]) == len({s for s in shorts if s})
    for name, info in command.settings.model_fields.items():
        assert (info.description or "").rstrip(".]"), name
        assert declared(info)["panel"] in PANELS, name


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)


def values(info: FieldInfo) -> st.SearchStrategy[Any]:
    """Return values that a setting may have."""
    kind, many = _kind(info.annotation)
    limits = {key: getattr(each, key) for each in info.metadata for key in vars_of(each)}
    one = one_value(kind, limits)
    if many:
        return st.lists(one, min_size=limits.get("min_length", 0), max_size=3).map(tuple)
    return one if info.is_required() or info.default is not None else st.none() | one


def vars_of(limit: Any) -> list[str]:
    return [key for key in ("ge", "gt", "le", "lt", "multiple_of", "min_length") if hasattr(limit, key)]


def one_value(kind: Any, limits: dict[str, Any]) -> st.SearchStrategy[Any]:
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is int:
        step = limits.get("multiple_of", 1)
        low, high = limits.get("ge", -(10**6)), limits.get("le", 10**9)
        return st.integers(-(-low // step), high // step).map(lambda n: n * step)
    if kind is float:
        low, high = limits.get("ge", limits.get("gt", -1e9)), limits.get("le", limits.get("lt", 1e9))
        return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits)
    simple = {bool: st.booleans(), str: TEXT, Path: TEXT.map(Path)}
    return simple[kind]


@pytest.mark.parametrize("command", list(commands()), ids=lambda command: command.words)
@pytest.mark.slow
def test_settings_survive_the_way_through_toml(command: Any) -> None:
    cls = command.settings

    @given(st.fixed_dictionaries({name: values(info) for name, info in cls.model_fields.items()}))
    def round_trip(chosen: dict[str, Any]) -> None:
        settings = cls(**chosen)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "settings.toml"
            path.write_text(to_toml(settings, command.verb, command.table), encoding="utf-8")
            assert resolve(cls, command.verb, command.table, {}, path) == settings

    round_trip()


def test_actions_are_those_of_the_engine() -> None:
    found = [
        command.action for command in commands() if command.verb == "data" and command.engine == "deblur"
    ]
    assert found == list(ACTIONS)
