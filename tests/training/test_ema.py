from __future__ import annotations

import torch
from torch import nn

from tersor.training.ema import WeightEMA


def test_the_average_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    ema = WeightEMA(model, decay=0.5)
    expected = model.weight.item()
    for step, weight in enumerate([3.0, -1.0, 2.0, 5.0, 8.0, 9.0, 7.0, 4.0, 1.0, 0.0, 6.0]):
        nn.init.constant_(model.weight, weight)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert model.weight.item() == 6
    ema.copy_to(model)
    torch.testing.assert_close(model.weight.item(), expected)


def test_batchnorm_statistics_are_averaged_and_other_buffers_are_not():
    model = nn.BatchNorm2d(2)
    model.register_buffer("mask", torch.tensor([0.0, 1.0]))
    ema = WeightEMA(model, decay=0.9)
    assert set(ema.averages) == {"weight", "bias", "running_mean", "running_var"}
    model.mask.fill_(1)
    model.running_mean.fill_(10)
    ema.update(model, 0)
    ema.copy_to(model)
    assert model.mask.tolist() == [1, 1]
    torch.testing.assert_close(model.running_mean, torch.full((2,), 9.0))
