"""What the search knows of this engine: the original's space, and a measurement by NumPy, here or elsewhere.

The space is the original's, 16 numbers. What is compared is the error on the held-out part of the training
data, and the CPU time; test data is never read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imgtool.engines.awb import measure, network, sets
from imgtool.engines.awb.measure import Structure
from imgtool.engines.awb.settings import Model, Train
from imgtool.errors import USAGE, ImgtoolError
from imgtool.search import gauge, space
from imgtool.search.cost import CALLS, Cost, Limits, Unmeasured
from imgtool.search.space import Span
from imgtool.search.task import Task
from imgtool.settings.sources import make

HEIGHT, WIDTH = 432, 648
BLOCKS = (1, 2, 3)
MEASURED = f"a {WIDTH}x{HEIGHT} frame in memory to its white by NumPy: CPU time, p95, 1 thread; whole process"
SELECTION = "held-out part of the training data; test data was not read"

SPACE: Mapping[str, Span] = {
    "neurons": Span(40, 250, whole=True),
    "decay": Span(0, 1.5),
    "layers": Span(2, 5, whole=True),
    "lr": Span(1e-4, 1e-2, log=True),
    "final_rate": Span(1e-6, 1e-4, log=True),
    "weight_decay": Span(1e-6, 1e-4, log=True),
    "halves": Span(2, 6, whole=True),  # of the scale: 1, 1.5, 2, 2.5, 3
    **{f"channels{block}": Span(16, 256, whole=True) for block in BLOCKS},
    **{f"reach{block}": Span(1, 3, whole=True) for block in BLOCKS},  # of the kernel, which is 2 reach + 1
    **{f"stride{block}": Span(1, 5, whole=True) for block in BLOCKS},
}
CONSTRAINTS = (
    "channels1 <= channels2",
    "channels2 <= channels3",
    *(f"stride{block} <= 2 * reach{block} + 1" for block in BLOCKS),
)


def task(settings: Train) -> Task:
    """Return the search of the original's space, or of ``--space``, in which networks may be of any kind.

    Raises:
        ImgtoolError: Code 2, where the data has a test part, for a space that does not fit, or for one that
            another machine cannot measure.
    """
    for folder in settings.data:
        if any(entry.part == "test" for entry in sets.dataset(folder, settings)):
            what = f"{folder} holds test data, by which nothing may be chosen"
            raise ImgtoolError(what, f"give its training part: --data {folder / 'train'}", USAGE)
    if settings.space:
        return _given(settings, settings.space)
    where = settings.remote or "this machine"
    return Task(
        SPACE,
        lambda trial: structure(trial.model_dump()),
        lambda net, limits: cost(net, limits, settings.remote),
        f"{MEASURED}; on {where}",
        parameters,
        {"arch": "deepawb", **_alone(settings)},
        least,
        CONSTRAINTS,
        "ax",
        SELECTION,
    )


def _alone(settings: Train) -> dict[str, Any]:
    """Return the settings of one training on a split of its own."""
    return {"remote": "", "fold": 0 if settings.folds else -1, "train_on_all": False}


def _given(settings: Train, path: Path) -> Task:
    """Return the search of a file's space."""
    if settings.remote:
        what = "--remote measures networks of the original's space alone"
        raise ImgtoolError(what, "leave out --remote or --space", USAGE)
    return Task(
        space.read(path, "awb", Train),
        lambda trial: {name: getattr(trial, name) for name in Model.model_fields},
        lambda net, limits: untrained(net),
        f"{MEASURED}; on this machine",
        fixed=_alone(settings),
        sampler="ax",
        selection=SELECTION,
    )


def untrained(net: Structure) -> Cost:
    """Measure a network of any kind with random weights, as ``bench`` measures: in a process without torch.

    Args:
        net: Settings that shape it.

    Raises:
        gauge.Unfit: There is no such network.
        Unmeasured: The process ended without an answer.
    """
    from imgtool import checkpoint
    from imgtool.engines.awb import model, worker
    from imgtool.engines.awb.engine import ENGINE

    shape = make(Model, net, "search")
    try:
        built = model.build(shape)
    except ImgtoolError as fault:
        raise gauge.Unfit(fault.what, fault.hint) from None
    with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
        path = Path(folder, "untrained.safetensors")
        checkpoint.save_weights(path, ENGINE, shape, built.state_dict(), {})
        try:
            found = worker.ask({"task": "core", "weights": str(path), "runtime": "numpy", "frames": CALLS})
        except ImgtoolError as fault:
            raise Unmeasured(fault.what, fault.hint) from None
        except RuntimeError as fault:  # such as too little memory
            raise Unmeasured(str(fault).splitlines()[-1]) from None
    count = sum(each.numel() for each in built.parameters())
    return Cost(found["core"]["p95"], found["peak_mb"], parameters=count)


def parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``train`` that values of the space stand for.

    Channels never fall from block to block, and no stride is larger than its kernel.
    """
    kernels = [2 * values[f"reach{block}"] + 1 for block in BLOCKS]
    strides = [min(values[f"stride{block}"], kernel) for block, kernel in zip(BLOCKS, kernels, strict=True)]
    scale = values["halves"] / 2
    return {
        "channels": _joined(sorted(values[f"channels{block}"] for block in BLOCKS)),
        "kernels": _joined(kernels),
        "strides": _joined(strides),
        "neurons": values["neurons"],
        "decay": values["decay"],
        "layers": values["layers"],
        "height": round(HEIGHT / scale),
        "width": round(WIDTH / scale),
        "lr": values["lr"],
        "final_lr": float(f"{min(values['final_rate'] / values['lr'], 1):.4g}"),
        "weight_decay": values["weight_decay"],
    }


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def structure(chosen: Mapping[str, Any]) -> Structure:
    """Return the shape of a network, all that its cost depends on.

    Raises:
        gauge.Unfit: The neurons do not fill the layers.
    """
    try:
        blocks = {
            name: list(network.triple(chosen[name], name)) for name in ("channels", "kernels", "strides")
        }
        wide = network.widths(chosen["neurons"], chosen["decay"], chosen["layers"])
    except ImgtoolError as fault:
        raise gauge.Unfit(fault.what, fault.hint) from None
    return blocks | {"widths": wide, "height": chosen["height"], "width": chosen["width"]}


def least(net: Structure) -> Cost:
    """Return what a network costs at the very least.

    Raises:
        gauge.Unfit: Its blocks shrink the input to nothing.
    """
    try:
        return measure.least(net)
    except ImgtoolError as fault:
        raise gauge.Unfit(fault.what, fault.hint) from None


def cost(net: Structure, limits: Limits, host: str) -> Cost:
    """Measure a network here, or on another machine where one is named."""
    if host:
        return measure.there(net, limits.ms, host)
    return measure.here(net, limits.ms)
