"""Weights & Biases: into a folder until somebody is logged in, for ``wandb sync`` to send."""

from __future__ import annotations

import importlib
import json
import logging
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from imgtool.errors import USAGE
from imgtool.track import WITHOUT, Unreachable
from imgtool.track.facts import COMMIT
from imgtool.track.package import Package
from imgtool.track.recorder import line
from imgtool.track.sink import About, Row, Status

FOLDER = "runs"
"""wandb makes a folder "wandb" in it."""
CLOUD = "https://api.wandb.ai"
OFFLINE = ("offline", "dryrun")
PATIENCE = 50.0
"""Seconds that the end of a run waits for what still has to be sent; ``wandb sync`` sends the rest."""
REGISTRY = "wandb-registry-model"
"""The registry of models that every organisation has."""


def logged_in() -> bool:
    """Tell whether there is a key: WANDB_API_KEY, or one that ``wandb login`` kept in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", CLOUD)).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / name for name in (".netrc", "_netrc")]:
        try:
            if netrc.netrc(str(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def mode() -> str:
    """Return "online", "offline" or another word of WANDB_MODE, which wins.

    Raises:
        Unreachable: Code 2: it says online, and nobody is logged in.
    """
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted in {"online", "shared"} and not logged_in():
        what = f"WANDB_MODE={wanted}, and nobody is logged in to Weights & Biases"
        raise Unreachable(what, "run wandb login, or set WANDB_MODE=offline", USAGE)
    return wanted or ("online" if logged_in() else "offline")


def open_sink(about: About) -> Wandb:
    """Begin a run, or go on with it.

    Raises:
        Unreachable: Nobody is logged in where that is needed, the service does not answer, or the folder
            cannot be written.
    """
    chosen = mode()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    to = Path(about.settings.track_to or os.environ.get("WANDB_DIR") or FOLDER)
    try:
        to.mkdir(parents=True, exist_ok=True)
        return Wandb(about, to, chosen)
    except Exception as fault:  # noqa: BLE001 - of its client, its service, the system
        what = f"Weights & Biases cannot record into {to}: {line(fault)}"
        hint = f"WANDB_MODE=offline needs no network; --track-to names the folder; {WITHOUT}"
        raise Unreachable(what, hint) from None


class Wandb:
    """A run of Weights & Biases."""

    rewinds = False
    graphs = False

    def __init__(self, about: About, to: Path, mode: str) -> None:
        """Begin the run and tell all settings."""
        self._about, self._offline = about, mode in OFFLINE
        self._wandb: Any = importlib.import_module("wandb")
        logging.getLogger("wandb").setLevel(logging.ERROR)
        before = about.before.get("run")
        settings = self._wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, disable_code=True,
            git_commit=about.facts.get(COMMIT), finish_timeout=PATIENCE,
        )  # fmt: skip
        self._run: Any = self._wandb.init(
            project=about.experiment, name=about.name, group=about.group or None, dir=str(to), mode=mode,
            job_type="train", config={"settings": _typed(about), "facts": dict(about.facts)}, id=before,
            resume="allow" if before and not self._offline else None, settings=settings,
            reinit="create_new",
        )  # fmt: skip
        for pattern in ("train/*", "epoch/*", "score/*", "samples", "curves"):
            self._run.define_metric(pattern, step_metric="step")
        # Rows are counted on where a run is resumed offline: its parts then fit together when they are sent.
        rows = max(int(self._run.step), int(about.before.get("rows", 0)))
        self.memory: dict[str, Any] = {"run": str(self._run.id), "to": str(to.resolve()), "rows": rows}
        folder = Path(self._run.dir).parent
        every = folder.with_name(f"offline-run-*-{before}") if before else folder
        self._logged: set[tuple[int | str, ...]] = set()  # rows of what was told in part
        self.where = f"offline; send it by: wandb sync {_short(every)}" if self._offline else self._run.url

    def _log(self, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=self.memory["rows"], commit=True)
        self.memory["rows"] += 1

    def rewind(self, step: int) -> None:
        """Do nothing: nothing is taken back."""

    def numbers(self, rows: Sequence[Row]) -> None:
        """Tell numbers, from the first that was not yet on; those of the best go into the summary."""
        names: list[tuple[int | str, ...]] = [(row.step, *row.values) for row in rows]
        for name, row in zip(names, rows, strict=True):
            if name in self._logged:
                continue
            best = {name: value for name, value in row.values.items() if name.startswith("best/")}
            if best:
                self._run.summary.update({**best, "best/step": row.step})
            else:
                self._log({**row.values, "step": row.step})
            self._logged.add(name)
        self._logged.difference_update(names)

    def picture(self, path: Path, tag: str, step: int) -> None:
        """Tell a picture; all sheets of samples are one picture that changes."""
        name = tag.rpartition("/")[0] or Path(tag).stem
        self._log({name: self._wandb.Image(str(path)), "step": step})

    def file(self, path: Path) -> None:
        """Keep a file of the run folder."""
        kept = Path(self._run.dir, path.name)
        kept.write_bytes(path.read_bytes())
        self._run.save(str(kept), base_path=self._run.dir, policy="now")

    def model(self, package: Package) -> str:
        """Keep the weights as an artifact, and link it to the registry where that was asked for."""
        name = self._about.settings.register_as
        card = json.loads(json.dumps(package.card))
        artifact = self._wandb.Artifact(
            name or f"{self._about.engine.name}-{self._run.id}", "model", metadata=card
        )
        told = Path(self._run.dir, "model.json").resolve()
        told.write_text(json.dumps(card, indent=2), encoding="utf-8")
        # "mutable" would copy them into the user's home.
        artifact.add_file(str(package.weights.resolve()), "best.safetensors", policy="immutable")
        artifact.add_file(str(told), policy="immutable")
        logged = self._run.log_artifact(artifact, aliases=["best", f"step-{card.get('step')}"])
        if not name:
            return ""
        if self._offline:
            return (
                f"the model is kept as artifact {name}: after wandb sync it is a version of it; "
                f"link it to a registry there"
            )
        logged.wait()
        self._run.link_artifact(logged, f"{REGISTRY}/{name}")
        return f"registered {name}: {logged.qualified_name}"

    def close(self, status: Status) -> None:
        """End the run; what is not finished has an exit code that is not 0."""
        self._run.summary["status"] = status
        self._run.finish(exit_code={"finished": 0, "failed": 1, "killed": 130}[status])


def _typed(about: About) -> dict[str, Any]:
    return about.settings.model_dump(mode="json", exclude={"resume", "out"})


def _short(path: Path) -> str:
    """Return a path as it is seen from here, where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
