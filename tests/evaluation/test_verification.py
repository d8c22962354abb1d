from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor import api
from tersor.core.errors import CompressionWarning, InputError
from tersor.deploy.onnx import export as write
from tersor.evaluation.file_inputs import FileInput
from tersor.evaluation.session import Session, open_session
from tersor.evaluation.verification import differences, verify
from tersor.quantization.fake_quantize import quantizers_disabled

IMAGES = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


def session(infer, *, precision="float32", dtype="float32"):
    return Session("onnxruntime", precision, 1, (FileInput("images", np.dtype(dtype), (None, 3, 8, 8)),), infer)


def in_torch(model, factor=1.0, shift=0.0):
    """A file whose outputs are those of torch times a factor, plus a shift."""

    def infer(array):
        with torch.no_grad():
            return (model(torch.from_numpy(array)) * factor + shift).numpy()

    return infer


def verified(opened, model, **options):
    """The result of `verify` ("nothing", "warned" or "refused") and its message."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            verify(opened, model, IMAGES, **options)
        except InputError as error:
            return "refused", str(error)
    return ("warned", str(found[0].message)) if found else ("nothing", "")


@pytest.mark.parametrize(
    ("factor", "precision", "expected"),
    [
        (1.0, "float32", "nothing"),
        (1.001, "float32", "nothing"),
        (1.01, "float32", "warned"),
        (1.05, "float32", "refused"),
        (1.04, "bfloat16", "nothing"),
        (1.1, "bfloat16", "warned"),
        (1.3, "bfloat16", "refused"),
        (float("nan"), "float32", "refused"),
    ],
)
def test_tolerances_for_a_float_network(factor, precision, expected):
    model = network()
    assert verified(session(in_torch(model, factor), precision=precision), model)[0] == expected


@pytest.mark.parametrize(("precise", "expected"), [(1.0, "warned"), (1.1, "refused")])
def test_a_difference_in_bfloat16_is_checked_again_in_float32(precise, expected):
    """A difference is accepted only if it is caused by bfloat16 itself."""
    model = network()
    found = verified(
        session(in_torch(model, 1.1), precision="bfloat16"),
        model,
        in_full_precision=lambda: session(in_torch(model, precise), precision="float32"),
    )
    assert found[0] == expected
    assert "differ from torch's by 10 %" in found[1]


def quantization_effect(model):
    """The outputs of torch for the first 16 images, and the relative change caused by quantization."""
    with torch.no_grad():
        of_torch = model(IMAGES[:16])
        with quantizers_disabled(model):
            return of_torch, float((model(IMAGES[:16]) - of_torch).norm() / of_torch.norm())


def test_the_tolerance_is_relative_to_the_effect_of_quantization():
    model = tersor.quantize(network(), [IMAGES], bits=2)
    _, moved = quantization_effect(model)
    assert moved > 0.02
    for times, expected in ((1.9, "nothing"), (2.1, "warned"), (5.1, "refused")):
        outcome, message = verified(session(in_torch(model, 1 + times * moved)), model)
        assert outcome == expected
        assert outcome == "nothing" or f"quantization changes them by {100 * moved:.3g} %" in message


def test_a_file_with_outputs_of_another_shape_is_refused():
    model = network()
    outcome, message = verified(session(lambda array: in_torch(model)(array)[:, :5]), model)
    assert outcome == "refused"
    assert "returns shape (16, 5), but the network in torch returns (16, 10)" in message


def test_the_file_and_torch_get_the_same_rounded_pixels():
    model = network()
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (MEAN, STD))
    seen = []

    def infer(array):
        seen.append(array)
        return in_torch(model)(((torch.from_numpy(array).float() / 255 - mean) / std).numpy())

    assert verified(session(infer, dtype="uint8"), model, pixels=(MEAN, STD))[0] == "nothing"
    assert seen[0].dtype == np.uint8


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A 2-bit network and its file."""
    quantized = tersor.quantize(network(), [IMAGES], bits=2)
    return quantized, write(quantized, IMAGES, tmp_path_factory.mktemp("verification") / "model.onnx")


def test_a_correct_2_bit_file_passes(file):
    quantized, path = file
    assert verified(open_session(path, "onnxruntime"), quantized)[0] == "nothing"


@pytest.fixture
def moved_by(file, monkeypatch):
    """A network whose last bias differs from that in the exported file, by a multiple of the effect of 2 bits."""

    def by(times):
        quantized, path = file
        monkeypatch.setattr(api, "write_onnx", lambda _model, _example, to, **_: shutil.copy(path, to))
        moved = copy.deepcopy(quantized)
        of_torch, share = quantization_effect(moved)
        moved.get_submodule("7").bias.data += times * share * of_torch.square().mean().sqrt()
        return moved

    return by


def test_export_raises_for_a_wrong_file_and_keeps_the_existing_one(moved_by, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(InputError, match="more than rounding can explain"):
        tersor.export(moved_by(20), IMAGES, path)
    assert path.read_bytes() == b"earlier"
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_the_error_mentions_tiny_activation_steps_for_openvino_only(moved_by, tmp_path):
    moved = moved_by(20)
    quantizer = next(each for name, each in moved.named_modules() if name.startswith("quantizers."))
    moved.tiny = copy.deepcopy(quantizer)  # which is not called, so that the tolerance stays
    moved.tiny.scale.data.fill_(2e-9)
    with pytest.raises(InputError, match=r"rounded in steps of 2e-09.* load trained weights"):
        tersor.export(moved, IMAGES, tmp_path / "model.onnx", runtime="openvino")
    with pytest.raises(InputError, match="Use another runtime, or keep layers in float"):
        tersor.export(moved, IMAGES, tmp_path / "model.onnx")


def test_export_warns_about_a_file_that_differs_more_than_usual(moved_by, tmp_path):
    with pytest.warns(CompressionWarning, match=r"16 example images .* differ from torch's by") as found:
        tersor.export(moved_by(3.5), IMAGES, tmp_path / "model.onnx")
    assert Path(found[0].filename) == Path(__file__)
    assert (tmp_path / "model.onnx").stat().st_size


class Outputs(nn.Module):
    """Class indices, logits, and features."""

    def __init__(self):
        super().__init__()
        self.network, self.factor = network(), 1.0

    def forward(self, images):
        features = self.network[:5](images)
        logits = self.network[5:](features)
        return logits.argmax(1), logits, self.factor * features


def test_every_floating_point_output_is_compared(tmp_path):
    model = Outputs().eval()
    file = tersor.export(model, IMAGES, tmp_path / "model.onnx")
    opened = open_session(file, "onnxruntime")
    verify(opened, model, IMAGES)
    model.factor = 2.0
    with pytest.raises(InputError, match=r"differ from torch's by 50 %.* replace it\.$"):
        verify(opened, model, IMAGES)


def test_a_nan_in_an_output_other_than_the_first_is_an_infinite_difference():
    expected = [torch.ones(2, 3), torch.ones(2, 3)]
    found = [torch.ones(2, 3) + 0.1, torch.tensor([[1.0, float("nan"), 1.0]] * 2)]
    first, second = differences(found, expected)
    assert first == pytest.approx(0.1)
    assert second == float("inf")
    assert differences(found[1:], found[1:]) == [0.0]
