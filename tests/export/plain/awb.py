"""Find a frame's white balance with an exported awb file and its JSON alone: awb.py MODEL.onnx FRAME JSON."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import rawpy

model, source, target = sys.argv[1:]
stated = json.loads(Path(model + ".json").read_text(encoding="utf-8"))
offset_unit = 0.25


def read(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The linear frame, H x W x 3, and which of its pixels count."""
    if path.endswith(".png"):
        frame = cv2.imread(path, cv2.IMREAD_UNCHANGED)[..., ::-1] / 65535
        return frame, (frame < 0.98).all(2) & (frame > 0).any(2)
    with rawpy.imread(path) as raw:
        mosaic = raw.raw_image_visible.astype(float)
        pattern = np.vectorize(lambda at: b"RGB".index(raw.color_desc[at]))(raw.raw_pattern)
        black = np.array(raw.black_level_per_channel, float)[raw.raw_pattern]
        white = raw.white_level
    rows, columns = mosaic.shape[0] // 2 * 2, mosaic.shape[1] // 2 * 2
    planes: list[list[np.ndarray]] = [[], [], []]
    for row in (0, 1):
        for column in (0, 1):
            plane = mosaic[row:rows:2, column:columns:2]
            planes[pattern[row, column]].append((plane - black[row, column]) / (white - black[row, column]))
    frame = np.stack([np.mean(plane, 0) for plane in planes], 2)
    return frame, np.max([np.max(plane, 0) for plane in planes], 0) < 0.98


def samples(length: int) -> slice:
    """Which rows or columns stand for all: of whole cells in the middle."""
    covered = length // (stride * side) * stride * side
    start = (length - covered) // 2 + stride // 2
    return slice(start, start + covered - stride + 1, stride)


frame, counted = read(source)
edge = max((frame.shape[0] * frame.shape[1] / 1536) ** 0.5, 1)
stride = max(round(edge / (4 if source.endswith(".png") else 8)), 1)
side = max(round(edge / stride), 1)
chosen = samples(frame.shape[0]), samples(frame.shape[1])
frame, counted = frame[chosen], counted[chosen]
shape = (frame.shape[0] // side, side, frame.shape[1] // side, side)
counted = counted.reshape(shape)
coverage = counted.mean((1, 3))
frame = frame.reshape(*shape, 3) * counted[..., None]
cells = frame.sum((1, 3)) / np.maximum(counted.sum((1, 3)), 1)[..., None]
counts = (coverage >= 0.25) & (cells > 0).all(2)
counts &= cells[..., 1] > 0.01 * cells[..., 1][counts].mean()

curve = np.reshape(stated["facts"]["generic_curve"], (-1, 3))


def log_white(kelvin: np.ndarray | float) -> np.ndarray:
    """Logs of R/G and B/G of the curve."""
    kelvin = np.atleast_1d(kelvin)
    at = np.clip(np.searchsorted(curve[:, 0], kelvin) - 1, 0, len(curve) - 2)
    share = ((kelvin - curve[at, 0]) / (curve[at + 1, 0] - curve[at, 0]))[:, None]
    return np.log(np.maximum(curve[at, 1:] + share * (curve[at + 1, 1:] - curve[at, 1:]), 0.01))


origin = log_white(5000)[0]
scale = 0.65 / np.maximum(abs(log_white(7500)[0] - log_white(3000)[0]), 0.1)
cells = cells / [np.exp(origin[0]), 1, np.exp(origin[1])]
light = cells.sum(2)
mean = (light[counts] / 3).mean()


def colours(values: np.ndarray) -> np.ndarray:
    """Aligned log-chroma of R, G, B."""
    logs = np.log(np.maximum(values, 0.002 * mean))
    return (logs[..., ::2] - logs[..., 1:2]) * scale


def histogram(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each point shared by the four bins around it."""
    at = np.clip((points.reshape(-1, 2) + 1.4) * 31 / 2.8, 0, 30.999)
    first = at.astype(int)
    part = at - first
    bins = np.zeros((32, 32))
    for row in (0, 1):
        for column in (0, 1):
            share = abs(1 - row - part[:, 0]) * abs(1 - column - part[:, 1])
            np.add.at(bins, (first[:, 0] + row, first[:, 1] + column), share * weights.ravel())
    return np.sqrt(50 * bins / (bins.sum() + 1e-6))


counted_coverage = np.where(counts, coverage, 0)
bright = counted_coverage * np.minimum(light / (3 * mean), 4)
held = np.where(counts[..., None], cells, 0)
edges, weights = [], []
for axis in (0, 1):
    difference = abs(np.diff(held, axis=axis))
    both = np.moveaxis(counted_coverage, axis, 0)
    smaller = np.moveaxis(np.minimum(both[1:], both[:-1]), 0, axis)
    edges.append(colours(difference).reshape(-1, 2))
    weights.append((smaller * np.minimum(difference.sum(2) / mean, 4)).ravel())
histograms = [
    histogram(colours(cells), counted_coverage),
    histogram(colours(cells), bright),
    histogram(np.concatenate(edges), np.concatenate(weights)),
]

mired = np.linspace(1e6 / 9000, 1e6 / 2400, 40)
middle = (log_white(1e6 / mired) - origin) * scale
along = np.gradient(middle, axis=0)
along /= np.linalg.norm(along, axis=1, keepdims=True)
normal = np.stack([-along[:, 1], along[:, 0]], 1)
offsets = np.linspace(-2, 2, 9)
place = (middle[:, None] + normal[:, None] * offsets[:, None] * offset_unit).reshape(-1, 2)
side_facts = np.stack([np.repeat(mired / 200 - 1.3, 9), np.zeros(360), np.zeros(360)], 1)
given = {
    "histograms": np.stack(histograms),
    "place": place,
    "side": side_facts,
    "log_prior": np.tile(-0.5 * offsets**2, 40),
}
(log_posterior,) = onnxruntime.InferenceSession(model).run(
    None, {name: value.astype(np.float32)[None] for name, value in given.items()}
)
share = np.exp(log_posterior[0].astype(float))
share /= share.sum()
lights = place / scale + origin
red, blue = np.exp(share @ lights)


def vectors(logs: np.ndarray) -> np.ndarray:
    """Directions of lights (R/G, 1, B/G)."""
    found = np.stack([np.exp(logs[..., 0]), np.ones(logs.shape[:-1]), np.exp(logs[..., 1])], -1)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


angles = np.degrees(np.arccos(np.clip(vectors(lights) @ vectors(share @ lights), -1, 1)))
answer = {"red": 1 / red, "green": 1.0, "blue": 1 / blue, "confidence": share[angles <= 3].sum()}
Path(target).write_text(json.dumps(answer), encoding="utf-8")
assert "imgtool" not in sys.modules
