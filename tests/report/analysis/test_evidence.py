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
from tersor.evaluation.session import open_session
from tersor.methods.ptq import PTQ
from tersor.report.analysis.evidence import gather
from tersor.training.context import AttachContext
from toy_networks import Small

BASELINE = {key: {"runtime": "onnxruntime", "precision": "float32"} for key in ("1", "32")}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder with a small network and the same in two bits, which changes its answers."""
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


def gathered(networks, teacher=None):
    folder, original, model, test = networks
    answers = {
        entry: predictions(open_session(folder / file, "onnxruntime"), (batch.images.numpy() for batch in test))
        for entry, file in (("original", "original.onnx"), ("artifact", "model.onnx"))
    }
    return gather(
        original,
        model,
        teacher,
        original,
        folder,
        test,
        Target(),
        answers=answers,
        baseline=BASELINE,
        progress=NullProgress(),
    )


@pytest.fixture(scope="module")
def evidence(networks):
    return gathered(networks)


def test_it_is_plain_values(evidence):
    assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence
    assert set(evidence) == {"looked_at", "layers", "widths", "masks", "profile", "targets", "attention", "answers"}
    assert evidence["looked_at"] == 256


def test_changed_answers_are_told(evidence):
    told = evidence["answers"]
    assert told["images"] == 300
    assert told["agreement"] < 100, "two bits change something"
    assert len(told["shown"]) == min(24, round(300 * (1 - told["agreement"] / 100)))


def test_the_classes_that_are_held_for_alike_are_means_of_softened_answers(networks, evidence):
    told = evidence["targets"]["similar"]
    _, original, _, test = networks
    softened = torch.cat([(original(batch.images) / 4).softmax(1).detach() for batch in test])
    assert told["images"] == 300
    for label, row in told["rows"]:
        assert row == pytest.approx(softened[test.images.labels == label].mean(0).tolist(), abs=1e-4)


def test_attention_is_drawn_for_each_network_and_resolution(evidence):
    told = evidence["attention"]
    assert list(told["layers"]) == ["before", "after"]
    for image in told["images"]:
        for name, layers in told["layers"].items():
            assert len(image["maps"][name]) == len(layers) > 0
            drawn = Image.open(io.BytesIO(base64.b64decode(image["maps"][name][0].partition(",")[2]))).convert("L")
            assert drawn.size == (48, 48)
            assert drawn.getextrema() == (0, 255)


def test_the_profile_names_every_layer_of_either_file(evidence):
    assert set(evidence["profile"]) == {"1", "32"}
    for told in evidence["profile"].values():
        for file in ("original", "artifact"):
            assert set(told[file]["layers"]) == {"first", "second", "answer"}
        assert "first" in told["baseline"]["layers"]
    assert evidence["profile"]["1"]["baseline"] == evidence["profile"]["1"]["original"], "nothing is profiled twice"


def test_the_teacher_softens_where_there_is_one(networks, evidence):
    assert evidence["targets"]["of"] == "original"
    teacher = Small()
    torch.nn.init.zeros_(teacher.answer.weight)
    torch.nn.init.zeros_(teacher.answer.bias)
    told = gathered(networks, teacher=teacher)["targets"]
    assert told["of"] == "teacher"
    assert len(told["images"]) == 6
    assert told["images"][0]["rows"][0]["probabilities"] == [0.2] * 5


def test_all_but_timings_is_the_same_again(networks, evidence):
    again = gathered(networks)
    assert {**again, "profile": None} == {**evidence, "profile": None}


def test_the_networks_stay_as_they_were(networks):
    _, original, model, _ = networks
    original.train()
    model.norm.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        gathered(networks)
        assert original.training
        assert model.norm.training
    finally:
        original.eval()
        model.eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
