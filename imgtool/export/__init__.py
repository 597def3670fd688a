"""The verb ``export``: a network as a file that runs elsewhere, run there and compared before it is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtool import files, header
from imgtool.engine import Engine
from imgtool.errors import DONE, USAGE, ImgtoolError
from imgtool.export import sidecar
from imgtool.export.formats import FORMATS, MODELS, SERVICES, Format
from imgtool.export.order import Order, lengths, sized
from imgtool.port import Loss, Port
from imgtool.settings import Export

if TYPE_CHECKING:
    from imgtool.console import Console

SPECIMENS = Path(__file__).parents[1] / "specimens"
"""Photos that ship, to compare on."""
ENOUGH = 6
"""Photos to compare floats on."""
NAMED = ("fp16", "int8", "libcamera")
"""What the default name of a file says."""
ONLY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("size", "dynamic", "precision", "photos", "calibration", "largest", "limit"), MODELS),
    **dict.fromkeys(("max_mb", "max_megapixels"), SERVICES),
    "opset": ("onnx", "openvino"),
    "gpu_safe": ("tflite",),
    "auth": ("azure-function",),
    "inputs": MODELS,
    "packing": MODELS,
    "camera": MODELS,
    "tuning": ("libcamera",),
}
"""Setting to the words of --to that it is for, where it is not for all."""


def plan(engine: Engine, settings: Export) -> Mapping[str, object]:
    """Return what ``--dry-run`` tells."""
    _check_options(settings)
    weights = header.find(settings.weights or engine.weights, engine.name)
    told: dict[str, object] = {"weights": str(weights)}
    if settings.to in SERVICES:
        return told | {"output": str(_folder(engine, settings))}
    _check_form(settings, FORMATS[settings.to])
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
    _check_options(settings)
    weights = header.find(settings.weights or engine.weights, engine.name)
    if settings.to in SERVICES:
        return _serve(engine, settings, weights, console)
    form = FORMATS[settings.to]
    _check_form(settings, form)
    for path in _targets(settings, weights, form):
        _check_new(path, settings.force)
    form.require()
    job = _job(engine, settings, weights)
    for path in job.targets:
        _check_new(path, settings.force)
    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        made = Path(folder, job.targets[0].name)
        with _enough_memory():
            record = job.make(made, console)
        _put(made, job, record)
    if job.port.note:
        console.say(job.port.note)
    text = f"{job.targets[0]}: {_summary(record['parity'])}"
    console.result(_short(record, job.targets[0], settings.to), text)
    return DONE


def _check_new(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise ImgtoolError(f"{path} exists", "--force overwrites it")


def _check_options(settings: Export) -> None:
    """Refuse settings that would change nothing: who gives them believes in them.

    Raises:
        ImgtoolError: Code 2.
    """
    to: str = settings.to
    for name, words in ONLY.items():
        info = type(settings).model_fields.get(name)
        if info is not None and to not in words and getattr(settings, name) != info.default:
            flag = "--" + name.replace("_", "-")
            raise ImgtoolError(f"{flag} is not for --to {to}", f"it is for {', '.join(words)}", USAGE)


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
        threads: CPU threads of the runs that are compared.
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
    threads: int
    targets: Sequence[Path]

    def make(self, path: Path, console: Console) -> dict[str, Any]:
        """Write and prove the file; return what the JSON beside it says."""
        settings, precision = self.settings, self.settings.precision
        last = self.form.suffix == ".tflite"
        shown = {axis: None if axis in self.free else size for axis, size in self.sizes.items()}
        about = sidecar.about(self.engine, self.weights, self.port, precision, shown, last)
        photos, ranges = self._photos(console)
        if ranges:
            console.say(f"{len(ranges)} photos calibrate the 8 bits, {len(photos)} others judge them")
        calibration = [self.port.real(photo, self.sizes) for photo in ranges]
        order = Order(
            self.port, self.sizes, self.free, about, precision, calibration, settings.opset, settings.gpu_safe
        )
        console.say(f"writing {path.name}")
        return self._proved(path, order, photos, console)

    def _proved(self, path: Path, order: Order, photos: Sequence[Path], console: Console) -> dict[str, Any]:
        from imgtool.export import parity

        settings = self.settings
        written = self.form.write(order, path)
        limit = self.form.limits[settings.precision]
        proof = parity.Proof(self._judged(), limit and (settings.limit or limit), self.threads)
        count = parity.PHOTOS if limit else len(photos)
        every = parity.cases(self.port, self.sizes, self.free, photos, self.largest, count)
        label = "comparing with torch"
        with (
            tempfile.TemporaryDirectory(prefix="imgtool-") as folder,
            console.progress(len(every), label) as bar,
        ):
            found = proof.check(path, every, Path(folder), lambda done, total: bar.advance(1))
        for row in found["cases"]:
            console.detail(f"{row['input']}: {row['max_abs']:.2g}")
        return sidecar.beside(path, order.about, self.port, written, found)

    def _judged(self) -> Port:
        """Return the port with the limit of 8 bits that the settings state."""
        if self.settings.precision != "int8" or not self.settings.limit:
            return self.port
        from imgtool.export import parity

        known: Loss = self.port.loss or parity.default_loss(self.port)
        return replace(self.port, loss=replace(known, limit=self.settings.limit, worst=None))

    def _photos(self, console: Console) -> tuple[list[Path], list[Path]]:
        """Return the photos to compare on, and those to calibrate with, of which none is among the others.

        Raises:
            ImgtoolError: There are too few that can be read.
        """
        eight = self.settings.precision == "int8"
        found = self._readable(2 * self.settings.calibration if eight else ENOUGH, console)
        if not eight:
            return found, []
        if len(found) < 2:
            what = "8 bits need two photos or more: some to calibrate with, others to judge by"
            raise ImgtoolError(what, "name a folder by --photos")
        return found[::2], found[1::2]

    def _readable(self, most: int, console: Console) -> list[Path]:
        """Return the first photos that can be read; of others it is said why they are left out."""
        suffixes = self.engine.suffixes or files.READABLE
        named = self.settings.photos or (str(SPECIMENS),)
        found: list[Path] = []
        for item in files.expand(named, suffixes):
            if item.source and len(found) < most:
                try:
                    self.port.real(item.source, self.sizes)
                except ImgtoolError as fault:
                    console.warn(f"left out: {fault.what}")
                else:
                    found.append(item.source)
        if not found:
            raise ImgtoolError("none of the photos can be read", "give others by --photos")
        return found


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Turn a lack of memory into words."""
    from imgtool import compute

    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if not compute.out_of_memory(fault):
            raise
        raise ImgtoolError("out of memory", "give a smaller --size or --largest") from None


def _check_form(settings: Export, form: Format) -> None:
    """Refuse what a format cannot hold, whatever the network.

    Raises:
        ImgtoolError: Code 2.
    """
    if settings.precision not in form.limits:
        known = ", ".join(form.limits)
        what = f"--to {settings.to} does not write {settings.precision}"
        raise ImgtoolError(what, f"it writes {known}", USAGE)
    if settings.dynamic and not form.free:
        what = f"--dynamic: files of {settings.to} have fixed sizes"
        raise ImgtoolError(what, "give --size alone, or take --to onnx, pt2 or openvino", USAGE)


def _job(engine: Engine, settings: Export, path: Path) -> Job:
    """Return what is to be done, all of whose parts go together.

    Raises:
        ImgtoolError: They do not.
    """
    from imgtool import checkpoint, compute

    form = FORMATS[settings.to]
    if engine.port is None:
        raise ImgtoolError(f"the engine {engine.name} cannot be exported", "use it by imgtool infer")
    threads = compute.use_threads(settings.threads)
    weights = _weights(engine, path)
    port = engine.port(checkpoint.network(engine, weights), settings)
    for word in (settings.to, settings.precision):
        if word in port.refuse:
            raise ImgtoolError(f"{weights.name} is not written as {word}: {port.refuse[word]}", _OTHER)
    sizes, free = lengths(port, settings.size, settings.dynamic, form.free)
    largest = sized(port, settings.largest, "--largest")
    targets = _targets(settings, path, form, tuple(port.beside))
    return Job(engine, settings, weights, form, port, sizes, free, largest, threads, targets)


def _weights(engine: Engine, path: Path) -> header.Weights:
    """Read weights as tensors.

    Raises:
        ImgtoolError: As ``checkpoint.read_weights``; or they are an exported file already.
    """
    from imgtool import checkpoint, runtime

    if runtime.kind_of(path) or path.suffix == ".npz":
        what = f"{path} is an exported file already"
        raise ImgtoolError(what, "export the .safetensors file that it was made from", USAGE)
    try:
        return checkpoint.read_weights(path, engine.name)
    except ImgtoolError as fault:
        hint = fault.hint.replace("imgtool infer", "imgtool export")
        raise ImgtoolError(fault.what, hint, fault.code) from None


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
    if named.suffix != form.suffix:
        what = f"-o {settings.out} is not named like a file of {settings.to}"
        raise ImgtoolError(what, f"name it something{form.suffix}", USAGE)
    others = [named.with_name(named.stem + suffix) for suffix in (*form.more, *beside)]
    return [named, *others, named.with_name(named.name + sidecar.SUFFIX)]


def _put(made: Path, job: Job, record: Mapping[str, Any]) -> None:
    """Put a proved file and all that goes with it into place, together or not at all."""
    first, *others, about = job.targets
    belong, beside = others[: len(job.form.more)], others[len(job.form.more) :]
    contents = {first: files.read(made), about: sidecar.text(record)}
    contents |= {path: files.read(made.with_name(path.name)) for path in belong}
    contents |= dict(zip(beside, job.port.beside.values(), strict=True))
    with ExitStack() as places:
        for path, content in contents.items():
            places.enter_context(files.atomic(path)).write_bytes(content)


def _short(record: Mapping[str, Any], path: Path, form: str) -> dict[str, Any]:
    """Return the command's result: the JSON beside the file, without the cases."""
    parity = {name: value for name, value in record["parity"].items() if name != "cases"}
    short = ("bytes", "sha256", "inputs", "outputs", "opset", "precision", "operators")
    told = {name: record.get(name) for name in short}
    return {"format": form, "file": str(path), **told, "parity": parity, "pass": True}


def _summary(parity: Mapping[str, Any]) -> str:
    """Return the comparison in a line for people."""
    if parity["limit"] is not None:
        text = f"at most {parity['max_abs']:.2g} from torch in {parity['samples']} comparisons"
        return f"{text} (limit {parity['limit']:.2g})"
    loss = parity["loss"]
    text = f"{loss['name']} {loss['mean']:.4g} {loss['unit']} on {loss['samples']} photos"
    return f"{text}, at worst {loss['worst']:.4g} (limit {loss['limit']:g})"


# --- services ----------------------------------------------------------------------------------


def _folder(engine: Engine, settings: Export) -> Path:
    return Path(settings.out or f"{engine.name}-{settings.to}").absolute()


def _serve(engine: Engine, settings: Export, weights: Path, console: Console) -> int:
    """Write the folder of a service, whole or not at all."""
    from imgtool.export import service
    from imgtool.serve import CONFIG

    target = _folder(engine, settings)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not (target / CONFIG).is_file():
            what = f"{target} exists, and is no folder that imgtool export wrote"
            raise ImgtoolError(what, "name another one by -o: it is not overwritten")
        _check_new(target, settings.force)
    _weights(engine, weights)
    with files.atomic_folder(target) as folder:
        record = service.write(engine, settings, folder, weights)
        _check_strays(target, folder)
    shown = settings.out or target.name
    console.result({"format": settings.to, "folder": str(shown), **record}, f"{shown}: see README.md there")
    return DONE


def _check_strays(target: Path, folder: Path) -> None:
    """Refuse to replace a folder that holds files which were not written by this command."""
    ours = {path.relative_to(folder) for path in folder.rglob("*")}
    for path in sorted(target.rglob("*")) if target.is_dir() else ():
        relative = path.relative_to(target)
        if path.is_file() and relative not in ours and "__pycache__" not in relative.parts:
            what = f"{path} is not of this export, and --force would delete it"
            raise ImgtoolError(what, "move it away, or name another folder by -o")
