"""Which networks share a capture and a decomposition in the exports of the tests. Sharing does not change the files."""

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _fx_passes

import captured_once
import decomposed_once
import recorded_once
import tersor
from tersor.deploy.onnx import export
from tersor.graph.capture import capture

IMAGES = torch.rand(2, 3, 8, 8)


def network(width=4, images=IMAGES):
    layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(5)
    made = nn.Sequential(*layers).eval()
    made(images)
    return made


def program(model, images=IMAGES):
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


@pytest.mark.parametrize("quantized", [False, True])
def test_sharing_does_not_change_the_exported_files(tmp_path, monkeypatch, quantized):
    networks = [tersor.quantize(network(), [IMAGES]) if quantized else network() for _ in range(2)]
    kept = len(captured_once._captured), len(decomposed_once._decomposed)
    shared = [export(each, IMAGES, tmp_path / f"{place}.onnx") for place, each in enumerate(networks)]
    assert len(captured_once._captured) <= kept[0] + 1
    assert len(decomposed_once._decomposed) <= kept[1] + 1
    monkeypatch.setattr(captured_once.Strategy, "_capture", captured_once._capture)
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
def test_different_programs_do_not_share_a_decomposition(other):
    assert decomposed_once._key(other()) != decomposed_once._key(program(network()))


def test_a_program_with_a_tensor_created_in_forward_is_decomposed_every_time(tmp_path):
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.tensor([1.0, 2.0])

    kept = len(captured_once._captured), len(decomposed_once._decomposed)
    export(nn.Sequential(nn.Flatten(), Shifted(192, 2)).eval(), IMAGES, tmp_path / "shifted.onnx")
    assert (len(captured_once._captured), len(decomposed_once._decomposed)) == kept


def graph_key(change=None):
    graph = capture(network(), IMAGES)
    if change is not None:
        change(graph)
    return recorded_once.described_call(graph, (IMAGES,), {}, "")


def test_equal_graphs_share_a_capture():
    assert graph_key() == graph_key()


def scaled(graph):
    output = next(iter(graph.graph.find_nodes(op="output")))
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0], 2.0)),)
    graph.recompile()


@pytest.mark.parametrize(
    "change",
    [
        scaled,
        lambda graph: setattr(graph.get_submodule("0"), "stride", (2, 2)),
        lambda graph: setattr(graph.get_submodule("5"), "bias", None),
        lambda graph: setattr(graph, "factor", 3),
    ],
    ids=["operators", "settings", "tensors", "attributes"],
)
def test_different_graphs_do_not_share_a_capture(change):
    assert graph_key(change) != graph_key()


def test_the_shared_capture_and_decomposition_are_active():
    assert captured_once.Strategy._capture is captured_once._captured_once
    assert _fx_passes.decompose_with_registry is decomposed_once._decomposed_once
