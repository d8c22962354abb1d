"""What a run says of an artifact that answers otherwise than torch."""

import re

import pytest
import torch

from tersor.methods.ptq import PTQ
from tersor.models import build
from tersor.pipeline.run import _disagreement
from tersor.training.context import AttachContext


@pytest.mark.parametrize(("bits", "harmless"), [(8, False), (4, True)])
def test_few_bits_may_answer_otherwise_and_eight_may_not(bits, harmless):
    attached = PTQ(activation_bits=bits).attach(
        build("resnet20", 10).eval(), AttachContext(data=[torch.randn(4, 3, 16, 16)])
    )
    attached.begin()
    told = _disagreement(96.0, attached.model, "accuracy")
    assert re.search(r"96.00 % of the artifact's predictions agree with torch's", told)
    assert ("Do not deploy model.onnx" in told) != harmless
    assert "Do not deploy model.onnx" in _disagreement(96.0, build("resnet20", 10), "accuracy")
