"""Bench of the deblur engine: cost beside the original network, quality, sharp photos, tiles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imgtool import images, metrics, plots, sheets
from imgtool.engine import Budget, Engine, Report, Subject, Table, Timing, Watch
from imgtool.engines.deblur import data
from imgtool.engines.deblur.settings import Infer
from imgtool.errors import USAGE, ImgtoolError

if TYPE_CHECKING:
    from torch import nn

    from imgtool.engine import Pixels
    from imgtool.engines.deblur.settings import Bench

SEED = {"arch": "unet-seed"}
UNSHARP = [(sigma, amount) for sigma in (1.0, 1.5, 2.5) for amount in (0.3, 0.6, 1.0)]
HD, LARGE = (1200, 1920), (4000, 6000)


def run(settings: Bench, lab: Any, engine: Engine) -> Report:
    """Measure cost always, quality where ``data`` is named, sharpness kept where ``photos`` is."""
    net = lab.network()
    figures, budgets, tables = _cost(settings, lab, engine, net)
    parts = [_quality(settings.data, net, engine, settings, lab)] if settings.data else []
    parts += [_sharp(settings.photos, net, engine, lab)] if settings.photos else []
    for more, limits, table in parts:
        figures |= more
        budgets += limits
        tables.append(table)
    return Report("deblurring network: cost, quality, tiles", figures, budgets, tables)


def macs(net: nn.Module, height: int, width: int) -> int:
    """Return the multiply-accumulate operations of a forward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        net.to("meta")(torch.empty(1, 3, height, width))
    return int(counter.get_total_flops() // 2)


def _subjects(settings: Bench) -> list[Subject]:
    size = (settings.height, settings.width)
    return [
        Subject("ours, whole", *size, settings={"tile": 0}),
        Subject("ours, tiles of 512", *size, settings={"tile": 512}),
        Subject("unet-seed, whole", *size, model=SEED, settings={"tile": 0}),
        Subject("unsharp mask", *size, baseline=True),
    ]


def _cost(
    settings: Bench, lab: Any, engine: Engine, net: nn.Module
) -> tuple[dict[str, object], list[Budget], list[Table]]:
    import copy

    parameters = sum(p.numel() for p in net.parameters())
    gmacs = macs(copy.deepcopy(net), *HD) / 1e9
    timings: dict[str, Timing] = lab.measure(_subjects(settings))
    ratio = timings["unet-seed, whole"].cpu / timings["ours, whole"].cpu
    megapixels = settings.height * settings.width / 1e6
    figures: dict[str, object] = {
        "parameters": parameters,
        "gmacs_1920x1200": gmacs,
        "size": [settings.width, settings.height],
        "cpu_seconds": {name: t.cpu for name, t in timings.items()},
        "cpu_seconds_per_megapixel": {name: t.cpu / megapixels for name, t in timings.items()},
        "peak_mb": {name: t.peak_mb for name, t in timings.items()},
        "cpu_ratio_to_seed": ratio,
    }
    budgets = [
        Budget("parameters", 5e6, parameters, "parameters"),
        Budget("arithmetic at 1920x1200", 150, gmacs, "GMACs"),
        Budget("CPU time of unet-seed over ours", 3, ratio, "times", ">="),
    ]
    rows = [_row(name, timing, megapixels) for name, timing in timings.items()]
    if settings.large:
        more, limit, row = _large(lab)
        figures |= more
        budgets.append(limit)
        rows.append(row)
    title = f"{settings.width}x{settings.height}, {settings.threads} thread(s)"
    if settings.report:
        plots.bars(
            {n: t.cpu for n, t in timings.items()},
            settings.report / "cpu.png",
            title=title,
            xlabel="CPU seconds",
            highlight="ours, whole",
        )
    return figures, budgets, [Table(title, ("subject", "CPU s", "CPU s/MP", "wall s", "peak MB"), rows)]


def _row(name: str, timing: Timing, megapixels: float) -> tuple[object, ...]:
    each = f"{timing.cpu / megapixels:.2f}"
    return name, f"{timing.cpu:.2f}", each, f"{timing.wall:.2f}", f"{timing.peak_mb:.0f}"


def _large(lab: Any) -> tuple[dict[str, object], Budget, tuple[object, ...]]:
    """Measure a photo of 6000x4000 once, with the default settings: its memory is the point."""
    timing: Timing = lab.measure([Subject("6000x4000", *LARGE, warm=False)], runs=1)["6000x4000"]
    megapixels = LARGE[0] * LARGE[1] / 1e6
    figures: dict[str, object] = {"large": {"cpu_seconds": timing.cpu, "peak_mb": timing.peak_mb}}
    limit = Budget("peak memory, 6000x4000", 2000, timing.peak_mb, "MB")
    return figures, limit, _row("ours, 6000x4000", timing, megapixels)


# --- quality ---------------------------------------------------------------------------------


def psnr(first: Pixels, second: Pixels) -> float:
    """Return the PSNR of two 8-bit pictures in dB."""
    return float(metrics.psnr(metrics.batch_of(first), metrics.batch_of(second)))


def _ssim(first: Pixels, second: Pixels) -> float:
    if min(first.shape[:2]) < 11:
        return float("nan")
    return float(metrics.ssim(metrics.batch_of(first), metrics.batch_of(second)))


def _quality(
    folder: Path, net: nn.Module, engine: Engine, settings: Bench, lab: Any
) -> tuple[dict[str, object], list[Budget], Table]:
    pairs, _ = data.find_pairs(folder)
    if not pairs:
        raise ImgtoolError(
            f"no pairs in {folder}", "expected blur/ beside sharp/, or X.png beside X_gt.png", USAGE
        )
    rows: list[tuple[object, ...]] = []
    values: dict[str, list[float]] = {
        name: [] for name in ("blurred", "ours", "gain", "ssim_blurred", "ssim", *map(str, UNSHARP))
    }
    for number, (blurred_path, sharp_path) in enumerate(pairs):
        blurred, sharp = images.read_rgb8(blurred_path), images.read_rgb8(sharp_path)
        output = engine.apply(net, images.Photo(blurred), Infer(inputs=("-",)), Watch()).pixels
        before, after = psnr(blurred, sharp), psnr(output, sharp)
        for name, value in (
            ("blurred", before),
            ("ours", after),
            ("gain", after - before),
            ("ssim_blurred", _ssim(blurred, sharp)),
            ("ssim", _ssim(output, sharp)),
        ):
            values[name].append(value)
        for sigma, amount in UNSHARP:
            values[str((sigma, amount))].append(psnr(engine.baseline(blurred, sigma, amount), sharp))
        rows.append((blurred_path.name, f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"))
        if settings.report and number < 20:
            sheets.compare(
                blurred, output, settings.report / f"{blurred_path.stem}.png", title=blurred_path.name
            )
    mean = {name: float(np.mean(each)) for name, each in values.items()}
    unsharp = max(mean[str(each)] for each in UNSHARP) - mean["blurred"]
    low, high = metrics.interval(values["gain"])
    if settings.report:
        plots.histogram(
            {"gain": values["gain"]},
            settings.report / "gain.png",
            title=f"{len(pairs)} pairs",
            xlabel="PSNR gain, dB",
        )
    rows += [
        ("mean", f"{mean['blurred']:.2f}", f"{mean['ours']:.2f}", f"{mean['gain']:+.2f}"),
        ("best unsharp mask of 9", "", f"{mean['blurred'] + unsharp:.2f}", f"{unsharp:+.2f}"),
    ]
    figures: dict[str, object] = {
        "pairs": len(pairs),
        "psnr": {"blurred": mean["blurred"], "ours": mean["ours"], "unsharp": mean["blurred"] + unsharp},
        "ssim": {"blurred": mean["ssim_blurred"], "ours": mean["ssim"]},
        "gain": mean["gain"],
        "gain_95": [low, high],
        "gains": {path.name: gain for (path, _), gain in zip(pairs, values["gain"], strict=True)},
    }
    limits = [Budget("mean PSNR gain over the blurred photos", 0.5, mean["gain"], "dB", ">=")]
    return (
        figures,
        limits,
        Table(f"PSNR in dB, {len(pairs)} pairs", ("pair", "blurred", "ours", "gain"), rows),
    )


def _sharp(
    folder: Path, net: nn.Module, engine: Engine, lab: Any
) -> tuple[dict[str, object], list[Budget], Table]:
    paths = [path for path in data.pictures_in(folder) if path.suffix.lower() in images.WRITABLE]
    if not paths:
        raise ImgtoolError(f"no photos in {folder}", "name a folder of sharp photos", USAGE)
    kept = []
    apart = 0.0
    for number, path in enumerate(paths):
        photo = images.read_rgb8(path)
        kept.append(psnr(engine.apply(net, images.Photo(photo), Infer(inputs=("-",)), Watch()).pixels, photo))
        if number < 6:
            apart = max(apart, tiled_apart(net, photo, engine))
    rows: list[tuple[object, ...]] = [
        (path.name, f"{value:.2f}")
        for path, value in sorted(zip(paths, kept, strict=True), key=lambda p: p[1])[:5]
    ]
    rows.append(("mean", f"{np.mean(kept):.2f}"))
    figures: dict[str, object] = {
        "sharp_psnr": float(np.mean(kept)),
        "sharp_psnr_worst": min(kept),
        "sharp_photos": len(kept),
        "tiled_apart_levels": apart,
    }
    limits = [
        Budget("PSNR of sharp photos after deblurring, mean", 45, float(np.mean(kept)), "dB", ">="),
        Budget("tiles of 256 against the whole photo, largest difference", 0.05, apart, "1/255"),
    ]
    return figures, limits, Table("sharp photos, the five most changed", ("photo", "PSNR, dB"), rows)


def tiled_apart(net: nn.Module, photo: Pixels, engine: Engine, tile: int = 256) -> float:
    """Return how far tiles and the whole photo differ at most, in units of 1/255, before rounding."""
    values = photo.astype(np.float32) / np.float32(255)
    whole, tiled = (
        engine.apply(net, images.Photo(values), Infer(inputs=("-",), tile=edge), Watch()).pixels
        for edge in (0, tile)
    )
    return float(np.abs(whole - tiled).max() * 255)
