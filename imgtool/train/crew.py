"""Trainings that are many, one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from imgtool import files
from imgtool.console import plain
from imgtool.engine import Engine
from imgtool.settings import Train
from imgtool.settings.sources import to_toml
from imgtool.train.loop import LOG, SETTINGS, STATE, Loop

if TYPE_CHECKING:
    from imgtool.console import Console

DONE_FILE = "done.json"
"""What a run found, written when it ended: a campaign does not repeat it."""
CAMPAIGN = "campaign.json"
"""Marks a folder of many runs."""


class Crew:
    """What an engine that trains many times is given: one training at a time, and words for the user."""

    def __init__(
        self,
        engine: Engine,
        settings: Train,
        folder: Path,
        console: Console,
        *,
        joined: bool = False,
        first: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Record the settings in the campaign's folder, so that --resume and --config find them.

        Args:
            engine: What is trained.
            settings: Of all runs.
            folder: Of the campaign.
            console: Where words go.
            joined: The folder is that of others' campaign, which has its record.
            first: Name to content of what a folder holds before it counts as a campaign's.
        """
        self.folder = folder
        self._engine, self._console = engine, console
        record = settings.changed(resume=None, out=None)
        self.config = folder / SETTINGS
        if not joined:
            files.write(self.config, to_toml(record, "train", engine.name).encode())
            for name, content in first.items():
                files.write(folder / name, content)
            files.write(folder / CAMPAIGN, json.dumps({"engine": engine.name}).encode())

    def say(self, text: str) -> None:
        """Say a line on standard error."""
        self._console.say(text)

    def train(self, settings: Train, name: str) -> Mapping[str, Any]:
        """Train into the sub-folder ``name``, go on with what was interrupted, or tell what had ended.

        Returns:
            ``{"best": {...}, "folder", "weights"}`` as a run prints them.

        Raises:
            ImgtoolError: As ``run``.
            KeyboardInterrupt: After the state was saved.
        """
        ended = self.ended(name)
        if ended is not None:
            return ended
        folder = self.folder / name
        resume = folder if self.begun(name) else None
        loop = Loop(self._engine, settings.changed(resume=resume, out=None), folder, self._console.muted())
        loop.home = self.folder
        found = loop.go()
        self.keep(name, found)
        return found

    def begun(self, name: str) -> bool:
        """Tell whether the sub-folder holds a training to go on with."""
        return (self.folder / name / STATE).exists()

    def ended(self, name: str) -> Mapping[str, Any] | None:
        """Return what the training in the sub-folder found; None where it has not ended."""
        path = self.folder / name / DONE_FILE
        return json.loads(files.read(path)) if path.exists() else None

    def log(self, name: str) -> list[dict[str, Any]]:
        """Return what the training in the sub-folder logged, a row for each epoch."""
        return files.json_lines(self.folder / name / LOG)

    def keep(self, name: str, found: Mapping[str, Any]) -> None:
        """Record that the training in the sub-folder has ended, and what it found."""
        files.write(self.folder / name / DONE_FILE, json.dumps(plain(found)).encode())
