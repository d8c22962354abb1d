"""The Python functions do not change their arguments."""

import copy
import json
import re
import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tersor
from onnx_files import scaling_file
from tersor import api
from tersor.core.errors import CompressionWarning, InputError
from tersor.evaluation.costs import costs
from tersor.evaluation.latency import BATCH_SIZES
from tersor.evaluation.timings import Timings
from tersor.models import build
from tersor.pipeline import file_comparison
from toy_networks import resnet8

IMAGES = torch.rand(16, 3, 16, 16)
LABELS = torch.arange(16) % 10


class Answers(torch.nn.Module):
    """A network that returns two tensors, either of which could be the logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        logits = self.network(images)
        return logits, 2 * logits


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet8()


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(IMAGES, torch.randint(10, (16,))), 8)


def test_prune_returns_a_smaller_network_and_does_not_change_the_original(model):
    before = copy.deepcopy(model.state_dict())
    pruned = tersor.prune(model, IMAGES, keep_macs=0.5)
    assert costs(pruned, IMAGES[:1]).macs <= 0.5 * costs(model, IMAGES[:1]).macs
    assert pruned(IMAGES).shape == (16, 10)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_prune_warns_about_uncounted_operators(model):
    class Spectrum(nn.Module):
        def forward(self, images):
            return images + torch.fft.fft2(images).real

    with pytest.warns(CompressionWarning, match=r"do not include these uncounted operators: aten\._fft_c2c in 0"):
        tersor.prune(nn.Sequential(Spectrum(), model).eval(), IMAGES)


def test_prune_can_use_labels_and_latency(model, loader, monkeypatch):
    pruned = tersor.prune(model, loader, importance="taylor")
    assert costs(pruned, IMAGES[:1]).macs <= 0.5 * costs(model, IMAGES[:1]).macs
    widths = {name: layer.out_channels for name, layer in model.named_modules() if isinstance(layer, torch.nn.Conv2d)}
    pruned = tersor.prune(model, IMAGES, importance="obs", scope="global")
    assert len({pruned.get_submodule(name).out_channels / width for name, width in widths.items()}) > 2
    layers = {name for name, _ in tersor.prune(model, IMAGES, branches=2).named_modules()}
    assert sum(name not in layers for name in widths) == 2 * 2, "of two blocks both convolutions"
    with pytest.raises(InputError, match="no labels"):
        tersor.prune(model, IMAGES, importance="taylor")

    def latency_ratio(original, example, target):
        assert target.runtime == "openvino"
        return lambda network: costs(network, example).macs / costs(original, example).macs

    monkeypatch.setattr(api, "latency_ratio", latency_ratio)
    pruned = tersor.prune(model, IMAGES, keep_latency=0.7, runtime="openvino", round_to=2)
    assert 0.6 < costs(pruned, IMAGES[:1]).macs / costs(model, IMAGES[:1]).macs <= 0.7


def test_quantize_and_prune_can_exclude_layers(model):
    quantized = tersor.quantize(model, IMAGES, exclude=["conv1"])
    (left,) = tersor.integer_coverage(quantized, IMAGES).operators
    assert (left.name, left.reason) == ("conv1", "excluded")
    pruned = tersor.prune(model, IMAGES, keep_macs=0.8, exclude=["layer3.*"])
    widths = {
        name: len(each.weight) for name, each in model.named_modules() if name.startswith("layer3") and ".conv" in name
    }
    assert widths
    assert {name: len(pruned.get_submodule(name).weight) for name in widths} == widths
    with pytest.raises(InputError, match="exclude should be a list"):
        tersor.quantize(model, IMAGES, exclude="conv1")


def test_quantize_does_not_change_the_network_even_if_it_fails(model, loader):
    keys = list(model.state_dict())
    with pytest.raises(InputError, match="loader is empty"):
        tersor.quantize(model, [])
    quantized = tersor.quantize(model, loader)
    assert list(model.state_dict()) == keys
    assert list(quantized.state_dict()) != keys
    assert model.training


def test_distill_does_not_change_the_teacher(model, loader):
    teacher = copy.deepcopy(model)
    tersor.distill(model, teacher, loader)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(InputError, match="the same network"):
        tersor.distill(model, model, loader)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, loader: tersor.quantize(model, loader, bits=0), r"^bits is 0\. It must be from 2 to 8\.$"),
        (
            lambda model, loader: tersor.quantize(model, loader, runtime="tflite"),
            "onnxruntime' or 'openvino', got",
        ),
        (lambda _, loader: tersor.quantize("resnet20", loader), "is of type str"),
        (lambda model, _: tersor.quantize(model, [IMAGES[:, :1]]), r"does not run on images \(1, 16, 16\)"),
        (lambda model, _: tersor.prune(model, IMAGES * torch.nan), "hold NaN"),
        (lambda model, _: tersor.prune(model, IMAGES, keep_macs=0), "keep_macs is 0. It must be above 0 and at most 1"),
        (lambda model, loader: tersor.distill(model, build("resnet20", 7), loader), r"\(2, 10\).*\(2, 7\)"),
        (lambda model, loader: tersor.distill(model, build("resnet20", 10), loader, temperature=0), "temperature is 0"),
        (lambda model, _: tersor.prune(model, IMAGES, keep_macs=0.5, keep_latency=0.5), "one target"),
        (lambda model, _: tersor.distill(model, build("resnet20", 10), []), "loader is empty"),
        (
            lambda model, _: tersor.distill(model, build("resnet20", 10), [(IMAGES, torch.full((16,), 10))]),
            "from 0 to 9",
        ),
        (lambda model, _: tersor.distill(model, build("resnet20", 10), [(IMAGES, torch.rand(16))]), "float32"),
        (lambda model, _: tersor.distill(model, build("resnet20", 10), [(IMAGES, LABELS > 5)]), "torch.bool"),
        (lambda model, _: tersor.distill(model, build("resnet20", 10), [(IMAGES, LABELS[:3])]), r"shape \(3,\)"),
        (lambda model, _: tersor.distill(model, build("resnet20", 10), [IMAGES]), "has no labels"),
        (
            lambda model, loader: tersor.distill(Answers(model), build("resnet20", 10), loader),
            "returns a tuple of shape",
        ),
        (lambda model, loader: tersor.distill(model, None, loader), "is of type NoneType"),
        (lambda model, loader: tersor.distill(model, build("resnet20", 10), loader, optimizer="adam"), "or 'adamw'"),
        (lambda model, loader: tersor.distill(model, build("resnet20", 10), loader, epochs=1.5), "whole number"),
        (
            lambda model, loader: tersor.distill(model, build("resnet20", 10), loader, loss_weight=0, label_weight=0),
            "no loss",
        ),
        (
            lambda model, loader: tersor.distill(model, build("resnet20", 7), loader, label_weight=0),
            r"\(2, 10\).*\(2, 7\)",
        ),
        (
            lambda model, _: tersor.distill(model, build("resnet20", 10), [(IMAGES[:, :1], torch.arange(8))]),
            r"student does not run on images \(1, 16, 16\)\. It takes images \(N, 3, H, W\)",
        ),
    ],
)
def test_invalid_arguments_raise_one_error(model, loader, call, words):
    with pytest.raises(InputError, match=words) as caught:
        call(model, loader)
    assert "pydantic" not in str(caught.value)


def test_distill_accepts_labels_of_any_integer_type_and_ignores_unused_labels(model):
    teacher, students = build("resnet20", 10).eval(), [copy.deepcopy(model) for _ in range(3)]
    for student, labels in zip(students, (LABELS, LABELS.int(), LABELS.to(torch.uint8)), strict=True):
        tersor.distill(student, teacher, [(IMAGES, labels)])
        assert torch.equal(student.conv1.weight, students[0].conv1.weight)
    tersor.distill(model, teacher, [(IMAGES, LABELS - 20)], label_weight=0)


def test_a_failed_export_keeps_the_existing_file(model, tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"of before")

    def refuse(*_):
        raise InputError("not installed")

    with pytest.raises(InputError, match=r"an \.onnx file"):
        tersor.export(model, IMAGES, tmp_path / "model.xml")
    with pytest.raises(InputError, match=r"\(N, C, H, W\)"):
        tersor.export(model, IMAGES[0], tmp_path / "model.onnx")
    monkeypatch.setattr(api, "open_session", refuse)
    with pytest.raises(InputError, match="not installed"):
        tersor.export(model, IMAGES, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"of before"


def test_export_warns_if_the_network_was_quantized_for_another_runtime(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).eval()
    quantized = copy.deepcopy(tersor.quantize(network, IMAGES, runtime="openvino"))
    with (
        pytest.warns(CompressionWarning, match="for openvino and is exported for onnxruntime"),
        pytest.raises(InputError),
    ):
        tersor.export(quantized, IMAGES[0], tmp_path / "model.onnx")  # raises before the slow part


def one_millisecond(openers, images, *, seconds):
    assert [len(image) for image in images.values()] == [1, 1]
    groups = {name: {size: [[1.0], [1.0]] for size in BATCH_SIZES} for name in openers}
    return Timings(groups, dict.fromkeys(BATCH_SIZES, "time"))


def test_compare_reports_the_percentage_of_equal_predictions(tmp_path, monkeypatch):
    monkeypatch.setattr(file_comparison, "measure_latency", one_millisecond)
    torch.manual_seed(0)
    images = torch.randn(40, 3, 8, 8)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval() for _ in range(2)]
    path = tersor.export(networks[1], images, tmp_path / "other.onnx")
    with torch.no_grad():
        same = (networks[0](images).argmax(1) == networks[1](images).argmax(1)).double().mean().item()
    labels = networks[1](images).argmax(1)
    labels[:10] = (labels[:10] + 1) % 4
    batches = [(images[:25], labels[:25]), (images[:0], labels[:0]), (images[25:], labels[25:])]
    found = tersor.compare(networks[0], path, batches, seconds=0.01)
    assert 0 < same < 1
    assert found["artifact"]["agreement"] == pytest.approx(100 * same)
    assert found["original"]["agreement"] == 100
    assert found["artifact"]["accuracy"] == 75
    right = (networks[0](images).argmax(1) == labels).double().mean().item()
    assert found["original"]["accuracy"] == pytest.approx(100 * right)
    assert found["artifact"]["bytes"] == path.stat().st_size
    assert 0 < found["artifact"]["compressed_bytes"] < found["artifact"]["bytes"]
    assert {size: each["median"] for size, each in found["artifact"]["latency_ms"].items()} == dict.fromkeys(
        ("1", "32", "128"), 1.0
    )
    assert found["artifact"]["difference"] == pytest.approx(75 - 100 * right)
    with torch.no_grad():
        before, after = ((network(images).argmax(1) == labels).double() for network in networks)
    changes = torch.cat([after - before, torch.tensor([1.0, -1.0])])
    expected = 100 * changes.std(correction=0).item() / 40**0.5
    assert found["artifact"]["difference_error"] == pytest.approx(expected)
    assert {size: each["value"] for size, each in found["artifact"]["speedup"].items()} == dict.fromkeys(
        ("1", "32", "128"), 1.0
    )
    assert not {"difference", "speedup"} & set(found["original"])
    unlabelled = tersor.compare(path, path, [images], seconds=0.01)
    assert unlabelled["artifact"]["accuracy"] is None
    assert (unlabelled["artifact"]["difference"], unlabelled["artifact"]["difference_error"]) == (None, None)
    for seconds in (0, -1, float("inf"), float("nan")):
        with pytest.raises(InputError, match="Write a finite number above 0"):
            tersor.compare(path, path, [images], seconds=seconds)
    with pytest.raises(InputError, match="the artifact is of type Sequential"):
        tersor.compare(path, networks[0], [images])


def test_the_speedup_is_the_latency_of_the_original_divided_by_that_of_the_artifact(tmp_path, monkeypatch):
    def timings(openers, _example, **_options):
        ms = {"original": 3.0, "artifact": 2.0}
        groups = {name: {size: [[ms[name]], [ms[name]]] for size in BATCH_SIZES} for name in openers}
        return Timings(groups, dict.fromkeys(BATCH_SIZES, "time"))

    monkeypatch.setattr(file_comparison, "measure_latency", timings)
    file = scaling_file(tmp_path / "file.onnx", 2.0)
    ratio = tersor.compare(file, file, [torch.rand(5, 3, 8, 8)], seconds=0.01)["artifact"]["speedup"]["1"]
    assert ratio["value"] == pytest.approx(1.5)
    assert ratio["low"] < 1.5 < ratio["high"]


def test_a_file_that_takes_pixels_is_compared_on_normalized_images(tmp_path, monkeypatch):
    examples = {}

    def timings(openers, example, **options):
        examples.update({name: each.dtype for name, each in example.items()})
        return one_millisecond(openers, example, **options)

    monkeypatch.setattr(file_comparison, "measure_latency", timings)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    pixels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    mean, std = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    images = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    file = tersor.export(network, images, tmp_path / "pixels.onnx", pixels=(mean, std))
    found = tersor.compare(network, file, [images[:30], images[30:]], seconds=0.01)
    assert found["artifact"]["agreement"] == 100
    assert examples == {"original": "float32", "artifact": "uint8"}
    proto = onnx.load(file)
    del proto.metadata_props[:]
    onnx.save(proto, file)
    with pytest.raises(InputError, match=r"pixels\.onnx takes uint8 pixels, but the batches are torch\.float32"):
        tersor.compare(network, file, [images], seconds=0.01)


RGB = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def normalization_of(file):
    return {each.key: json.loads(each.value) for each in onnx.load(file).metadata_props}.get("normalization")


def test_the_normalization_is_stored_in_the_file(tmp_path):
    network, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).eval(), torch.randn(8, 3, 8, 8)
    told = {"mean": list(RGB[0]), "std": list(RGB[1])}
    path = tmp_path / "file.onnx"
    assert normalization_of(tersor.export(network, images, path)) is None
    assert normalization_of(tersor.export(network, images, path, normalization=RGB)) == told
    assert normalization_of(tersor.export(network, images, path, pixels=RGB)) == told
    quantized = tersor.quantize(network, images, normalization=RGB)
    assert normalization_of(tersor.export(quantized, images, path)) == told
    with pytest.raises(InputError, match=r"but quantize was called with \(\(0\.5"):
        tersor.export(quantized, images, path, normalization=((0.1, 0.4, 0.3), RGB[1]))
    with pytest.raises(InputError, match=r"normalization is \(\[0\.5\], \[0\.2\]\)\. Pass .* lists of 3 numbers"):
        tersor.export(network, images, path, normalization=([0.5], [0.2]))
    with pytest.raises(InputError, match=r"the network is already quantized\. Pass it to tersor\.export"):
        tersor.quantize(quantized, images)


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_the_normalization_can_be_arrays_or_tensors(tmp_path, kind):
    network, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).eval(), torch.randn(8, 3, 8, 8)
    given, path = tuple(map(kind, RGB)), tmp_path / "file.onnx"
    for stored in (
        normalization_of(tersor.export(network, images, path, normalization=given)),
        normalization_of(tersor.export(network, images, path, pixels=given)),
        normalization_of(tersor.export(tersor.quantize(network, images, normalization=given), images, path)),
    ):
        assert stored["mean"] == pytest.approx(RGB[0])
        assert stored["std"] == pytest.approx(RGB[1])


def test_different_values_for_pixels_and_normalization_raise(tmp_path):
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), torch.randn(8, 3, 8, 8)
    with pytest.raises(
        InputError,
        match=r"normalization is \(\(0\.1.* but pixels is \(\(0\.5.*Leave out normalization, or give the same values",
    ):
        tersor.export(network, images, tmp_path / "a.onnx", pixels=RGB, normalization=((0.1, 0.4, 0.3), RGB[1]))


def test_compare_warns_about_images_that_are_not_normalized(tmp_path, monkeypatch):
    monkeypatch.setattr(file_comparison, "measure_latency", one_millisecond)
    network, unit = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), torch.rand(24, 3, 8, 8)
    file = tersor.export(network, unit, tmp_path / "model.onnx", normalization=RGB)
    with pytest.warns(
        CompressionWarning, match=r"the images have values from .* but pixels normalized with mean 0\.5"
    ) as seen:
        tersor.compare(network, file, [unit], seconds=0.01)
    assert [each.filename for each in seen if "normalized with" in str(each.message)] == [__file__]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", CompressionWarning)
        tersor.compare(network, file, [(unit - 0.5) / 0.25], seconds=0.01)
    assert not [each for each in seen if "normalized with" in str(each.message)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            lambda unit: 255 * unit,
            "have values from 0 to 255, but pixels normalized with mean 0.5 0.4 0.3 and",
        ),
        (lambda unit: unit, r"have values from 0 to 1, but .* lie between -2\.5 and 2\.5\. Pass"),
        (lambda unit: unit[:15], None),
        (lambda unit: (unit - 0.5) / 0.25, None),
        (lambda unit: 8 * unit - 4, None),
    ],
)
def test_calibration_images_that_are_not_normalized_cause_a_warning(values, words):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).eval()
    unit = torch.rand(24, 3, 8, 8)
    unit[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    batches = values(unit).split(5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", CompressionWarning)
        tersor.quantize(network, batches, normalization=RGB)
    told = [str(each.message) for each in seen if "normalized with" in str(each.message)]
    assert len(told) == (words is not None)
    if words:
        assert re.search(words, told[0])
        assert seen[0].filename == __file__


def test_outputs_that_are_not_logits_are_compared_by_distance(tmp_path, monkeypatch):
    monkeypatch.setattr(file_comparison, "measure_latency", one_millisecond)
    files = [scaling_file(tmp_path / f"{factor}.onnx", factor) for factor in (2.0, 2.2)]
    found = tersor.compare(*files, [torch.rand(5, 3, 8, 8)], seconds=0.01)
    assert found["artifact"]["relative error"] == pytest.approx(10, rel=1e-3)
    assert found["original"]["relative error"] == 0
    assert found["artifact"]["agreement"] == pytest.approx(90, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "rate"),
    [({}, 0.05), ({"optimizer": "adamw"}, 0.0005), ({"optimizer": "adamw", "learning_rate": 0.3}, 0.3)],
)
def test_distill_uses_the_given_options(model, loader, monkeypatch, given, rate):
    seen = {}

    def train(*networks, epochs, task, progress):
        seen.update(networks=networks, epochs=epochs, task=task)

    monkeypatch.setattr(api, "train_on_outputs", train)
    teacher = copy.deepcopy(model)
    tersor.distill(model, teacher, loader, epochs=3, temperature=2.0, loss_weight=0.5, label_weight=0.3, **given)
    student, its_teacher, batches, method, training = seen["networks"]
    assert (student, its_teacher, batches) == (model, teacher, loader)
    assert (method.temperature, method.loss_weight, method.label_weight) == (2.0, 0.5, 0.3)
    assert (training.optimizer.name, training.optimizer.learning_rate) == (given.get("optimizer", "sgd"), rate)
    assert (seen["epochs"], seen["task"]) == (3, None)
    for epochs in (0, 1.5):
        with pytest.raises(InputError, match=r"Write a whole number, 1 or more"):
            tersor.distill(model, teacher, loader, epochs=epochs)
    tersor.distill(model, teacher, loader, epochs=1)
    with pytest.raises(InputError, match="a loader with a length"):
        tersor.distill(model, teacher, (batch for batch in loader))


def test_compare_checks_that_the_file_exists_before_it_converts_the_network(monkeypatch):
    monkeypatch.setattr(file_comparison, "to_export", None)
    with pytest.raises(InputError, match=r"missing\.onnx"):
        tersor.compare(resnet8(), "missing.onnx", [(IMAGES, LABELS)])
