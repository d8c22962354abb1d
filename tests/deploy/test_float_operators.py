"""The entries of `numbers.json` about the operators that are not computed in integers."""

from __future__ import annotations

import json

import torch
from torch import nn

from tersor.deploy.float_operators import float_operators
from tersor.methods.ptq import PTQ
from tersor.training.context import AttachContext

IMAGES = torch.rand(4, 3, 8, 8)


def network():
    torch.manual_seed(0)
    ends = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 10)
    return nn.Sequential(*ends).eval()


def test_float_operators_are_listed_as_plain_values_with_a_warning():
    attached = PTQ().attach(network(), AttachContext(data=[IMAGES]))
    attached.begin()
    entries, warning = float_operators(attached.model, IMAGES)
    total = 3 * 8 * 64 + 8 * 8 * 64 + 512 * 10
    reason = "tersor does not quantize ConvTranspose2d"
    expected = {"name": "2", "kind": "ConvTranspose2d", "reason": reason}
    assert entries["float_operators"] == [{**expected, "macs": 4096, "share": 4096 / total}]
    assert entries["integer_macs_share"] == 1 - 4096 / total
    assert entries["uncounted_operators"] == []
    assert json.loads(json.dumps(entries)) == entries
    assert warning is not None
    assert "38.1 %" in warning


def test_a_float_network_has_no_integer_share():
    expected = {"integer_macs_share": None, "float_operators": [], "uncounted_operators": []}
    assert float_operators(network(), IMAGES) == (expected, None)
