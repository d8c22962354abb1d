"""Each output of a file has its name in the network, and the logits are found among the outputs."""

from collections import namedtuple

import onnxruntime
import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import InputError
from tersor.data.network_inputs import TensorInputs
from tersor.deploy.onnx import export
from tersor.deploy.outputs import logits_index
from tersor.evaluation.session import open_session

Given = namedtuple("Given", ["logits", "embedding", "maps"])
Two = namedtuple("Two", ["scores", "features"])
IMAGES = torch.randn(6, 3, 8, 8)
LABELS = torch.arange(6)
KINDS = {
    "one": (lambda each: (each.logits,), ["logits"]),
    "tuple": (lambda each: (each.maps, each.logits), ["output_0", "output_1"]),
    "none": (lambda each: (each.logits, None, each.maps), ["output_0", "output_2"]),
    "inner": (
        lambda each: {"logits": each.logits, "maps": [each.maps, each.embedding]},
        ["logits", "maps.0", "maps.1"],
    ),
    "fields": (lambda each: Two(each.logits, each.maps), ["scores", "features"]),
    "taken": (lambda each: {"images": each.maps, "v1": each.logits}, ["output_images", "output_v1"]),
}


class Several(nn.Module):
    """Returns the values that `give` selects from logits (N, 10), embedding (N, 4) and maps (N, 4, 6, 6)."""

    def __init__(self, give):
        super().__init__()
        self.stem, self.head, self.give = nn.Conv2d(3, 4, 3), nn.Linear(4, 10), give

    def forward(self, images):
        maps = torch.relu(self.stem(images))
        embedding = maps.mean((2, 3))
        return self.give(Given(self.head(embedding), embedding, maps))

    def logits(self, images):
        return self.head(torch.relu(self.stem(images)).mean((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_keep_the_networks_names_and_the_logits_are_found(kind, tmp_path):
    torch.manual_seed(0)
    give, names = KINDS[kind]
    network = Several(give).eval()
    path = export(network, IMAGES, tmp_path / "n.onnx")
    session = onnxruntime.InferenceSession(path)
    assert [each.name for each in session.get_outputs()] == names
    found = open_session(path, "onnxruntime")
    torch.testing.assert_close(torch.from_numpy(found.run(IMAGES.numpy())), network.logits(IMAGES).detach())


class SameNames(nn.Module):
    """An output has the name of an input, or an input has the default name of a single output."""

    def __init__(self, keys):
        super().__init__()
        self.keys = keys

    def forward(self, values, logits):
        found = (values + logits, values * logits)
        return dict(zip(self.keys, found, strict=True)) if self.keys else found[0]


@pytest.mark.parametrize(
    ("keys", "names"), [(["values", "sum"], ["output_values", "sum"]), ([], ["output_logits"])], ids=["dict", "single"]
)
def test_no_output_has_the_name_of_an_input(keys, names, tmp_path):
    inputs = TensorInputs((torch.ones(2, 3), torch.ones(2, 3)))
    path = export(SameNames(keys), inputs, tmp_path / "n.onnx")
    assert [each.name for each in onnxruntime.InferenceSession(path).get_outputs()] == names


def test_compare_uses_the_distance_if_several_outputs_could_be_the_logits(tmp_path):
    network = Several(lambda each: (each.embedding, each.logits)).eval()
    path = tersor.export(network, IMAGES, tmp_path / "n.onnx")
    found = tersor.compare(network, path, [(IMAGES, LABELS)], seconds=0.01)
    assert found["artifact"]["relative error"] < 0.01
    with pytest.raises(InputError, match="it is not clear which one contains the logits"):
        tersor.compare(network, path, [(IMAGES, LABELS)], seconds=0.01, task="classification")


def test_the_logits_are_found_by_name_then_as_the_only_output_then_by_the_number_of_classes():
    assert logits_index(["a", "logits"], [2, 2]) == 1
    assert logits_index(["a"], [4]) == 0
    assert logits_index(["a", "b"], [4, 2]) == 1
    assert logits_index(["a", "b"], [2, 2]) is None
    assert logits_index(["a", "b"], [None, 2]) is None
