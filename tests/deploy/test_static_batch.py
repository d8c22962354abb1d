"""Files with a fixed batch size: when they are needed, what is in them, and how a session runs any number of images."""

import importlib
import json
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tersor
from tersor import models
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.core.target import Target
from tersor.deploy import static_batch
from tersor.deploy.static_batch import batch_for, crashes_on_dynamic_batches
from tersor.evaluation.batch_padding import in_batches_of
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.scoring import file_predictions
from tersor.evaluation.session import open_session
from tersor.recipe import parse

AMX = frozenset({"avx512f", "amx_tile", "amx_int8"})
IMAGES = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OPENVINO = Target(runtime="openvino")


@pytest.mark.parametrize(
    ("version", "flags", "expected"),
    [
        ("2025.4.1", AMX, False),
        ("2026.1.0", AMX, True),
        ("2026.2.1", AMX, True),
        ("2026.3.0-22293-c508c7595e3", AMX, True),
        ("2026.3.0", AMX - {"amx_int8"}, False),
        ("2026.4.0", AMX, False),
        ("2027.1.0", AMX, False),
    ],
)
def test_affected_openvino_versions_and_processors(version, flags, expected):
    assert crashes_on_dynamic_batches(version, flags) is expected


class RecordedProgress(NullProgress):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ).eval()


@pytest.fixture(scope="module")
def quantized(network):
    return tersor.quantize(network, [IMAGES])


@pytest.fixture
def affected(monkeypatch):
    """Simulate a processor with AMX and OpenVINO 2026.2."""
    monkeypatch.setattr(static_batch, "installed_version", lambda _package: "2026.2.0")
    monkeypatch.setattr(static_batch, "cpu_flags", lambda: AMX)


def test_only_an_integer_network_for_openvino_needs_a_static_batch(network, quantized, affected):
    assert batch_for(quantized, OPENVINO) == 1
    assert batch_for(network, OPENVINO) is None
    assert batch_for(quantized, Target(runtime="onnxruntime")) is None
    assert batch_for(quantized, Target(runtime="openvino", batch=8)) == 8


def test_the_batch_is_dynamic_if_openvino_is_not_affected(quantized, monkeypatch):
    monkeypatch.setattr(static_batch, "cpu_flags", lambda: AMX)
    for version in ("2026.4.1", None):
        monkeypatch.setattr(static_batch, "installed_version", lambda _package, version=version: version)
        assert batch_for(quantized, OPENVINO) is None


def batch_in(path):
    return onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value


@pytest.fixture(scope="module")
def files(quantized, tmp_path_factory):
    """The network's file for any batch, for one image, and for four."""
    folder = tmp_path_factory.mktemp("files")
    return {size: tersor.export(quantized, IMAGES, folder / f"{size}.onnx", batch=size) for size in (None, 1, 4)}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_with_a_static_batch_can_be_measured(runtime, files):
    pytest.importorskip(runtime)
    assert [batch_in(path) for path in files.values()] == [0, 1, 4]
    sessions = {str(size): open_session(path, runtime) for size, path in files.items()}
    assert [session.batch for session in sessions.values()] == [None, 1, 4]
    expected = sessions["None"].run(IMAGES.numpy())
    for session in sessions.values():
        np.testing.assert_allclose(session.run(IMAGES.numpy()), expected, rtol=1e-5, atol=1e-6)
        assert len(file_predictions(session, [IMAGES.numpy(), IMAGES[:3].numpy()])) == 10
    openers = {name: partial(lambda session: session, session) for name, session in sessions.items()}
    timings = measure_latency(openers, IMAGES[:1].numpy(), (1, 6), seconds=0)
    assert all(timings.spread(name, size).median > 0 for name in sessions for size in (1, 6))


def test_the_export_for_an_affected_runtime_warns(network, quantized, affected, tmp_path):
    with pytest.warns(UserWarning, match=r"batch size of 1: OpenVINO 2026.2.0 crashes .*target\.batch"):
        written = tersor.export(quantized, IMAGES, tmp_path / "model.onnx", runtime="openvino")
    assert batch_in(written) == 1


def test_a_batch_of_zero_raises(network, tmp_path):
    with pytest.raises(InputError, match=r"batch is 0\. It must be at least 1\."):
        tersor.export(network, IMAGES, tmp_path / "model.onnx", batch=0)
    assert not list(tmp_path.iterdir())


def test_incomplete_batches_are_padded_and_the_padding_is_dropped():
    seen = []

    def infer(images):
        seen.append(images[:, 0].tolist())
        return images * 10

    assert in_batches_of(infer, 2)(np.array([[1], [2], [3]])).tolist() == [[10], [20], [30]]
    assert seen == [[1, 2], [3, 3]]
    assert in_batches_of(lambda images: images.sum(), 2)(np.ones((3, 1))) == 2, "no row for each image: as it is"


@pytest.mark.slow
def test_a_run_for_an_affected_runtime_writes_and_measures_a_static_batch(affected, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    module = importlib.import_module("tersor.pipeline.run")
    monkeypatch.setattr(module, "measure", partial(module.measure, seconds=0.2))
    torch.manual_seed(0)
    models.save_weights(models.build("resnet20", 10), tmp_path / "weights.safetensors")
    recipe = parse(
        "{model: {name: resnet20, weights: WEIGHTS}, data: {name: digits}, target: {runtime: openvino},"
        " stages: [{name: quantize, methods: [{ptq: {calibration_images: 64}}]}]}".replace(
            "WEIGHTS", str(tmp_path / "weights.safetensors")
        ),
        "recipe",
    )
    progress = RecordedProgress()
    out = module.run(recipe, out=tmp_path / "out", progress=progress)
    assert (batch_in(out / "original.onnx"), batch_in(out / "model.onnx")) == (0, 1)
    assert sum("batch size of 1" in line for line in progress.lines) == 1
    numbers = json.loads((out / "numbers.json").read_text())
    assert (numbers["original"]["batch"], numbers["artifact"]["batch"]) == (None, 1)
    assert numbers["agreement_with_torch"] > 99
    assert list(json.loads((out / "evidence.json").read_text())["profile"]) == ["1"]
