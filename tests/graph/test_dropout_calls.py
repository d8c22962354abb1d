"""Calls of dropout whose `training` argument is False in the source code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.graph.aten import operator_name
from tersor.graph.capture import capture

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A convolution, and a method or function with dropout."""

    def __init__(self, drop):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.drop = drop

    def mixed(self, x):
        return F.dropout(x, 0.5, self.training)


class Constant(Network):
    def forward(self, x):
        x = torch.flatten(F.dropout2d(self.conv(x).relu(), 0.5, training=False).mean((2, 3)), 1)
        return self.head(
            F.dropout(
                x,
                p=0.5,
                training=False,
            )
        )


class InPlace(Network):
    def forward(self, x):
        x = F.dropout(self.conv(x), 0.5, False, True)
        return self.head(x.relu().mean((2, 3)))


class InPlaceInTraining(Network):
    def forward(self, x):
        x = F.dropout(self.conv(x), 0.5, self.training, True)
        x = F.dropout2d(x, 0.2, self.training, inplace=True)
        return self.head(x.mean((2, 3)))


class Nested(Network):
    def forward(self, x):
        return self.head(F.dropout(F.dropout(self.conv(x).mean((2, 3)), 0.5, self.training), 0.2, training=False))


class InMethod(Network):
    def forward(self, x):
        x = self.mixed(F.dropout(self.conv(x).mean((2, 3)), 0.2, False))
        return self.head(x)


class OtherThirdArgument(Network):
    def forward(self, x):
        x = F.dropout(self.conv(x).mean((2, 3)), 0.5, self.training).flatten(1).norm(2, 1, False)
        return self.head(x[:, None].expand(-1, 4))


class OfTheModule(Network):
    def forward(self, x):
        x = self.drop(self.conv(x).mean((2, 3)))
        return self.head(x)


def drops(network):
    return [node for node in capture(network, IMAGES).graph.nodes if "dropout" in str(node.target)]


@pytest.mark.parametrize("kind", [Constant, InPlace])
def test_a_call_with_the_constant_false_is_not_part_of_the_graph(kind):
    assert not drops(kind(None).eval())
    graph = capture(kind(None).eval(), IMAGES)
    assert not [node for node in graph.graph.nodes if "dropout" in operator_name(node)]


@pytest.mark.parametrize("kind", [InPlaceInTraining, Nested, InMethod, OtherThirdArgument, OfTheModule])
def test_dropout_stays_if_another_call_on_the_line_may_drop(kind):
    network = kind(nn.Dropout(0.5)).eval()
    found = capture(network, IMAGES).train()
    torch.manual_seed(0)
    first = found(IMAGES)
    assert not torch.equal(found(IMAGES), first)
