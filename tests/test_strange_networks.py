"""Unusual networks of users: their output containers, attention masks and stored tables."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import onnx
import pytest
import torch
from torch import nn

import tersor
from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import InputError
from tersor.graph.capture import capture

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", "logits features")


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 10)

    def logits(self, x):
        return self.head(self.second(x).relu().mean((2, 3)))


class InOrderedDict(Parts):
    def forward(self, x):
        x = self.first(x).relu()
        return OrderedDict(logits=self.logits(x), map=x)


class InNamedTuple(Parts):
    def forward(self, x):
        x = self.first(x).relu()
        return Pair(self.logits(x), (x.mean((2, 3)), [x]))


@pytest.mark.parametrize("kind", [InOrderedDict, InNamedTuple])
def test_outputs_in_any_container_keep_their_structure(kind):
    model = kind().eval()
    graph = capture(model, IMAGES)
    assert type(graph(IMAGES)) is type(model(IMAGES))
    pruned = tersor.prune(model, IMAGES, keep_macs=0.7, round_to=1)
    before, after = (torch.utils._pytree.tree_leaves(each(IMAGES)) for each in (model, pruned))
    assert [each.shape for each in after] == [each.shape for each in before]
    assert pruned.second.out_channels < 16
    assert pruned.head.out_features == 10


@dataclass
class Result:
    logits: torch.Tensor
    features: torch.Tensor
    loss: torch.Tensor | None = None


@dataclass
class Results:
    main: Result


class Unknown:
    """An output object whose tensors torch cannot find."""

    def __init__(self, logits, features):
        self.logits, self.features = logits, features


class Returns(Parts):
    def __init__(self, container):
        super().__init__()
        self.container = container

    def forward(self, x):
        x = self.first(x).relu()
        return self.container(self.logits(x), x)


@pytest.mark.parametrize(
    ("container", "names"),
    [
        (Result, ["logits", "features"]),
        (lambda *found: Results(Result(*found)), ["main.logits", "main.features"]),
        (
            lambda logits, features: (logits, Result(logits, features)),
            ["output_0", "output_1.logits", "output_1.features"],
        ),
    ],
)
def test_dataclasses_are_supported_as_outputs(container, names, tmp_path):
    model = Returns(container).eval()
    quantized = tersor.quantize(model, IMAGES)
    assert type(quantized(IMAGES)) is type(model(IMAGES))
    file = onnx.load(tersor.export(quantized, IMAGES, tmp_path / "m.onnx"))
    assert [each.name for each in file.graph.output] == names


def test_a_student_can_return_a_dataclass():
    student = Returns(Result)
    before = student.head.weight.clone()
    tersor.distill(student, Returns(Result).eval(), [(IMAGES, torch.arange(4))] * 2, learning_rate=0.1)
    assert not torch.equal(student.head.weight, before)


def test_an_unsupported_output_object_is_explained_in_the_error():
    with pytest.raises(
        InputError, match=r"it returns a Unknown, which .*\. Return tensors in a tuple, list, dict, named"
    ):
        capture(Returns(Unknown).eval(), IMAGES)


class SpecialForOne(Parts):
    def forward(self, x):
        logits = self.logits(self.first(x).relu())
        return logits * 2 if x.shape[0] == 1 else logits


def test_a_network_that_computes_differently_for_a_batch_of_one_raises():
    with pytest.raises(InputError, match=r"not equivalent.*at batch size 1, .*no branch on the batch size"):
        capture(SpecialForOne().eval(), IMAGES)


class Masked(nn.Module):
    """Attention to earlier tokens only."""

    def __init__(self, *, padding=False):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head, self.padding = nn.Linear(16, 10), padding
        self.register_buffer("later", torch.triu(torch.ones(16, 16, dtype=torch.bool), 1))

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        if self.padding:
            masks = {"key_padding_mask": self.later[:1].expand(x.shape[0], 16)}
        else:
            masks = {"attn_mask": self.later}
        return self.head(self.attention(tokens, tokens, tokens, **masks)[0].mean(1))


@pytest.mark.parametrize("padding", [False, True])
def test_networks_with_attention_masks_are_captured_and_pruned(padding):
    model = Masked(padding=padding).eval()
    graph = capture(model, IMAGES)
    assert torch.allclose(graph(IMAGES), model(IMAGES), atol=1e-6)
    assert graph.state_dict().keys() == model.state_dict().keys()
    pruned = tersor.prune(model, IMAGES, keep_macs=0.7, round_to=1)
    assert pruned(IMAGES).shape == (4, 10)
    assert pruned(IMAGES).isfinite().all()


class StoresATable(Parts):
    """Computes a table in its first run, like many position encodings."""

    table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, 16, device=x.device)[:, None]
        return self.logits((self.first(x + self.table)).relu())


def test_a_network_that_stores_a_table_is_saved_and_loaded(tmp_path):
    model = StoresATable().eval()
    model(IMAGES)
    quantized = tersor.quantize(model, [IMAGES])
    tersor.save(quantized, tmp_path / "saved")
    again = tersor.load(StoresATable(), tmp_path / "saved")
    assert torch.equal(again(IMAGES), quantized(IMAGES))


def test_a_table_is_rebuilt_on_the_device_of_the_network():
    model = StoresATable().eval()
    model(IMAGES)
    graph = capture(model, IMAGES)
    again = rebuild(StoresATable().to("meta"), structure(graph))
    assert again.meta == graph.meta
    assert {each.device.type for each in again.parameters()} == {"meta"}


def test_a_network_with_different_settings_cannot_be_loaded(tmp_path):
    class Parted(Parts):
        def __init__(self, act, stride=1):
            super().__init__()
            self.act, self.second.stride = act, (stride, stride)

        def forward(self, x):
            return self.logits(self.act(self.first(x)))

    tersor.save(tersor.quantize(Parted(nn.ReLU()).eval(), [IMAGES]), tmp_path / "saved")
    tersor.load(Parted(nn.ReLU()), tmp_path / "saved")
    for other in (Parted(nn.SiLU()), Parted(nn.ReLU(), stride=2)):
        with pytest.raises(InputError, match="operators or the settings of its layers differ"):
            tersor.load(other, tmp_path / "saved")


def test_a_submodule_named_self_raises():
    model = Parts()
    model.add_module("self", nn.Identity())
    with pytest.raises(InputError, match=r"a submodule named 'self', .*\. Rename it\."):
        capture(model.eval(), IMAGES)


def test_a_structure_with_a_huge_input_shape_raises():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)).eval()
    saved = structure(tersor.quantize(model, [IMAGES]))
    assert saved["inputs"] == [{"name": None, "shape": [3, 16, 16], "dtype": "float32"}]
    with pytest.raises(InputError, match="the input shapes are too large"):
        rebuild(model, {**saved, "inputs": [{**saved["inputs"][0], "shape": [3, 4096, 4096]}]})
