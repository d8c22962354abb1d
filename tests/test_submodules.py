"""A single submodule can be compressed; the rest of the user's network is not changed and still runs."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import InputError

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.deeper = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.out = nn.Conv2d(16, 8, 1)

    def forward(self, images):
        fine = self.stem(images)
        coarse = self.deeper(fine)
        return OrderedDict([("fine", self.out(fine)), ("coarse", self.out(coarse))])


class Detector(nn.Module):
    """Keeps all positions with a high score, so that the number of outputs depends on the values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = Backbone(), nn.Conv2d(8, 1, 1)

    def forward(self, images):
        found = []
        for features in self.backbone(images).values():
            scores = self.head(features).flatten(1)
            found += [each[each > each.mean()] for each in scores if each.max() > -100]
        return found


def test_compressing_the_whole_detector_raises_and_suggests_the_backbone(tmp_path, capfd):
    for attempt in (
        lambda: tersor.quantize(Detector().eval(), [IMAGES]),
        lambda: tersor.prune(Detector().eval(), [IMAGES]),
        lambda: tersor.export(Detector().eval(), IMAGES, tmp_path / "detector.onnx"),
    ):
        with pytest.raises(InputError, match=r"test_submodules.py, line \d+.*model\.backbone"):
            attempt()
    assert capfd.readouterr() == ("", ""), "the exporter prints its graph"


@pytest.mark.parametrize("compress", [tersor.quantize, tersor.prune])
def test_a_backbone_with_a_dict_of_features_can_be_compressed_separately(compress, tmp_path):
    detector = Detector().eval()
    before = detector.backbone(IMAGES)
    detector.backbone = compress(detector.backbone, [IMAGES])
    after = detector.backbone(IMAGES)
    assert isinstance(after, OrderedDict)
    assert list(after) == ["fine", "coarse"]
    assert [each.shape for each in after.values()] == [each.shape for each in before.values()]
    assert len(detector(IMAGES)) == 8
    detector.train()
    assert detector.backbone.get_submodule("stem.1").training
    sum(each.sum() for each in detector(IMAGES)).backward()
    assert detector.backbone.get_submodule("stem.0").bias.grad is not None
    assert tersor.export(detector.eval().backbone, IMAGES, tmp_path / "backbone.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_backbones_of_torchvisions_detectors_can_be_compressed(name):
    import torchvision

    size = 320 if "320" in name else 64
    options = {} if "320" in name else {"min_size": size, "max_size": size}
    torch.manual_seed(0)
    detector = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3, **options).eval()
    images = torch.rand(2, 3, size, size)
    with pytest.raises(InputError, match=r"model\.backbone"):
        tersor.quantize(detector, [images])
    before = detector.backbone(images)
    detector.backbone = tersor.quantize(detector.backbone, [images])
    assert list(detector.backbone(images)) == list(before)
    assert [set(each) for each in detector(list(images))] == [{"boxes", "scores", "labels"}] * 2
