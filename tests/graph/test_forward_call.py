"""Running a user's network on images in channels_last."""

import pytest
import torch
from torch import nn

import tersor
from tersor.graph.forward_call import run

IMAGES = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)


class Viewing(nn.Module):
    """Flattens its feature map with `view`, as many networks do."""

    def __init__(self, flatten=lambda features: features.view(features.size(0), -1)):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 6, 3)
        self.classifier = nn.Linear(6 * 6 * 6, 10)
        self.flatten = flatten

    def forward(self, images):
        return self.classifier(self.flatten(self.features(images)))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda features: features.view(features.size(0), -1),
        lambda features: features.view(size=(-1, 216)),
        lambda features: features.view_as(torch.empty(len(features), 216)),
    ],
    ids=["view", "keyword", "view_as"],
)
def test_features_in_channels_last_can_be_viewed(flatten):
    network = Viewing(flatten)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        network(IMAGES)
    torch.testing.assert_close(run(network, IMAGES), network(IMAGES.contiguous()))


def test_an_invalid_view_raises():
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        run(Viewing(lambda features: features.view(4, 7)), IMAGES)


def test_a_network_that_views_its_features_can_be_trained():
    student = tersor.distill(Viewing(), Viewing(), [(IMAGES, torch.tensor([0, 1, 2, 3]))])
    assert all(parameter.is_contiguous() for parameter in student.parameters())
