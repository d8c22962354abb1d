"""Which programs share a decomposition in the tests, and that files do not change by it."""

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _fx_passes

import decomposed_once
import tersor
from tersor.deploy.onnx import export

IMAGES = torch.rand(2, 3, 8, 8)


def network(width=4, images=IMAGES):
    layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(5)
    made = nn.Sequential(*layers).eval()
    made(images)
    return made


def program(model, images=IMAGES):
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


@pytest.mark.parametrize("quantized", [False, True])
def test_files_are_the_same_without_it(tmp_path, monkeypatch, quantized):
    networks = [tersor.quantize(network(), [IMAGES]) if quantized else network() for _ in range(2)]
    kept = len(decomposed_once._decomposed)
    shared = [export(each, IMAGES, tmp_path / f"{place}.onnx") for place, each in enumerate(networks)]
    assert len(decomposed_once._decomposed) <= kept + 1
    monkeypatch.setattr(_fx_passes, "decompose_with_registry", decomposed_once._decompose)
    monkeypatch.setattr("torch.export.exported_program._override_composite_implicit_decomp", decomposed_once._override)
    alone = [export(each, IMAGES, tmp_path / "alone.onnx").read_bytes() for each in networks]
    assert [path.read_bytes() for path in shared] == alone
    assert alone[0] != alone[1]


def test_equal_programs_share_a_decomposition():
    first, second = program(network()), program(network())
    assert decomposed_once._key(first) == decomposed_once._key(second)


@pytest.mark.parametrize(
    "other",
    [
        lambda: program(network(width=5)),
        lambda: program(network(images=IMAGES[..., 1:]), IMAGES[..., 1:]),
        lambda: program(network().double(), IMAGES.double()),
        lambda: program(nn.Sequential(network())),
    ],
    ids=["width", "images", "precision", "module paths"],
)
def test_others_do_not(other):
    assert decomposed_once._key(other()) != decomposed_once._key(program(network()))


def test_a_program_with_a_tensor_of_its_forward_method_is_decomposed_every_time(tmp_path):
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.tensor([1.0, 2.0])

    kept = len(decomposed_once._decomposed)
    export(nn.Sequential(nn.Flatten(), Shifted(192, 2)).eval(), IMAGES, tmp_path / "shifted.onnx")
    assert len(decomposed_once._decomposed) == kept


def test_it_is_in_use():
    assert _fx_passes.decompose_with_registry is decomposed_once._decomposed_once
