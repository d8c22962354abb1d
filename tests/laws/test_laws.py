"""Laws for every method in `methods/`. The folder is the list of methods.

A method that cannot pass a law says so in its class: `exempt = {law: reason}`; a law has the name of its test.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest
import subjects
import torch
from subjects import STEPS, build_method, experiment_of, recipe
from torch import nn
from torch.nn.utils import parametrize

from tersor import methods as registry
from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.data import load
from tersor.deploy.onnx import export
from tersor.evaluation.scoring import file_predictions
from tersor.evaluation.session import open_session
from tersor.graph.layer_selection import weighted_layers
from tersor.graph.parametrization import parametrizations_of, strip
from tersor.pipeline import stages
from tersor.pruning.mask import weight_mask
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.recipe import parse, write
from tersor.training.context import AttachContext
from tersor.training.loop import fit
from tersor.training.method import chain
from tersor.training.objective import Objective

NAMES = registry.names()
KINDS = ("defaults", "example")
LAWS = ("defaults", "off", "parameters", "resume", "strip", "seed", "chained", "export", "processes", "paper")
SAMPLED = 6
FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def network_by_name(monkeypatch):
    """Make `subjects:Subject` importable for recipes."""
    monkeypatch.syspath_prepend(str(FOLDER))


def skip_if_exempt(name, law):
    reason = subjects.exempt(name, law)
    if reason is not None:
        pytest.skip(f"{name} is exempt: {reason}")


def attached(method, steps=STEPS, learned=None):
    """The method attached to the network; `learned` are weights for network and teacher."""
    experiment = experiment_of(recipe(method))
    for network in (experiment.model, experiment.teacher) if learned else ():
        network.load_state_dict(learned)
    experiment.teacher.eval()
    attachment = stages.attach(experiment, experiment.recipe.stages[0], experiment.model, NullProgress())
    return experiment, attachment


def trained(method, learned=None, **training):
    """The network after a short training run with the method."""
    experiment, attachment = attached(method, learned=learned)
    attachment.begin()
    stage = recipe(method, **training).stages[0]
    fit(attachment, experiment.training_batches(stage), stage, steps=STEPS, teacher=experiment.teacher, seed=3)
    attachment.finish()
    return experiment, attachment.model.eval()


@functools.cache
def trained_example(name, optimizer="sgd"):
    """The network after a short training run with a method's example and accumulated gradients; only to be read."""
    options = {"optimizer": {"name": optimizer, "learning_rate": 0.01}, "accumulate": 2}
    return trained(build_method(name, "example"), **options)[1]


@functools.cache
def trained_without_methods():
    """The network after a short training run on the labels; only to be read."""
    experiment = experiment_of(recipe())
    attachment = chain([], experiment.model, AttachContext())
    stage = experiment.recipe.stages[0]
    fit(attachment, experiment.training_batches(stage), stage, steps=STEPS, teacher=experiment.teacher, seed=3)
    return attachment.model.eval()


def equal_states(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def quantized(model):
    """Layers with a quantized weight, and the number of quantized activations."""
    layers = weighted_layers(model)
    on_grids = {
        name for name in layers if any(isinstance(each, FakeQuantize) for each in parametrizations_of(layers[name]))
    }
    edges = [name for name, each in model.named_modules() if isinstance(each, FakeQuantize) and "quantizers" in name]
    return on_grids, len(edges)


def masks_of(model):
    """Masks by layer."""
    masks = {name: weight_mask(layer) for name, layer in weighted_layers(model).items()}
    return {name: mask.mask for name, mask in masks.items() if mask is not None}


def sparsity(model, names):
    """Masked fraction of all these layers together, since methods may use one threshold for all of them."""
    masks = masks_of(model)
    return 1 - sum(int(masks[name].sum()) for name in names) / max(1, sum(masks[name].numel() for name in names))


@torch.no_grad()
def check_effective_weights(model):
    """Masked weights are 0 and quantized values have at most 2^bits levels, for any combination of methods."""
    levels = {}
    edges = [each for name, each in model.named_modules() if isinstance(each, FakeQuantize) and "quantizers" in name]
    hooks = [
        each.register_forward_hook(lambda module, _inputs, output: levels.update({module: len(output.unique())}))
        for each in edges
    ]
    if edges:
        model.eval()(subjects.images(50))
    for hook in hooks:
        hook.remove()
    assert all(levels[edge] <= 2**edge.grid.bits for edge in edges)
    for layer in weighted_layers(model).values():
        weight, mask = layer.weight.detach(), weight_mask(layer)
        assert torch.isfinite(weight).all()
        if mask is not None:
            assert (weight[~mask.mask] == 0).all()
        for grid in (each.grid for each in parametrizations_of(layer) if isinstance(each, FakeQuantize)):
            assert all(len(channel.unique()) <= 2**grid.bits for channel in weight)


@pytest.mark.parametrize("name", NAMES)
def test_exemptions_name_existing_laws_and_give_a_reason(name):
    cls = registry.get(name)
    exempt = getattr(cls, "exempt", {})
    assert set(exempt) <= set(LAWS)
    assert all(reason for reason in exempt.values())
    assert cls.example, "an example with parameters that differ from the defaults"
    assert ("off" in exempt) != hasattr(cls, "off")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_defaults(name, kind):
    """A method can be built with its defaults, is immutable, and survives writing and parsing a recipe."""
    skip_if_exempt(name, "defaults")
    method = build_method(name, kind)
    assert parse(write(recipe(method)), "again").stages[0].methods == (method,)
    with pytest.raises(AttributeError):
        method.steps = 3
    assert registry.name_of(method) == name


@pytest.mark.parametrize("name", NAMES)
def test_off(name):
    """With strength 0 a method changes nothing, bit for bit."""
    skip_if_exempt(name, "off")
    found, plain = trained(build_method(name, "off"))[1], trained_without_methods()
    assert equal_states(found.state_dict(), plain.state_dict())
    images = subjects.images(50)
    assert torch.equal(found(images), plain(images))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters(name, kind):
    """Attaching keeps every Parameter object and does not use the global random generator."""
    skip_if_exempt(name, "parameters")
    method = build_method(name, kind)
    experiment = experiment_of(recipe(method))
    before = {id(parameter) for parameter in experiment.model.parameters()}
    data = experiment.batches(experiment.data.train, 64)
    random_state = torch.get_rng_state()
    attachment = method.attach(experiment.model, AttachContext(data=data, teacher=experiment.teacher, steps=STEPS))
    assert {id(parameter) for parameter in attachment.model.parameters()} >= before
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", NAMES)
def test_the_structure_is_rebuilt_from_plain_values(name):
    skip_if_exempt(name, "resume")
    model = trained_example(name)
    plain = json.loads(json.dumps(structure(model)))
    rebuilt = rebuild(subjects.Subject(), plain)
    rebuilt.load_state_dict(model.state_dict())
    images = subjects.images(50)
    assert torch.equal(rebuilt.eval()(images), model(images))


def hooks_on(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_strip(name, kind):
    """A stripped copy has the outputs of the model, which is unchanged; no hook remains."""
    skip_if_exempt(name, "strip")
    method = build_method(name, kind)
    if hasattr(method, "iterations"):  # the length of the reconstruction does not matter here
        method = dataclasses.replace(method, iterations=2)
    experiment, attachment = attached(method)
    attachment.begin()
    options = {"layers": attachment.layers, "label_weight": attachment.label_weight}
    objective = Objective(attachment.model, attachment.terms, experiment.teacher, **options).train()
    optimizer = torch.optim.SGD([each for each in objective.parameters() if each.requires_grad], lr=0.01)
    handle = attachment.bind(optimizer)
    batch = next(iter(experiment.training_batches(experiment.recipe.stages[0])))
    torch.stack([*objective(batch).values()]).sum().backward()
    optimizer.step()
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    attachment.finish()
    assert not hooks_on(attachment.model)
    assert not hooks_on(experiment.teacher)
    attachment.model.eval()
    images = subjects.images(50)
    expected = attachment.model(images)
    plain = strip(attachment.model)
    assert torch.allclose(plain(images), expected, atol=1e-6)
    assert torch.equal(attachment.model(images), expected)
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_seed(name, optimizer):
    """The same seed gives the same bits, with both optimizers and with accumulated gradients."""
    skip_if_exempt(name, "seed")
    first, second = trained_example(name, optimizer), trained_example.__wrapped__(name, optimizer)
    assert equal_states(first.state_dict(), second.state_dict())
    check_effective_weights(first)


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_optimizer_step_keeps_masks_and_levels(name):
    skip_if_exempt(name, "seed")
    experiment, attachment = attached(build_method(name, "example"))
    attachment.begin()
    optimizer = torch.optim.SGD(attachment.model.parameters(), lr=0.01)
    handle = attachment.bind(optimizer)
    attachment.model.train()
    for step, batch in zip(range(STEPS), experiment.training_batches(experiment.recipe.stages[0]), strict=False):
        attachment.model(batch.images).square().mean().backward()
        if step != 2:  # as a loss scaler skips steps with infinite gradients
            optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    attachment.finish()
    check_effective_weights(attachment.model)
    complete = trained_example(name)
    names = masks_of(complete)
    assert masks_of(attachment.model).keys() == names.keys()
    assert sparsity(attachment.model, names) == sparsity(complete, names)


def chained(first, second):
    """The networks after a stage with both methods, for every allowed order, and the errors for other orders."""
    ends, refusals = [], []
    for pair in ((first, second), (second, first)):
        try:
            methods = [build_method(name, "example") for name in pair]
            experiment = experiment_of(recipe(*methods))
        except InputError as refusal:
            refusals.append(str(refusal))
            continue
        attachment = stages.attach(experiment, experiment.recipe.stages[0], experiment.model, NullProgress())
        attachment.begin()
        stage = experiment.recipe.stages[0]
        fit(attachment, experiment.training_batches(stage), stage, steps=STEPS, teacher=experiment.teacher, seed=3)
        attachment.finish()
        ends.append(attachment.model.eval())
    return ends, refusals


PAIRS = sorted(itertools.combinations(NAMES, 2))
CHOSEN = random.Random(len(PAIRS)).sample(PAIRS, min(SAMPLED, len(PAIRS)))  # the sample changes with every new method


@pytest.mark.parametrize(
    ("first", "second"),
    [pytest.param(*pair, marks=() if pair in CHOSEN else pytest.mark.slow) for pair in PAIRS],
)
def test_chained(first, second):
    """With any other method, masks are exact, quantized values have their levels, and outputs are finite."""
    skip_if_exempt(first, "chained")
    skip_if_exempt(second, "chained")
    alone = [trained_example(name) for name in (first, second)]
    ends, refusals = chained(first, second)
    if not ends:  # only two quantizing or two masking methods may exclude each other
        assert all(quantized(each)[0] for each in alone) or all(masks_of(each) for each in alone), refusals
    for model in ends:
        check_effective_weights(model)
        assert torch.isfinite(model(subjects.images(50))).all()
        for each in alone:  # the same layers, edges and sparsity as alone
            layers, edges = quantized(each)
            assert layers <= quantized(model)[0]
            assert edges <= quantized(model)[1]
            names = masks_of(each)
            assert sparsity(model, names) == pytest.approx(sparsity(each, names), abs=0.005)


@pytest.fixture(scope="module")
def learned():
    """Weights of a network trained on digits."""
    experiment = experiment_of(recipe())
    attachment = chain([], experiment.model, AttachContext())
    stage = recipe(optimizer={"learning_rate": 0.1}, batch_size=32).stages[0]
    batches = experiment.batches(load(name="digits").train, 32, shuffle=True)
    fit(attachment, batches, stage, steps=120, seed=3)
    return attachment.model.state_dict()


@pytest.fixture(scope="module")
def exported():
    """Structure of an exported network -> its method."""
    return {}


@pytest.mark.parametrize("name", NAMES)
def test_export(name, tmp_path, learned, exported):
    """The ONNX file has at least 99 % of torch's predictions.

    Methods with the same resulting structure use the same export code, so only the first of them is exported. Without
    quantizers the file is that of the stripped copy, which `test_strip` checks.
    """
    skip_if_exempt(name, "export")
    # large or bfloat16 steps differ between processors, and on some the network predicts a single class
    gently = {"optimizer": {"learning_rate": 0.005}, "precision": "float32"}
    experiment, model = trained(build_method(name, "example"), learned, **gently)
    plain = json.dumps(structure(model))
    if plain in exported:
        pytest.skip(f"{exported[plain]} has the same structure and was exported")
    exported[plain] = name
    with torch.no_grad():  # BatchNorm statistics are from before the six steps
        for batch in experiment.batches(load(name="digits").train, 32, shuffle=True):
            model.train()(batch.images)
    model.eval()
    images = subjects.images()
    path = export(model, images, tmp_path / "model.onnx")
    classes = file_predictions(open_session(path, "onnxruntime"), [images.numpy()])
    with torch.no_grad():
        expected = model(images).argmax(1)
    assert (classes == expected).float().mean() >= 0.99
    assert len(expected.unique()) >= 5, "a network that predicts one class would always agree"


@pytest.mark.parametrize("name", NAMES)
def test_paper(name):
    """The file names its paper and year, gives shapes, and says where the paper or the authors' code differs."""
    skip_if_exempt(name, "paper")
    text = sys.modules[registry.get(name).__module__].__doc__
    assert re.search(r"(ICLR|ICML|CVPR|ICCV|ECCV|NeurIPS|AAAI|arXiv)[ ,]", text)
    assert re.search(r"\b(19|20)\d\d\b", text)
    assert re.search(r"\((N|C_out|C), ", text)
    assert re.search(r"([Tt]he papers? |[Aa]uthors' code|DepGraph's code|Zhu and Gupta's method)", text)


def test_every_law_is_a_test():
    files = [FOLDER / "test_laws.py", FOLDER / "test_laws_in_processes.py"]
    here = {name for file in files for name in re.findall(r"^def test_(\w+)", file.read_text(), re.MULTILINE)}
    assert set(LAWS) <= here


def test_a_law_can_be_broken():
    """The check fails for a quantized weight with too many levels."""
    layer = nn.Sequential(nn.Conv2d(1, 1, 3))
    parametrize.register_parametrization(layer[0], "weight", _Wrong())
    with pytest.raises(AssertionError):
        check_effective_weights(layer)


class _Wrong(FakeQuantize):
    def __init__(self):
        super().__init__(Grid.signed(2))

    def forward(self, values):
        return values
