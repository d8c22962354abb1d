"""Serves an artifact without tersor and without torch: python examples/serve.py ARTIFACT IMAGE..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

folder, *paths = sys.argv[1:]
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
numbers = json.load(open(f"{folder}/numbers.json"))
size = session.get_inputs()[0].shape[3], session.get_inputs()[0].shape[2]
pixels = np.stack([Image.open(path).convert("RGB").resize(size) for path in paths]) / 255
images = ((pixels - numbers["mean"]) / numbers["std"]).astype(np.float32).transpose(0, 3, 1, 2)
for path, answer in zip(paths, session.run(None, {"images": images})[0].argmax(1)):
    print(path, numbers["classes"][answer])
