"""The Python functions with one network of each task."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import SIDE, batches, network

import tersor
from tersor import tasks
from tersor.core.errors import InputError


@pytest.mark.parametrize(
    "name",
    [
        "detection",
        *[
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("segmentation", "multilabel", "regression", "distance")
        ],
    ],
)
def test_quantize_export_and_compare_use_the_metric_of_the_task(name, tmp_path):
    model, loader = network(name), batches(name)
    images = loader[0] if isinstance(loader[0], torch.Tensor) else loader[0][0]
    quantized = tersor.quantize(model, loader, task=name)
    path = tersor.export(quantized, images, tmp_path / "model.onnx")
    found = tersor.compare(model, path, loader, seconds=0.01, task=name)
    metric = tasks.build(name).metric
    assert "accuracy" not in found["artifact"]
    assert set(found["artifact"]) == {
        *(metric, "agreement", "bytes", "compressed_bytes", "latency_ms", "difference", "difference_error", "speedup")
    }
    assert found["artifact"]["difference_error"] is None
    assert found["original"]["agreement"] == 100
    assert 50 < found["artifact"]["agreement"] <= 100
    assert found["artifact"][metric] is not None


@pytest.mark.parametrize("name", ["segmentation", "distance"])
def test_prune_works_without_a_task(name):
    model, loader = network(name), batches(name)
    pruned = tersor.prune(model, loader, keep_macs=0.7)
    assert sum(each.numel() for each in pruned.parameters()) < sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("name", ["regression", "detection", "embedding", "distance"])
def test_distill_brings_a_student_closer_to_the_outputs_of_its_teacher(name):
    teacher, loader = network(name), batches(name)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    images = loader[0] if isinstance(loader[0], torch.Tensor) else loader[0][0]
    distance = tasks.build("distance")
    before = float(distance.loss(student(images), teacher(images)).detach())
    unlabelled = [batch if isinstance(batch, torch.Tensor) else batch[0] for batch in loader]
    tersor.distill(student, teacher, unlabelled, epochs=20, label_weight=0, task=name, learning_rate=0.05)
    assert float(distance.loss(student(images), teacher(images)).detach()) < 0.7 * before


def test_a_network_of_an_unknown_task_is_compressed_without_labels(tmp_path):
    original, images = network("distance"), batches("distance")
    pruned = tersor.prune(original, images, keep_macs=0.7)
    before = float(tasks.build("distance").loss(pruned(images[0]), original(images[0])).detach())
    tersor.distill(pruned, original, images, epochs=20, label_weight=0)
    path = tersor.export(tersor.quantize(pruned, images), images[0], tmp_path / "model.onnx")
    found = tersor.compare(original, path, images, seconds=0.01)
    assert found["original"]["relative error"] == 0
    assert 0 < found["artifact"]["relative error"] < 80 * before**0.5  # of 100, without distillation


@pytest.mark.parametrize(("given", "rate"), [({}, 0.0005), ({"learning_rate": 0.002}, 0.002)])
def test_the_first_step_of_adamw_moves_weights_by_the_learning_rate(given, rate):
    student, loader = network("segmentation"), batches("segmentation", 8)
    before = copy.deepcopy(student)
    tersor.distill(student, copy.deepcopy(student), loader, optimizer="adamw", task="segmentation", **given)
    moved = [(a - b).detach().abs().max() for a, b in zip(student.parameters(), before.parameters(), strict=True)]
    assert float(torch.stack(moved).max()) == pytest.approx(rate, rel=0.05)


def wrong_loss(outputs, targets):
    return outputs.no_such_method() + targets


def test_an_error_in_a_users_loss_is_reported_with_its_line():
    line = wrong_loss.__code__.co_firstlineno + 1
    words = f"the loss wrong_loss failed in {__file__}, line {line} .*: AttributeError: 'Tensor' object has no"
    with pytest.raises(InputError, match=words):
        tersor.distill(network("regression"), network("regression"), batches("regression"), loss=wrong_loss)


def test_an_error_in_a_users_metric_is_reported_with_its_line(tmp_path):
    model, loader = network("regression"), batches("regression")
    path = tersor.export(model, loader[0][0], tmp_path / "model.onnx")
    with pytest.raises(InputError, match=rf"the metric wrong_metric failed in {__file__}, line .*: KeyError: 'scores'"):
        tersor.compare(path, path, loader, seconds=0.01, metric=wrong_metric)


def wrong_metric(outputs, targets):
    return {"values": outputs - targets}["scores"]


def test_distill_accepts_a_loss_and_any_targets():
    student, teacher, seen = network("regression"), network("regression"), []

    def largest(outputs, targets):
        seen.append(targets.shape)
        return (outputs - targets).abs().amax(1).mean()

    tersor.distill(student, teacher, batches("regression"), loss=largest)
    assert seen == [(8, 2), (8, 2)]
    with pytest.raises(InputError, match=r"the loss returned shape \(8, 2\)"):
        tersor.distill(student, teacher, batches("regression"), loss=lambda outputs, targets: outputs - targets)
    with pytest.raises(InputError, match="no targets"):
        tersor.distill(student, teacher, [torch.randn(8, 3, SIDE, SIDE)], loss=largest)


def test_compare_accepts_a_metric(tmp_path):
    model, loader = network("regression"), batches("regression")
    path = tersor.export(model, loader[0][0], tmp_path / "model.onnx")

    def error(outputs, targets):
        return (outputs - targets).abs().mean()

    found = tersor.compare(model, path, loader, seconds=0.01, task="regression", metric=error)
    named = tersor.compare(model, path, loader, seconds=0.01, task="regression")
    assert found["artifact"]["error"] == pytest.approx(named["artifact"]["mean absolute error"], rel=1e-4)
    assert tersor.compare(model, path, [loader[0][0]], seconds=0.01, metric=error)["artifact"]["error"] is None


def test_a_task_that_does_not_match_the_network_raises_before_anything_runs():
    with pytest.raises(InputError, match=r"a segmentation network returns logits .* not a tensor of shape \(2, 2\)"):
        tersor.distill(network("regression"), network("regression"), batches("regression"), task="segmentation")
    with pytest.raises(InputError, match="two outputs cannot be compared"):
        tersor.distill(network("segmentation"), network("distance"), batches("distance"), label_weight=0)
    with pytest.raises(InputError, match=r"loss is of type str\. Pass a function"):
        tersor.prune(network("regression"), batches("regression"), loss="mse")
