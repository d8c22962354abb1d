"""Masks and widths in the report; masked zeros from training to the exported file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tersor.data.batch import Batch
from tersor.deploy.onnx import export
from tersor.evaluation.latency import compressed_bytes, size_bytes
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.qat import QAT
from tersor.methods.weight_pruning import WeightPruning
from tersor.pruning.mask import weight_mask
from tersor.report.analysis.layers import layer_table
from tersor.report.analysis.pruning import masks, widths
from tersor.training.context import AttachContext
from tersor.training.loop import fit
from tersor.training.method import chain
from tersor.training.options import OptimizerOptions, Training
from toy_networks import Small

SPARSITY = 0.75
IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Few:
    """64 images of five classes in batches of 16, the same in every epoch."""

    def __len__(self):
        return 4

    def __iter__(self):
        labels = IMAGES.flatten(1)[:, :5].argmax(1)
        return (Batch(IMAGES[index], labels[index], index) for index in torch.arange(64).split(16))

    def set_epoch(self, epoch):
        pass


def pruned(width=16, **options):
    torch.manual_seed(0)
    attached = WeightPruning(sparsity=SPARSITY, **options).attach(Small(width).eval(), AttachContext())
    attached.begin()
    attached.finish()
    return attached.model


def masks_of(model):
    masks_by_name = {name: weight_mask(module) for name, module in model.named_modules()}
    return {name: mask.mask for name, mask in masks_by_name.items() if mask is not None}


@pytest.fixture(scope="module")
def trained_on_grids():
    """A masked network after a few steps of 8-bit training, which change every remaining weight."""
    model = pruned()
    before = {name: mask.clone() for name, mask in masks_of(model).items()}
    attached = chain([QAT(calibration_images=32)], model, AttachContext(data=[IMAGES[:32]], steps=8))
    attached.begin()
    training = Training(optimizer=OptimizerOptions(learning_rate=0.05), precision="float32")
    fit(attached, Few(), training, steps=8)
    attached.finish()
    return attached.model, before


def test_the_file_contains_the_zeros_of_the_masks(trained_on_grids, tmp_path):
    model, before = trained_on_grids
    assert {name: mask.tolist() for name, mask in masks_of(model).items()} == {
        name: mask.tolist() for name, mask in before.items()
    }
    proto = onnx.load(export(model, IMAGES[:1], tmp_path / "model.onnx"))
    stored = [numpy_helper.to_array(each) for each in proto.graph.initializer]
    kernels = [each for each in stored if each.dtype == np.int8 and each.ndim == 4]
    assert len(kernels) == 2
    for (name, mask), kernel in zip(before.items(), kernels, strict=True):
        shown = model.get_submodule(name).weight.detach().numpy()
        assert not kernel[~mask.numpy()].any(), "what is masked is zero"
        assert ((kernel == 0) == (shown == 0)).all(), "and what else is zero, rounding has made so"
        assert (kernel == 0).mean() < 0.05 + SPARSITY


def test_zeros_from_masks_are_distinguished_from_zeros_from_rounding(trained_on_grids):
    model, before = trained_on_grids
    by_name = {entry["name"]: entry for entry in layer_table(Small(16), model, IMAGES)}
    for name, mask in before.items():
        assert by_name[name]["masked"] == pytest.approx(1 - mask.float().mean().item())
        assert by_name[name]["zeros"] >= (~mask).sum()
    assert by_name["answer"]["masked"] == 0
    with torch.no_grad():
        model.get_submodule("answer").parametrizations.weight.original[0] = 0
    assert layer_table(Small(16), model, IMAGES)[-1]["sparsity"] >= 0.2
    assert layer_table(Small(16), model, IMAGES)[-1]["masked"] == 0


def test_masked_weights_make_the_compressed_file_smaller(tmp_path):
    torch.manual_seed(0)
    dense = export(Small(64).eval(), IMAGES[:1], tmp_path / "dense.onnx")
    sparse = export(pruned(64), IMAGES[:1], tmp_path / "sparse.onnx")
    assert abs(size_bytes(sparse) - size_bytes(dense)) < 0.01 * size_bytes(dense), "as they lie, nothing is saved"
    assert compressed_bytes(dense) > 0.8 * size_bytes(dense), "floats do not compress"
    assert compressed_bytes(sparse) < 0.5 * compressed_bytes(dense)


def test_masks_are_listed_per_kernel():
    model = pruned(10)
    first, second = masks(model)
    assert (first["name"], first["shape"]) == ("first", [10, 3, 3, 3])
    assert [len(first["filters"]), len(second["filters"])] == [8, 4]
    assert len(second["filters"][0]) == 10
    expected = weight_mask(model.second).mask[2, 5].flatten().tolist()
    assert second["filters"][2][5] == "".join("1" if kept else "0" for kept in expected)
    assert masks(Small()) == []


def test_of_many_layers_six_evenly_spaced_ones_are_listed():
    model = nn.Sequential(*[nn.Conv2d(2, 2, 1) for _ in range(11)])
    attached = WeightPruning(sparsity=0.5).attach(model, AttachContext())
    assert [each["name"] for each in masks(attached.model)] == ["0", "2", "4", "6", "8", "10"]


def test_widths_of_layers_in_both_networks_are_listed():
    original = Small(16).eval()
    cut = ChannelPruning(keep_channels=0.5, round_to=4).attach(Small(16).eval(), AttachContext(data=[IMAGES])).model
    assert len(cut.first.weight) < 16
    assert widths(original, cut) == [
        {"name": "first", "before": 16, "after": len(cut.first.weight)},
        {"name": "second", "before": 4, "after": 4},
        {"name": "answer", "before": 5, "after": 5},
    ]
    assert widths(nn.Sequential(nn.Linear(3, 4)), cut) == []
