"""Develop a RAW file with an exported isp file and its JSON alone: isp.py MODEL.onnx RAW PNG."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import rawpy
from PIL import Image, TiffImagePlugin

NOISE_PROFILE = 51041
XYZ_FROM_SRGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)

model, source, target = sys.argv[1:]
stated = json.loads(Path(model + ".json").read_text(encoding="utf-8"))
with rawpy.imread(source) as raw:
    mosaic = raw.raw_image_visible.astype(np.float32)
    pattern = np.array([raw.color_desc[at] for at in raw.raw_pattern.flat]).reshape(2, 2)
    black = np.array(raw.black_level_per_channel, np.float32)[raw.raw_pattern]
    white, balance, sizes = raw.white_level, np.array(raw.camera_whitebalance[:3]), raw.sizes
    matrix, from_xyz = raw.color_matrix[:, :3], raw.rgb_xyz_matrix[:3]

down, across = (int(at[0]) for at in np.nonzero(pattern == ord("R")))
height, width = mosaic.shape
black = np.tile(black, (height // 2 + 1, width // 2 + 1))[:height, :width]
mosaic = (mosaic - black) / (white - black)
margin = stated["facts"]["halo"]
more = (
    (margin + down, margin + (height + down) % 2),
    (margin + across, margin + (width + across) % 2),
)
mosaic = np.pad(mosaic, more, mode="reflect")
planes = np.stack([mosaic[row::2, column::2] for row in (0, 1) for column in (0, 1)])

if from_xyz.any():
    matrix = from_xyz @ XYZ_FROM_SRGB
    matrix = np.linalg.inv(matrix / matrix.sum(1, keepdims=True))
elif not matrix.any():
    matrix = np.eye(3)
with open(source, "rb") as file:
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    tags.load(file)
noise = np.reshape(tags.get(NOISE_PROFILE, stated["facts"]["noise"]), (-1, 2)).mean(0)
given = {"planes": planes, "gains": balance / balance.min(), "noise": noise, "matrix": matrix}
session = onnxruntime.InferenceSession(model)
(photo,) = session.run(
    None, {one.name: np.asarray(given[one.name], np.float32)[None] for one in session.get_inputs()}
)
levels = np.rint(photo[0].transpose(1, 2, 0).clip(0, 1) * 255).astype(np.uint8)
levels = levels[more[0][0] :, more[1][0] :][:height, :width]
if sizes.crop_width:
    top, left = sizes.crop_top_margin - sizes.top_margin, sizes.crop_left_margin - sizes.left_margin
    levels = levels[top:, left:][: sizes.crop_height, : sizes.crop_width]
turns = {3: 2, 5: 1, 6: 3}
Image.fromarray(np.rot90(levels, turns.get(sizes.flip, 0))).save(target)
assert "imgtool" not in sys.modules
