"""Circular padding works in both runtimes."""

from __future__ import annotations

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tersor

IMAGES = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))


class Padded(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.sizes = nn.Conv2d(3, 4, 3), sizes

    def forward(self, images):
        return self.conv(F.pad(images, self.sizes, mode="circular"))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 0, 0, 3), (1, 2, 0, 0), (0, 0, 4, 0)])
def test_an_exported_file_pads_like_torch(sizes, runtime, tmp_path):
    """`export` compares the outputs of the file with those of torch, on several images and on one."""
    path = tersor.export(Padded(*sizes).eval(), IMAGES, tmp_path / "model.onnx", runtime=runtime)
    operators = [each.op_type for each in onnx.load(path).graph.node]
    assert "Pad" not in operators
    assert operators.count("Concat") == any(sizes[2:]) + any(sizes[:2])
    assert operators.count("Slice") == sum(each > 0 for each in sizes)


def test_other_padding_modes_are_not_rewritten(tmp_path):
    path = tersor.export(nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3)).eval(), IMAGES, tmp_path / "m.onnx")
    assert [each.op_type for each in onnx.load(path).graph.node] == ["Pad", "Conv"]
