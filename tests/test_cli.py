"""The command line: help, faults, exit codes, and that it waits for nothing heavy."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli

from imgtool import __version__, engines, images
from imgtool.cli import run
from imgtool.errors import ImgtoolError
from imgtool.flags import commands, flags, general
from imgtool.settings import VERBS
from imgtool.settings.sources import resolve

ROOT = Path(__file__).parents[1]
HEAVY = "torch torchvision numpy cv2 PIL imageio rawpy tifffile matplotlib jinja2 safetensors".split()
COMMANDS = list(commands())
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in an empty folder, on no terminal; put back the variables that a run sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Return a function that replaces a verb and tells what it was called with."""

    def replace(name: str, end: Any = 0) -> list[Any]:
        calls: list[Any] = []

        def fake(*arguments: Any) -> int:
            calls.append(arguments)
            if isinstance(end, BaseException):
                raise end
            return int(end)

        module = types.ModuleType(name)
        module.run = fake  # type: ignore[attr-defined]
        module.plan = lambda *_: {"device": "cpu", "outputs": ["a.png", "b\n.png"]}  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"imgtool.{name}", module)
        monkeypatch.setattr(engines, "load", lambda engine: engine.upper())
        return calls

    return replace


def test_flags_arrive_as_settings(verb: Callable[..., list[Any]]) -> None:
    calls = verb("infer")
    assert (
        run("infer deblur a.jpg b.jpg -o out --tile 256 --strength 0.5 --compare --format png".split()) == 0
    )
    engine, settings, console = calls[0]
    assert engine == "DEBLUR"
    assert settings.inputs == ("a.jpg", "b.jpg")
    assert (settings.out, settings.tile, settings.strength) == ("out", 256, 0.5)
    assert (settings.compare, settings.format, settings.overlap) == (True, "png", 64)
    assert (console.json, console.quiet, console.verbose) == (False, False, False)
    assert settings.model_fields_set == {"inputs", "out", "tile", "strength", "compare", "format"}


def test_flags_may_stand_anywhere_and_repeat(verb: Callable[..., list[Any]]) -> None:
    calls = verb("train")
    assert run("train deblur --photos a --photos b -q --batch 4 --json --threads 3".split()) == 0
    _, settings, console = calls[0]
    assert (settings.photos, settings.batch) == ((Path("a"), Path("b")), 4)
    assert (console.json, console.quiet) == (True, True)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_data_gets_its_action(verb: Callable[..., list[Any]]) -> None:
    calls = verb("data")
    assert run(["data", "synth", "deblur", "photos", "-o", "pairs", "--count", "3"]) == 0
    engine, action, settings, _ = calls[0]
    assert (engine, action, settings.photos, settings.count) == ("DEBLUR", "synth", (Path("photos"),), 3)


def test_an_action_that_stands_alone_is_typed_without_an_engine(
    verb: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = verb("data")
    assert run(["data", "inspect", "lens", "b.raw", "--pattern", "BGGR"]) == 0  # a file may be named so
    engine, action, settings, _ = calls[0]
    assert (engine, action, settings.inputs) == ("ISP", "inspect", (Path("lens"), Path("b.raw")))
    assert settings.pattern == "BGGR"
    assert capsys.readouterr().err == "imgtool data inspect: starting\n"
    assert run(["data", "inspect", "a.dng", "--bits", "12", "-n"]) == 0
    out = capsys.readouterr().out
    assert tomli.loads(out)["data"]["inspect"]["isp"]["bits"] == 12
    Path("my.toml").write_text(out)
    assert run(["data", "inspect", "b.dng", "-c", "my.toml"]) == 0
    assert (calls[1][2].bits, calls[1][2].inputs) == (12, (Path("b.dng"),))


def test_alone_it_is_the_only_action_of_its_name() -> None:
    names = [command.action for command in COMMANDS if command.verb == "data"]
    alone = [command for command in COMMANDS if command.words == f"data {command.action}"]
    assert [(command.action, command.engine) for command in alone] == [("inspect", "isp"), ("fetch", "")]
    assert all(names.count(command.action) == 1 for command in alone)
    assert {command.engine for command in commands(["data", "inspect", "lens"])} == {"isp"}
    assert {command.engine for command in commands(["data", "inspct"])} == {*engines.SUMMARY, ""}
    assert [command.words for command in commands(["data", "fetch", "s3://bucket"])] == ["data fetch"]


def test_files_presets_and_switches_turned_off(verb: Callable[..., list[Any]]) -> None:
    calls = verb("infer")
    Path("my.toml").write_text("[infer.deblur]\ncompare = true\ninputs = ['x.jpg']\nforce = true\n")
    assert run(["infer", "deblur", "-c", "my.toml", "--no-compare"]) == 0
    settings = calls[0][1]
    assert (settings.compare, settings.force, settings.inputs) == (False, True, ("x.jpg",))
    calls = verb("train")
    assert run(["train", "deblur", "--preset", "a100", "--crop", "128"]) == 0
    assert (calls[0][1].batch, calls[0][1].crop) == (128, 128)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_verbs_exit_code_is_ours(verb: Callable[..., list[Any]], code: int) -> None:
    verb("infer", code)
    assert run(["infer", "deblur", "x"]) == code


def test_first_word_on_standard_error(
    verb: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    verb("infer")
    run(["infer", "deblur", "x"])
    assert capsys.readouterr() == ("", "imgtool infer deblur: starting\n")
    run(["infer", "deblur", "x", "-q"])
    assert capsys.readouterr() == ("", "")


def test_a_fault_is_two_lines_and_its_code(
    verb: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    verb("infer", ImgtoolError("the disk is full", "make room", 1))
    assert run(["infer", "deblur", "x", "-q"]) == 1
    assert capsys.readouterr() == ("", "error: the disk is full\nhint: make room\n")
    assert run(["infer", "deblur", "x", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": "the disk is full", "hint": "make room"}


def test_interrupt(verb: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]) -> None:
    verb("train", KeyboardInterrupt())
    assert run(["train", "deblur"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_a_bug_keeps_its_traceback(verb: Callable[..., list[Any]]) -> None:
    verb("train", ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        run(["train", "deblur"])


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        ("infer deblur x --tyle 3", "no such option: --tyle", "did you mean --tile?"),
        ("infer deblr x", "no such command 'deblr'", "did you mean 'deblur'?"),
        ("trian deblur", "no such command 'trian'", "did you mean 'train'?"),
        ("data inspect", "needs INPUTS", "RAW files"),
        ("data inspect a.dng --bits 40", "--bits: input should be less", "bits of a pixel"),
        ("data sinth deblur", "no such command 'sinth'", "did you mean 'synth'?"),
        ("infer deblur", "infer deblur needs INPUTS", "Photos"),
        ("infer deblur x --tile wide", "--tile: input should be a valid integer", "Edge of a tile"),
        ("infer deblur x --tile -1", "--tile: input should be greater than or equal to 0", "Edge of a tile"),
        ("infer deblur x --format bmp", "'bmp' is not one of 'jpg', 'png', 'tif', 'webp'", "infer deblur"),
        ("train deblur --lr 0", "--lr: input should be greater than 0", "learning rate"),
        ("train deblur --steps", "option '--steps' requires an argument", "--help"),
        ("train deblur --preset a1000", "'a1000' is not one of", "train deblur"),
        ("train deblur stray", "got unexpected extra argument", "train deblur"),
        ("data synth deblur photos", "data synth deblur needs --out", "Folder for"),
        ("infer deblur x -c nowhere.toml", "no such settings file: nowhere.toml", "--config"),
    ],
)
def test_wrong_words(words: str, what: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words.split()) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (out, len(lines)) == ("", 2)
    assert lines[0].startswith("error: ")
    assert what in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]


def test_wrong_words_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["infer", "deblur", "--json", "--tyle", "3"]) == 2
    assert json.loads(capsys.readouterr().out)["hint"] == "did you mean --tile?"


def test_dry_run_prints_settings_that_config_reads(
    verb: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = verb("train")
    assert run("train deblur --photos p --batch 3 -n".split()) == 0
    out = capsys.readouterr().out
    assert tomli.loads(out)["train"]["deblur"]["batch"] == 3
    assert [line for line in out.splitlines() if line.startswith("#")] == [
        "# device: cpu",
        "# outputs: a.png",
        "# outputs: b .png",
    ]
    Path("again.toml").write_text(out)
    again = resolve(engines.settings("deblur").Train, "train", "deblur", {}, Path("again.toml"))
    assert (again.batch, again.photos) == (3, (Path("p"),))  # type: ignore[attr-defined]
    assert calls == []


def test_dry_run_in_json(verb: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]) -> None:
    verb("data")
    assert run("data synth deblur p -o pairs -n --json".split()) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["verb"], record["engine"], record["plan"]["device"]) == ("data", "deblur", "cpu")
    assert (record["settings"]["out"], record["settings"]["photos"]) == ("pairs", ["p"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_help_shows_example_first_and_every_flag(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.words.split(), "-h"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert lines[0].startswith(f"Usage: imgtool {command.words}")
    assert lines[1] == f"Example: {command.settings.example}"
    for flag in [*flags(command.settings), *general(command)]:
        assert all(word in out for word in ([flag.metavar] if flag.argument else flag.words))
    assert "[default: " in out


def test_help_of_groups_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert "Example: imgtool infer deblur" in out
    assert all(text in out for text in VERBS.values())
    assert run(["infer", "-h"]) == 0
    assert "Sharpen photos." in capsys.readouterr().out
    assert run([]) == 2
    assert "Usage: imgtool" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"imgtool {__version__}\n"


ENDING = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from imgtool import cli

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
atexit.register(print, "the handler has run")
ending, leave = threading.Event(), cli.leave
cli.leave = lambda code: (ending.set(), leave(code))
ThreadPoolExecutor().submit(lambda: (ending.wait(30), time.sleep(0.2), print("the work is done")))
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
sys.argv[1:] = ["--version"]
cli.main()
"""


def test_main_ends_the_process_itself() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.split("\n") == [
        f"imgtool {__version__}", "the work is done", "the handler has run", ""
    ]  # fmt: skip
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("infr", 2, "error:"),
        ("--version >&-", 0, ""),
        ("infr 2>&-", 2, ""),
        pytest.param("infer filter photo.png -o dark.png >&- 2>&-", 0, "", marks=pytest.mark.slow),
        pytest.param("--version > /dev/full", 1, "No space", marks=FULL),
    ],
)
def test_main_exits(words: str, code: int, said: str, tmp_path: Path) -> None:
    images.write(tmp_path / "photo.png", images.Photo(np.zeros((8, 8, 3), np.uint8)))
    command = f"{shlex.quote(sys.executable)} -m imgtool {words}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(said) if said == "error:" else said in done.stderr
    if "dark" in words:
        assert images.read(tmp_path / "dark.png").pixels.shape == (8, 8, 3)


@FULL
def test_a_last_word_that_cannot_be_written_is_a_failure() -> None:
    last = "import atexit; from imgtool.cli import leave; atexit.register(print, 'the last word'); leave(0)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", last], stdout=full, stderr=subprocess.PIPE, env=buffered, check=False
        )
    assert done.returncode == 1


LIGHT = f"""
import os, sys
from imgtool.cli import run
for words in (["--help"], ["infer", "deblur", "-h"], ["data", "-h"], ["infer", "deblr"], ["--version"]):
    run(words)
os.environ.update(_IMGTOOL_COMPLETE="complete_bash", COMP_WORDS="imgtool infer deblur --fo", COMP_CWORD="3")
try:
    run([])
except SystemExit:
    pass
sys.exit(", ".join(name for name in {HEAVY!r} if name in sys.modules) or 0)
"""


def test_help_and_completion_import_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert "--format" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("imgtool in", ["infer"]),
        ("imgtool data sy", ["synth"]),
        ("imgtool data ins", ["inspect"]),
        ("imgtool data inspect --pattern G", ["GRBG", "GBRG"]),
        ("imgtool train deblur --preset r", ["rtx4090"]),
        ("imgtool infer deblur --format w", ["webp"]),
        ("imgtool infer deblur pho", []),  # the shell then offers files
        ("imgtool infer deblur --out pho", []),
    ],
)
def test_completion(
    typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_IMGTOOL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    with pytest.raises(SystemExit):
        run([])
    assert capsys.readouterr().out.split() == offered


def test_a_closed_pipe_is_no_traceback() -> None:
    source = "import sys; from imgtool.cli import run; sys.exit(run(['train', 'deblur', '-h']))"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", source],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_reference_is_fresh() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"))["reference"]()
    stale = "docs/cli.md is stale: run `make docs`"
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == made, stale


@pytest.mark.slow
def test_a_whole_command_imports_the_settings_of_its_engine_alone() -> None:
    program = (
        "import sys\nfrom imgtool import cli\n"
        "code = cli.run(['data', 'check', 'awb', 'nowhere'])\n"
        "names = ('lens', 'deblur', 'awb')\n"
        "print(code, [name for name in names if f'imgtool.engines.{name}.settings' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "2 ['awb']"
    assert "no such folder: nowhere" in done.stderr
