from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from PIL import Image
from torch import nn

from evidence_page import undocumented
from tersor.core.progress import NullProgress
from tersor.core.target import Target
from tersor.data import Batches
from tersor.data.image_sets import Pixels
from tersor.deploy.onnx import export
from tersor.evaluation.measurement import arrays
from tersor.evaluation.results import Execution
from tersor.evaluation.scoring import file_predictions
from tersor.evaluation.session import open_session
from tersor.methods.ptq import PTQ
from tersor.report.analysis.evidence import collect_evidence
from tersor.tasks.classification import Classification
from tersor.training.context import AttachContext
from toy_networks import Small

BASELINE = dict.fromkeys(("1", "32"), Execution(runtime="onnxruntime", precision="float32"))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder with a small network, and its 2-bit version, which predicts differently."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    original, model = Small().eval(), Small().eval()
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (300, 8, 8, 3), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 5, (300,), generator=draw)
    test = Batches(Pixels(pixels, labels), 100, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    with torch.no_grad():  # so that different classes are predicted
        original.answer.bias -= original(next(iter(test)).images).mean(0)
    model.load_state_dict(original.state_dict())
    attached = PTQ(bits=2).attach(model, AttachContext(data=test))
    attached.begin()
    example = next(iter(test)).images[:1]
    export(original, example, folder / "original.onnx")
    export(attached.model, example, folder / "model.onnx")
    return folder, original, attached.model, test


def collected(networks, teacher=None, target=None):
    folder, original, model, test = networks
    target = target or Target()
    classes = {
        entry: file_predictions(open_session(folder / file, "onnxruntime"), arrays(test, target.input))
        for entry, file in (("original", "original.onnx"), ("artifact", "model.onnx"))
    }
    return collect_evidence(
        original,
        model,
        teacher,
        original,
        folder,
        test,
        target,
        Classification(),
        predictions=classes,
        classes=tuple("0123456789"),
        baseline=BASELINE,
        progress=NullProgress(),
    )


@pytest.fixture(scope="module")
def evidence(networks):
    return collected(networks)


def test_the_evidence_consists_of_plain_values(evidence):
    assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence
    assert set(evidence) == {
        *("observed_images", "layers", "widths", "masks", "profile", "soft_targets", "attention", "predictions")
    }
    assert evidence["observed_images"] == 256


def test_the_reference_page_documents_every_key(evidence):
    assert not undocumented(evidence, "evidence.json of a run")
    assert undocumented({"layers": [{"name": "first", "colour": 1}]}, "evidence.json of a run") == {"layers[].colour"}


def test_predictions_of_original_and_artifact_are_compared(evidence):
    compared = evidence["predictions"]
    assert compared["images"] == 300
    assert compared["agreement"] < 100, "two bits change predictions"
    assert len(compared["examples"]) == min(24, round(300 * (1 - compared["agreement"] / 100)))


def test_class_similarity_is_the_mean_of_the_soft_predictions(networks, evidence):
    similarity = evidence["soft_targets"]["class_similarity"]
    _, original, _, test = networks
    softened = torch.cat([(original(batch.images) / 4).softmax(1).detach() for batch in test])
    assert similarity["images"] == 300
    for label, row in similarity["rows"]:
        assert row == pytest.approx(softened[test.images.targets == label].mean(0).tolist(), abs=1e-4)


def test_there_are_attention_maps_for_each_network_and_resolution(evidence):
    attention = evidence["attention"]
    assert list(attention["layers"]) == ["before", "after"]
    for image in attention["images"]:
        for name, layers in attention["layers"].items():
            assert len(image["maps"][name]) == len(layers) > 0
            shown = Image.open(io.BytesIO(base64.b64decode(image["maps"][name][0].partition(",")[2]))).convert("L")
            assert shown.size == (48, 48)
            assert shown.getextrema() == (0, 255)


def test_the_profile_contains_every_layer_of_both_files(evidence):
    assert set(evidence["profile"]) == {"1", "32"}
    for profiles in evidence["profile"].values():
        for file in ("original", "artifact"):
            assert set(profiles[file]["layers"]) == {"first", "second", "answer"}
        assert "first" in profiles["baseline"]["layers"]
    assert evidence["profile"]["1"]["baseline"] == evidence["profile"]["1"]["original"], "nothing is profiled twice"


def test_the_profile_of_files_that_take_pixels_contains_the_same_layers(networks, evidence, tmp_path):
    _, original, model, test = networks
    example, pixels = next(iter(test)).images[:1], ([0.5] * 3, [0.2] * 3)
    export(original, example, tmp_path / "original.onnx", pixels=pixels)
    export(model, example, tmp_path / "model.onnx", pixels=pixels)
    profile = collected((tmp_path, original, model, test), target=Target(input="uint8"))["profile"]
    for size, profiles in evidence["profile"].items():
        for file in ("original", "artifact"):
            assert set(profile[size][file]["layers"]) == set(profiles[file]["layers"])


class Attending(nn.Module):
    """A convolution, and attention over its positions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, stride=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.answer = nn.Linear(16, 5)

    def forward(self, images):
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        return self.answer(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def test_attention_layers_are_compared_with_the_original(networks, tmp_path):
    test = networks[-1]
    torch.manual_seed(0)
    original, model = Attending().eval(), Attending().eval()
    attached = PTQ(bits=8).attach(model, AttachContext(data=test))
    attached.begin()
    example = next(iter(test)).images[:1]
    export(original, example, tmp_path / "original.onnx")
    export(attached.model, example, tmp_path / "model.onnx")
    found = collected((tmp_path, original, attached.model, test))
    names = ["stem", "attention.in_proj", "attention.out_proj", "answer"]
    assert [each["name"] for each in found["layers"]] == [each["name"] for each in found["widths"]] == names
    projection = found["layers"][1]
    assert projection["original_shape"] == projection["shape"] == [48, 16]
    assert projection["weight_bits"] == 8
    assert [(each["before"], each["after"]) for each in found["widths"]] == [(16, 16), (48, 48), (16, 16), (5, 5)]


def test_soft_targets_come_from_the_teacher_if_there_is_one(networks, evidence):
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


def test_collecting_evidence_does_not_change_the_networks(networks):
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
