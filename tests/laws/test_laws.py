"""What every file in `methods/` promises. No method is named here: the folder is the list.

A method that cannot keep a law says so in its class: `exempt = {law: reason}`, where a law is called as its test.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest
import subjects
import torch
from subjects import STEPS, experiment_of, made, recipe
from torch import nn
from torch.nn.utils import parametrize

from tersor import methods as registry
from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.data import load
from tersor.deploy.onnx import export
from tersor.evaluation.latency import predictions
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
    """A recipe names the network: `subjects:Subject`."""
    monkeypatch.syspath_prepend(str(FOLDER))


def kept(name, law):
    reason = subjects.exempt(name, law)
    if reason is not None:
        pytest.skip(f"{name} says that it cannot: {reason}")


def attached(method, steps=STEPS, learned=None):
    """The method on the network, which has learned something where `learned` is given, as its teacher then has."""
    experiment = experiment_of(recipe(method))
    for network in (experiment.model, experiment.teacher) if learned else ():
        network.load_state_dict(learned)
    experiment.teacher.eval()
    found = stages.attach(experiment, experiment.recipe.stages[0], experiment.model, NullProgress())
    return experiment, found


def trained(method, learned=None, **training):
    """What a short training with the method ends in."""
    experiment, found = attached(method, learned=learned)
    found.begin()
    stage = recipe(method, **training).stages[0]
    fit(found, experiment.training_batches(stage), stage, steps=STEPS, teacher=experiment.teacher, seed=3)
    found.finish()
    return experiment, found.model.eval()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def quantized(model):
    """Layers whose weight is on a grid, and how many edges are."""
    layers = weighted_layers(model)
    on_grids = {
        name for name in layers if any(isinstance(each, FakeQuantize) for each in parametrizations_of(layers[name]))
    }
    edges = [name for name, each in model.named_modules() if isinstance(each, FakeQuantize) and "quantizers" in name]
    return on_grids, len(edges)


def masks_of(model):
    """Of each layer that has one."""
    masks = {name: weight_mask(layer) for name, layer in weighted_layers(model).items()}
    return {name: mask.mask for name, mask in masks.items() if mask is not None}


def sparsity(model, names):
    """Fraction that is masked of these layers together: a threshold may be one for all of them."""
    masks = masks_of(model)
    return 1 - sum(int(masks[name].sum()) for name in names) / max(1, sum(masks[name].numel() for name in names))


@torch.no_grad()
def check_what_is_shown(model):
    """Masks are zeros and grids have no more levels than bits, whatever methods were laid one over the other."""
    levels = {}
    edges = [each for name, each in model.named_modules() if isinstance(each, FakeQuantize) and "quantizers" in name]
    hooks = [
        each.register_forward_hook(lambda module, _inputs, given: levels.update({module: len(given.unique())}))
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
def test_a_method_says_only_of_laws_that_there_are_that_it_cannot_keep_them(name):
    cls = registry.get(name)
    exempt = getattr(cls, "exempt", {})
    assert set(exempt) <= set(LAWS)
    assert all(reason for reason in exempt.values())
    assert cls.example, "an example that differs from the defaults"
    assert ("off" in exempt) != hasattr(cls, "off")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_defaults(name, kind):
    """It is built with its defaults, cannot be changed, and comes back from a recipe's text as it was."""
    kept(name, "defaults")
    method = made(name, kind)
    assert parse(write(recipe(method)), "again").stages[0].methods == (method,)
    with pytest.raises(AttributeError):
        method.steps = 3
    assert registry.name_of(method) == name


@pytest.mark.parametrize("name", NAMES)
def test_off(name):
    """Strength zero changes nothing, bit for bit."""
    kept(name, "off")
    _, plain = trained(made(name, "off"))
    experiment = experiment_of(recipe())
    found = chain([], experiment.model, AttachContext())
    stage = experiment.recipe.stages[0]
    fit(found, experiment.training_batches(stage), stage, steps=STEPS, teacher=experiment.teacher, seed=3)
    assert same(plain.state_dict(), found.model.state_dict())
    images = subjects.images(50)
    assert torch.equal(plain(images), found.model.eval()(images))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters(name, kind):
    """Attaching keeps every Parameter object, and draws no number."""
    kept(name, "parameters")
    method = made(name, kind)
    experiment = experiment_of(recipe(method))
    before = {id(parameter) for parameter in experiment.model.parameters()}
    data = experiment.batches(experiment.data.train, 64)
    random_state = torch.get_rng_state()
    found = method.attach(experiment.model, AttachContext(data=data, teacher=experiment.teacher, steps=STEPS))
    assert {id(parameter) for parameter in found.model.parameters()} >= before
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_laid_is_laid_again_from_plain_values(name):
    kept(name, "resume")
    _, model = trained(made(name, "example"))
    told = json.loads(json.dumps(structure(model)))
    again = rebuild(subjects.Subject(), told)
    again.load_state_dict(model.state_dict())
    images = subjects.images(50)
    assert torch.equal(again.eval()(images), model(images))


def hooks_on(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_strip(name, kind):
    """A plain copy answers as the model does, which still works; no hook is left behind."""
    kept(name, "strip")
    method = made(name, kind)
    if hasattr(method, "iterations"):  # how long rounding is learned changes nothing here
        method = dataclasses.replace(method, iterations=2)
    experiment, found = attached(method)
    found.begin()
    objective = Objective(
        found.model, found.terms, experiment.teacher, layers=found.layers, label_weight=found.label_weight
    ).train()
    optimizer = torch.optim.SGD([each for each in objective.parameters() if each.requires_grad], lr=0.01)
    handle = found.bind(optimizer)
    batch = next(iter(experiment.training_batches(experiment.recipe.stages[0])))
    torch.stack([*objective(batch).values()]).sum().backward()
    optimizer.step()
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    found.finish()
    assert not hooks_on(found.model)
    assert not hooks_on(experiment.teacher)
    found.model.eval()
    images = subjects.images(50)
    expected = found.model(images)
    plain = strip(found.model)
    assert torch.allclose(plain(images), expected, atol=1e-6)
    assert torch.equal(found.model(images), expected)
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_seed(name, optimizer):
    """The same seed gives the same bits, under either optimizer and with accumulated gradients."""
    kept(name, "seed")
    options = {"optimizer": {"name": optimizer, "learning_rate": 0.01}, "accumulate": 2}
    (_, first), (_, second) = (trained(made(name, "example"), **options) for _ in range(2))
    assert same(first.state_dict(), second.state_dict())
    check_what_is_shown(first)


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_does_no_harm(name):
    kept(name, "seed")
    experiment, found = attached(made(name, "example"))
    found.begin()
    optimizer = torch.optim.SGD(found.model.parameters(), lr=0.01)
    handle = found.bind(optimizer)
    found.model.train()
    for step, batch in zip(range(STEPS), experiment.training_batches(experiment.recipe.stages[0]), strict=False):
        found.model(batch.images).square().mean().backward()
        if step != 2:  # as a loss scaler does where a gradient is not finite
            optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    found.finish()
    check_what_is_shown(found.model)
    complete = trained(made(name, "example"))[1]
    names = masks_of(complete)
    assert masks_of(found.model).keys() == names.keys()
    assert sparsity(found.model, names) == sparsity(complete, names)


def chained(first, second):
    """What both in one stage end in, for every order that is legal."""
    ends, refusals = [], []
    for pair in ((first, second), (second, first)):
        try:
            methods = [made(name, "example") for name in pair]
            experiment = experiment_of(recipe(*methods))
        except InputError as refusal:
            refusals.append(str(refusal))
            continue
        found = stages.attach(experiment, experiment.recipe.stages[0], experiment.model, NullProgress())
        found.begin()
        stage = experiment.recipe.stages[0]
        fit(found, experiment.training_batches(stage), stage, steps=STEPS, teacher=experiment.teacher, seed=3)
        found.finish()
        ends.append(found.model.eval())
    return ends, refusals


PAIRS = sorted(itertools.combinations(NAMES, 2))
CHOSEN = random.Random(len(PAIRS)).sample(PAIRS, min(SAMPLED, len(PAIRS)))  # others with every method that comes


@pytest.mark.parametrize(
    ("first", "second"),
    [pytest.param(*pair, marks=() if pair in CHOSEN else pytest.mark.slow) for pair in PAIRS],
)
def test_chained(first, second):
    """With any other method: masks are exact, grids have their levels, answers are finite."""
    kept(first, "chained")
    kept(second, "chained")
    alone = [trained(made(name, "example"))[1] for name in (first, second)]
    ends, refusals = chained(first, second)
    if not ends:  # only two that lay grids, or two that lay masks, may exclude each other
        assert all(quantized(each)[0] for each in alone) or all(masks_of(each) for each in alone), refusals
    for model in ends:
        check_what_is_shown(model)
        assert torch.isfinite(model(subjects.images(50))).all()
        for each in alone:  # what it does alone, it does beside the other
            layers, edges = quantized(each)
            assert layers <= quantized(model)[0]
            assert edges <= quantized(model)[1]
            names = masks_of(each)
            assert sparsity(model, names) == pytest.approx(sparsity(each, names), abs=0.005)


@pytest.fixture(scope="module")
def learned():
    """A network that tells digits apart."""
    experiment = experiment_of(recipe())
    found = chain([], experiment.model, AttachContext())
    stage = recipe(optimizer={"learning_rate": 0.1}, batch_size=32).stages[0]
    batches = experiment.batches(load(name="digits").train, 32, shuffle=True)
    fit(found, batches, stage, steps=120, seed=3)
    return found.model.state_dict()


@pytest.fixture(scope="module")
def exported():
    """Structure of a network that was exported -> the method that left it."""
    return {}


@pytest.mark.parametrize("name", NAMES)
def test_export(name, tmp_path, learned, exported):
    """The ONNX file gives 99 % of torch's predictions.

    Methods that leave the same structure are exported by the same code: the first of them is. Of a network without
    grids the file is the plain copy's, and `test_strip` compares that.
    """
    kept(name, "export")
    # six large steps, or steps in bfloat16, leave another network on every kind of processor, on some a single answer
    gently = {"optimizer": {"learning_rate": 0.005}, "precision": "float32"}
    experiment, model = trained(made(name, "example"), learned, **gently)
    left = json.dumps(structure(model))
    if left in exported:
        pytest.skip(f"{exported[left]} leaves the same structure, and was exported")
    exported[left] = name
    with torch.no_grad():  # BatchNorm's statistics are those of the network before six steps have cut it
        for batch in experiment.batches(load(name="digits").train, 32, shuffle=True):
            model.train()(batch.images)
    model.eval()
    images = subjects.images()
    path = export(model, images, tmp_path / "model.onnx")
    answers = torch.from_numpy(predictions(open_session(path, "onnxruntime"), [images.numpy()]))
    with torch.no_grad():
        expected = model(images).argmax(1)
    assert (answers == expected).float().mean() >= 0.99
    assert len(expected.unique()) >= 5, "a network that gives one answer agrees with anything"


@pytest.mark.parametrize("name", NAMES)
def test_paper(name):
    """The file names its paper and year, gives shapes, and says what the paper or the authors' code has otherwise."""
    kept(name, "paper")
    text = sys.modules[registry.get(name).__module__].__doc__
    assert re.search(r"(ICLR|ICML|CVPR|ICCV|ECCV|NeurIPS|AAAI|arXiv)[ ,]", text)
    assert re.search(r"\b(19|20)\d\d\b", text)
    assert re.search(r"\((N|C_out|C), ", text)
    assert re.search(r"([Tt]he papers? |[Aa]uthors' code|DepGraph's code|Zhu and Gupta let)", text)


def test_the_laws_of_exemptions_are_the_tests_here():
    files = [FOLDER / "test_laws.py", FOLDER / "test_laws_in_processes.py"]
    here = {name for file in files for name in re.findall(r"^def test_(\w+)", file.read_text(), re.MULTILINE)}
    assert set(LAWS) <= here


def test_a_law_can_be_broken():
    """What the laws look at is there to be seen: a weight off its grid, a zero that moved."""
    layer = nn.Sequential(nn.Conv2d(1, 1, 3))
    parametrize.register_parametrization(layer[0], "weight", _Wrong())
    with pytest.raises(AssertionError):
        check_what_is_shown(layer)


class _Wrong(FakeQuantize):
    def __init__(self):
        super().__init__(Grid.signed(2))

    def forward(self, values):
        return values
