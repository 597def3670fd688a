"""The verb ``export``: a network as a file that runs elsewhere, run there and compared before it is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import files, header
from imgtool.engine import Engine, Loss, Port
from imgtool.errors import DONE, USAGE, ImgtoolError
from imgtool.export import sidecar
from imgtool.export.formats import FORMATS, SERVICES, Format
from imgtool.export.order import Order, lengths, read_size
from imgtool.settings import Export

if TYPE_CHECKING:
    from imgtool.console import Console

SPECIMENS = Path(__file__).parents[1] / "specimens"
"""Photos that ship, to compare on."""
NAMED = ("fp16", "int8", "libcamera")
"""What the default name of a file says."""
APART = 4
"""Number of photos from which on those that calibrate are not those that are compared on."""


def plan(engine: Engine, settings: Export) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells."""
    weights = header.find(settings.weights or engine.weights, engine.name)
    told: dict[str, object] = {"weights": str(weights)}
    if settings.to in SERVICES:
        return told | {"output": str(_folder(engine, settings))}
    job = _job(engine, settings, weights)
    free = ", ".join(sorted(job.free)) or "none"
    sizes = ", ".join(f"{axis} {size}" for axis, size in job.sizes.items() if axis not in job.free)
    return told | {
        "inputs": [f"{slot.name}: {slot.meaning}" for slot in job.port.inputs],
        "free": free,
        "fixed": sizes or "none",
        "output": [str(path) for path in job.targets],
    }


def run(engine: Engine, settings: Export, console: Console) -> int:
    """Write the file, run it, compare it, and only then put it into its place.

    Raises:
        ImgtoolError: The network, the format or the size do not go together, a package is missing, the
            file differs from torch, or a file exists.
    """
    weights = header.find(settings.weights or engine.weights, engine.name)
    if settings.to in SERVICES:
        return _serve(engine, settings, weights, console)
    form = FORMATS[settings.to]
    for path in _targets(settings, weights, form):
        files.check_new(path, settings.force)
    form.require()
    job = _job(engine, settings, weights)
    for path in job.targets:
        files.check_new(path, settings.force)
    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        made = Path(folder, job.targets[0].name)
        record = job.make(made, console)
        _put(made, job, record)
    text = f"{job.targets[0]}: {_proved(record['parity'])}"
    console.result(_short(record, job.targets[0], settings.to), text)
    return DONE


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        engine: The engine.
        settings: Of the command.
        weights: What was read of the weights.
        form: The format.
        port: What the file shall hold.
        sizes: Length of every axis.
        free: Axes that stay free.
        largest: Height and width of the largest picture that is compared.
        targets: The files: the model, what belongs to it, what goes beside it, and the JSON.
    """

    engine: Engine
    settings: Export
    weights: header.Weights
    form: Format
    port: Port
    sizes: Mapping[str, int]
    free: frozenset[str]
    largest: tuple[int, int]
    targets: Sequence[Path]

    def make(self, path: Path, console: Console) -> dict[str, Any]:
        """Write and prove the file; return what the JSON beside it says."""
        from imgtool.export import parity

        settings, precision = self.settings, self.settings.precision
        last = self.form.suffix == ".tflite"
        shown = {axis: None if axis in self.free else size for axis, size in self.sizes.items()}
        about = sidecar.about(self.engine, self.weights, self.port, precision, shown, last)
        photos, ranges = self._photos(console)
        calibration = [self.port.real(photo, self.sizes) for photo in ranges]
        order = Order(
            self.port, self.sizes, self.free, about, precision, calibration, settings.opset, settings.gpu_safe
        )
        console.say(f"writing {path.name}")
        written = self.form.write(order, path)
        limit = self.form.limits[precision]
        proof = parity.Proof(self._judged(), limit and (settings.limit or limit), settings.threads)
        every = parity.cases(self.port, self.sizes, self.free, photos, self.largest)
        label = "comparing with torch"
        with (
            tempfile.TemporaryDirectory(prefix="imgtool-") as folder,
            console.progress(len(every), label) as bar,
        ):
            found = proof.check(path, every, Path(folder), lambda done, total: bar.advance(1))
        for row in found["cases"]:
            console.detail(f"{row['input']}: {row['max_abs']:.2g}")
        return sidecar.beside(path, about, self.port, written, found)

    def _judged(self) -> Port:
        """Return the port with the limit of 8 bits that the settings state."""
        if self.settings.precision != "int8" or not self.settings.limit:
            return self.port
        from imgtool.export import parity

        known: Loss = self.port.loss or parity.default_loss(self.port)
        return replace(self.port, loss=replace(known, limit=self.settings.limit))

    def _photos(self, console: Console) -> tuple[list[Path], list[Path]]:
        """Return the photos to compare on, and those to calibrate with."""
        suffixes = self.engine.suffixes or files.READABLE
        named = self.settings.photos or (str(SPECIMENS),)
        found = [item.source for item in files.expand(named, suffixes) if item.source]
        if self.settings.precision != "int8":
            return found, []
        if len(found) < APART:
            console.say(
                f"8 bits are calibrated and judged on the same {len(found)} photos: --photos gives more"
            )
            return found, found
        return found[::2], found[1::2][: self.settings.calibration]


def _job(engine: Engine, settings: Export, path: Path) -> Job:
    """Return what is to be done, all of whose parts go together.

    Raises:
        ImgtoolError: They do not.
    """
    from imgtool import checkpoint, compute

    form = FORMATS[settings.to]
    if settings.precision not in form.limits:
        known = ", ".join(form.limits)
        raise ImgtoolError(f"--to {settings.to} does not write {settings.precision}", f"it writes {known}")
    if settings.dynamic and not form.free:
        what = f"--dynamic: files of {settings.to} have fixed sizes"
        raise ImgtoolError(what, "give --size alone, or take --to onnx, pt2 or openvino")
    if engine.port is None:
        raise ImgtoolError(f"the engine {engine.name} cannot be exported", "use it by imgtool infer")
    largest = read_size(settings.largest, "--largest")
    compute.use_threads(settings.threads)
    weights = checkpoint.read_weights(path, engine.name)
    port = engine.port(checkpoint.network(engine, weights), settings)
    for word in (settings.to, settings.precision):
        if word in port.refuse:
            raise ImgtoolError(f"{weights.name} is not written as {word}: {port.refuse[word]}", _OTHER)
    sizes, free = lengths(port, settings.size, settings.dynamic, form.free)
    targets = _targets(settings, path, form, tuple(port.beside))
    return Job(engine, settings, weights, form, port, sizes, free, largest, targets)


_OTHER = "take another --to or --precision"


def _targets(settings: Export, weights: Path, form: Format, beside: Sequence[str] = ()) -> list[Path]:
    """Return the files that will be written, the model first.

    Raises:
        ImgtoolError: Code 2: -o has the suffix of another format.
    """
    words: tuple[str, str] = (settings.precision, settings.to)
    name = "-".join([weights.stem, *(word for word in words if word in NAMED)]) + form.suffix
    named = Path(settings.out) if settings.out else Path(name)
    if named.is_dir():
        named /= name
    if named.suffix.lower() != form.suffix:
        what = f"-o {settings.out} is not named like a file of {settings.to}"
        raise ImgtoolError(what, f"name it something{form.suffix}", USAGE)
    others = [named.with_name(named.stem + suffix) for suffix in (*form.more, *beside)]
    return [named, *others, named.with_name(named.name + sidecar.SUFFIX)]


def _put(made: Path, job: Job, record: Mapping[str, Any]) -> None:
    """Put a proved file and all that goes with it into place, the file itself last."""
    first, *others, about = job.targets
    contents = {path: files.read(made.with_name(path.name)) for path in others[: len(job.form.more)]}
    contents |= dict(zip(others[len(job.form.more) :], job.port.beside.values(), strict=True))
    contents |= {about: sidecar.text(record), first: files.read(made)}
    fresh = [path for path in contents if not path.exists()]
    try:
        for path, content in contents.items():
            files.write(path, content)
    except ImgtoolError:
        for path in fresh:
            path.unlink(missing_ok=True)
        raise


def _short(record: Mapping[str, Any], path: Path, form: str) -> dict[str, Any]:
    """Return the command's result: the JSON beside the file, without the cases."""
    parity = {name: value for name, value in record["parity"].items() if name != "cases"}
    short = ("bytes", "sha256", "inputs", "outputs", "opset", "precision", "operators")
    told = {name: record.get(name) for name in short}
    return {"format": form, "file": str(path), **told, "parity": parity, "pass": True}


def _proved(parity: Mapping[str, Any]) -> str:
    """Return the comparison in a line for people."""
    text = f"at most {parity['max_abs']:.2g} from torch in {parity['samples']} comparisons"
    if parity["limit"] is not None:
        return f"{text} (limit {parity['limit']:.2g})"
    loss = parity["loss"]
    return f"{text}; {loss['name']} {loss['mean']:.4g} {loss['unit']}, at worst {loss['worst']:.4g}"


# --- services ----------------------------------------------------------------------------------


def _folder(engine: Engine, settings: Export) -> Path:
    return Path(settings.out or f"{engine.name}-{settings.to}")


def _serve(engine: Engine, settings: Export, weights: Path, console: Console) -> int:
    """Write the folder of a service, whole or not at all."""
    from imgtool.export import service

    target = _folder(engine, settings)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        files.check_new(target, settings.force)
    header.read(weights, engine.name)
    with files.atomic_folder(target) as folder:
        record = service.write(engine, settings, folder, weights)
    console.result({"format": settings.to, "folder": str(target), **record}, f"{target}: see README.md there")
    return DONE
