"""The deblur engine's record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from imgtool import losses, metrics, tiles
from imgtool.engine import Engine, Result, Terms, TileFacts, Watch
from imgtool.engines.deblur import actions, bench, data, model, port
from imgtool.engines.deblur.settings import Model

if TYPE_CHECKING:
    from imgtool.engine import Pixels
    from imgtool.engines.deblur.settings import Infer, Train
    from imgtool.images import Photo

NETWORKS: dict[str, type[nn.Module]] = {"unet-lite": model.UNetLite, "unet-seed": model.UNetSeed}
WHOLE = "unet-seed normalises over the whole image (GroupNorm), so every tile would get tones of its own"


def build(settings: Model) -> nn.Module:
    """Build the network that ``settings.arch`` names."""
    return NETWORKS[settings.arch]()


def tile_facts(net: nn.Module) -> TileFacts:
    """Return what cutting may assume.

    Bytes per pixel are the growth of VmHWM in a fresh process, float32, one and two threads. The
    lite network itself needs 270 (a photo of 1080p taken whole); with what glibc's heap holds besides
    it takes 400 to 575 (tiles of 500 to 700 and their halos, ten runs of each), where the heap is given
    back after each tile, and more than 640 where it is not. The original network: 900 to 1000, whole.
    """
    if isinstance(net, port.Ported):
        return net.tiles
    if isinstance(net, model.UNetSeed):
        return TileFacts(net.multiple, local=False, bytes_per_pixel=1000, reason=WHOLE)
    return TileFacts(model.UNetLite.multiple, halo=model.HALO, border=port.BORDER, bytes_per_pixel=640)


def load(settings: Train) -> tuple[data.Samples, data.Samples]:
    """Return the training and the held-out set, if the loss can take their crops.

    Raises:
        ImgtoolError: Code 2, for crops too small, and as ``data.load``.
    """
    if settings.loss == "msssim-charbonnier":
        losses.check_ms_ssim(settings.crop)
    return data.load(settings)


def loss(net: nn.Module, batch: data.Pair, settings: Train) -> Terms:
    """Return the terms of the loss on a batch of uint8 pairs.

    ``relative-mse``: the squared error left, as a share of the blurred image's. ``charbonnier-fft``:
    Charbonnier + the spectrum's L1. ``msssim-charbonnier``, the original's: 0.84 (1 - MS-SSIM) +
    0.16 Charbonnier.
    """
    blurred, sharp = _unit(batch.blurred), _unit(batch.sharp)
    output = net(blurred)
    with torch.autocast(output.device.type, enabled=False):
        output = output.float()
        if settings.loss == "relative-mse":
            return {"relative-mse": losses.relative_mse(output, sharp, blurred)}
        charbonnier = losses.charbonnier(output, sharp)
        if settings.loss == "msssim-charbonnier":
            return {"ms-ssim": 0.84 * losses.ms_ssim_loss(output, sharp), "charbonnier": 0.16 * charbonnier}
        return {"charbonnier": charbonnier, "fft": losses.frequency(output, sharp)}


def score(net: nn.Module, batch: data.Pair) -> Terms:
    """Return per image: PSNR, its gain over the blurred input, SSIM, and PSNR on sharp input (dB)."""
    blurred, sharp = _unit(batch.blurred), _unit(batch.sharp)
    output = metrics.to_8_bit(net(blurred))
    psnr = metrics.psnr(output, sharp)
    return {
        "psnr": psnr,
        "gain": psnr - metrics.psnr(blurred, sharp),
        "ssim": metrics.ssim(output, sharp),
        "sharp": metrics.psnr(metrics.to_8_bit(net(sharp)), sharp),
    }


def samples(net: nn.Module, batch: data.Pair) -> dict[str, Tensor]:
    """Return the columns of the sample sheet."""
    blurred = _unit(batch.blurred)[:6]
    return {"blurred": blurred, "output": net(blurred), "sharp": _unit(batch.sharp)[:6]}


def _unit(image: Tensor) -> Tensor:
    return image.to(memory_format=torch.channels_last).float() / 255


def apply(net: nn.Module, photo: Photo, settings: Infer, watch: Watch) -> Result:
    """Sharpen a photo of any size, in tiles where it does not fit into ``memory``.

    Raises:
        ImgtoolError: For tiles of a network that may not be cut, or when memory runs out.
    """
    image = photo.pixels
    facts = tile_facts(net)
    if isinstance(net, port.Ported):
        plan = net.plan(image, settings)
        return _result(*tiles.run(net, image, plan, facts, watch), plan)
    if facts.local and settings.overlap < facts.halo:
        reach = f"less than the network reaches ({facts.halo}): tiles may show"
        watch.say(f"--overlap {settings.overlap} is {reach}")
    plan = _plan(image, settings, facts)
    start = None
    if settings.strength and isinstance(net, model.UNetLite):
        small = tiles.shrink(image, net.shrink)
        mended, _, _ = tiles.run(
            net.coarse, small, _plan(small, settings, facts, 1.0), facts, Watch(say=watch.say)
        )
        start = tiles.Enlarged(mended - small, net.shrink)
        net = net.fine
    return _result(*tiles.run(net, image, plan, facts, watch, start), plan)


def _result(out: Pixels, count: int, edge: int, plan: tiles.Plan) -> Result:
    halo = plan.halo if count > 1 else 0
    return Result(out, {"tiles": count, "tile": edge, "halo": halo, "strength": plan.strength})


def _plan(image: Pixels, settings: Infer, facts: TileFacts, strength: float | None = None) -> tiles.Plan:
    height, width = image.shape[:2]
    core = tiles.choose(height, width, settings.tile, settings.overlap, settings.memory * 1e9, facts)
    return tiles.Plan(core, settings.overlap, settings.strength if strength is None else strength)


def unsharp(image: Pixels, sigma: float = 1.5, amount: float = 0.6) -> Pixels:
    """Sharpen classically: add ``amount`` times the difference to a gaussian blur of ``sigma``."""
    values = image.astype(np.float32)
    values += amount * (values - cv2.GaussianBlur(values, (0, 0), sigma))
    if image.dtype == np.float32:
        return values
    return np.rint(np.clip(values, 0, np.iinfo(image.dtype).max)).astype(image.dtype)


ENGINE: Engine = Engine(
    name="deblur",
    model=Model,
    build=build,
    data=load,
    loss=loss,
    score=score,
    apply=apply,
    samples=samples,
    tiles=tile_facts,
    bench=lambda settings, lab: bench.run(settings, lab, ENGINE),
    actions=actions.ACTIONS,
    reads="rgb",
    best="psnr",
    higher_is_better=True,
    scale=1,
    weights="deblur-unet-lite",
    baseline=unsharp,
    port=port.port,
    ported=port.ported,
)
