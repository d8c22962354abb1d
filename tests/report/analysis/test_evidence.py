from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from PIL import Image

from tersor.core.progress import NullProgress
from tersor.core.target import Target
from tersor.data import Batches
from tersor.data.image_sets import Pixels
from tersor.deploy.onnx import export
from tersor.evaluation.latency import predictions
from tersor.evaluation.results import Execution
from tersor.evaluation.session import open_session
from tersor.methods.ptq import PTQ
from tersor.report.analysis.evidence import collect_evidence
from tersor.training.context import AttachContext
from toy_networks import Small

BASELINE = dict.fromkeys(("1", "32"), Execution(runtime="onnxruntime", precision="float32"))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder with a small network and the same in two bits, which changes its predictions."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    original, model = Small().eval(), Small().eval()
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (300, 8, 8, 3), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 5, (300,), generator=draw)
    test = Batches(Pixels(pixels, labels), 100, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    with torch.no_grad():  # so that no class always wins
        original.answer.bias -= original(next(iter(test)).images).mean(0)
    model.load_state_dict(original.state_dict())
    attached = PTQ(bits=2).attach(model, AttachContext(data=test))
    attached.begin()
    example = next(iter(test)).images[:1]
    export(original, example, folder / "original.onnx")
    export(attached.model, example, folder / "model.onnx")
    return folder, original, attached.model, test


def collected(networks, teacher=None):
    folder, original, model, test = networks
    classes = {
        entry: predictions(open_session(folder / file, "onnxruntime"), (batch.images.numpy() for batch in test))
        for entry, file in (("original", "original.onnx"), ("artifact", "model.onnx"))
    }
    return collect_evidence(
        original,
        model,
        teacher,
        original,
        folder,
        test,
        Target(),
        predictions=classes,
        baseline=BASELINE,
        progress=NullProgress(),
    )


@pytest.fixture(scope="module")
def evidence(networks):
    return collected(networks)


def test_it_is_plain_values(evidence):
    assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence
    assert set(evidence) == {
        *("observed_images", "layers", "widths", "masks", "profile", "soft_targets", "attention", "predictions")
    }
    assert evidence["observed_images"] == 256


def test_predictions_are_compared(evidence):
    compared = evidence["predictions"]
    assert compared["images"] == 300
    assert compared["agreement"] < 100, "two bits change predictions"
    assert len(compared["examples"]) == min(24, round(300 * (1 - compared["agreement"] / 100)))


def test_class_similarity_is_the_mean_soft_prediction(networks, evidence):
    similarity = evidence["soft_targets"]["class_similarity"]
    _, original, _, test = networks
    softened = torch.cat([(original(batch.images) / 4).softmax(1).detach() for batch in test])
    assert similarity["images"] == 300
    for label, row in similarity["rows"]:
        assert row == pytest.approx(softened[test.images.labels == label].mean(0).tolist(), abs=1e-4)


def test_attention_maps_of_each_network_and_resolution(evidence):
    attention = evidence["attention"]
    assert list(attention["layers"]) == ["before", "after"]
    for image in attention["images"]:
        for name, layers in attention["layers"].items():
            assert len(image["maps"][name]) == len(layers) > 0
            shown = Image.open(io.BytesIO(base64.b64decode(image["maps"][name][0].partition(",")[2]))).convert("L")
            assert shown.size == (48, 48)
            assert shown.getextrema() == (0, 255)


def test_the_profile_names_every_layer_of_either_file(evidence):
    assert set(evidence["profile"]) == {"1", "32"}
    for profiles in evidence["profile"].values():
        for file in ("original", "artifact"):
            assert set(profiles[file]["layers"]) == {"first", "second", "answer"}
        assert "first" in profiles["baseline"]["layers"]
    assert evidence["profile"]["1"]["baseline"] == evidence["profile"]["1"]["original"], "nothing is profiled twice"


def test_soft_targets_are_the_teachers_if_there_is_one(networks, evidence):
    assert evidence["soft_targets"]["network"] == "original"
    teacher = Small()
    torch.nn.init.zeros_(teacher.answer.weight)
    torch.nn.init.zeros_(teacher.answer.bias)
    targets = collected(networks, teacher=teacher)["soft_targets"]
    assert targets["network"] == "teacher"
    assert len(targets["images"]) == 6
    assert targets["images"][0]["rows"][0]["probabilities"] == [0.2] * 5


def test_everything_but_timings_is_reproducible(networks, evidence):
    again = collected(networks)
    assert {**again, "profile": None} == {**evidence, "profile": None}


def test_the_networks_do_not_change(networks):
    _, original, model, _ = networks
    original.train()
    model.norm.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        collected(networks)
        assert original.training
        assert model.norm.training
    finally:
        original.eval()
        model.eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
