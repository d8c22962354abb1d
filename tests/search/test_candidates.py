"""Candidates and their recipes, the search space, the `wide_plain` networks, and the cache of latencies."""

import importlib
import math

import numpy as np
import onnx
import pytest
import torch

from tersor import models, recipe
from tersor.evaluation.timings import Ratio
from tersor.models.wide_plain import WIDE_PLAIN
from tersor.recipe import DataSource, Network, Recipe, Stage
from tersor.search import candidate_latency
from tersor.search.candidate import BITS, Candidate
from tersor.search.candidate_latency import Latency, Measurement, structure_hash
from tersor.search.space import Space, candidate_of, family
from tersor.search.training_stage import as_made
from tersor.training.options import LearningRateSchedule

CANDIDATES = [
    Candidate(branches=branches, keep_macs=keep, bits=bits)
    for branches in (0, 3)
    for keep in (1.0, 0.5)
    for bits in BITS
] + [Candidate("resnet20"), Candidate("timm:resnet18", pixels=24)]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.name)
def test_the_recipe_of_a_candidate_is_valid(candidate):
    whole = Recipe(
        model=Network(name="resnet56"), teacher="original", data=DataSource(name="digits"), stages=candidate.stages(())
    )
    assert recipe.parse(recipe.write(whole), "again") == whole


def test_names_of_different_candidates_differ():
    names = [candidate.name for candidate in [*CANDIDATES, Candidate("timm_resnet18", pixels=24)]]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)


def test_the_first_candidates_cover_depth_width_both_and_students_without_repetition():
    space = Space(9, prunable=True, students=["a", "b"], bits=("8", "mixed", "4"), pixels=(24,))
    first = space.first()
    assert len(set(first)) == len(first)
    assert {each.network for each in first} == {"original", "a", "b"}
    assert any(each.branches and each.keep_macs < 1 for each in first)
    assert {each.bits for each in first} == set(BITS)
    assert {each.pixels for each in first} == {None, 24}
    assert not first[0].inherits or not first[1].inherits, "students come early"


def test_a_network_that_cannot_be_pruned_leaves_only_students():
    space = Space(0, prunable=False, students=["a"])
    assert [each.network for each in space.first()] == ["a"]
    assert not space.samples


def test_sampled_parameters_are_converted_to_a_candidate():
    parameters = {"branches": 2, "keep_macs": 0.35000000000000003, "bits": "4"}
    assert candidate_of(parameters) == Candidate(branches=2, keep_macs=0.35, bits="4")


@pytest.mark.parametrize(("pixels", "stem"), [(32, "wide_plain_"), (224, "wide_plain_large_")])
def test_the_family_matches_the_size_of_the_images(pixels, stem):
    names = family(pixels)
    assert set(names) <= set(WIDE_PLAIN)
    assert all(name.startswith(stem) for name in names)
    assert not family(4)


@pytest.mark.parametrize(("name", "pixels"), [("wide_plain_8", 8), ("wide_plain_8", 33), ("wide_plain_large_8", 32)])
def test_networks_of_the_family_run_on_small_and_odd_image_sizes(name, pixels):
    network = models.build(name, 7).eval()
    assert network(torch.rand(2, 3, pixels, pixels)).shape == (2, 7)
    wide = [module.out_channels for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(width % 8 == 0 for width in wide)


def file_of(path, channels, value):
    weight = onnx.numpy_helper.from_array(np.full((channels, 3, 1, 1), value, np.float32), "weight")
    node = onnx.helper.make_node("Conv", ["images", "weight"], ["logits"])
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", channels, 8, 8])
    graph = onnx.helper.make_graph([node], "g", [images], [logits], [weight])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnx.save(model, path)
    return path


def test_the_structure_hash_depends_on_shapes_and_not_on_values(tmp_path):
    first, same = file_of(tmp_path / "a.onnx", 8, 1.0), file_of(tmp_path / "b.onnx", 8, 2.0)
    assert structure_hash(first) == structure_hash(same)
    assert structure_hash(first) != structure_hash(file_of(tmp_path / "c.onnx", 16, 1.0))


def test_the_structure_hash_does_not_depend_on_shared_constants(tmp_path):
    """Two equal constants become one tensor of the file, so that names and tensors differ."""

    def scaled(name, constants, operator="Mul"):
        make = onnx.helper.make_node
        nodes = [make("Mul", ["x", constants[0]], ["h"]), make(operator, ["h", constants[-1]], ["y"])]
        ends = [onnx.helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, [1, 4]) for each in ("x", "y")]
        kept = [onnx.numpy_helper.from_array(np.full(4, 2.0, np.float32), each) for each in constants]
        graph = onnx.helper.make_graph(nodes, "scaled", ends[:1], ends[1:], kept)
        onnx.save(onnx.helper.make_model(graph), tmp_path / name)
        return structure_hash(tmp_path / name)

    assert scaled("two.onnx", ["a", "b"]) == scaled("one.onnx", ["shared"])
    assert scaled("two.onnx", ["a", "b"]) != scaled("sum.onnx", ["a", "b"], "Add")


def test_latency_is_relative_to_the_reference_and_measured_once_per_structure(tmp_path, monkeypatch):
    module = importlib.import_module(candidate_latency.__name__)
    measured = []

    class FakeTimings:
        def __init__(self, openers):
            measured.append(sorted(openers))

        def spread(self, name, size):
            return type("Spread", (), {"median": {"original": 4.0, "int8": 2.0}[name] * size})

        def ratio(self, name, against, size):
            if name == "int8":
                assert against == "original"
                return Ratio(0.5, 0.45, 0.55, 9, 3)
            assert (name, against) == ("file", "reference")
            return Ratio(0.25, 0.2, 0.3, 9, 3)

    monkeypatch.setattr(module, "measure_latency", lambda openers, *_, **__: FakeTimings(openers))
    image = np.zeros((1, 3, 8, 8), np.float32)
    cache = tmp_path / "latencies.json"
    measurement = Measurement(cache, "onnxruntime", image, (1, 32), seconds=2.0)
    reference = file_of(tmp_path / "original.onnx", 8, 1.0)
    baselines = measurement.baselines({"original": None, "int8": None}, "original")
    error = round(math.log(0.55 / 0.45) / 2, 4)
    assert baselines == {
        "original": Latency({1: 4.0, 32: 128.0}, {}), "int8": Latency({1: 2.0, 32: 64.0}, {1: error, 32: error})
    }  # fmt: skip
    measurement.compare_with(reference, baselines["original"].ms)
    file = file_of(tmp_path / "a.onnx", 16, 1.0)
    expected = Latency({1: 1.0, 32: 32.0}, dict.fromkeys((1, 32), round(math.log(0.3 / 0.2) / 2, 4)))
    assert measurement.latency(file) == expected
    again = Measurement(cache, "onnxruntime", image, (1, 32), seconds=2.0)
    again.compare_with(reference, baselines["original"].ms)
    assert again.latency(file_of(tmp_path / "b.onnx", 16, 5.0)) == expected
    assert again.baselines({"original": None, "int8": None}, "original") == baselines
    assert len(measured) == 2
    cache.write_text("damaged")
    assert again.baselines({"original": None, "int8": None}, "original") == baselines
    assert len(measured) == 3
    cache.write_text("damaged")
    assert again.latency(file) == expected, "the reference comes from the state of the search"


def test_a_stage_with_fewer_steps_keeps_the_fraction_of_its_warm_up():
    planned = Stage(name="train-1", steps=1000, lr_schedule=LearningRateSchedule(warmup_epochs=10))
    made = as_made(planned, 37)
    assert (made.steps, made.lr_schedule.warmup_epochs) == (37, 0.37)
    assert as_made(planned.model_copy(update={"lr_schedule": LearningRateSchedule()}), 5).lr_schedule.warmup_epochs == 0
