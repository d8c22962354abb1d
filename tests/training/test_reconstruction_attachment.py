"""AdaRound and BRECQ in recipes."""

from __future__ import annotations

import pytest
import torch

from tersor.checkpoint.store import Checkpoints
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.graph.layer_selection import weighted_layers
from tersor.methods.adaround import AdaRound
from tersor.methods.brecq import BRECQ
from tersor.models import build
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import run_stages
from tersor.quantization.fake_quantize import weight_quantizer
from tersor.recipe import parse
from tersor.training.context import AttachContext
from toy_networks import resnet8

METHODS = {
    "adaround": 'adaround: {bits: 3, iterations: 50, calibration_images: 64, exclude: ["layer[23]*"]}',
    "brecq": 'brecq: {bits: 3, activation_bits: 4, iterations: 50, calibration_images: 64, exclude: ["layer[23]*"]}',
}
RECIPE = """\
model: {name: "toy_networks:resnet8"}
data: {name: digits, limit: 128}
stages:
  - {name: learn, steps: 2, batch_size: 32}
  - {name: quantize, methods: [{METHOD}]}
"""


class Stops(NullProgress):
    """Interrupts the reconstruction."""

    def __init__(self, after):
        self.left = after

    def start(self, task, total):
        self.counts = "reconstruction" in task

    def advance(self, items=1, **shown):
        self.left -= self.counts
        if self.counts and self.left == 0:
            raise KeyboardInterrupt


def run_recipe(method, folder, progress=None):
    experiment = prepare(
        parse(RECIPE.replace("{METHOD}", f"{{{METHODS[method]}}}"), "r"), model=None, data=None, progress=NullProgress()
    )
    return run_stages(experiment, Checkpoints(folder), progress or NullProgress())[0].state_dict()


@pytest.mark.parametrize("method", ["brecq", pytest.param("adaround", marks=pytest.mark.slow)])
def test_an_interrupted_reconstruction_is_resumed_bit_identically(method, tmp_path):
    expected = run_recipe(method, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(method, tmp_path / "stopped", Stops(4))
    assert len(list((tmp_path / "stopped").glob("02-quantize-0000000-*"))) == 1
    again = RecordedLines()
    found = run_recipe(method, tmp_path / "stopped", again)
    assert "quantize: resuming" in again.lines
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


class RecordedLines(NullProgress):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.mark.parametrize("method", [AdaRound(bits=2, iterations=1), BRECQ(bits=2, iterations=1)])
def test_first_and_last_layers_have_8_bits(method):
    data = [torch.randn(32, 3, 16, 16)]
    attached = method.attach(resnet8().eval(), AttachContext(data=data))
    attached.begin()
    bits = [weight_quantizer(layer).grid.bits for layer in weighted_layers(attached.model).values()]
    assert bits == [8, *[2] * 6, 8]


@pytest.mark.parametrize("method", [AdaRound(), BRECQ()])
def test_missing_images_raise(method):
    with pytest.raises(InputError, match=r"needs images to calibrate with\. Pass a few hundred: AttachContext\(data="):
        method.attach(build("resnet20", 10), AttachContext())
