"""What a run depends on besides its settings: this version, machine, packages, and where it was begun."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import imgtool
from imgtool import machine
from imgtool.settings import Train

COMMIT, DIRTY = "working_directory_git_commit", "working_directory_git_dirty"


def commit(folder: Path) -> dict[str, str]:
    """Return the commit of a folder's repository, and whether tracked files differ: "true", "false".

    Args:
        folder: The working directory: its repository may have nothing to do with this package.

    Returns:
        By the names ``COMMIT`` and ``DIRTY``; {} where there is no repository, no commit, or no git.
    """
    found = [_git(folder, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))]
    if found[0] is None or found[1] is None:
        return {}
    return {COMMIT: found[0].strip(), DIRTY: "true" if found[1].strip() else "false"}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def packages() -> list[str]:
    """Return what is installed, "name==version", sorted."""
    found = {(each.name, each.version) for each in metadata.distributions() if each.name}
    return sorted((f"{name}=={version}" for name, version in found), key=str.lower)


def environment(settings: Train) -> Mapping[str, str]:
    """Return version, working directory's commit and machine of a run: name to text."""
    told = machine.facts(settings.device, settings.threads)
    facts = {"imgtool": imgtool.__version__, **commit(Path.cwd())}
    return facts | {name: str(value) for name, value in told.items() if value is not None}
