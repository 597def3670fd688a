"""Edge-preserving smoothing: the slow filters.

All take ``(H, W, 3)`` RGB, uint8 or float32 in 0..1, and return float32 ``(H, W, 3)`` in 0..1.
"""

from __future__ import annotations

from typing import Annotated

import cv2
import numpy as np

from imgtool.engines.filter.pixels import (
    Count,
    Factor,
    Floats,
    Limits,
    Pixels,
    Radius,
    Sigma,
    Strength,
    Tone,
    Window,
    eight_bit,
    mirrored,
    unit,
)

Step = Annotated[float, Limits(0.001, 0.25)]
Turns = Annotated[int, Limits(1, 20)]


def bilateral(image: Pixels, d: Window = 9, sr: Tone = 0.1, ss: Sigma = 3.0) -> Floats:
    """Return OpenCV's bilateral filter, on 8 bits (Tomasi and Manduchi, "Bilateral filtering", ICCV 1998).

    Args:
        image: The photo.
        d: Diameter of the window in pixels.
        sr: Sigma of the differences of values, 0..1, summed over the colours.
        ss: Sigma of the distances, in pixels.
    """
    return unit(cv2.bilateralFilter(np.ascontiguousarray(eight_bit(image)), d, 255 * sr, ss))


def nlm(image: Pixels, h: Strength = 6.0, patch: Window = 7, search: Window = 21) -> Floats:
    """Return OpenCV's non-local means of colour photos, on 8 bits.

    Buades, Coll and Morel, "A non-local algorithm for image denoising", CVPR 2005. It compares CIELAB.

    Args:
        image: The photo.
        h: Strength, for lightness and colour, in levels of 8 bits.
        patch: Edge of what is compared, in pixels.
        search: Edge of the window that is searched, in pixels.
    """
    pixels = cv2.cvtColor(eight_bit(image), cv2.COLOR_RGB2BGR)
    return unit(
        cv2.cvtColor(cv2.fastNlMeansDenoisingColored(pixels, None, h, h, patch, search), cv2.COLOR_BGR2RGB)
    )


def rolling_guidance(image: Pixels, sr: Tone = 0.1, ss: Sigma = 3.0, n: Count = 4) -> Floats:
    """Return OpenCV's rolling guidance filter, on 8 bits (Zhang, Shen, Xu and Jia, ECCV 2014).

    Args:
        image: The photo.
        sr: Sigma of the differences of values, 0..1.
        ss: Sigma of the distances, in pixels: what is smaller vanishes.
        n: Iterations.
    """
    pixels = np.ascontiguousarray(eight_bit(image))
    return unit(cv2.ximgproc.rollingGuidanceFilter(pixels, None, -1, 255 * sr, ss, n))


def weighted_median(image: Pixels, radius: Radius = 5, sigma: Strength = 25.5) -> Floats:
    """Return OpenCV's weighted median filter, on 8 bits (Zhang, Xu and Jia, CVPR 2014).

    The grey photo is the guide: for a guide in colours OpenCV groups those of the whole photo by k-means from
    random centres, and two runs differ.

    Args:
        image: The photo.
        radius: Of the window, in pixels.
        sigma: Of the differences of grey that weigh, in levels of 8 bits.
    """

    def run(pixels: Pixels) -> Pixels:
        guide = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        way = cv2.ximgproc.WMF_EXP
        return cv2.ximgproc.weightedMedianFilter(guide, pixels, radius, sigma=sigma, weightType=way)

    return unit(mirrored(run, eight_bit(image), radius))


def tv(image: Pixels, weight: Strength = 0.1, eps: Strength = 2e-4, most: Count = 200) -> Floats:
    """Return each colour with less total variation (Rudin, Osher and Fatemi, 1992).

    By the dual projection of Chambolle, "An algorithm for total variation minimization and applications",
    2004: ends when the energy changes by less than ``eps`` of the first, or after ``most`` iterations.

    Args:
        image: The photo.
        weight: The larger, the smoother.
        eps: Relative change of the energy at which it ends.
        most: Largest number of iterations.
    """
    values = unit(image)
    out = np.empty_like(values)
    for colour in range(values.shape[2]):
        out[..., colour] = _tv(np.ascontiguousarray(values[..., colour]), weight, eps, most)
    return out


def _tv(values: Floats, weight: float, eps: float, most: int) -> Floats:
    across, down = np.zeros_like(values), np.zeros_like(values)
    right, below = np.zeros_like(values), np.zeros_like(values)
    norm = np.empty_like(values)
    tau = np.float32(0.25)
    step = np.float32(tau / weight)
    out = values
    first = before = 0.0
    for turn in range(most):
        if turn:
            change = -(across + down)
            change[:, 1:] += across[:, :-1]
            change[1:] += down[:-1]
            out = values + change
            energy = float(np.vdot(change, change))
        else:
            energy = 0.0
        np.subtract(out[:, 1:], out[:, :-1], out=right[:, :-1])
        np.subtract(out[1:], out[:-1], out=below[:-1])
        np.multiply(right, right, out=norm)
        norm += below * below
        np.sqrt(norm, out=norm)
        energy = (energy + weight * float(norm.sum(dtype=np.float64))) / values.size
        if not turn:
            first = energy
        elif abs(before - energy) < eps * first:
            break
        before = energy
        norm *= step
        norm += 1
        for dual, slope in ((across, right), (down, below)):
            slope *= tau
            dual -= slope
            dual /= norm
    return out


def l0(image: Pixels, lam: Strength = 0.02, kappa: Factor = 2.0) -> Floats:
    """Return the photo with few gradients that are not zero, in float32.

    Xu, Lu, Xu and Jia, "Image smoothing via L0 gradient minimization", 2011, algorithm 1: the photo is taken
    for periodic.

    Args:
        image: The photo.
        lam: Weight of the number of gradients.
        kappa: Factor of beta from one iteration to the next, from 2 ``lam`` up to 1e5.
    """
    import torch

    values = torch.from_numpy(np.ascontiguousarray(unit(image).transpose(2, 0, 1)))
    height, width = values.shape[1:]
    spectrum = torch.fft.rfft2(values)
    turns = [
        2 - 2 * torch.cos(2 * torch.pi * torch.arange(count) / size)
        for count, size in ((height, height), (width // 2 + 1, width))
    ]
    slopes = turns[0][:, None] + turns[1]
    beta, out = 2 * lam, values
    while beta < 1e5:
        right, below = out.roll(-1, 2) - out, out.roll(-1, 1) - out
        small = (right.square() + below.square()).sum(0) < lam / beta
        right.masked_fill_(small, 0)
        below.masked_fill_(small, 0)
        right = right.roll(1, 2) - right
        right += below.roll(1, 1)
        right -= below
        out = torch.fft.irfft2(
            (spectrum + beta * torch.fft.rfft2(right)) / (1 + beta * slopes), (height, width)
        )
        beta *= kappa
    return np.ascontiguousarray(out.clamp(0, 1).permute(1, 2, 0).numpy())


def guided(image: Pixels, radius: Radius = 8, eps: Strength = 0.01) -> Floats:
    """Return OpenCV's guided filter, each photo its own guide, in float32 (He, Sun and Tang, ECCV 2010).

    Args:
        image: The photo.
        radius: Of the two windows, in pixels.
        eps: Variance below which a window is smoothed, where white is 1.
    """
    found = mirrored(
        lambda pixels: cv2.ximgproc.guidedFilter(pixels, pixels, radius, eps), unit(image), 2 * radius
    )
    return np.clip(found, 0, 1, out=found)


def anisotropic(image: Pixels, k: Tone = 0.05, alpha: Step = 0.2, n: Count = 10) -> Floats:
    """Return the photo after anisotropic diffusion, in float32 (Perona and Malik, IEEE TPAMI 12(7), 1990).

    Explicit steps with the four neighbours; the conductance exp(-(d / ``k``)^2) is one for all colours, of
    the mean d of their absolute differences.

    Args:
        image: The photo.
        k: Difference above which an edge hinders, where white is 1.
        alpha: Length of a step; stable up to 0.25.
        n: Steps.
    """
    return mirrored(lambda pixels: _diffused(pixels, k, alpha, n), unit(image), n)


def _diffused(image: Floats, k: float, alpha: float, n: int) -> Floats:
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    for _ in range(n):
        right, below = np.diff(planes, axis=2), np.diff(planes, axis=1)
        for flow in (right, below):
            mean = (np.abs(flow[0]) + np.abs(flow[1]) + np.abs(flow[2])) * np.float32(1 / (3 * k))
            flow *= np.float32(alpha) * cv2.exp(-mean * mean)
        planes[:, :, :-1] += right
        planes[:, :, 1:] -= right
        planes[:, :-1] += below
        planes[:, 1:] -= below
    return planes.transpose(1, 2, 0)


def wls(image: Pixels, lam: Strength = 100.0, sr: Tone = 0.1, n: Turns = 3) -> Floats:
    """Return OpenCV's fast global smoother, weighted least squares row by row and column by column.

    Min, Choi, Lu, Ham, Sohn and Do, "Fast global image smoothing based on weighted least squares", IEEE TIP
    23(12), 2014; the guide is the photo on 8 bits, what is smoothed is float32.

    Args:
        image: The photo.
        lam: The larger, the smoother.
        sr: Sigma of the differences of values, 0..1.
        n: Iterations.
    """
    pixels, values = (np.ascontiguousarray(each) for each in (eight_bit(image), unit(image)))
    found: Floats = cv2.ximgproc.fastGlobalSmootherFilter(pixels, values, lam, 255 * sr, None, 0.25, n)
    return found
