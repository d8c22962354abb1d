"""Products of two activations in integers, and products that stay in float because of their rounding error."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.core.target import Target
from tersor.evaluation.node_profile import node_times
from tersor.evaluation.session import open_session
from tersor.graph.eval_mode import evaluating
from tersor.methods.ptq import PTQ
from tersor.quantization.integer_coverage import integer_coverage
from tersor.quantization.product_error import product_errors
from tersor.quantization.quantizers import find_quantizers
from tersor.training.context import AttachContext

IMAGES = torch.rand(4, 3, 14, 14, generator=torch.Generator().manual_seed(0))
SAVES_NO_TIME = "product of two activations, as in attention, which would not be faster in integers"
TARGET = Target(runtime="onnxruntime", cpu="vnni")


class Attention(nn.Module):
    """Two heads: one with a given `sharpness`, one that averages all 196 positions (1.3 steps of 1 / 255 each)."""

    def __init__(self, sharpness=1.0, width=32, moved=lambda weights: weights):
        super().__init__()
        self.moved = moved
        torch.manual_seed(0)
        self.patches, self.qkv, self.out = nn.Conv2d(3, 16, 1), nn.Linear(16, 6 * width), nn.Linear(2 * width, 16)
        self.head = nn.Linear(16, 4)
        self.register_buffer("factors", torch.tensor([sharpness, 0.0]).reshape(2, 1, 1))

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = self.moved((q @ k.mT * self.factors).softmax(-1))
        return self.head((tokens + self.out((weights @ v).transpose(1, 2).flatten(2))).mean(1))


def quantized(network, target=TARGET, **options):
    attached = PTQ(**options).attach(network, AttachContext(data=[IMAGES], target=target))
    attached.begin()
    return attached.model


@pytest.mark.skipif(Target().cpu == "avx2", reason="made for VNNI: on this processor products of the file saturate")
def test_attention_is_computed_in_integers_in_onnxruntime(tmp_path):
    network = Attention().eval()
    graph = quantized(copy.deepcopy(network))
    assert integer_coverage(graph, IMAGES).share == 1
    path = tersor.export(graph, IMAGES, tmp_path / "attention.onnx")
    kinds = Counter(each.kind for each in node_times(path, "onnxruntime", IMAGES.numpy(), runs=1))
    assert kinds["MatMul"] + kinds["FusedMatMul"] == 0
    assert kinds["MatMulIntegerToFloat"] + kinds["QLinearMatMul"] >= 4
    found, expected = open_session(path, "onnxruntime").run(IMAGES.numpy()), network(IMAGES).detach().numpy()
    assert np.abs(found - expected).mean() < 0.02 * np.abs(expected).mean()


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"target": Target(runtime="openvino", cpu="vnni")}, 32),
        ({"target": Target(runtime="onnxruntime", cpu="avx2")}, 32),
        ({"activation_bits": 4}, 32),
        ({"exclude": ("*matmul*",)}, 32),
        ({}, 24),
    ],
)
def test_products_stay_in_float_if_integers_save_no_time(options, width):
    covered = integer_coverage(quantized(Attention(width=width).eval(), **options), IMAGES)
    assert {(each.kind, each.reason) for each in covered.operators} == {("matmul", SAVES_NO_TIME)}
    assert len(covered.operators) == 1


def test_a_product_that_rounding_distorts_stays_in_float():
    graph = quantized(Attention(sharpness=300.0).eval())
    (left,) = integer_coverage(graph, IMAGES).operators
    assert left.reason == "rounding both operands would cost too much accuracy"
    quantizers = find_quantizers(graph)
    assert len(quantizers.products) == 1, "the scores stay in integers"
    assert "quantizers.softmax" not in quantizers.activations


@pytest.mark.parametrize(
    ("moved", "rounded"),
    [(lambda weights: weights, "softmax"), (lambda weights: weights.flip(-1).contiguous(), "flip")],
    ids=["as they are", "moved behind the quantizer"],
)
def test_the_measured_error_is_that_of_the_two_products(moved, rounded):
    graph = quantized(Attention(moved=moved).eval())
    quantizer = graph.get_submodule(f"quantizers.{rounded}")
    quantizer.set_grid(torch.tensor(1 / 255))
    operands = []
    hook = quantizer.register_forward_hook(lambda _, inputs, output: operands.append((inputs[0], output)))
    with evaluating(graph), torch.no_grad():
        graph(IMAGES)
        _, _, values = graph.qkv(operands_of(graph)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    hook.remove()
    values = graph.get_submodule("quantizers.qkv")(values)
    exact, product = (each @ values for each in operands[0])
    expected = ((product - exact).square().sum((2, 3)) / exact.square().sum((2, 3))).mean()
    errors = product_errors(find_quantizers(graph), IMAGES, always={"quantizers.qkv"})
    (name,) = [name for name in errors if name.endswith("matmul_1")]
    assert errors[name] == pytest.approx(float(expected), rel=1e-3)
    assert errors[name] > 0.01


def operands_of(graph):
    """The input of the projection in the quantized network."""
    found = []
    hook = graph.qkv.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    graph(IMAGES)
    hook.remove()
    return found[0]


def test_saved_networks_keep_the_operands_of_products(tmp_path):
    graph = quantized(Attention().eval())
    again = tersor.load(Attention(), tersor.save(graph, tmp_path / "saved"))
    assert integer_coverage(again, IMAGES) == integer_coverage(graph, IMAGES)
    torch.testing.assert_close(again.eval()(IMAGES), graph(IMAGES), rtol=0, atol=0)


def test_max_drop_can_keep_products_in_float():
    attached = PTQ(max_drop=0.0).attach(Attention().eval(), AttachContext(data=[IMAGES], target=TARGET))
    attached.begin()
    assert set(attached.quantizers.products) == {"matmul", "matmul_1"}
