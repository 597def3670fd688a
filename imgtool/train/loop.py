"""One training run.

Everything that happens at a step is a function of the step: the learning rate, the samples, the
augmentation. So a run is its settings, and the state that resumes it is the network, the averaged
weights, the optimiser and the step.
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn

from imgtool import checkpoint, compute, dist, files, names, plots, sheets, track
from imgtool.console import Console, plain
from imgtool.engine import Engine
from imgtool.errors import USAGE, ImgtoolError
from imgtool.optimisers import Soap
from imgtool.samples import Stages
from imgtool.settings import Train
from imgtool.settings.sources import to_toml
from imgtool.train.feeding import Numbers, load, size_at
from imgtool.train.phases import Phases

if TYPE_CHECKING:
    from types import FrameType

    from imgtool.console import Bar

P = ParamSpec("P")

STATE = "last.pt"
SETTINGS = "settings.toml"
LOG = "log.jsonl"
BEST = "best.safetensors"
TWICE = 3.0
"""Seconds in which torchrun may hand on a signal that all of its processes got as well."""
RECORDS = ("track", "track_to", "experiment", "register_as")
"""Settings that say where a run is recorded besides."""
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


def _differing(engine: Engine, settings: Train, weights: checkpoint.Weights) -> str:
    """Return the flags of weights that shape the network otherwise than these settings do, "" for none."""
    wanted = {name: getattr(settings, name) for name in engine.model.model_fields}
    other = {name: weights.model.get(name, value) for name, value in wanted.items()}
    return " ".join(
        f"--{name.replace('_', '-')} {other[name]}" for name in wanted if other[name] != wanted[name]
    )


def _by_one(method: Callable[Concatenate[Loop, P], None]) -> Callable[Concatenate[Loop, P], None]:
    """Leave to the first of the processes what one alone may do: to write."""

    @wraps(method)
    def call(loop: Loop, /, *arguments: P.args, **named: P.kwargs) -> None:
        if loop.world.first:
            method(loop, *arguments, **named)

    return call


class Loop:
    """One training run; of many processes (``dist``) each has one, and they go through it in step."""

    def __init__(self, engine: Engine, settings: Train, folder: Path, console: Console) -> None:
        """Build network, data and optimiser, and take up the state of a resumed run."""
        self.world = dist.world()
        folder = dist.gather(folder)[0]  # its name may be the time
        self.engine, self.settings, self.folder = engine, settings, folder
        self.console = console if self.world.first else _Unheard()
        self.home = folder  # what --resume takes: of one run among many, the folder of all
        compute.use_threads(self.world.threads(settings.threads))
        self.device = dist.device(settings.device)
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
        self.stages = _checked(engine.stages(settings), settings.steps, self.world.size)
        self.step, self.seconds, self.bad, self.skipped, self.stale = 0, 0.0, 0, 0, 0
        self.best: dict[str, Any] = {}
        self.sums: dict[str, Tensor] = {}
        self.began = time.monotonic()
        self.interrupted = False
        self.tracker: track.Tracker = track.Silent()
        if settings.resume:
            self._take_up(checkpoint.read_state(folder / STATE, STATES))
        if settings.compile:
            compute.compile_net(self.net, self.device, self.console.say)
        self.learner = dist.Learner(self.net, lambda net, batch: engine.loss(net, batch, settings))

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
        left = "" if self.step < self.settings.steps else ": nothing is left to do; a larger --steps goes on"
        self.console.say(f"resuming {self.folder} at step {self.step} of {self.settings.steps}{left}")

    @_by_one
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

    @_by_one
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
        if self._enough(rows):
            return self._finish()
        with (
            _signals(self),
            _explained(),
            self._tracked() as self.tracker,
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
            if self.best:
                self.tracker.model(self.folder / BEST, self.best)
        return self._finish()

    def _tracked(self) -> AbstractContextManager[track.Tracker]:
        if not self.world.first:
            return nullcontext(track.Silent())
        return track.begin(self.engine, self.settings, self.folder, self.console.say)

    @_by_one
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
        stop = self.interrupted and self.world.size == 1  # many stop where they meet, before a step
        if ended or self.step % settings.save_every == 0 or stop:
            self._save()
        if stop:
            self._stop()
        if ended and 0 < settings.patience <= self.stale:
            self.console.say(f"no better {self.engine.best} for {self.stale} epochs: stopping early")
            return True
        return ended and self._enough(self._rows())

    def _stop(self) -> None:
        self.console.say(f"stopped at step {self.step}; go on with --resume {self.home}")
        raise KeyboardInterrupt

    def _enough(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Ask the engine whether what was logged is all that was wanted, and say so."""
        words = dist.gather(self.engine.enough(rows, self.settings) if rows and self.world.first else "")[0]
        if words:
            self.console.say(words)
        return bool(words)

    def _batches(self) -> Iterator[Any]:
        """Yield the batches from this step on.

        Raises:
            ImgtoolError: As the data set raised it. Unless this was before the first step, the state is
                saved, there are weights that can be used, and the hint says how to go on.
        """
        batches = load(self.train, Numbers(self.stages, self.step, self.world), self.settings.workers)
        while True:
            batch, fault = _next(batches)
            if self.world.size > 1:
                fault = self._met(fault)
            if fault is not None:
                raise self._broken(fault)
            if batch is None:
                return
            yield batch

    def _met(self, fault: ImgtoolError | None) -> ImgtoolError | None:
        """Meet the other processes before a step; return the fault of the first that has one.

        Raises:
            KeyboardInterrupt: One was told to stop: all do, after the state was saved.
        """
        told = dist.total(torch.tensor([self.interrupted, fault is not None], dtype=torch.int32))
        if told[0]:  # what prepares data may have been ended by the same signal
            self._save()
            dist.wait()
            self._stop()
        return next(filter(None, dist.gather(fault))) if told[1] else None

    def _broken(self, fault: ImgtoolError) -> ImgtoolError:
        """Save what a fault of the data leaves; return it with how to go on."""
        if self.step:
            self._save()
            if not self.best:
                self._keep_unfinished()
            saved = f"the state of step {self.step} is saved: go on with --resume {self.home}"
            fault.hint = "; ".join(filter(None, (fault.hint, saved)))
            dist.wait()
        return fault

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
        self.world.samples = size_at(self.stages, self.step)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            terms = self.learner(_to(batch, self.device))
        loss = torch.stack(list(terms.values())).sum() * dist.share()
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        terms = dist.whole(terms)
        loss = torch.stack(list(terms.values())).sum()
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip or math.inf)
        if bool(torch.isfinite(norm + loss)):  # the one time in a step that a GPU is waited for
            self.scaler.step(self.optimiser)
            self._average()
            self.bad = 0
            self._count({"loss": loss, **terms, "": torch.ones((), device=self.device)})
            self.tracker.step(
                self.step + 1, {"loss": loss, **terms, "lr": learning_rate(self.step, self.settings)}
            )
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
            dist.wait()
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
        self.tracker.epoch(row)
        self._draw(epoch, pictures)
        text = f"epoch {epoch}  step {self.step}  loss {row['loss']:.5f}  " + "  ".join(
            f"{k} {v:.4g}" for k, v in scores.items()
        )
        self.console.result(row)
        self.console.say(text)
        return "  ".join(f"{k} {v:.4g}" for k, v in scores.items())

    @torch.inference_mode()
    def _validate(self) -> tuple[dict[str, float], Mapping[str, Tensor]]:
        """Return the scores of all held-out data, and pictures of its first batch (of the first process)."""
        mine: list[Mapping[str, Tensor]] = []
        pictures: Mapping[str, Tensor] = {}
        fault: ImgtoolError | None = None
        try:
            for batch in self._held_out():
                scores = self.engine.score(self.ema, batch)
                mine.append({name: score.cpu().double() for name, score in scores.items()})
                if self.world.first:
                    pictures = pictures or self.engine.samples(self.ema, batch)
        except ImgtoolError as met:
            fault = met
        every, faults = zip(*dist.gather((mine, fault)), strict=True)
        if any(faults):
            raise next(filter(None, faults))
        values: dict[str, list[Tensor]] = {}
        for scores in _in_turn(every):
            for name, score in scores.items():
                values.setdefault(name, []).append(score)
        return {name: float(torch.cat(parts).mean()) for name, parts in values.items()}, pictures

    def _held_out(self) -> Iterator[Any]:
        """Yield the held-out data, all of it once; each of many processes takes batches in turn."""
        size = min(self.settings.batch, 8)
        whole, rest = divmod(len(self.held_out), size)
        numbers = list(Numbers(((whole, size), (min(rest, 1), rest))))
        for batch in load(self.held_out, numbers[self.world.rank :: self.world.size], 0):
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

    @_by_one
    def _keep(self, about: Mapping[str, Any]) -> None:
        """Write the averaged weights."""
        about = {**about, "train": portable(self.settings), **self.engine.describe(self.train)}
        checkpoint.save_weights(self.folder / BEST, self.engine, self.settings, self.ema.state_dict(), about)

    @_by_one
    def _draw(self, epoch: int, pictures: Mapping[str, Tensor]) -> None:
        curves = self.folder / "curves.png"
        plots.curves(self._rows(), curves, title=f"{self.engine.name} {self.folder.name}")
        self.tracker.picture(curves, self.step)
        self._sheet(pictures, f"epoch-{epoch:04d}", f"epoch {epoch}")

    @_by_one
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
        path = self.folder / "samples" / f"{name}.png"
        sheets.sheet(images, path, title=title)
        self.tracker.picture(path, self.step)

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
    """Return settings as plain values for a weights file: of paths only the last name, nobody's folders.

    Where a run is recorded besides is left out.
    """

    def short(value: Any) -> Any:
        if isinstance(value, tuple):
            return [short(each) for each in value]
        if isinstance(value, str) and (names.is_url(value) or (os.sep in value and os.path.exists(value))):
            value = Path(value)
        return Path(names.public(names.shown(str(value)))).name if isinstance(value, Path) else value

    return {name: short(value) for name, value in settings.model_dump().items() if name not in RECORDS}


def _checked(stages: Stages, steps: int, processes: int) -> Stages:
    if sum(each for each, _ in stages) != steps:
        raise ValueError(f"the stages {stages} are not those of {steps} steps")
    least = min(batch for _, batch in stages)
    if least < processes:
        what = f"a batch of {least} has no sample for each of {processes} processes"
        raise ImgtoolError(what, "give a larger --batch, or start fewer processes", USAGE)
    return stages


class _Unheard(Console):
    """Says nothing: of many processes one speaks."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        """Say nothing."""

    def result(self, record: Mapping[str, object], text: str = "") -> None:
        """Give nothing."""


def _next(batches: Iterator[Any]) -> tuple[Any, ImgtoolError | None]:
    """Return the next batch, None behind the last, and what was wrong with the data."""
    try:
        return next(batches, None), None
    except ImgtoolError as fault:
        return None, fault


def _in_turn(every: Sequence[Sequence[Mapping[str, Tensor]]]) -> Iterator[Mapping[str, Tensor]]:
    """Yield the first of each, then the second of each, and so on."""
    for number in range(max(map(len, every))):
        yield from (each[number] for each in every if number < len(each))


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
        self.hasty = -math.inf  # time from which on a second signal is meant as one

    def __enter__(self) -> None:
        self.before = (
            {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)} if self.main else {}
        )

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.loop.interrupted and time.monotonic() > self.hasty:
            raise KeyboardInterrupt
        if not self.loop.interrupted and self.loop.world.size > 1:
            self.hasty = time.monotonic() + TWICE
        self.loop.interrupted = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
