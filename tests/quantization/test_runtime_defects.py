"""A convolution that OpenVINO would compute incorrectly stays in float, and is named."""

from importlib.metadata import version

import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.evaluation.session import open_session
from tersor.evaluation.verification import verify
from tersor.graph.aten import operator_name
from tersor.methods.ptq import PTQ
from tersor.quantization import runtime_defects
from tersor.training.context import AttachContext


class Tokens(nn.Module):
    """A patch embedding and a class token."""

    def __init__(self, *, bias=True, token=True):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4, bias=bias)
        self.token = nn.Parameter(torch.randn(1, 1, 16)) if token else None
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(x).mean(1))


IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def quantized(network, runtime):
    torch.manual_seed(0)
    context = AttachContext(data=[IMAGES], target=Target(runtime=runtime))
    attached = PTQ().attach(network.eval(), context)
    attached.begin()
    return attached.model.eval()


def in_float(network):
    return {each.name: each.reason for each in tersor.integer_coverage(network, IMAGES[:2]).operators}


def test_the_patch_embedding_of_a_vit_stays_in_float_for_openvino():
    assert in_float(quantized(Tokens(), "openvino")) == {
        "patches": "OpenVINO loses the bias of a convolution before a concatenation with a constant"
    }


@pytest.mark.parametrize(
    ("network", "runtime"),
    [(Tokens(), "onnxruntime"), (Tokens(bias=False), "openvino"), (Tokens(token=False), "openvino")],
    ids=["ONNX Runtime", "no bias", "no token"],
)
def test_all_others_are_computed_in_integers(network, runtime):
    assert not in_float(quantized(network, runtime))


def test_the_file_for_openvino_is_the_network(tmp_path):
    model = quantized(Tokens(), "openvino")
    file = export(model, IMAGES, tmp_path / "model.onnx")
    verify(open_session(file, "openvino"), model, IMAGES)


class Padded(nn.Module):
    """Padding of a size that depends on the image, as in Swin: here it is 0 on all sides."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.second(nn.functional.pad(x, (0, -x.shape[3] % 7, 0, -x.shape[2] % 7))).mean((2, 3))


def test_a_padding_of_0_is_removed():
    graph = quantized(Padded(), "openvino")
    assert not [node for node in graph.graph.nodes if operator_name(node) == "pad"]
    assert not in_float(graph)


@pytest.mark.skipif(version("openvino") < "2026", reason="OpenVINO has this defect since 2026.0")
def test_openvino_still_has_the_defect(tmp_path, monkeypatch):
    """If this fails, OpenVINO computes the layer correctly, and the rule can go."""
    monkeypatch.setattr(runtime_defects, "before_concatenated_constants", lambda _: set())
    model = quantized(Tokens(), "openvino")
    file = export(model, IMAGES, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="differ from torch's"):
        verify(open_session(file, "openvino"), model, IMAGES)
