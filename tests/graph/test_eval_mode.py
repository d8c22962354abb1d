from __future__ import annotations

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.graph.eval_mode import check_forward


class Squeezed(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)).squeeze()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_network_is_run_on_two_images(count):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    images = torch.randn(count, 3, 2, 2)
    two = torch.cat([images, images])[:2] if count == 1 else images[:2]
    assert torch.equal(check_forward("the network", network, images), network(two))


@pytest.mark.parametrize("count", [1, 2])
def test_a_squeezed_batch_dimension_raises(count):
    with pytest.raises(InputError, match=r"shape \(2, 3\) for two images and \(3,\) for one"):
        check_forward("the network", Squeezed().eval(), torch.randn(count, 3, 2, 2))


class Converted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, images):
        return self.layer(images.flatten(1).bfloat16())


def test_a_conversion_to_another_precision_is_named_in_the_error():
    with pytest.raises(InputError, match=r"BFloat16.* Remove conversions to another precision, such as x\.bfloat16"):
        check_forward("the network", Converted().eval(), torch.randn(2, 3, 2, 2))
