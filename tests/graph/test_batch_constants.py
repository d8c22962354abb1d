from __future__ import annotations

import onnxruntime
import pytest
import torch
from torch import nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import tersor
from tersor.core.errors import InputError
from tersor.graph.aten import shape_of
from tersor.graph.capture import capture, has_batch_dimension

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.run, self.conv, self.head = run, nn.Conv2d(3, 16, 3), nn.Linear(16 * 36, 10)
        self.token = nn.Parameter(torch.randn(1, 16, 1, 1))

    def forward(self, x):
        return self.run(self, x)


def by_len(net, x):
    return net.head((net.conv(x) + net.token.expand(len(x), -1, -1, -1)).view(len(x), -1))


def by_int(net, x):
    return net.head(net.conv(x).reshape(int(x.shape[0]), 16 * 36))


def merged(net, x):
    """Two windows of each image are rows of one tensor, with a table of one row more than these."""
    windows = net.conv(x).view(len(x) * 2, 8, 36) + torch.zeros(len(x) * 2 + 1, 8, 1)[1:]
    return net.head(windows.view(len(x), -1))


def averaged(net, x):
    logits = net.head(net.conv(x).flatten(1))
    return logits - logits.sum(0) / len(x)


@pytest.mark.parametrize("run", [by_len, by_int, merged, averaged])
def test_a_batch_size_that_is_a_python_number_stays_free(run):
    network = Network(run).eval()
    graph = capture(network, IMAGES)
    for count in (1, 4, 7, 16):
        torch.testing.assert_close(graph(IMAGES[:count]), network(IMAGES[:count]))
    *_, last = (node for node in graph.graph.nodes if node.op == "call_module")
    assert has_batch_dimension(last)
    assert shape_of(last)[1:] == (10,)


def test_such_a_network_is_compressed_exported_and_loaded(tmp_path):
    network = Network(by_len).eval()
    quantized = tersor.quantize(network, [IMAGES])
    path = tersor.export(quantized, IMAGES, tmp_path / "model.onnx")
    assert onnxruntime.InferenceSession(path).get_inputs()[0].shape[0] == "batch"
    tersor.save(quantized, tmp_path / "saved")
    assert torch.equal(tersor.load(Network(by_len), tmp_path / "saved")(IMAGES), quantized(IMAGES))
    pruned = tersor.prune(network, IMAGES, round_to=1, keep_macs=0.6)
    assert pruned.conv.out_channels < 16
    assert pruned(IMAGES[:3]).shape == (3, 10)


def test_what_computes_something_else_for_another_batch_size_is_refused():
    stored = {}

    def table(net, x):
        return by_len(net, x) + stored.setdefault(len(x), torch.ones(len(x), 1))

    def branches(net, x):
        return by_len(net, x) * (2 if len(x) == 2 else 1)

    def squares(net, x):
        return by_len(net, x) * (len(x) ** 2)

    for run in (table, branches, squares):
        with pytest.raises(InputError, match=r"fixes the batch size|not equivalent"):
            capture(Network(run).eval(), IMAGES)


def test_an_operator_that_does_not_run_on_another_batch_size_is_refused(monkeypatch):
    def fails(*_):
        raise IndexError("dimension out of range")

    monkeypatch.setattr(FakeTensorProp, "propagate_dont_convert_inputs", fails)
    with pytest.raises(InputError, match="fixes the batch size"):
        capture(Network(by_len).eval(), IMAGES)
