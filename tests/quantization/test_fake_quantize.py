from __future__ import annotations

import pytest
import torch

from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid


def tracking() -> FakeQuantize:
    """A quantizer of activations whose running means have seen one range."""
    quantizer = FakeQuantize(Grid(0, 255)).track_activations(0.1)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    return quantizer.train()


@pytest.mark.parametrize("active", [True, False])
def test_a_state_dict_restores_whether_the_range_still_moves(active):
    saved, loaded = tracking(), tracking()
    saved.observer.active = active
    loaded.observer.active = not active
    loaded.load_state_dict(saved.state_dict())
    assert loaded.is_trained is active
    loaded(torch.tensor([-8.0, 8.0]))
    assert (float(loaded.observer.high) > 1) is active
