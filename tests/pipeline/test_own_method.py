"""User-defined methods: the documented examples, zeros without a mask, and methods that raise errors."""

from __future__ import annotations

import ast
import re
import runpy

import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.utils import parametrize

import blocks
from tersor.checkpoint.store import Checkpoints
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.methods.channel_pruning import ChannelPruning
from tersor.pipeline.dry_run import explain
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import run_stages
from tersor.pruning.mask import note_of_lost_zeros, unmasked_zeros
from tersor.recipe import parse
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.mask_attachment import insert_masks, mask_of
from tersor.training.method import PLAIN_VALUES, chain
from tersor.training.objective import Outputs

RECIPE = """\
model: {name: "test_own_method:network"}
data: {name: digits, limit: 64}
stages:
  - {name: prune, epochs: 3, batch_size: 32, methods: ["METHOD"]}
  - {name: finetune, epochs: 1, batch_size: 32, methods: []}
"""


def network(num_classes: int = 10):
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, num_classes)
    )


class Zeros(Attachment):
    def after_step(self, step, optimizer):
        with torch.no_grad():
            self.model[0].weight[:, :2] = 0


@dataclass(frozen=True, config=PLAIN_VALUES)
class WithoutMask:
    def attach(self, model, context):
        return Zeros(model)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@dataclass(frozen=True, config=PLAIN_VALUES)
class PlainFunction:
    def attach(self, model, context):
        return Attachment(model, [torch.mean])


@dataclass(frozen=True, config=PLAIN_VALUES)
class OtherLayer:
    def attach(self, model, context):
        return Attachment(model, layers=[("0", "layer9")])


@dataclass(frozen=True, config=PLAIN_VALUES)
class OwnParametrization:
    def attach(self, model, context):
        parametrize.register_parametrization(model[0], "weight", Halved())
        return Attachment(model)


@dataclass(frozen=True, config=PLAIN_VALUES)
class WithoutContext:
    def attach(self, model):
        return Attachment(model)


@dataclass(frozen=True, config=PLAIN_VALUES)
class ReturnsNothing:
    def attach(self, model, context):
        pass


def run(method, tmp_path, teacher=False):
    text = RECIPE.replace('"METHOD"', method if method.startswith("{") else f'"{method}"')
    if teacher:
        text += 'teacher: {name: "test_own_method:network", epochs: 1, training: {batch_size: 32}}\n'
    recipe = parse(text, "recipe.yaml")
    experiment = prepare(recipe, model=None, data=None, progress=NullProgress())
    return run_stages(experiment, Checkpoints(tmp_path / "checkpoints"), NullProgress())


def test_the_mask_of_the_documented_method_is_kept(tmp_path, monkeypatch):
    page = "how-to/own-method.md"
    (tmp_path / "my_methods.py").write_text(blocks.blocks(page, "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    assert parse(blocks.blocks(page, "yaml")[0], page).stages[0].name == "prune"
    pruned, records = run("my_methods:Grow", tmp_path)
    assert mask_of(pruned[0]).mask.float().mean().item() == pytest.approx(0.7)
    assert pruned[0].weight.eq(0).float().mean().item() == pytest.approx(0.3)
    assert records[0].masks[0]["sparsity"][-3:] == pytest.approx([0.1, 0.2, 0.3], abs=0.01)
    assert not any("zero" in note for record in records for note in record.notes)


def test_the_documented_loss_can_be_trained(tmp_path, monkeypatch):
    page = "how-to/own-method.md"
    (tmp_path / "my_losses.py").write_text(blocks.blocks(page, "python")[1])
    monkeypatch.syspath_prepend(tmp_path)
    assert parse(blocks.blocks(page, "yaml")[1], page).stages[0].name == "distill"
    _, records = run('{"my_losses:Similarity": {layers: ["1", "2"], weight: 2}}', tmp_path, teacher=True)
    assert 0 < records[0].losses["similarity"] < 2


def test_the_scales_of_the_documented_quantizer_are_powers_of_two(tmp_path, monkeypatch):
    page = "how-to/own-method.md"
    (tmp_path / "my_quantizers.py").write_text(blocks.blocks(page, "python")[2])
    monkeypatch.syspath_prepend(tmp_path)
    assert parse(blocks.blocks(page, "yaml")[2], page).stages[0].name == "quantize"
    own, built_in = (
        run(f'{{"{name}": {{bits: 5}}}}', tmp_path / name[:3])[0].get_submodule("0").parametrizations.weight[0].scale
        for name in ("my_quantizers:PowerOfTwo", "ptq")
    )
    assert len(own) == 10
    assert torch.equal(own.log2(), own.log2().round())
    assert ((built_in <= own) & (own < 2 * built_in)).all()


@pytest.mark.parametrize(
    ("block", "name", "values", "message"),
    [
        (0, "Grow", {"rate": 3}, "rate is 3. It must be above 0 and below 1."),
        (0, "Grow", {"rat": 0.1}, "Grow has no parameter 'rat'. Did you mean 'rate'? Possible: rate, sparsity."),
        (1, "Similarity", {"weight": "x"}, "weight should be a number, got 'x'."),
        (2, "PowerOfTwo", {"bits": 9}, "bits is 9. It must be from 2 to 8."),
    ],
)
def test_a_wrong_parameter_of_a_documented_method_raises_one_error(block, name, values, message, tmp_path):
    file = tmp_path / "documented.py"
    file.write_text(blocks.blocks("how-to/own-method.md", "python")[block])
    namespace = runpy.run_path(str(file))
    with pytest.raises(InputError) as caught:
        namespace[name](**values)
    assert str(caught.value) == message


def test_the_documented_importance_removes_the_channels_with_the_lowest_score(tmp_path, monkeypatch):
    page = "how-to/own-method.md"
    (tmp_path / "my_importance.py").write_text(blocks.blocks(page, "python")[3])
    monkeypatch.syspath_prepend(tmp_path)
    (documented,) = parse(blocks.blocks(page, "yaml")[3], page).stages[0].methods
    assert documented.importance == "my_importance:spread"
    given = network()
    weights = given[0].weight.detach().flatten(1), given[4].weight.detach().T
    parts = [rows.abs().sum(1) * rows.std(1, correction=0) for rows in weights]
    score = sum(part / part.mean() for part in parts)
    method = ChannelPruning(keep_channels=0.5, importance="my_importance:spread", round_to=1)
    pruned = chain([method], given, AttachContext(data=[torch.randn(8, 3, 8, 8)])).model
    kept = weights[0][score.argsort()[5:].sort().values]
    assert torch.equal(pruned.get_submodule("0").weight.flatten(1), kept)


def test_the_documented_loss_is_the_mean_squared_difference_of_cosines():
    found = {}
    exec(blocks.blocks("how-to/own-method.md", "python")[1].replace("config=PLAIN_VALUES", ""), found)
    ours, theirs = torch.randn(3, 4, 2, 2), torch.randn(3, 5, 2, 2)
    value = found["SimilarityTerm"](("a", "b"), 2.0)(None, Outputs(None, {"a": ours}), Outputs(None, {"b": theirs}))
    cosines = [
        [torch.cosine_similarity(each[i].flatten(), each[j].flatten(), dim=0) for i in range(3) for j in range(3)]
        for each in (ours, theirs)
    ]
    expected = 2 * sum((one - other) ** 2 for one, other in zip(*cosines, strict=True)) / 9
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_layer_that_does_not_exist_raises_one_error():
    with pytest.raises(InputError, match=r"OtherLayer' compares layers, but the teacher has no layer 'layer9'"):
        chain([OtherLayer()], network(), AttachContext(teacher=network()))


def test_the_names_imported_on_the_page_are_in_the_api_reference():
    page, reference = "how-to/own-method.md", (blocks.DOCS / "reference" / "api.md").read_text()
    imports = [
        node
        for text in blocks.blocks(page, "python")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("tersor")
    ]
    imported = {f"{node.module}.{each.name}" for node in imports for each in node.names}
    listed = set(re.findall(r"^::: (\S+)$", reference, re.MULTILINE))
    assert len(imported) > 9
    assert imported <= listed
    named = re.search(r"## Write a method.*?```python\n(.*?)```", reference, re.DOTALL)[1]
    exec(named, {})


def test_lost_zeros_of_an_earlier_stage_are_noted(tmp_path):
    pruned, records = run("test_own_method:WithoutMask", tmp_path)
    assert pruned[0].weight.ne(0).all()
    assert not any("zero" in note for note in records[0].notes)
    assert records[1].notes[-1].startswith("48.6 % of the weights were zero before this stage and are not zero after")
    assert "insert_masks" in records[1].notes[-1]


def test_masked_zeros_are_not_reported_as_lost():
    model = network()
    with torch.no_grad():
        model[0].weight[:6] = 0
    zeros = unmasked_zeros(model)
    insert_masks({"0": model[0]}, "masked", "a method")
    mask_of(model[0]).mask[:6] = False
    with torch.no_grad():
        model[0].parametrizations.weight.original.fill_(1)
    assert not note_of_lost_zeros(zeros, model)
    assert not unmasked_zeros(model)["0"].any()


def test_explain_raises_for_a_parametrization_that_cannot_be_saved():
    recipe = parse(RECIPE.replace("METHOD", "test_own_method:OwnParametrization"), "recipe.yaml")
    with pytest.raises(InputError, match=r"Halved, which tersor cannot save.*insert_masks"):
        list(explain(recipe, progress=NullProgress()))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (WithoutContext(), "test_own_method:WithoutContext': attach must take .model, context.* too many positional"),
        (ReturnsNothing(), "test_own_method:ReturnsNothing': attach must .* return an Attachment; .* of type NoneType"),
        (
            PlainFunction(),
            "PlainFunction': one of the terms is of type builtin_function_or_method. Write a class",
        ),
    ],
)
def test_an_attach_method_with_a_wrong_signature_raises_one_error(method, message):
    with pytest.raises(InputError, match=message):
        chain([method], network(), AttachContext())
