from __future__ import annotations

import onnxruntime
import pytest
import torch
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import tersor
from tersor.core.errors import InputError
from tersor.graph.aten import shape_of
from tersor.graph.batch_constants import compute_batch_sizes
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
    """Two windows of each image are rows of one tensor; a table has one more row than that."""
    windows = net.conv(x).view(len(x) * 2, 8, 36) + torch.zeros(len(x) * 2 + 1, 8, 1)[1:]
    return net.head(windows.view(len(x), -1))


def averaged(net, x):
    logits = net.head(net.conv(x).flatten(1))
    return logits - logits.sum(0) / len(x)


def resized(net, x):
    return net.head(nn.functional.interpolate(net.conv(x), scale_factor=2)[:, :, ::2, ::2].reshape(len(x), -1))


def padded(net, x):
    return net.head(nn.functional.pad(net.conv(x), (1, 1, 1, 1))[:, :, 1:-1, 1:-1].reshape(len(x), -1))


@pytest.mark.parametrize("run", [by_len, by_int, merged, averaged, resized, padded])
def test_a_batch_size_read_as_a_python_number_stays_dynamic(run):
    network = Network(run).eval()
    graph = capture(network, IMAGES)
    for count in (1, 4, 7, 16):
        torch.testing.assert_close(graph(IMAGES[:count]), network(IMAGES[:count]))
    *_, last = (node for node in graph.graph.nodes if node.op == "call_module")
    assert has_batch_dimension(last)
    assert shape_of(last)[1:] == (10,)


def test_a_network_that_reads_the_batch_size_is_compressed_exported_and_loaded(tmp_path):
    network = Network(by_len).eval()
    quantized = tersor.quantize(network, [IMAGES])
    path = tersor.export(quantized, IMAGES, tmp_path / "model.onnx")
    assert onnxruntime.InferenceSession(path).get_inputs()[0].shape[0] == "batch"
    tersor.save(quantized, tmp_path / "saved")
    assert torch.equal(tersor.load(Network(by_len), tmp_path / "saved")(IMAGES), quantized(IMAGES))
    pruned = tersor.prune(network, IMAGES, round_to=1, keep_macs=0.6)
    assert pruned.conv.out_channels < 16
    assert pruned(IMAGES[:3]).shape == (3, 10)


def test_a_network_that_computes_differently_for_another_batch_size_raises():
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


def test_an_operator_that_fails_for_another_batch_size_raises(monkeypatch):
    def fails(*_):
        raise IndexError("dimension out of range")

    monkeypatch.setattr(FakeTensorProp, "propagate_dont_convert_inputs", fails)
    with pytest.raises(InputError, match="fixes the batch size"):
        capture(Network(by_len).eval(), IMAGES)


def recorded(size, run):
    """The graph of `run` for a batch of `size`, as the exporter records it: the batch size is a number."""

    class Fixed(nn.Module):
        def forward(self, x):
            return run(x, size)

    return fx.symbolic_trace(Fixed())


def rows(x, count):
    return torch.narrow(torch.tile(x, (2, 1)), 0, 0, count)


def test_a_constant_that_is_linear_in_the_batch_size_is_computed():
    graph = recorded(4, lambda x, n: torch.add(rows(x, 2 * n - 3), 7.0))
    other = recorded(6, lambda x, n: torch.add(rows(x, 2 * n - 3), 7.0))
    assert compute_batch_sizes(graph, other, [torch.zeros(4, 3)], 6)
    graph.recompile()
    x = torch.rand(9, 3)
    assert torch.equal(graph(x), torch.tile(x, (2, 1))[:15] + 7)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, n: rows(x, n // 3),  # 1 and 2 rows for 4 and 6 images
        lambda x, n: torch.mul(x, 1.0 / n),
        lambda x, n: torch.neg(x) if n == 4 else torch.sin(x),
        lambda x, n: torch.add(torch.neg(x), x if n == 4 else torch.sin(torch.neg(x))),
        lambda x, n: torch.sub(torch.neg(x), torch.sin(x)) if n == 4 else torch.sub(torch.neg(x), torch.sin(x) * 1),
        lambda x, n: torch.tile(x, (n,) if n == 4 else (n, 1)),
        lambda x, n: torch.sub(x, torch.neg(x)) if n == 4 else torch.sub(torch.neg(x), x),
    ],
)
def test_graphs_with_other_differences_are_rejected(run):
    size = 6
    assert not compute_batch_sizes(recorded(4, run), recorded(size, run), [torch.zeros(4, 3)], size)


class Windows(nn.Module):
    """The windows of the original Swin code: the batch size is computed from their number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, images):
        batch, channels, height, width = images.shape
        windows = images.view(batch, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 3, 5, 1)
        windows = self.linear(windows.reshape(-1, 16, channels))
        count = int(windows.shape[0] / (height * width / 4 / 4))
        merged = windows.view(count, height // 4, width // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5)
        merged = merged.contiguous().view(batch, height * width, channels)
        return merged + images.flatten(2).transpose(1, 2)


def test_a_batch_size_can_be_computed_from_the_number_of_windows():
    network, images = Windows().eval(), torch.randn(2, 4, 8, 8)
    graph = capture(network, images)
    for count in (1, 3, 8):
        more = torch.randn(count, 4, 8, 8)
        assert torch.allclose(graph(more), network(more), atol=1e-6)
