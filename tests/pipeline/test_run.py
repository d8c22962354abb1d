"""What a run says of an artifact that answers otherwise than torch."""

import pytest
import torch

from tersor.methods.ptq import PTQ
from tersor.models import build
from tersor.pipeline.run import _told_of_disagreement
from tersor.training.context import AttachContext


@pytest.mark.parametrize(("bits", "harmless"), [(8, False), (4, True)])
def test_few_bits_may_answer_otherwise_and_eight_may_not(bits, harmless):
    attached = PTQ(activation_bits=bits).attach(
        build("resnet20", 10).eval(), AttachContext(data=[torch.randn(4, 3, 16, 16)])
    )
    attached.begin()
    told = _told_of_disagreement(96.0, attached.model)
    assert told.startswith("the artifact gives 96.00 % of torch's answers")
    assert ("do not ship it" in told) != harmless
    assert "do not ship it" in _told_of_disagreement(96.0, build("resnet20", 10))
