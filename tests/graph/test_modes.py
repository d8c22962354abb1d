"""Warnings about random numbers in eval mode, and notes about training behavior that a captured graph loses."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import tersor
from tersor.checkpoint.structure import structure
from tersor.core.errors import CompressionWarning, InputError
from tersor.evaluation.costs import costs
from tersor.graph.capture import INPUTS, capture
from tersor.graph.forward_call import InputSpec
from tersor.graph.modes import training_notes
from tersor.methods.qat import QAT
from tersor.training.context import AttachContext
from toy_networks import Swish

IMAGES = torch.rand(2, 3, 4, 4)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 1), function

    def forward(self, images):
        return self.function(self.conv(images))


@pytest.mark.parametrize(
    "function", [lambda x: x + torch.rand(1), lambda x: x + torch.randn_like(x), lambda x: F.dropout(x, training=True)]
)
def test_random_numbers_in_eval_mode_cause_a_warning_with_the_line(function):
    with pytest.warns(CompressionWarning, match=r"random numbers in eval mode \(test_modes.py, line \d+: "):
        capture(Applied(function).eval(), IMAGES)


def attended(x):
    tokens = x.flatten(2).mT
    return F.scaled_dot_product_attention(tokens, tokens, tokens)


class Rows(nn.Module):
    """A recurrent layer over the rows of the first channel."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.layer(x[:, 0])


@pytest.mark.parametrize("function", [nn.Dropout(0.5), attended, Rows(), nn.RReLU()])
def test_random_numbers_in_training_only_cause_no_warning(function):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompressionWarning)
        capture(Applied(function).eval(), IMAGES)


class Frozen(nn.Sequential):
    """Keeps its BatchNorm in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def test_a_custom_train_method_is_noted():
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    network = nn.Sequential(nn.Identity(), Frozen(*layers)).train()
    (note,) = training_notes(capture(network, IMAGES))
    assert note.startswith("the compressed network does not use the custom train() of 1:")
    assert training_notes(capture(nn.Sequential(*layers), IMAGES)) == ()


class FunctionalNorm(nn.Module):
    """F.batch_norm with the module's own buffers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, images):
        return F.batch_norm(self.conv(images), self.mean, self.var, training=self.training)


class FrozenNorm(FunctionalNorm):
    def forward(self, images):
        return F.batch_norm(self.conv(images), self.mean, self.var)


def test_a_functional_batchnorm_that_uses_the_training_mode_is_noted():
    (note,) = training_notes(capture(nn.Sequential(nn.Identity(), FunctionalNorm()), IMAGES))
    assert note.startswith("the compressed network keeps F.batch_norm of 1 in eval mode")
    assert training_notes(capture(nn.Sequential(nn.Identity(), FrozenNorm()), IMAGES)) == ()


class Auxiliary(nn.Module):
    """Returns a second output in training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        features = self.conv(images)
        if self.training:
            return features, features.mean()
        return features


class Attention(nn.Module):
    """Drops attention weights in training."""

    def __init__(self, rate):
        super().__init__()
        self.drop = nn.Dropout(rate)
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        tokens = self.conv(images).flatten(2).mT
        return F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=self.drop.p if self.training else 0.0)


class Noise(nn.Module):
    """Does nothing in eval mode."""

    def forward(self, features):
        training = self.training
        return features + torch.randn_like(features) if training else features


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.noise = nn.Conv2d(3, 4, 1), Noise()

    def forward(self, images):
        return self.noise(self.conv(images))


def dropped(features, training):
    return F.dropout(features, 0.5, training)


class Passed(Auxiliary):
    def forward(self, images):
        return dropped(self.conv(images), training=self.training)


class Checkpointed(Auxiliary):
    use_checkpoint = False

    def forward(self, images):
        if self.use_checkpoint and self.training:
            return checkpoint(self.conv, images)
        return self.conv(images)


@pytest.mark.parametrize("network", [Auxiliary(), Attention(0.5)], ids=["output", "rate"])
def test_reading_the_training_mode_is_noted_with_the_line(network):
    (note,) = training_notes(capture(nn.Sequential(nn.Identity(), network), IMAGES))
    assert re.search(r"code for eval mode, .* method of 1 reads self\.training \(test_modes\.py, line \d+\)", note)
    line = int(note.rpartition(" ")[2].rstrip(")"))
    assert "self.training" in Path(__file__).read_text(encoding="utf-8").splitlines()[line - 1]


class Alpha(Auxiliary):
    def forward(self, images):
        return F.alpha_dropout(self.conv(images), 0.5, training=self.training)


def noisy(features, training):
    return features + torch.randn_like(features) if training else features


class Keyword(Auxiliary):
    def forward(self, images):
        return noisy(self.conv(images), training=self.training)


class Helped(Auxiliary):
    def forward(self, images):
        return self.mixed(self.conv(images))

    def mixed(self, features):
        return features + torch.randn_like(features) if self.training else features

    def unused(self):
        return self.training


class Shaken(Auxiliary):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 1), Shake())

    def forward(self, images):
        return self.conv(images)


class Shake(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = 0.5

    def forward(self, features):
        return features * (torch.rand(1) > self.p) if self.training else features * (1 - self.p)


@pytest.mark.parametrize("network", [Alpha(), Keyword(), Helped(), Shaken()], ids=lambda each: type(each).__name__)
def test_passing_the_training_mode_to_a_function_is_noted(network):
    (note,) = training_notes(capture(network, IMAGES))
    assert re.search(r"forward method of \S+ reads self\.training \(test_modes\.py, line", note)


class Parts(nn.Module):
    """A layer over the positions of a map, which the graph contains as separate operators."""

    def __init__(self, layer):
        super().__init__()
        self.conv, self.layer = nn.Conv2d(3, 4, 1), layer

    def forward(self, images):
        tokens = self.conv(images).flatten(2).mT
        return self.layer(tokens)[0] if isinstance(self.layer, nn.RNNBase) else self.layer(tokens, tokens, tokens)[0]


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize(
    "made",
    [
        lambda rate: nn.MultiheadAttention(4, 2, dropout=rate, batch_first=True),
        lambda rate: nn.GRU(4, 4, 2, dropout=rate, batch_first=True),
    ],
    ids=["attention", "GRU"],
)
def test_the_dropout_of_attention_and_recurrent_layers_is_noted(made, rate):
    notes = training_notes(capture(Parts(made(rate)).eval(), IMAGES))
    note = "the compressed network trains without the dropout of layer, because its graph was recorded in eval mode"
    assert notes == ((note,) if rate else ())


def test_a_module_without_operators_in_eval_mode_is_noted():
    (note,) = training_notes(capture(nn.Sequential(nn.Identity(), Noisy()), IMAGES))
    assert "the forward method of 1.noise reads self.training" in note


@pytest.mark.parametrize("network", [Attention(0.0), Checkpointed(), Passed()], ids=["rate", "checkpoint", "argument"])
def test_reading_the_training_mode_without_effect_is_not_noted(network):
    assert training_notes(capture(nn.Sequential(nn.Identity(), network), IMAGES)) == ()


class Standardized(nn.Conv2d):
    def forward(self, images):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(images, weight, self.bias)


def test_a_weight_computed_in_forward_is_noted():
    (note,) = training_notes(capture(nn.Sequential(nn.Identity(), Standardized(3, 4, 1)).eval(), IMAGES))
    assert note.startswith("the compressed network trains the weights of 1.conv2d directly")
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    assert training_notes(capture(nn.Sequential(parametrized, nn.ReLU()).eval(), IMAGES)) == ()


@pytest.mark.parametrize(
    ("count", "named"), [(2, "1.conv2d and 2.conv2d_1"), (3, "1.conv2d, ..., 3.conv2d_2 (3 in all)")]
)
def test_several_modules_are_not_named_as_a_range(count, named):
    layers = [Standardized(3, 3, 1) for _ in range(count)]
    (note,) = training_notes(capture(nn.Sequential(nn.Identity(), *layers).eval(), IMAGES))
    assert note.startswith(f"the compressed network trains the weights of {named} directly")


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_context, values):
        return values.round()

    @staticmethod
    def backward(_context, gradient):
        return gradient


def detached(values):
    return values + (values.round() - values).detach()


def test_a_custom_backward_with_different_gradients_is_noted():
    (note,) = training_notes(capture(Applied(StraightThrough.apply).eval(), IMAGES))
    assert note.startswith("the compressed network does not use the custom backward() of StraightThrough")


@pytest.mark.parametrize("function", [Swish.apply, detached, F.silu])
def test_a_custom_backward_with_the_gradients_of_autograd_is_not_noted(function):
    assert training_notes(capture(Applied(function).eval(), IMAGES)) == ()


def test_prune_warns_about_a_custom_backward():
    layers = nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), Applied(StraightThrough.apply)
    layers[-1].conv = nn.Conv2d(32, 4, 1)
    with pytest.warns(CompressionWarning, match=r"custom backward\(\) of StraightThrough"):
        tersor.prune(nn.Sequential(*layers).eval(), torch.rand(8, 3, 4, 4), keep_macs=0.7)


def test_a_users_training_loop_gets_a_warning_about_a_custom_backward():
    network = nn.Sequential(Applied(StraightThrough.apply), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    attached = QAT().attach(network.eval(), AttachContext(data=[IMAGES], steps=2))
    attached.begin()
    optimizer = torch.optim.SGD(attached.model.parameters(), 0.1)
    with pytest.warns(CompressionWarning, match=r"custom backward\(\) of StraightThrough") as caught:
        attached.bind(optimizer).remove()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached.bind(optimizer, start=0).remove()


class Assigns(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        self.conv.weight.data = self.conv.weight.data * 1.0
        return self.conv(images)


def test_errors_explain_torchscript_and_assignments_to_data():
    with pytest.raises(InputError, match=r"it uses the \.data of a tensor.*Read values with detach\(\)"):
        capture(Assigns(), IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Conv2d(3, 3, 1))
    with pytest.raises(InputError, match="0 is a TorchScript program"):
        capture(nn.Sequential(scripted, nn.Conv2d(3, 4, 1)), IMAGES)


class Shared(nn.Module):
    """One convolution with two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.second = self.first

    def forward(self, images):
        return self.second(images)


def test_a_state_dict_with_one_weight_under_two_names_loads_into_the_graph():
    network, other = Shared().eval(), Shared().eval()
    graph = capture(network, IMAGES)
    graph.load_state_dict(other.state_dict())
    torch.testing.assert_close(graph(IMAGES), other(IMAGES))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        graph.load_state_dict({**other.state_dict(), "third.weight": torch.zeros(1)})


def test_a_graph_module_not_captured_by_tersor_is_captured():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    graph = capture(traced, IMAGES)
    assert graph.meta[INPUTS] == (InputSpec(None, (3, 4, 4), "float32"),)
    torch.testing.assert_close(graph(IMAGES), traced(IMAGES))
    assert structure(traced)["inputs"] is None


def test_an_lstm_captured_as_operators_keeps_its_kind_in_the_costs():
    graph = capture(Applied(lambda x: x).eval(), IMAGES)
    assert {each.kind for each in costs(graph, IMAGES).layers} == {"Conv2d"}
    network = nn.Sequential(nn.Flatten(2), nn.LSTM(16, 4, batch_first=True)).eval()
    assert [each.kind for each in costs(capture(network, IMAGES), IMAGES).layers] == ["LSTM"]


class CopiedForward(nn.BatchNorm2d):
    """BatchNorm with torch's own forward method, as libraries copy it, and an activation."""

    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        if self.training:  # noqa: SIM108
            bn_training = True
        else:
            bn_training = self.running_mean is None
        return F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var,
            self.weight,
            self.bias,
            bn_training,
            self.momentum,
            self.eps,
        ).relu()


class NoisyNorm(CopiedForward):
    def forward(self, x):
        if self.training:
            x = x + torch.randn_like(x)
        return super().forward(x)


class SelectedTensor(nn.BatchNorm2d):
    def forward(self, x):
        shift = self.bias if self.training else 0.0
        return super().forward(x) + shift.mean() if self.training else super().forward(x)


@pytest.mark.parametrize(("kind", "noted"), [(CopiedForward, False), (NoisyNorm, True), (SelectedTensor, True)])
def test_training_code_of_a_batchnorm_is_noted_unless_it_is_that_of_torch(kind, noted):
    notes = training_notes(capture(nn.Sequential(nn.Conv2d(3, 4, 1), kind(4)).eval(), IMAGES))
    assert [("reads self.training" in note) for note in notes] == [True] * noted
