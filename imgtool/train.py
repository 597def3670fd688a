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
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from imgtool import checkpoint, compute, files, plots, sheets
from imgtool.engine import Engine
from imgtool.errors import DONE, USAGE, ImgtoolError
from imgtool.settings import Train, table, to_toml

if TYPE_CHECKING:
    from types import FrameType

    from imgtool.console import Console

STATE = "last.pt"
SETTINGS = "settings.toml"
LOG = "log.jsonl"


def learning_rate(step: int, settings: Train) -> float:
    """Return the rate at a step: a linear rise, then half a cosine down to ``final_lr`` of the peak.

    It depends on nothing but the step, so a resumed run cannot climb back up.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    low = settings.final_lr
    return settings.lr * (low + (1 - low) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def run_folder(engine: Engine, settings: Train) -> Path:
    """Return the folder that a run writes into."""
    if settings.resume:
        return settings.resume
    return settings.out or Path("runs") / engine.name / datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def resumed(engine: Engine, settings: Train) -> Train:
    """Return the settings of the run to resume, with what was given now laid over them."""
    if not settings.resume:
        return settings
    path = settings.resume / SETTINGS
    if not path.is_file():
        raise ImgtoolError(
            f"no run to resume in {settings.resume}", f"{SETTINGS} is missing: name a run's folder", USAGE
        )
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    return type(settings).model_validate(table(path, "train", engine.name) | given)


def plan(engine: Engine, settings: Train) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells: where it would run, how large, how long, and what it writes."""
    settings = resumed(engine, settings)
    net = engine.build(settings)
    train, held_out = engine.data(settings)
    return {
        "device": str(compute.device(settings.device)),
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps": settings.steps,
        "samples per epoch": len(train),
        "held-out samples": len(held_out),
        "output": str(run_folder(engine, settings)),
    }


def run(engine: Engine, settings: Train, console: Console) -> int:
    """Train; the run folder then holds settings, log, weights, pictures and the state to resume.

    Raises:
        ImgtoolError: For data that cannot be used, or a run whose loss is not finite any more.
        KeyboardInterrupt: After the state was saved.
    """
    settings = resumed(engine, settings)
    folder = run_folder(engine, settings)
    if not settings.resume and (folder / STATE).exists():
        raise ImgtoolError(
            f"{folder} already holds a run",
            f"go on with it by --resume {folder}, or name another folder by -o",
        )
    loop = Loop(engine, settings, folder, console)
    loop.go()
    return DONE


class Loop:
    """One training run."""

    def __init__(self, engine: Engine, settings: Train, folder: Path, console: Console) -> None:
        """Build network, data and optimiser, and take up the state of a resumed run."""
        self.engine, self.settings, self.folder, self.console = engine, settings, folder, console
        compute.use_threads(settings.threads)
        self.device = compute.device(settings.device)
        self.autocast = compute.autocast_type(settings.precision, self.device)
        torch.manual_seed(settings.seed)
        self.net = engine.build(settings)
        if settings.weights:
            checkpoint.load_state(
                self.net, checkpoint.read_weights(checkpoint.find(settings.weights), engine.name)
            )
        compute.channels_last(self.net.to(self.device))
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.net.parameters(), settings.lr, weight_decay=settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        self.train, self.held_out = engine.data(settings)
        self.step, self.seconds, self.bad, self.skipped, self.stale = 0, 0.0, 0, 0, 0
        self.best: dict[str, Any] = {}
        self.sums: dict[str, float] = {}
        self.interrupted = False
        if settings.resume:
            self._take_up(checkpoint.read_state(folder / STATE))

    # --- state ---

    def _take_up(self, state: Mapping[str, Any]) -> None:
        checkpoint.load_state(self.net, checkpoint.Weights(STATE, self.engine.name, {}, {}, state["net"]))
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        for name in ("step", "seconds", "bad", "skipped", "stale", "best", "sums"):
            setattr(self, name, state[name])
        log = self.folder / LOG
        if log.exists():
            kept = [row for row in log.read_text().splitlines() if json.loads(row)["step"] <= self.step]
            files.write(log, "".join(row + "\n" for row in kept).encode())
        self.console.say(f"resuming {self.folder} at step {self.step} of {self.settings.steps}")

    def _save(self) -> None:
        state = {
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
        } | {
            name: getattr(self, name)
            for name in ("step", "seconds", "bad", "skipped", "stale", "best", "sums")
        }
        checkpoint.save_state(self.folder / STATE, state)

    # --- the loop ---

    def go(self) -> None:
        """Run to the last step, to the early stop, or to the interrupt."""
        files.write(self.folder / SETTINGS, to_toml(self.settings, "train", self.engine.name).encode())
        parameters = sum(p.numel() for p in self.net.parameters())
        self.console.say(
            f"training {self.engine.name}: {parameters:,} parameters on {self.device}, into {self.folder}"
        )
        with (
            _signals(self),
            self.console.progress(self.settings.steps, f"train {self.engine.name}") as progress,
        ):
            progress.advance(self.step)
            began = time.monotonic()
            for batch in self._batches():
                self._learn(batch)
                progress.advance(1)
                ended = self.step % self.settings.epoch_steps == 0 or self.step == self.settings.steps
                if ended:
                    self.seconds += time.monotonic() - began
                    began = time.monotonic()
                    progress.update(self._end_epoch())
                if ended or self.step % self.settings.save_every == 0 or self.interrupted:
                    self._save()
                if self.interrupted:
                    self.console.say(f"stopped at step {self.step}; go on with --resume {self.folder}")
                    raise KeyboardInterrupt
                if ended and self.settings.patience and self.stale >= self.settings.patience:
                    self.console.say(f"no better {self.engine.best} for {self.stale} epochs: stopping early")
                    break
        self._finish()

    def _batches(self) -> Iterator[Any]:
        size = self.settings.batch
        numbers = [range(s * size, (s + 1) * size) for s in range(self.step, self.settings.steps)]
        yield from _loader(self.train, numbers, self.settings.workers)

    def _freeze(self) -> None:
        prefix, epoch = self.settings.freeze, self.step // self.settings.epoch_steps
        open_again = bool(self.settings.unfreeze_epoch) and epoch >= self.settings.unfreeze_epoch
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(not (prefix and name.startswith(prefix)) or open_again)

    def _learn(self, batch: Any) -> None:
        if self.settings.freeze:
            self._freeze()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        self.net.train()
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            terms = self.engine.loss(self.net, _to(batch, self.device), self.settings)
        loss = torch.stack(list(terms.values())).sum()
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip or math.inf)
        if bool(torch.isfinite(norm)) and bool(torch.isfinite(loss)):
            self.scaler.step(self.optimiser)
            self._average()
            self.bad = 0
            self._count({"loss": loss, **terms, "": torch.ones(())})
        else:
            self._skip()
        self.scaler.update()
        self.step += 1

    def _skip(self) -> None:
        self.bad += 1
        self.skipped += 1
        if self.bad >= self.settings.max_bad_steps:
            raise ImgtoolError(
                f"loss or gradient not finite for {self.bad} steps in a row, up to step {self.step}",
                "lower --lr, or take --precision fp32; the last good state is in the run folder",
            )

    def _average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
            for mean, buffer in zip(self.ema.buffers(), self.net.buffers(), strict=True):
                mean.copy_(buffer)

    def _count(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())

    # --- an epoch ---

    def _end_epoch(self) -> str:
        scores, pictures = self._validate()
        steps = max(self.sums.pop("", 0.0), 1.0)
        means = {name: value / steps for name, value in self.sums.items()}
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
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps(row) + "\n")
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
        total, size = len(self.held_out), max(min(self.settings.batch, 8), 1)
        numbers = [range(start, min(start + size, total)) for start in range(0, total, size)]
        for batch in _loader(self.held_out, numbers, 0):
            batch = _to(batch, self.device)
            for name, score in self.engine.score(self.ema, batch).items():
                values.setdefault(name, []).append(score.cpu().double())
            pictures = pictures or {k: v.cpu() for k, v in self.engine.samples(self.ema, batch).items()}
        return {name: float(torch.cat(parts).mean()) for name, parts in values.items()}, pictures

    def _judge(self, row: Mapping[str, Any]) -> None:
        value = row["scores"][self.engine.best]
        before = self.best.get("scores", {}).get(self.engine.best)
        better = before is None or (value > before if self.engine.higher_is_better else value < before)
        self.stale = 0 if better else self.stale + 1
        if better and math.isfinite(value):
            self.best = {"epoch": row["epoch"], "step": row["step"], "scores": row["scores"]}
            about = {
                "scores": row["scores"],
                "step": row["step"],
                "train": json.loads(self.settings.model_dump_json()),
            }
            checkpoint.save_weights(
                self.folder / "best.safetensors", self.engine, self.settings, self.ema.state_dict(), about
            )

    def _draw(self, epoch: int, pictures: Mapping[str, Tensor]) -> None:
        rows = [json.loads(line) for line in (self.folder / LOG).read_text().splitlines()]
        plots.curves(rows, self.folder / "curves.png", title=f"{self.engine.name} {self.folder.name}")
        images = {
            name: value.permute(0, 2, 3, 1).float().clamp(0, 1).numpy() for name, value in pictures.items()
        }
        sheets.sheet(images, self.folder / "samples" / f"epoch-{epoch:04d}.png", title=f"epoch {epoch}")

    def _finish(self) -> None:
        last = {
            "best": self.best,
            "folder": str(self.folder),
            "weights": str(self.folder / "best.safetensors"),
        }
        if self.skipped:
            self.console.warn(f"{self.skipped} steps were skipped: their loss or gradient was not finite")
        scores = "  ".join(f"{k} {v:.4g}" for k, v in self.best.get("scores", {}).items())
        self.console.result(last, f"best: {scores}\nweights: {last['weights']}")


def _loader(examples: Any, numbers: Sequence[Sequence[int]], workers: int) -> DataLoader[Any]:
    dataset: Dataset[Any] = examples
    return DataLoader(
        dataset,
        batch_sampler=[list(batch) for batch in numbers],
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def _start_worker(number: int) -> None:
    """Leave interrupts to the main process, and one core to each worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


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
