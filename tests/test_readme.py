"""README says the truth: its tree names every file, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from imgtool.flags import commands, flags, general

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"]
COMMANDS = {command.words: command for command in commands()}


def blocks(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)


def typed(page: Path) -> list[str]:
    """Return every imgtool command that a page shows, one per line, without its comment."""
    lines = [line for block in blocks(page.read_text(encoding="utf-8")) for line in block.splitlines()]
    found = [re.search(r"(?:^|\s|/)imgtool (train|infer|export|bench|data) [^|>&]*", line) for line in lines]
    return [match.group().strip().removeprefix("/") for match in found if match]


def test_the_tree_names_every_file_of_the_package() -> None:
    tree = README.split("```text\n", 1)[1].split("```", 1)[0]
    named, path = set(), [""]
    for line in tree.splitlines():
        match = re.match(r"( *)(\S+)", line)
        assert match
        depth = len(match.group(1)) // 2
        path[depth:] = [match.group(2).rstrip("/")]
        named.add("/".join(path))
    files = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "imgtool").rglob("*.py")
        if "weights" not in file.parts
    }
    assert files <= named
    assert {name for name in named if name.endswith(".py")} <= files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_flags_exist(page: Path) -> None:
    for line in typed(page):
        words = shlex.split(line, comments=True)[1:]
        name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
        assert name, f"{page.name}: no such command: {line}"
        command = COMMANDS[name]
        known = {word for flag in [*flags(command.settings), *general(command)] for word in flag.words}
        given = {word.split("=")[0] for word in words if word.startswith("-") and word != "-"}
        assert given <= known | {"-h", "--help"}, f"{page.name}: unknown flags {given - known} in: {line}"


def test_readme_has_both_commands_and_links_to_files_that_exist() -> None:
    start, test = (
        README.split(f"<!-- {mark} -->\n```sh\n", 1)[1].split("\n", 1)[0] for mark in ("start", "test")
    )
    assert "imgtool infer deblur examples/blurred.jpg" in start
    assert test.endswith("-m pytest")
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
