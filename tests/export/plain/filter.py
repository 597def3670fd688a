"""Filter a photo with an exported filter file and its JSON alone: filter.py MODEL.onnx PHOTO PNG."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, source, target = sys.argv[1:]
stated = json.loads(Path(model + ".json").read_text(encoding="utf-8"))
photo = ImageOps.exif_transpose(Image.open(source)).convert("RGB")
image = np.asarray(photo, np.float32).transpose(2, 0, 1)[None] / 255
(filtered,) = onnxruntime.InferenceSession(model).run(None, {"image": image})
filtered = filtered[0].transpose(1, 2, 0)

if stated["facts"]["target"].endswith("_canny"):
    most = filtered.max()
    scaled = filtered[..., 0] / most if most >= 1e-6 else np.zeros(filtered.shape[:2], np.float32)
    levels = np.where(scaled >= 1, 255, np.floor(scaled.clip(0, 1) * 255)).astype(np.uint8)
    levels = cv2.Canny(levels, 50, 150)
else:
    levels = np.rint(filtered.clip(0, 1) * 255).astype(np.uint8).squeeze()
Image.fromarray(levels).save(target)
assert "imgtool" not in sys.modules
