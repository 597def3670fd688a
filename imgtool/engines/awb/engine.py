"""The awb engine's record."""

from __future__ import annotations

from imgtool.engine import Engine, later
from imgtool.engines.awb import apply, reading, sidecar
from imgtool.engines.awb.settings import ACTIONS, Model

_HERE = "imgtool.engines.awb"

ENGINE: Engine = Engine(
    name="awb",
    model=Model,
    build=later(f"{_HERE}.model", "build"),
    data=later(f"{_HERE}.data", "load"),
    loss=later(f"{_HERE}.model", "loss"),
    score=later(f"{_HERE}.model", "score"),
    apply=apply.apply,
    samples=later(f"{_HERE}.model", "samples"),
    tiles=later(f"{_HERE}.model", "tile_facts"),
    bench=later(f"{_HERE}.bench", "run"),
    actions={name: later(f"{_HERE}.actions", name) for name in ACTIONS},
    reads="bayer",
    best="recovery",
    higher_is_better=False,
    scale=1,
    weights="awb-hist",
    baseline=apply.baseline,
    describe=later(f"{_HERE}.data", "describe"),
    campaign=later(f"{_HERE}.campaign", "run"),
    wants_campaign=later(f"{_HERE}.campaign", "wanted"),
    search=later(f"{_HERE}.search", "task"),
    table="gains.csv",
    check=apply.check,
    beside=apply.beside,
    prepare=apply.prepare,
    uses_weights=apply.uses_weights,
    open=apply.opened,
    picture=False,
    sheets=("-methods",),
    drawn=reading.is_drawn,
    unfit=sidecar.unfit,
    port=later(f"{_HERE}.port", "port"),
    ported=later(f"{_HERE}.exported", "ported"),
    archived=later(f"{_HERE}.exported", "archived"),
)
