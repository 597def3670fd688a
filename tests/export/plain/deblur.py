"""Sharpen a photo with an exported deblur file and its JSON alone: deblur.py MODEL.onnx PHOTO PNG [TILE]."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, source, target, *rest = sys.argv[1:]
stated = json.loads(Path(model + ".json").read_text(encoding="utf-8"))
halo, grid = stated["facts"]["halo"], stated["facts"]["grid"]
tile = int(rest[0]) if rest else 2048
session = onnxruntime.InferenceSession(model)
photo = ImageOps.exif_transpose(Image.open(source)).convert("RGB")
image = np.asarray(photo, np.float32).transpose(2, 0, 1)[None] / 255
sharp = np.zeros_like(image)


def tiles(length: int) -> list[tuple[slice, slice, slice]]:
    """Where each tile lies in the photo, what of it is kept, and where that goes."""
    found = []
    step = (tile - 2 * halo) // grid * grid
    for begin in range(0, max(length - 2 * halo, 1) if length > tile else 1, step):
        end = min(begin + tile, length) if length > tile else length
        first = begin + (halo if begin else 0)
        last = end - (halo if end < length else 0)
        found.append((slice(begin, end), slice(first - begin, last - begin), slice(first, last)))
    return found


for rows, kept_rows, to_rows in tiles(image.shape[2]):
    for columns, kept_columns, to_columns in tiles(image.shape[3]):
        (part,) = session.run(None, {"image": np.ascontiguousarray(image[:, :, rows, columns])})
        sharp[:, :, to_rows, to_columns] = part[:, :, kept_rows, kept_columns]

levels = np.rint(sharp[0].clip(0, 1) * 255).astype(np.uint8)
Image.fromarray(levels.transpose(1, 2, 0)).save(target)
assert "imgtool" not in sys.modules
