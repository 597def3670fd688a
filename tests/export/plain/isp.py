"""Develop a RAW file with an exported isp file and its JSON alone: isp.py MODEL.onnx RAW PNG."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import rawpy
from PIL import Image, TiffImagePlugin

DNG_VERSION, AS_SHOT_NEUTRAL, NOISE_PROFILE = 50706, 50728, 51041
XYZ_FROM_SRGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)

model, source, target = sys.argv[1:]
stated = json.loads(Path(model + ".json").read_text(encoding="utf-8"))
with rawpy.imread(source) as raw:
    mosaic = raw.raw_image_visible.astype(np.float32)
    pattern = np.array([raw.color_desc[at] for at in raw.raw_pattern.flat]).reshape(2, 2)
    black = np.array(raw.black_level_per_channel, np.float32)[raw.raw_pattern]
    white, sizes = raw.white_level, raw.sizes
    balance, daylight = (np.array(one[:3]) for one in (raw.camera_whitebalance, raw.daylight_whitebalance))
    own, from_xyz = raw.color_matrix[:, :3], raw.rgb_xyz_matrix[:3]
with open(source, "rb") as file:
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    tags.load(file)

down, across = (int(at[0]) for at in np.nonzero(pattern == ord("R")))
height, width = mosaic.shape
black = np.tile(black, (height // 2 + 1, width // 2 + 1))[:height, :width]
mosaic = (mosaic - black) / (white - black)
halo = stated["facts"]["halo"]
more = (
    (halo + down, halo + (height + down) % 2),
    (halo + across, halo + (width + across) % 2),
)
mosaic = np.pad(mosaic, more, mode="reflect")
planes = np.stack([mosaic[row::2, column::2] for row in (0, 1) for column in (0, 1)])

is_dng = DNG_VERSION in tags
if not balance.all() or (is_dng and AS_SHOT_NEUTRAL not in tags and np.ptp(balance) == 0):
    balance = daylight
matrix = np.eye(3)
if np.linalg.matrix_rank(own) == 3 and ((is_dng and own[0, 0] > 1 / 8) or not from_xyz.any()):
    matrix = own
elif from_xyz.any():
    matrix = from_xyz @ XYZ_FROM_SRGB
    matrix = np.linalg.inv(matrix / matrix.sum(1, keepdims=True))
# A file without a NoiseProfile would have to be measured.
noise = np.reshape(tags[NOISE_PROFILE], (-1, 2)).mean(0)
noise[1] = max(noise[1], 1 / (12 * (white - black.min()) ** 2))
given = {"planes": planes, "gains": balance / balance.min(), "noise": noise, "matrix": matrix}
session = onnxruntime.InferenceSession(model)
(photo,) = session.run(
    None, {one.name: np.asarray(given[one.name], np.float32)[None] for one in session.get_inputs()}
)
levels = np.rint(photo[0].transpose(1, 2, 0) * 255).astype(np.uint8)
levels = levels[more[0][0] :, more[1][0] :][:height, :width]
top, left = sizes.crop_top_margin - sizes.top_margin, sizes.crop_left_margin - sizes.left_margin
bottom, right = top + sizes.crop_height, left + sizes.crop_width
inside = top >= 0 and bottom <= height and left >= 0 and right <= width
if inside and sizes.crop_height * sizes.crop_width >= height * width / 4:
    levels = levels[top:bottom, left:right]
turns = {3: 2, 5: 1, 6: 3}
Image.fromarray(np.rot90(levels, turns.get(sizes.flip, 0))).save(target)
assert "imgtool" not in sys.modules
