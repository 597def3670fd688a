"""Find a frame's white balance with an exported awb file and its JSON alone: awb.py MODEL.onnx FRAME JSON."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import rawpy
from PIL import TiffImagePlugin

model, source, target = sys.argv[1:]
stated = json.loads(Path(model + ".json").read_text(encoding="utf-8"))
COLOR_MATRIX, SECOND_MATRIX, CALIBRATION, ANALOG_BALANCE = 50721, 50722, 50723, 50727


def read_png(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    """The frame, H x W x 3; of each pixel the peak; which are not masked; levels of black and white."""
    values = cv2.imread(path, cv2.IMREAD_UNCHANGED)[..., ::-1].astype(float)
    white = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if values.max() < 2**bits)
    return values / white, values, values.any(2), 0.0, float(white)


def read_raw(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    """The same of the squares of a mosaic; the largest of both greens stands for the second channel."""
    with rawpy.imread(path) as raw:
        mosaic = raw.raw_image_visible.astype(float)
        pattern = np.vectorize(lambda at: b"RGB".index(raw.color_desc[at]))(raw.raw_pattern)
        blacks = np.array(raw.black_level_per_channel, float)[raw.raw_pattern]
        levels = [raw.white_level, *(raw.camera_white_level_per_channel or ())]
    rows, columns = mosaic.shape[0] // 2 * 2, mosaic.shape[1] // 2 * 2
    black, white = blacks.mean(), min(level for level in levels if level > 0)
    found: list[list[np.ndarray]] = [[], [], []]
    given: list[list[np.ndarray]] = [[], [], []]
    for row in (0, 1):
        for column in (0, 1):
            plane = mosaic[row:rows:2, column:columns:2]
            found[pattern[row, column]].append((plane - blacks[row, column]) / (white - black))
            given[pattern[row, column]].append(plane)
    frame = np.stack([np.mean(planes, 0) for planes in found], 2)
    values = np.stack([np.max(planes, 0) for planes in given], 2)
    return frame, values, np.ones(frame.shape[:2], bool), black, white


def saturation(values: np.ndarray, black: float, white: float) -> float:
    """The white level, or the frame's own plateau where that is lower."""
    peak, least = values.max(2).ravel(), values.min(2).ravel()
    few = max(8, len(peak) // 2048)
    if len(peak) < 32 * few:
        return white
    top = np.sort(peak)[-few]
    if not 0.6 <= (top - black) / (white - black) < 0.98:
        return white
    band = max(0.005 * (top - black), 1)
    near = peak >= top - band
    crowd, below = near.sum(), (peak >= top - 3 * band).sum() - near.sum()
    if not 4 * below + few <= crowd <= len(peak) / 2:
        return white
    stopped = np.median(least[near]) >= top - 2 * band
    moving = least[near].std() > max(4 * peak[near].std(), 0.01 * (top - black))
    return float(top) if stopped or moving else white


def chromaticity(kelvin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CIE x and y of lights: Kang et al. (2002) below 4000 K, CIE daylight from 5000 K on."""
    t = 1000 / kelvin
    x = np.where(
        kelvin < 4000,
        np.polyval([-0.2661239, -0.2343589, 0.8776956, 0.179910], t),
        np.polyval([-3.0258469, 2.1070379, 0.2226347, 0.240390], t),
    )
    parts = [
        [-1.1063814, -1.3481102, 2.18555832, -0.20219683],
        [-0.9549476, -1.37418593, 2.09137015, -0.16748867],
    ]
    y = np.select(
        [kelvin < 2222, kelvin < 4000],
        [np.polyval(part, x) for part in parts],
        np.polyval([3.081758, -5.8733867, 3.75112997, -0.37001483], x),
    )
    day_x = np.where(
        kelvin < 7000,
        np.polyval([-4.607, 2.9678, 0.09911, 0.244063], t),
        np.polyval([-2.0064, 1.9018, 0.24748, 0.23704], t),
    )
    day_y = np.polyval([-3.0, 2.87, -0.275], day_x)
    s = np.clip((kelvin - 4000) / 1000, 0, 1)
    s = s * s * (3 - 2 * s)
    return x + s * (day_x - x), y + s * (day_y - y)


def matrix_of(path: str) -> np.ndarray | None:
    """The matrix from XYZ to the camera, None where it is unknown."""
    with rawpy.imread(path) as raw:
        matrix = raw.rgb_xyz_matrix[:3]
    with open(path, "rb") as file:
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
    assert SECOND_MATRIX not in tags, "matrices of two lights would have to be interpolated"
    if COLOR_MATRIX in tags:
        balance = np.diag(np.array(tags.get(ANALOG_BALANCE, (1, 1, 1)), float))
        calibration, matrix = (
            np.reshape(np.array(tags.get(tag, np.eye(3)), float), (3, 3))
            for tag in (CALIBRATION, COLOR_MATRIX)
        )
        return balance @ calibration @ matrix
    return matrix if matrix.any() else None


def curve_of(matrix: np.ndarray) -> np.ndarray:
    """Kelvin, R/G and B/G that a matrix tells."""
    kelvin = 1e6 / np.linspace(1e6 / 2000, 1e6 / 12000, 26)
    x, y = chromaticity(kelvin)
    rgb = np.stack([x / y, np.ones(26), (1 - x - y) / y], 1) @ matrix.T
    points = np.stack([kelvin, rgb[:, 0] / rgb[:, 1], rgb[:, 2] / rgb[:, 1]], 1)
    return points[(rgb > 0).all(1) & (points[:, 1:] > 0.01).all(1)]


def samples(length: int) -> slice:
    """Which rows or columns stand for all: of whole cells in the middle, of which there is one at least."""
    covered = length // (stride * side) * stride * side
    start = (length - covered) // 2 + stride // 2
    return slice(start, start + covered - stride + 1, stride)


linear = source.endswith(".png")
frame, values, counted, black, white = (read_png if linear else read_raw)(source)
edge = max((frame.shape[0] * frame.shape[1] / 1536) ** 0.5, 1)
stride = max(round(edge / (4 if linear else 8)), 1)
side = max(round(edge / stride), 1)
chosen = samples(frame.shape[0]), samples(frame.shape[1])
frame, values, counted = frame[chosen], values[chosen], counted[chosen]
counted = counted & (values.max(2) < black + 0.98 * (saturation(values, black, white) - black))
shape = (frame.shape[0] // side, side, frame.shape[1] // side, side)
counted = counted.reshape(shape)
coverage = counted.mean((1, 3))
frame = frame.reshape(*shape, 3) * counted[..., None]
cells = frame.sum((1, 3)) / np.maximum(counted.sum((1, 3)), 1)[..., None]
counts = (coverage >= 0.25) & (cells > 0).all(2)
counts &= cells[..., 1] > 0.01 * cells[..., 1][counts].mean()

matrix = None if linear else matrix_of(source)
curve = np.array(stated["facts"]["generic_curve"]) if matrix is None else curve_of(matrix)
offset_unit = 0.25 if matrix is None else 0.05


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
