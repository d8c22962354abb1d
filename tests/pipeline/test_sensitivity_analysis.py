"""`tersor sensitivity`: what it measures, and that it can be interrupted at any time."""

import json

import pytest
import torch

from tersor import models
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.pipeline import sensitivity_analysis
from tersor.pipeline.sensitivity_analysis import WIDTHS, measure
from tersor.quantization.sensitivity import Cost
from tersor.recipe import parse
from toy_networks import resnet8

RECIPE = """\
model: {name: "toy_networks:resnet8", weights: WEIGHTS}
data: {name: digits}
stages: [{name: quantize, methods: [{mixed_precision: {average_bits: 4}}]}]
"""
STOPPED_AFTER = 7


class Watched(NullProgress):
    def __init__(self, stop=False):
        self.said, self.total, self.done, self.stop = [], 0, 0, stop

    def say(self, line):
        self.said.append(line)

    def start(self, task, total):
        self.total = total

    def advance(self, items=1, **values):
        self.done += items
        if self.stop and self.done == STOPPED_AFTER:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(sensitivity_analysis, "WIDTHS", (2, 8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "trained.safetensors"
    models.save_weights(resnet8(), path)
    return path


@pytest.fixture
def recipe(weights):
    return parse(RECIPE.replace("WEIGHTS", str(weights)), "recipe.yaml")


def test_the_default_widths():
    assert WIDTHS == (2, 3, 4, 5, 6, 8)


def test_every_layer_is_measured_at_every_width(recipe, tmp_path):
    progress = Watched()
    found, figure = measure(recipe, out=tmp_path / "a.json", images=50, progress=progress)
    assert progress.done == progress.total == 16
    layers = list(found.weights)
    assert (layers[0], layers[-1], len(layers)) == ("conv1", "linear", 8)
    assert found.weights["conv1"] == 432
    assert [(cost.layer, cost.bits) for cost in found.costs] == [(name, bits) for name in layers for bits in (2, 8)]
    assert all(0 < cost.error < 10 for cost in found.costs)
    assert all(cost.drop is not None and round(cost.drop * 50 / 100, 6).is_integer() for cost in found.costs)
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["costs"][0] == {
        "layer": "conv1",
        "bits": 2,
        "error": found.costs[0].error,
        "drop": found.costs[0].drop,
    }
    assert saved["measured_with"]["images"] == 50
    assert figure.read_text().startswith("<svg")
    assert "toy_networks:resnet8" in figure.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.svg"]


def test_an_interrupted_analysis_is_resumed(recipe, tmp_path, monkeypatch):
    whole, _ = measure(recipe, out=tmp_path / "whole.json", images=30, progress=NullProgress())
    out = tmp_path / "stopped.json"
    with pytest.raises(KeyboardInterrupt):
        measure(recipe, out=out, images=30, progress=Watched(stop=True))
    assert json.loads(out.read_text())["costs"] == json.loads((tmp_path / "whole.json").read_text())["costs"][:7]
    assert {path.name for path in tmp_path.iterdir()} == {"whole.json", "whole.svg", "stopped.json"}
    progress = Watched()
    found, _ = measure(recipe, out=out, images=30, progress=progress)
    assert found == whole
    assert progress.done == progress.total == 16
    assert f"{out}: resuming after 7 measurements, 9 remain" in progress.said
    assert out.read_text() == (tmp_path / "whole.json").read_text()
    assert (tmp_path / "stopped.svg").read_text() == (tmp_path / "whole.svg").read_text()
    monkeypatch.setattr(sensitivity_analysis, "sensitivity", lambda *_, **__: iter(()))
    assert measure(recipe, out=out, images=30, progress=NullProgress())[0] == whole, "nothing is measured again"


def test_an_interrupted_write_keeps_a_complete_file(recipe, tmp_path, monkeypatch):
    out = tmp_path / "a.json"

    def interrupted(self, content):
        with self.open("wb") as opened:
            opened.write(content[:40])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(recipe, out=out, images=20, progress=Watched(stop=True))
    before = out.read_bytes()
    monkeypatch.setattr("pathlib.Path.write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(recipe, out=out, images=20, progress=NullProgress())
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def begun(recipe, tmp_path, monkeypatch):
    """A file with one measurement; no further measurements are made."""
    only = Cost("conv1", 2, 0.5, 1.0)
    monkeypatch.setattr(sensitivity_analysis, "sensitivity", lambda *_, **__: iter([only]))
    measure(recipe, out=tmp_path / "a.json", images=50, progress=NullProgress())
    return tmp_path / "a.json"


@pytest.mark.parametrize(
    ("change", "images", "message"),
    [
        (("trained.safetensors", "other.safetensors"), 50, "was measured with SHA-256 of model.weights: "),
        (("name: digits", "name: digits, validation: 0.2"), 50, "data.validation: 0.1, but now it is 0.2"),
        (("stages:", "seed: 3\nstages:"), 50, "was measured with seed: 0, but now it is 3"),
        (("stages:", "target: {cpu: arm64}\nstages:"), 50, "but now it is arm64"),
        (("", ""), 60, "was measured with images: 50, but now it is 60"),
    ],
)
def test_a_file_measured_with_other_settings_raises(begun, weights, change, images, message):
    other = weights.with_name("other.safetensors")
    models.save_weights(resnet8(), other)
    before = begun.read_bytes()
    changed = parse(RECIPE.replace("WEIGHTS", str(weights)).replace(*change), "recipe.yaml")
    with pytest.raises(InputError, match=message) as refused:
        measure(changed, out=begun, images=images, progress=NullProgress())
    assert "--out" in str(refused.value)
    assert begun.read_bytes() == before


def test_settings_without_influence_are_not_compared(begun, weights):
    text = RECIPE.replace("WEIGHTS", str(weights)).replace("average_bits: 4", "average_bits: 3")
    text = text.replace("name: digits", "name: digits, augment: flip")
    assert measure(parse(text, "recipe.yaml"), out=begun, images=50, progress=NullProgress())[0].costs


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b'{"costs": 3}', b"\xff\x00"])
def test_a_file_not_written_by_tersor_raises(content, recipe, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json was not written by `tersor sensitivity`, or is damaged"):
        measure(recipe, out=tmp_path / "a.json", progress=NullProgress())
    assert (tmp_path / "a.json").read_bytes() == content


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer", "ghost", "unknown layers or bit widths"),
        ("bits", 7, "unknown layers or bit widths"),
        ("error", float("nan"), "or is damaged"),
        ("error", -0.5, "or is damaged"),
    ],
)
def test_a_file_with_changed_costs_raises(key, value, message, recipe, tmp_path):
    cost = {"layer": "conv1", "bits": 2, "error": 0.5, "drop": None} | {key: value}
    (tmp_path / "a.json").write_text(json.dumps({"measured_with": {}, "weights": {"conv1": 432}, "costs": [cost]}))
    with pytest.raises(InputError, match=message):
        measure(recipe, out=tmp_path / "a.json", progress=NullProgress())


def test_images_are_sampled_in_proportion_to_the_classes(recipe, tmp_path, monkeypatch):
    seen = []

    def fake_costs(_quantizers, data, _asked, **_):
        seen.append(torch.cat([batch.targets for batch in data]))
        return iter([Cost("conv1", 2, 0.5, 1.0)])

    monkeypatch.setattr(sensitivity_analysis, "sensitivity", fake_costs)
    for place, count in enumerate((50, 50, None, 10_000)):
        measure(recipe, out=tmp_path / f"{place}.json", images=count, progress=NullProgress())
    assert torch.bincount(seen[0]).tolist() == [5] * 10
    assert torch.equal(seen[0], seen[1])
    assert len(seen[2]) == len(seen[3]) > 100


@pytest.mark.parametrize(
    ("change", "out", "message"),
    [
        ((", weights: WEIGHTS", ""), "a.json", "toy_networks:resnet8 has no weights"),
        (("name: digits", "name: digits, validation: 0"), "a.json", "there are no validation images"),
        (("WEIGHTS", "absent.safetensors"), "a.json", "weights file"),
        (("", ""), "a.svg", "NAME.json"),
        (("", ""), "absent/a.json", "an existing folder"),
    ],
)
def test_recipes_and_paths_that_cannot_be_used_raise(change, out, message, weights, tmp_path):
    recipe = parse(RECIPE.replace(*change).replace("WEIGHTS", str(weights)), "recipe.yaml")
    with pytest.raises(InputError, match=message):
        measure(recipe, out=tmp_path / out, progress=NullProgress())
    assert not list(tmp_path.iterdir())
