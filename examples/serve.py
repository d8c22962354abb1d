"""Classify images with the folder of a run, without tersor or torch: python examples/serve.py FOLDER IMAGE..."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

folder, *paths = map(Path, sys.argv[1:])
session = onnxruntime.InferenceSession(folder / "model.onnx")
numbers = json.loads((folder / "numbers.json").read_text())
*_, height, width = session.get_inputs()[0].shape
images = np.stack([Image.open(path).convert("RGB").resize((width, height)) for path in paths])
if session.get_inputs()[0].type == "tensor(float)":  # else the network takes uint8 pixels
    images = ((images / 255 - numbers["mean"]) / numbers["std"]).astype(np.float32)
images = images.transpose(0, 3, 1, 2)
for path, logits in zip(paths, session.run(None, {"images": images})[0], strict=True):
    print(path, numbers["classes"][logits.argmax()])
