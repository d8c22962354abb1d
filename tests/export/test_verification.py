from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor import verbs
from tersor.core.errors import CompressionWarning, InputError
from tersor.export.onnx import export as write
from tersor.export.runtime import Session, open_session
from tersor.export.verification import verify

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


def session(infer, *, precision="float32", batch=None, dtype="float32"):
    return Session("onnxruntime", precision, 1, np.dtype(dtype), (batch, 3, 8, 8), infer)


def in_torch(model, factor=1.0, shift=0.0):
    """A file that gives what torch gives, times a factor."""

    def infer(array):
        with torch.no_grad():
            return (model(torch.from_numpy(array)) * factor + shift).numpy()

    return infer


def verified(opened, model, **options):
    """What is said: "nothing", "warned" or "refused"."""
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
def test_of_a_network_in_float(factor, precision, expected):
    model = network()
    assert verified(session(in_torch(model, factor), precision=precision), model)[0] == expected


def test_the_yardstick_is_what_quantization_does():
    model = network()
    quantized = tersor.quantize(model, [IMAGES], bits=2)
    with torch.no_grad():
        moved = float((quantized(IMAGES[:16]) - model(IMAGES[:16])).norm() / quantized(IMAGES[:16]).norm())
    assert moved > 0.02
    for times, expected in ((1.9, "nothing"), (2.1, "warned"), (5.1, "refused")):
        said, told = verified(session(in_torch(quantized, 1 + times * moved)), quantized)
        assert said == expected
        assert said == "nothing" or f"quantization moves them by {100 * moved:.3g} %" in told


def test_a_file_of_fixed_batch_and_one_of_another_shape():
    model, sizes = network(), []

    def infer(array):
        sizes.append(len(array))
        return in_torch(model)(array)

    assert verified(session(infer, batch=6), model)[0] == "nothing"
    assert sizes == [6, 6, 6]
    said, told = verified(session(lambda array: in_torch(model)(array)[:, :5]), model)
    assert said == "refused"
    assert "gives (16, 5), and the network in torch (16, 10)" in told


def test_pixels_are_whole_numbers_on_both_sides():
    model = network()
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (MEAN, STD))
    seen = []

    def infer(array):
        seen.append(array)
        return in_torch(model)(((torch.from_numpy(array).float() / 255 - mean) / std).numpy())

    assert verified(session(infer, dtype="uint8"), model, pixels=(MEAN, STD))[0] == "nothing"
    assert seen[0].dtype == np.uint8


@pytest.fixture
def changed(monkeypatch):
    """Files are written from networks whose bias was moved: `changed(by)`."""

    def by(much):
        def wrong(model, example, path, **options):
            model[7].bias.data += much
            written = write(model, example, path, **options)
            model[7].bias.data -= much
            return written

        monkeypatch.setattr(verbs, "write_onnx", wrong)

    return by


def test_the_verb_refuses_a_wrong_file_and_leaves_that_of_before(changed, tmp_path):
    model = network()
    path = tmp_path / "model.onnx"
    path.write_bytes(b"of before")
    changed(1.0)
    with pytest.raises(InputError, match="Rounding does not explain that"):
        tersor.export(model, IMAGES, path)
    assert path.read_bytes() == b"of before"
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_the_verb_warns_and_leaves_a_file_that_is_off(changed, tmp_path):
    model = network()
    changed(0.002)
    with pytest.warns(CompressionWarning, match=r"16 example images .* differ from torch's by") as found:
        tersor.export(model, IMAGES, tmp_path / "model.onnx")
    assert Path(found[0].filename) == Path(__file__)
    assert (tmp_path / "model.onnx").stat().st_size


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_right_file_of_few_bits_is_no_false_alarm(bits, tmp_path):
    quantized = tersor.quantize(network(), [IMAGES], bits=bits)
    opened = open_session(write(quantized, IMAGES, tmp_path / "model.onnx"), "onnxruntime")
    assert verified(opened, quantized)[0] == "nothing"
