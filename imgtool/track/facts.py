"""What a run depends on besides its settings: code, machine, packages."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import imgtool
from imgtool.settings import Bench, Train

OF_FIGURES = ("omp_wait_policy", "load")
"""What only figures of speed depend on."""


def commit(folder: Path) -> dict[str, str]:
    """Return "git_commit" and "git_dirty" ("true" where tracked files differ) of a folder's repository.

    Returns:
        {} where there is no repository, no commit, or no git.
    """
    found = [_git(folder, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))]
    if found[0] is None or found[1] is None:
        return {}
    return {"git_commit": found[0].strip(), "git_dirty": "true" if found[1].strip() else "false"}


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
    """Return version, commit and machine of a run: name to text."""
    from imgtool.bench import environment as machine

    told = machine(Bench(device=settings.device, threads=settings.threads))
    facts = {"imgtool": imgtool.__version__, **commit(Path.cwd())}
    return facts | {
        name: str(value) for name, value in told.items() if value is not None and name not in OF_FIGURES
    }
