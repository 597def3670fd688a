"""The isp engine's record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from imgtool import dist, losses, metrics
from imgtool.engine import Engine, Terms, Watch
from imgtool.engines.isp import actions, apply, bench, data, libraw, model, pairs, perceptual, port, unprocess
from imgtool.engines.isp.layouts import of_another_camera
from imgtool.engines.isp.sample import Sample
from imgtool.engines.isp.settings import Infer, Model
from imgtool.errors import USAGE, ImgtoolError
from imgtool.mosaic import Mosaic

if TYPE_CHECKING:
    from imgtool.engine import Pixels
    from imgtool.engines.isp.settings import Train

MARGIN = libraw.MARGIN
"""Pixels at the edges of a crop that count neither in losses nor in scores: context is missing there."""


def _fed(net: nn.Module, batch: Sample) -> Tensor:
    return model.feed(net, batch.packed, batch.gains, batch.noise).to(memory_format=torch.channels_last)


def _inside(image: Tensor) -> Tensor:
    return image[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def _unit(image: Tensor) -> Tensor:
    return _inside(image).float() / 255


_MALVAR = model.Demosaic()


def front_end(batch: Sample) -> Tensor:
    """Return what the fixed front end makes of a batch, Malvar's demosaicing and the camera's colours."""
    with torch.no_grad():
        fed = model.feed(_MALVAR, batch.packed, batch.gains, batch.noise)
        return model.photo(_MALVAR.to(fed.device), fed, batch.matrix)


LATE = 0.7
"""Share of the training after which "charbonnier-msssim" looks at structure too."""


def load(settings: Train) -> tuple[data.Samples, data.Samples]:
    """Return the training and the held-out set, if the loss can take their crops.

    Raises:
        ImgtoolError: Code 2, for crops too small, and as ``data.load``.
    """
    _check(settings)
    least = losses.MS_SSIM_SMALLEST + 2 * MARGIN + 1
    if settings.loss == "charbonnier-msssim" and settings.crop < least:
        what = f"--loss charbonnier-msssim needs crops of at least {least} pixels, not {settings.crop}"
        raise ImgtoolError(what, f"take --crop {least}, or another --loss", USAGE)
    if settings.loss == "original":
        perceptual.weights_file(settings.vgg)
    return data.load(settings)


def _check(settings: Train) -> None:
    """Refuse what training could do but inference could not."""
    if settings.scaling != "mai21":
        return
    hint = "take --scaling levels"
    if settings.photos or settings.raws:
        raise ImgtoolError(
            "--scaling mai21 is for --data alone: it leaves out balance and levels", hint, USAGE
        )
    if settings.colour == "camera":
        raise ImgtoolError(
            "--scaling mai21 leaves out the camera's balance", f"{hint}, or --colour learned", USAGE
        )


def begin(net: nn.Module, settings: Train) -> str:
    """Return what a user should know before a training; the network stays as it is."""
    foreign = [folder for folder in settings.data if of_another_camera(folder)]
    words = [pairs.warning(settings)]
    if foreign and settings.colour == "camera":
        what = f"the photographs of {foreign[0]} come from another camera than its RAW files"
        words.append(f"{what}: --colour learned lets the network learn their colours")
    return "; ".join(filter(None, words))


def loss(net: nn.Module, batch: Sample, settings: Train) -> Terms:
    """Return the terms of the loss on a batch, of display values.

    ``relative-mse``: the squared error left, as a share of the front end's. ``charbonnier-msssim``:
    Charbonnier, and after 70 % of the steps 0.15 (1 - MS-SSIM) with it. ``original``: 20 MSE + MSE of
    VGG-19's relu5_4 + 20 (1 - SSIM).
    """
    output, target = _inside(model.photo(net, _fed(net, batch), batch.matrix)), _unit(batch.target)
    if settings.loss == "relative-mse":
        given = _inside(front_end(batch)).clamp(0, 1)
        return {"relative-mse": losses.relative_mse(output, target, given)}
    if settings.loss == "original":
        seen = perceptual.features(settings.vgg, output.device)
        return losses.fidelity_and_features(output, target, seen)
    terms = {"charbonnier": losses.charbonnier(output, target)}
    if settings.loss == "charbonnier-msssim" and float(dist.least(batch.progress[0])) > LATE - 1e-6:
        terms["ms-ssim"] = 0.15 * losses.ms_ssim_loss(output, target)
    return terms


def score(net: nn.Module, batch: Sample) -> Terms:
    """Return per image: PSNR and SSIM; where LibRaw's rendering of the frame is there, also its PSNR."""
    output = metrics.to_8_bit(_inside(model.photo(net, _fed(net, batch), batch.matrix)))
    target = _unit(batch.target)
    found = {"psnr": metrics.psnr(output, target), "ssim": metrics.ssim(output, target)}
    return found | ({"libraw": metrics.psnr(_unit(batch.rival), target)} if batch.rival.numel() else {})


def samples(net: nn.Module, batch: Sample) -> dict[str, Tensor]:
    """Return the columns of the sample sheet."""
    first = Sample(*(part[:6] for part in batch))
    output = model.photo(net, _fed(net, first), first.matrix).clamp(0, 1)
    rival = {"libraw": first.rival.float() / 255} if first.rival.numel() else {}
    return {**rival, "output": output, "target": first.target.float() / 255}


def specimen(height: int, width: int, seed: int) -> Mosaic:
    """Return a frame of random pixels of a made-up camera."""
    rng = np.random.default_rng(seed)
    recipe = unprocess.draw(rng)
    values = rng.integers(recipe.black, recipe.white, (height, width), np.uint16)
    return unprocess.as_mosaic(values, recipe, "a frame of random pixels")


def baseline(mosaic: Mosaic) -> Pixels:
    """Develop a frame classically: the front end with Malvar's demosaicing, 8 bits, not turned."""
    settings = Infer(inputs=("-",), demosaic="malvar", area="visible", flip=False)
    return apply.apply(None, mosaic, settings, Watch()).pixels


ENGINE: Engine = Engine(
    name="isp",
    model=Model,
    build=model.build,
    data=load,
    loss=loss,
    score=score,
    apply=apply.apply,
    samples=samples,
    tiles=apply.tile_facts,
    bench=lambda settings, lab: bench.run(settings, lab, ENGINE),
    actions=actions.ACTIONS,
    reads="bayer",
    best="psnr",
    higher_is_better=True,
    scale=1,
    weights="isp-lrfu-s",
    baseline=baseline,
    describe=data.describe,
    begin=begin,
    check=apply.check,
    uses_weights=apply.uses_weights,
    open=apply.opened,
    specimen=specimen,
    suffixes=apply.SUFFIXES,
    form=apply.form,
    port=port.port,
    ported=port.ported,
)
