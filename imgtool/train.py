"""The verb ``train``: one loop for all engines.

Everything that happens at a step is a function of the step: the learning rate, the samples, the
augmentation. So a run is its settings, and the state that resumes it is the network, the averaged
weights, the optimiser and the step.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from imgtool import checkpoint, compute, files, plots, repeat, sheets
from imgtool.console import plain
from imgtool.engine import Engine, Examples
from imgtool.errors import DONE, USAGE, ImgtoolError
from imgtool.optimisers import Soap
from imgtool.samples import Stages
from imgtool.settings import Train, make, table, to_toml

if TYPE_CHECKING:
    from types import FrameType

    from imgtool.console import Bar, Console

STATE = "last.pt"
SETTINGS = "settings.toml"
LOG = "log.jsonl"
BEST = "best.safetensors"
DONE_FILE = "done.json"
"""What a run found, written when it ended: a campaign does not repeat it."""
CAMPAIGN = "campaign.json"
"""Marks a folder of many runs."""
COUNTERS = ("step", "seconds", "bad", "skipped", "stale", "best")
STATES = ("net", "ema", "optimiser", "scaler", "random", "sums", *COUNTERS)
"""What the state of a run holds."""


def learning_rate(step: int, settings: Train) -> float:
    """Return the rate at a step: a linear rise, then half a cosine down to ``final_lr`` of the peak.

    With ``cycle``, half cosines follow each other, each twice as long as the one before: Loshchilov and
    Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, with T_mult = 2.

    It depends on nothing but the step, so a resumed run cannot climb back up.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    low = settings.final_lr
    return settings.lr * (low + (1 - low) * (1 + math.cos(math.pi * _fallen(step, settings))) / 2)


def _fallen(step: int, settings: Train) -> float:
    """Return the part of its half cosine, 0 to 1, that the rate has gone through."""
    step -= settings.warmup
    if not settings.cycle:
        return min(step / max(settings.steps - settings.warmup, 1), 1.0)
    length = 1 << (step // settings.cycle + 1).bit_length() - 1  # of the cycle, in first cycles
    return (step - settings.cycle * (length - 1)) / (settings.cycle * length)


def run_folder(engine: Engine, settings: Train) -> Path:
    """Return the folder that a run writes into."""
    if settings.resume:
        return settings.resume
    return settings.out or Path("runs") / engine.name / datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def resumed(engine: Engine, settings: Train) -> Train:
    """Return the settings of the run to resume, with what was given now laid over them.

    Raises:
        ImgtoolError: Code 2, where the folder holds no run of this engine.
    """
    if not settings.resume:
        return settings
    path = settings.resume / SETTINGS
    if not path.is_file():
        raise ImgtoolError(
            f"no run to resume in {settings.resume}", f"{SETTINGS} is missing: name a run's folder", USAGE
        )
    before = table(path, "train", engine.name)
    if not before:
        raise ImgtoolError(
            f"the run in {settings.resume} is not of the {engine.name} engine",
            f"{SETTINGS} there names its engine",
            USAGE,
        )
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    begun, found = make(type(settings), before, str(path)), make(type(settings), before | given, str(path))
    _check_same_network(engine, begun, found)
    repeat.check_same(begun, found)
    return found


def _check_same_network(engine: Engine, begun: Train, wanted: Train) -> None:
    """Refuse to go on with another network or optimiser than those that a run began with."""
    parts = dict.fromkeys(engine.model.model_fields, "network") | {"optimiser": "optimiser"}
    for name, part in parts.items():
        value = getattr(begun, name)
        if getattr(wanted, name) != value:
            flag = f"--{name.replace('_', '-')}"
            what = f"the run was begun with {flag} {value}, and goes on with that {part} alone"
            raise ImgtoolError(what, f"leave out {flag}, or begin anew", USAGE)


def plan(engine: Engine, settings: Train) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells: where it would run, how large, how long, and what it writes."""
    settings = resumed(engine, settings)
    _wants_campaign(engine, settings)
    net = engine.build(settings)
    train, held_out = engine.data(settings)
    return {
        "device": str(compute.device(settings.device)),
        "parameters": sum(p.numel() for p in net.parameters()),
        **({"runs": settings.runs} if settings.runs > 1 else {}),
        "steps": settings.steps,
        "samples per epoch": len(train),
        "held-out samples": len(held_out),
        "output": str(run_folder(engine, settings)),
    }


def _wants_campaign(engine: Engine, settings: Train) -> bool:
    wanted = engine.campaign is not None and engine.wants_campaign(settings)
    if wanted and settings.runs > 1:
        what = "--runs repeats one training, and these settings ask for many different ones"
        raise ImgtoolError(what, "leave out --runs", USAGE)
    return wanted


def run(engine: Engine, settings: Train, console: Console) -> int:
    """Train; the run folder then holds settings, log, weights, pictures and the state to resume.

    Returns:
        1 where one of repeated runs failed, else 0.

    Raises:
        ImgtoolError: For data that cannot be used, memory or a disk that does not do, or a run
            whose loss is not finite any more.
        KeyboardInterrupt: After the state was saved.
    """
    settings = resumed(engine, settings)
    folder = run_folder(engine, settings)
    campaign = _wants_campaign(engine, settings)
    if not settings.resume and any((folder / name).exists() for name in (STATE, CAMPAIGN)):
        raise ImgtoolError(
            f"{folder} already holds a run",
            f"go on with it by --resume {folder}, or name another folder by -o",
        )
    if engine.campaign is not None and campaign:
        record = engine.campaign(settings, Crew(engine, settings, folder, console))
        lines = [f"{name}: {value}" for name, value in record.items()]
        console.result(record, "\n".join(lines))
        return DONE
    if settings.runs > 1:
        return repeat.run(engine, settings, Crew(engine, settings, folder, console), console)
    loop = Loop(engine, settings, folder, console)
    loop.go()
    return DONE


class Crew:
    """What an engine that trains many times is given: one training at a time, and words for the user."""

    def __init__(self, engine: Engine, settings: Train, folder: Path, console: Console) -> None:
        """Record the settings in the campaign's folder, so that --resume and --config find them."""
        self.folder = folder
        self._engine, self._console = engine, console
        record = settings.changed(resume=None, out=None)
        self.config = folder / SETTINGS
        files.write(self.config, to_toml(record, "train", engine.name).encode())
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


def _differing(engine: Engine, settings: Train, weights: checkpoint.Weights) -> str:
    """Return the flags of weights that shape the network otherwise than these settings do, "" for none."""
    wanted = {name: getattr(settings, name) for name in engine.model.model_fields}
    other = {name: weights.model.get(name, value) for name, value in wanted.items()}
    return " ".join(
        f"--{name.replace('_', '-')} {other[name]}" for name in wanted if other[name] != wanted[name]
    )


class Loop:
    """One training run."""

    def __init__(self, engine: Engine, settings: Train, folder: Path, console: Console) -> None:
        """Build network, data and optimiser, and take up the state of a resumed run."""
        self.engine, self.settings, self.folder, self.console = engine, settings, folder, console
        self.home = folder  # what --resume takes: of one run among many, the folder of all
        compute.use_threads(settings.threads)
        self.device = compute.device(settings.device)
        self.autocast = compute.autocast_type(settings.precision, self.device)
        torch.manual_seed(settings.seed)
        self.net = engine.build(settings)
        self.phases = Phases(self.net, settings)
        if not settings.resume:
            self._begin()
        compute.channels_last(self.net.to(self.device))
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        kind = Soap if settings.optimiser == "soap" else torch.optim.AdamW
        groups = [{"params": part} for part in self.phases.parameters]
        self.optimiser: torch.optim.Optimizer = kind(groups, settings.lr, weight_decay=settings.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        self.train, self.held_out = engine.data(settings)
        self.stages = _checked(engine.stages(settings), settings.steps)
        self.step, self.seconds, self.bad, self.skipped, self.stale = 0, 0.0, 0, 0, 0
        self.best: dict[str, Any] = {}
        self.sums: dict[str, Tensor] = {}
        self.began = time.monotonic()
        self.interrupted = False
        if settings.resume:
            self._take_up(checkpoint.read_state(folder / STATE, STATES))
        if settings.compile:
            compute.compile_net(self.net, self.device, console.say)

    def _begin(self) -> None:
        """Fill the new network with what the engine begins with, then with the weights that were named."""
        words = self.engine.begin(self.net, self.settings) if self.engine.begin else ""
        if words:
            self.console.say(words)
        if self.settings.weights:
            name = self.engine.name
            weights = checkpoint.read_weights(checkpoint.find(self.settings.weights, name), name)
            differing = _differing(self.engine, self.settings, weights)
            try:
                checkpoint.load_state(self.net, weights)
            except ImgtoolError:
                if not differing:
                    raise
                what = f"the weights {weights.name} are of another network than the one to train"
                raise ImgtoolError(what, f"they were trained with {differing}", USAGE) from None
            if differing:
                self.console.warn(f"the weights {weights.name} were trained with {differing}")

    # --- state ---

    def _take_up(self, state: Mapping[str, Any]) -> None:
        checkpoint.load_state(self.net, checkpoint.Weights(STATE, self.engine.name, {}, {}, state["net"]))
        self.ema.load_state_dict(state["ema"])
        if [len(group["params"]) for group in state["optimiser"]["param_groups"]] != [
            len(part) for part in self.phases.parameters
        ]:
            raise ImgtoolError(
                "a run cannot go on with another --freeze", "leave it as it was, or begin anew", USAGE
            )
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        for name in COUNTERS:
            setattr(self, name, state[name])
        for name, value in state["sums"].items():
            self.sums[name] = self._wide(torch.tensor(value, dtype=torch.float64))
        self.console.say(f"resuming {self.folder} at step {self.step} of {self.settings.steps}")

    def _save(self) -> None:
        self._clock()
        state = {
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "sums": {name: float(value) for name, value in self.sums.items()},
        } | {name: getattr(self, name) for name in COUNTERS}
        checkpoint.save_state(self.folder / STATE, state)

    def _rows(self) -> list[dict[str, Any]]:
        """Return the log up to this step: a run that was killed may have written more than it saved."""
        log = self.folder / LOG
        rows = files.json_lines(log) if log.exists() else []
        return [row for row in rows if row.get("step", math.inf) <= self.step]

    def _write_log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
        files.write(self.folder / LOG, text.encode())

    def _clock(self) -> None:
        """Add the time since it was last called to what the run has taken."""
        now = time.monotonic()
        self.seconds += now - self.began
        self.began = now

    # --- the loop ---

    def go(self) -> dict[str, Any]:
        """Run to the last step, to the early stop, or to the interrupt; return what was best."""
        if not self.settings.resume:
            self._write_settings()
        rows = self._rows()
        self._write_log(rows)
        parameters = sum(p.numel() for p in self.net.parameters())
        self.console.say(
            f"training {self.engine.name}: {parameters:,} parameters on {self.device}, into {self.folder}"
        )
        if rows and self._enough(rows):
            return self._finish()
        with (
            _signals(self),
            _explained(),
            self.console.progress(self.settings.steps, f"train {self.engine.name}") as progress,
        ):
            progress.advance(self.step)
            resumed_at = self.step
            self.began = time.monotonic()
            for batch in self._batches():
                self._learn(batch)
                progress.advance(1)
                if self.settings.resume and self.step == resumed_at + 1:
                    self._write_settings()  # not before: what was given now may not even run
                if self._after_step(progress):
                    break
        return self._finish()

    def _write_settings(self) -> None:
        """Record the settings; with --config they repeat the run, from its start, in a folder of its own."""
        record = self.settings.changed(resume=None, out=None)
        files.write(self.folder / SETTINGS, to_toml(record, "train", self.engine.name).encode())

    def _after_step(self, progress: Bar) -> bool:
        """Validate and save where it is time to; tell whether to stop early."""
        settings = self.settings
        ended = self.step % settings.epoch_steps == 0 or self.step == settings.steps
        if ended:
            progress.update(self._end_epoch())
        if settings.sample_every and self.step % settings.sample_every == 0:
            self._sample()
        if ended or self.step % settings.save_every == 0 or self.interrupted:
            self._save()
        if self.interrupted:
            self.console.say(f"stopped at step {self.step}; go on with --resume {self.home}")
            raise KeyboardInterrupt
        if ended and 0 < settings.patience <= self.stale:
            self.console.say(f"no better {self.engine.best} for {self.stale} epochs: stopping early")
            return True
        return ended and self._enough(self._rows())

    def _enough(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Ask the engine whether what was logged is all that was wanted, and say so."""
        words = self.engine.enough(rows, self.settings)
        if words:
            self.console.say(words)
        return bool(words)

    def _batches(self) -> Iterator[Any]:
        """Yield the batches from this step on.

        Raises:
            ImgtoolError: As the data set raised it. Unless this was before the first step, the state is
                saved, there are weights that can be used, and the hint says how to go on.
        """
        try:
            yield from _load(self.train, Numbers(self.stages, self.step), self.settings.workers)
        except ImgtoolError as fault:
            if self.step:
                self._save()
                if not self.best:
                    self._keep_unfinished()
                saved = f"the state of step {self.step} is saved: go on with --resume {self.home}"
                fault.hint = "; ".join(filter(None, (fault.hint, saved)))
            raise

    def _keep_unfinished(self) -> None:
        """Write the weights as they are, before any epoch has ended; the run itself takes no note of it."""
        try:
            scores, _ = self._validate()
        except ImgtoolError:  # the source of the held-out data may be the one that died
            scores = {}
        self._keep({"step": self.step, "scores": plain(scores)})

    def _learn(self, batch: Any) -> None:
        shares = (1.0, self.settings.unfreeze_lr)
        for group, share in zip(self.optimiser.param_groups, shares, strict=False):
            group["lr"] = learning_rate(self.step, self.settings) * share
        self.net.train()
        self.phases.enter(self.step)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            terms = self.engine.loss(self.net, _to(batch, self.device), self.settings)
        loss = torch.stack(list(terms.values())).sum()
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip or math.inf)
        if bool(torch.isfinite(norm + loss)):  # the one time in a step that a GPU is waited for
            self.scaler.step(self.optimiser)
            self._average()
            self.bad = 0
            self._count({"loss": loss, **terms, "": torch.ones((), device=self.device)})
        else:
            self._skip()
        self.scaler.update()
        self.step += 1

    def _skip(self) -> None:
        self.bad += 1
        self.skipped += 1
        if self.bad >= self.settings.max_bad_steps:
            row, self.bad = self.bad, 0
            self._save()  # no step was taken since the last good one
            raise ImgtoolError(
                f"loss or gradient not finite for {row} steps in a row, up to step {self.step}",
                f"go on from the last good weights with a lower --lr: --resume {self.home}",
            )

    def _average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
            for mean, buffer in zip(self.ema.buffers(), self.net.buffers(), strict=True):
                mean.copy_(buffer)

    def _count(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + self._wide(value.detach())

    def _wide(self, value: Tensor) -> Tensor:
        """Return a sum's summand, in double precision where the device has it."""
        return value.to(torch.float32 if self.device.type == "mps" else torch.float64).to(self.device)

    # --- an epoch ---

    def _end_epoch(self) -> str:
        scores, pictures = self._validate()
        self._clock()
        sums = {name: float(value) for name, value in self.sums.items()}
        steps = max(sums.pop("", 0.0), 1.0)
        means = {name: value / steps for name, value in sums.items()}
        self.sums = {}
        epoch = math.ceil(self.step / self.settings.epoch_steps)
        row = {
            "epoch": epoch,
            "step": self.step,
            "lr": learning_rate(self.step - 1, self.settings),
            "loss": means.pop("loss", math.nan),
            "terms": means,
            "scores": scores,
            "seconds": self.seconds,
            "skipped": self.skipped,
        }
        self._write_log([*self._rows(), row])
        self._judge(row)
        self._draw(epoch, pictures)
        text = f"epoch {epoch}  step {self.step}  loss {row['loss']:.5f}  " + "  ".join(
            f"{k} {v:.4g}" for k, v in scores.items()
        )
        self.console.result(row)
        self.console.say(text)
        return "  ".join(f"{k} {v:.4g}" for k, v in scores.items())

    @torch.inference_mode()
    def _validate(self) -> tuple[dict[str, float], Mapping[str, Tensor]]:
        values: dict[str, list[Tensor]] = {}
        pictures: Mapping[str, Tensor] = {}
        for batch in self._held_out():
            for name, score in self.engine.score(self.ema, batch).items():
                values.setdefault(name, []).append(score.cpu().double())
            pictures = pictures or self.engine.samples(self.ema, batch)
        return {name: float(torch.cat(parts).mean()) for name, parts in values.items()}, pictures

    def _held_out(self) -> Iterator[Any]:
        """Yield the held-out data, all of it once."""
        size = min(self.settings.batch, 8)
        whole, rest = divmod(len(self.held_out), size)
        for batch in _load(self.held_out, Numbers(((whole, size), (min(rest, 1), rest))), 0):
            yield _to(batch, self.device)

    def _judge(self, row: Mapping[str, Any]) -> None:
        name = self.engine.best
        if self.engine.otherwise and not math.isfinite(row["scores"][name]):
            name = self.engine.otherwise
        value, before = row["scores"].get(name, math.nan), self.best.get("scores", {}).get(name, math.nan)
        sign = 1 if self.engine.higher_is_better else -1
        better = math.isfinite(value) and (not math.isfinite(before) or sign * value > sign * before)
        last = self.phases.last(self.step) and self.step > sum(steps for steps, _ in self.stages[:-1])
        self.stale = 0 if better or not last else self.stale + 1
        if better:
            self.best = {"epoch": row["epoch"], "step": row["step"], "scores": row["scores"]}
            self._keep({"scores": row["scores"], "step": row["step"]})

    def _keep(self, about: Mapping[str, Any]) -> None:
        """Write the averaged weights."""
        about = {**about, "train": portable(self.settings), **self.engine.describe(self.train)}
        checkpoint.save_weights(self.folder / BEST, self.engine, self.settings, self.ema.state_dict(), about)

    def _draw(self, epoch: int, pictures: Mapping[str, Tensor]) -> None:
        plots.curves(self._rows(), self.folder / "curves.png", title=f"{self.engine.name} {self.folder.name}")
        self._sheet(pictures, f"epoch-{epoch:04d}", f"epoch {epoch}")

    @torch.inference_mode()
    def _sample(self) -> None:
        """Draw a sheet of the first of the held-out data."""
        for batch in self._held_out():
            pictures = self.engine.samples(self.ema, batch)
            self._sheet(pictures, f"step-{self.step:06d}", f"step {self.step}")
            break

    def _sheet(self, pictures: Mapping[str, Tensor], name: str, title: str) -> None:
        images = {
            label: value.permute(0, 2, 3, 1).float().clamp(0, 1).cpu().numpy()
            for label, value in pictures.items()
        }
        sheets.sheet(images, self.folder / "samples" / f"{name}.png", title=title)

    def _finish(self) -> dict[str, Any]:
        if not self.best:
            raise ImgtoolError(
                f"no finite {self.engine.best} was ever reached: there are no weights",
                "lower --lr and start again",
            )
        last = {
            "best": self.best,
            "folder": str(self.folder),
            "weights": str(self.folder / BEST),
        }
        if self.skipped:
            self.console.warn(f"{self.skipped} steps were skipped: their loss or gradient was not finite")
        scores = "  ".join(f"{k} {v:.4g}" for k, v in self.best.get("scores", {}).items())
        self.console.result(last, f"best: {scores}\nweights: {last['weights']}")
        return last


def portable(settings: Train) -> dict[str, Any]:
    """Return settings as plain values for a weights file: of paths only the last name, nobody's folders."""

    def short(value: Any) -> Any:
        if isinstance(value, tuple):
            return [short(each) for each in value]
        return value.name if isinstance(value, Path) else value

    return {name: short(value) for name, value in settings.model_dump().items()}


class Phases:
    """What of a network learns when: a frozen part, all or the end of which learns from some epoch on.

    Attributes:
        parameters: The parameters that always learn, and those of the frozen part where there is one.
        opens: Step from which on the frozen part learns, None for never.
    """

    def __init__(self, net: nn.Module, settings: Train) -> None:
        """Split a network as the settings say.

        Raises:
            ImgtoolError: Code 2, for a prefix that freezes nothing, as a typing error would, or
                everything, and for a share in which there is nothing to learn.
        """
        prefix = settings.freeze
        names = [name for name, _ in net.named_parameters()]
        frozen = [name for name in names if prefix and name.startswith(prefix)]
        if prefix and len(frozen) in (0, len(names)):
            raise ImgtoolError(
                f"--freeze {prefix} fits {'every' if frozen else 'no'} parameter",
                "their names begin with: " + ", ".join(sorted({name.partition(".")[0] for name in names})),
                USAGE,
            )
        self._norms = _norms(net, prefix) if prefix and settings.frozen_norm else {}
        fixed = {f"{name}.{each}" for name in self._norms for each in ("weight", "bias")}
        opened = set(frozen[-math.ceil(settings.unfreeze_share * len(frozen)) :]) - fixed if frozen else set()
        by_name = dict(net.named_parameters())
        free = [value for name, value in by_name.items() if name not in frozen]
        self._frozen = [(by_name[name], name in opened) for name in frozen]
        self.parameters = [free, [by_name[name] for name in frozen]] if frozen else [free]
        opening = bool(frozen) and settings.unfreeze_epoch > 0
        self.opens = (settings.unfreeze_epoch - 1) * settings.epoch_steps if opening else None
        if opening and not opened:
            raise ImgtoolError(
                f"--unfreeze-share {settings.unfreeze_share:g} opens nothing but batch normalisation",
                "take a larger share",
                USAGE,
            )

    def enter(self, step: int) -> None:
        """Let the parameters learn that do so at a step; the network is in training mode before."""
        is_open = self.opens is not None and step >= self.opens
        for parameter, opened in self._frozen:
            parameter.requires_grad_(is_open and opened)
        for norm in self._norms.values():
            norm.eval()

    def last(self, steps: int) -> bool:
        """Tell whether the last of a number of steps was in the last phase."""
        return self.opens is None or steps > self.opens


def _norms(net: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Return the layers below a prefix that keep statistics: batch and instance normalisation."""
    kinds = nn.modules.batchnorm._NormBase
    return {
        name: module
        for name, module in net.named_modules()
        if f"{name}.".startswith(prefix) and isinstance(module, kinds)
    }


class _Guarded(Dataset[Any]):
    """Hands a user's fault on as a sample: torch would remake it from the text of its traceback."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, number: int) -> Any:
        try:
            return self.examples[number]
        except ImgtoolError as fault:
            return fault


def _collate(samples: Sequence[Any]) -> Any:
    faults = [sample for sample in samples if isinstance(sample, ImgtoolError)]
    return faults[0] if faults else default_collate(list(samples))


def _checked(stages: Stages, steps: int) -> Stages:
    if sum(each for each, _ in stages) != steps:
        raise ValueError(f"the stages {stages} are not those of {steps} steps")
    return stages


@dataclass(frozen=True)
class Numbers:
    """The sample numbers of every batch of a run, made as they are asked for.

    Attributes:
        stages: Steps and samples per step of each part of the run.
        start: Step to begin at.
    """

    stages: Stages
    start: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield batch after batch: each has the numbers that follow those of the step before."""
        first, past = 0, self.start
        for steps, size in self.stages:
            gone = min(past, steps)
            past -= gone
            first += gone * size
            for _ in range(steps - gone):
                yield list(range(first, first + size))
                first += size

    def __len__(self) -> int:
        """Return the number of batches."""
        return max(sum(steps for steps, _ in self.stages) - self.start, 0)


def _load(examples: Examples, numbers: Numbers, workers: int) -> Iterator[Any]:
    """Yield the batches of the given sample numbers, in their order.

    Raises:
        ImgtoolError: As the data set raised it, also from another process.
    """
    loader = DataLoader(
        _Guarded(examples),
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker if workers else None,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Else each loader, and so each resume, would draw from the run's own random numbers.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    if workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        # Torch's own handler raises wherever the run is, even amid saving; it also looks when it waits.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while (batch := _next(batches)) is not None:
        if isinstance(batch, ImgtoolError):
            raise batch
        yield batch


def _next(batches: Iterator[Any]) -> Any:
    """Return the next batch, or None; turn the end of a process that should make it into advice."""
    try:
        return next(batches, None)
    except (RuntimeError, ConnectionError, EOFError) as fault:
        # What ends while it hands over a batch is seen as a broken connection. A fault of the data
        # set itself begins with "Caught", and is a bug.
        lost = str(fault).startswith("DataLoader worker")
        if str(fault).startswith("Caught") or (isinstance(fault, RuntimeError) and not lost):
            raise
        raise ImgtoolError(
            "a process that prepares data was killed, perhaps for its memory", "lower --workers"
        ) from None


def _start_worker(number: int) -> None:
    """Leave Ctrl-C to the main process, which may still need its data, and one core to each worker.

    SIGTERM must end a worker: by it the main process, when it ends, ends those that still wait.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what torch says when memory runs out into advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if not compute.out_of_memory(fault):
            raise
        raise ImgtoolError("out of memory while training", "lower --batch, or make samples smaller") from None


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return type(batch)(*(_to(part, device) for part in batch))


class _signals:
    """Turn the first SIGINT or SIGTERM into "stop after this step"; the second acts at once."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        self.before = (
            {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)} if self.main else {}
        )

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.loop.interrupted:
            raise KeyboardInterrupt
        self.loop.interrupted = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
