"""Networks with several input tensors, by position or by name, in the Python functions."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import InputError
from tersor.data.network_inputs import TensorInputs
from tersor.evaluation.session import open_session
from tersor.graph.capture import INPUTS, capture, capture_again
from tersor.graph.forward_call import input_names, input_nodes, run
from tersor.methods.adaround import AdaRound
from tersor.methods.brecq import BRECQ
from tersor.training.context import AttachContext

GENERATOR = torch.Generator().manual_seed(0)
LEFT, RIGHT = (torch.randn(16, 3, 8, 8, generator=GENERATOR) for _ in range(2))
WORDS = torch.randint(0, 50, (16, 7), generator=GENERATOR)
LABELS = torch.randint(0, 10, (16,), generator=GENERATOR)


class Siamese(nn.Module):
    """Applies the same stem to two images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.mix, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 10)

    def forward(self, left, right):
        both = torch.cat([self.stem(left), self.stem(right)], 1)
        return self.head(self.mix(both).relu().mean((2, 3)))


class ImageAndText(nn.Module):
    """An image, integer token indices, and an input that keeps its default value."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.words = nn.Conv2d(3, 16, 3), nn.Embedding(50, 16)
        self.project, self.head = nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, pixel_values, input_ids, scale=None):
        words = self.words(input_ids).mean(1)
        return {"logits": self.head(self.stem(pixel_values).relu().mean((2, 3)) * self.project(words)), "words": words}


POSITIONAL = (Siamese, (LEFT, RIGHT))
NAMED = (Siamese, {"right": RIGHT, "left": LEFT})
TOKENS = (ImageAndText, {"pixel_values": LEFT, "input_ids": WORDS})


def outputs(network, inputs):
    found = network(**inputs) if isinstance(inputs, dict) else network(*inputs)
    return found["logits"] if isinstance(found, dict) else found


def batches(inputs):
    """As a DataLoader returns them: positional inputs in a list."""
    halves = [slice(0, 8), slice(8, 16)]
    if isinstance(inputs, dict):
        return [({name: value[half] for name, value in inputs.items()}, LABELS[half]) for half in halves]
    return [[[value[half] for value in inputs], LABELS[half]] for half in halves]


@pytest.mark.parametrize(("kind", "inputs"), [POSITIONAL, NAMED, TOKENS], ids=["positional", "named", "tokens"])
def test_networks_with_several_inputs_are_quantized_exported_saved_and_loaded(kind, inputs, tmp_path):
    network = kind().eval()
    quantized = tersor.quantize(network, batches(inputs))
    expected, found = outputs(network, inputs), outputs(quantized, inputs)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    path = tersor.export(quantized, inputs, tmp_path / "model.onnx")  # compared with torch there
    graph = onnx.load(path).graph
    assert {each.name for each in graph.input} == (set(inputs) if isinstance(inputs, dict) else {"left", "right"})
    assert [each.name for each in open_session(path, "openvino").inputs] == [each.name for each in graph.input]
    tersor.save(quantized, tmp_path / "saved")
    assert torch.equal(outputs(tersor.load(kind(), tmp_path / "saved"), inputs), found)


class UpperCase(Siamese):
    def forward(self, Left, right):  # noqa: N803
        return super().forward(Left, right)


class Differences(nn.Module):
    def forward(self, X, x):  # noqa: N803
        return X - 2 * x


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (UpperCase(), (LEFT, RIGHT)),
        (Differences(), {"X": LEFT, "x": RIGHT}),
        (Differences(), {"x": LEFT, "X": RIGHT}),
    ],
    ids=["positional", "named", "swapped"],
)
def test_a_captured_network_has_the_input_names_of_the_original(network, inputs):
    network.eval()
    inputs = TensorInputs(inputs)
    graph = capture(network, inputs)
    assert input_names(graph, inputs) == input_names(network, inputs)
    assert [each.target for each in input_nodes(graph.graph)] == [*input_names(network, inputs)]
    torch.testing.assert_close(run(graph, inputs), run(network, inputs))
    again = capture_again(network, graph.meta[INPUTS])
    assert torch.equal(run(again, inputs), run(graph, inputs))


@pytest.mark.parametrize(("kind", "inputs"), [POSITIONAL, TOKENS], ids=["positional", "tokens"])
def test_networks_with_several_inputs_are_pruned_and_distilled(kind, inputs):
    network, before = kind().eval(), sum(each.numel() for each in kind().parameters())
    pruned = tersor.prune(network, batches(inputs), round_to=1, keep_macs=0.6, importance="obs")
    assert outputs(pruned, inputs).shape == (16, 10)
    assert sum(each.numel() for each in pruned.parameters()) < before
    weights = [each.clone() for each in pruned.parameters()]
    trained = tersor.distill(pruned, network, batches(inputs), task="classification")
    assert outputs(trained, inputs).isfinite().all()
    assert not all(map(torch.equal, weights, trained.parameters()))


def test_taylor_importance_works_with_several_inputs():
    pruned = tersor.prune(Siamese().eval(), batches((LEFT, RIGHT)), round_to=1, keep_macs=0.6, importance="taylor")
    assert pruned.mix.out_channels < 16


@pytest.mark.slow
@pytest.mark.parametrize("batch", [None, 4])
def test_an_exported_file_with_several_inputs_is_compared_with_the_network(batch, tmp_path):
    network = Siamese().eval()
    path = tersor.export(network, (LEFT, RIGHT), tmp_path / "model.onnx", batch=batch)
    found = tersor.compare(network, path, batches((LEFT, RIGHT)), seconds=0.01)
    assert found["artifact"]["agreement"] == 100
    assert found["artifact"]["accuracy"] == found["original"]["accuracy"]


def test_wrong_inputs_raise_one_error(tmp_path):
    with pytest.raises(InputError, match="needs 2 inputs: left, right, but a batch has one"):
        tersor.quantize(Siamese().eval(), [LEFT])
    with pytest.raises(InputError, match=r"does not run on the inputs left \(3, 8, 8\) of float32, wrong .*unexpected"):
        tersor.quantize(Siamese().eval(), batches({"left": LEFT, "wrong": RIGHT}))
    with pytest.raises(InputError, match=r"have the shapes \(16, 3, 8, 8\), \(4, 3, 8, 8\)"):
        tersor.quantize(Siamese().eval(), [((LEFT, RIGHT[:4]), LABELS)])
    path = tersor.export(Siamese().eval(), (LEFT, RIGHT), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="takes the inputs left, right, but one array was given"):
        open_session(path, "onnxruntime").run(LEFT.numpy())
    for method, name in ((BRECQ(), "brecq"), (AdaRound(), "adaround")):
        with pytest.raises(InputError, match=rf"^{name} supports only networks with one input tensor; this one has 2"):
            method.attach(Siamese().eval(), AttachContext(data=batches((LEFT, RIGHT))))


class AnyNumber(nn.Module):
    def forward(self, first, *others):
        return first


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (torch.zeros(2, 3), ("images",)),
        (TensorInputs((torch.zeros(2, 3),)), ("first",)),
        (TensorInputs((torch.zeros(2, 3), torch.zeros(2), torch.zeros(2))), ("first", "input_1", "input_2")),
        (TensorInputs({"second": torch.zeros(2), "first": torch.zeros(2)}), ("second", "first")),
    ],
)
def test_input_names_follow_from_the_inputs_and_the_signature(inputs, names):
    assert input_names(AnyNumber(), inputs) == names
