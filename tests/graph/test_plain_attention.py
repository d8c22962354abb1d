from __future__ import annotations

import pytest
import torch
from torch import nn

from tersor.graph.capture import capture
from tersor.graph.plain_attention import PlainAttention, with_plain_attention

QUERY, OTHER = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
MASKS = {
    "none": None,
    "of booleans": CAUSAL,
    "of numbers": torch.zeros(5, 5).masked_fill(CAUSAL, float("-inf")),
    "of each head": CAUSAL.expand(4, 5, 5),
}


def pair(**options):
    """The same attention module twice: torch's, and the plain version."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, **options).eval()])
    for parameter in model.parameters():
        parameter.data.normal_()
    theirs = model[0]
    ours = with_plain_attention(model)[0]
    assert type(ours) is PlainAttention
    assert ours.in_proj_weight is theirs.in_proj_weight
    return ours, theirs


def same(ours, theirs, *given, **options):
    found, expected = ours(*given, **options), theirs(*given, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    if expected[1] is None:
        assert found[1] is None
    else:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks(mask, need_weights):
    given = MASKS[mask] if mask != "of each head" else MASKS[mask].clone()
    same(*pair(batch_first=True), QUERY, QUERY, QUERY, attn_mask=given, need_weights=need_weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layouts_other_keys_and_weights_of_each_head(batch_first, bias):
    both = pair(batch_first=batch_first, bias=bias)
    query, other = (QUERY, OTHER) if batch_first else (QUERY.transpose(0, 1), OTHER.transpose(0, 1))
    same(*both, query, other, other)
    same(*both, query, other, 2 * other, average_attn_weights=False)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 6}], ids=str)
def test_unsupported_options_keep_the_module_of_torch(options):
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, **options)])
    assert type(with_plain_attention(model)[0]) is nn.MultiheadAttention


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True, **options), nn.Linear(8, 3)

    def forward(self, images):
        tokens = images.flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


@pytest.mark.parametrize("options", [{}, {"add_zero_attn": True}], ids=str)
def test_plain_attention_is_captured_with_the_keys_of_torch(options):
    torch.manual_seed(0)
    model, images = Attends(**options).eval(), torch.randn(2, 8, 3, 3)
    graph = capture(model, images)
    torch.testing.assert_close(graph(images), model(images))
    assert graph.state_dict().keys() == model.state_dict().keys()
    other = Attends(**options).eval()
    graph.load_state_dict(other.state_dict())
    torch.testing.assert_close(graph(images), other(images))
    torch.testing.assert_close(model(images), other(images), msg="the same Parameters")
