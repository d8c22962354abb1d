from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from tersor.core.target import Target
from tersor.methods.ptq import PTQ
from tersor.pruning.mask import Mask
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.report.analysis.layers import layer_table
from tersor.training.context import AttachContext
from toy_networks import Small


@pytest.fixture
def images():
    return torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def original():
    torch.manual_seed(0)
    return Small().eval()


def quantized(network, images, bits, **options):
    attached = PTQ(bits=bits, exclude=("answer",), **options).attach(
        network, AttachContext(data=[images[:8]], target=Target(cpu="vnni"))
    )
    attached.begin()
    return attached.model.eval()


def test_the_table_of_a_float_network(original, images):
    table = layer_table(original, original, images)
    assert [entry["name"] for entry in table] == ["first", "second", "answer"]
    first = table[0]
    assert first["kind"] == "Conv2d"
    assert first["original_shape"] == first["shape"] == [6, 3, 3, 3]
    assert (first["weight_bits"], first["activation_bits"]) == (32, 32)
    assert first["levels"] is first["clipped"] is first["error"] is None
    histogram = first["histogram"]
    assert histogram["unit"] == "value"
    assert histogram["before"] == histogram["after"]
    assert sum(histogram["after"]) == 6 * 3 * 9


def test_the_table_of_a_quantized_layer_contains_levels_and_histogram(original, images):
    model = quantized(Small().eval(), images, bits=2, first_last_bits=2)
    first, second, answer = layer_table(original, model, images)
    assert (first["weight_bits"], first["activation_bits"]) == (2, 2)
    assert first["levels"] == 3
    assert second["zeros"] == int((model.second.weight == 0).sum())
    assert answer["weight_bits"] == 32
    histogram = second["histogram"]
    assert histogram["grid"] == [-1, 1]
    assert histogram["low"] == -1.5
    integers = (model.second.weight / model.second.parametrizations.weight[0].scale.reshape(-1, 1, 1, 1)).round()
    assert histogram["after"] == [int((integers == level).sum()) for level in (-1, 0, 1)]
    assert sum(histogram["before"]) == model.second.weight.numel()
    assert len(histogram["before"]) * histogram["width"] == 3
    scale = model.second.parametrizations.weight[0].scale
    assert histogram["step"] == [scale.min().item(), scale.median().item(), scale.max().item()]


def test_histograms_of_8_bit_layers_use_the_same_bins_before_and_after(original, images):
    histogram = layer_table(original, quantized(Small().eval(), images, bits=8), images)[1]["histogram"]
    assert histogram["width"] == histogram["after_width"] == 2
    assert sum(histogram["after"]) == sum(histogram["before"]) == 6 * 4 * 9
    assert len(histogram["after"]) == len(histogram["before"]) <= 128


def test_the_error_is_that_of_the_output_of_the_quantized_layer(original, images):
    model = quantized(original, images, bits=3)
    second = layer_table(original, model, images)[1]
    weights = model.second.parametrizations.weight
    with torch.no_grad():
        quantizer = model.get_submodule("quantizers.relu")
        seen = []
        hook = quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(images)
        hook.remove()
        exact = F.conv2d(seen[0], weights.original, model.second.bias, padding=1)
        rounded = F.conv2d(quantizer(seen[0]), model.second.weight, model.second.bias, padding=1)
    expected = ((rounded - exact).norm() / exact.norm()).item()
    assert 0.01 < expected < 1
    assert second["error"] == pytest.approx(expected, rel=1e-4)


def test_a_layer_with_tiny_outputs_has_an_error(original, images):
    with torch.no_grad():
        original.second.weight *= 1e-4
        original.second.bias.zero_()
    error = layer_table(original, quantized(original, images, bits=3), images)[1]["error"]
    assert 0.01 < error < 1


def test_clipped_is_the_fraction_outside_the_grid(original, images):
    model = quantized(original, images, bits=8)
    quantizer = model.get_submodule("quantizers.images")
    quantizer.set_grid(torch.tensor(0.01), torch.tensor(128))  # -1.28 to 1.27
    first = layer_table(original, model, images)[0]
    values = images.numpy()
    expected = np.mean((np.round(values / 0.01) < -128) | (np.round(values / 0.01) > 127))
    assert 0.15 < expected < 0.25
    assert first["clipped"] == pytest.approx(expected, abs=1e-4)


def test_a_mask_is_not_included_in_the_error(original, images):
    model = Small().eval()
    mask = Mask(model.second.weight.shape)
    mask.mask[:, :3] = False
    parametrize.register_parametrization(model.second, "weight", mask)
    quantizer = FakeQuantize(Grid.signed(8), channels=4)
    parametrize.register_parametrization(model.second, "weight", quantizer)
    quantizer.set_grid(torch.full((4,), 0.002))
    entry = layer_table(original, model, images)[1]
    assert entry["sparsity"] >= 0.5
    assert entry["zeros"] == round(entry["sparsity"] * model.second.weight.numel())
    assert entry["error"] < 0.02, "from rounding only"


def test_shapes_before_and_after_channel_removal_are_listed(original, images):
    table = layer_table(original, Small(width=4).eval(), images)
    assert (table[1]["original_shape"], table[1]["shape"]) == ([4, 6, 3, 3], [4, 4, 3, 3])


def test_a_different_architecture_is_not_compared_even_if_some_layer_names_match(images):
    other = Small().eval()
    other.third = nn.Linear(5, 5)
    table = layer_table(other, Small().eval(), images)
    assert len(table) == 3
    assert all(entry["original_shape"] is None and entry["histogram"]["before"] == [] for entry in table)


def test_no_hook_remains(original, images):
    model = quantized(original, images, bits=4)
    layer_table(original, model, images)
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
