import copy
import math
import re
from functools import partial

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.evaluation.costs import costs
from tersor.graph.batchnorm_statistics import moments_of_batches
from tersor.graph.capture import capture
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.ptq import PTQ
from tersor.methods.weight_pruning import WeightPruning
from tersor.models import build
from tersor.training.context import AttachContext
from tersor.training.method import chain

IMAGES = torch.rand(8, 3, 16, 16)
STREAM = ("*.conv2",)
"""The layers that write into the residual stream of a ResNet."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("resnet20", 10).eval()


def attached(model, *, latency=None, **options):
    return ChannelPruning(**options).attach(model, AttachContext(data=[IMAGES], latency=latency))


class Curve:
    """Latency ratios of a machine on which latency is a curve of the MACs."""

    def __init__(self, curve):
        self.curve = curve
        self.asked = []

    def __call__(self, original, example, target):
        assert example.shape == (1, 3, 16, 16)
        assert target.runtime == "onnxruntime"
        return partial(self.ratio, original, example)

    def ratio(self, original, example, network):
        self.asked.append(costs(network, example).macs / costs(original, example).macs)
        return self.curve(self.asked[-1])


@pytest.mark.parametrize("keep", [0.45, 0.8])
def test_a_latency_is_met_and_no_more_goes_than_it_takes(model, keep):
    ratios = Curve(lambda macs: 0.3 + 0.7 * macs)  # half of the work takes 0.65 of the time
    before = costs(model, IMAGES[:1]).macs
    result = attached(model, keep_latency=keep, latency=ratios, round_to=2)
    fraction = costs(result.model, IMAGES[:1]).macs / before
    assert keep - 0.03 < 0.3 + 0.7 * fraction <= keep
    assert len(ratios.asked) <= 7
    assert any(f"{0.3 + 0.7 * fraction:.3f} of the measured latency at batch size 1" in note for note in result.notes)


def test_a_latency_that_no_width_reaches_raises(model):
    with pytest.raises(InputError, match=r"keep_latency: 0.3 cannot be met: a fraction of 0.9\d\d remain"):
        attached(model, keep_latency=0.3, latency=Curve(lambda macs: 0.9 + 0.1 * macs))
    with pytest.raises(InputError, match="latency_ratio"):
        attached(model, keep_latency=0.6)


@pytest.mark.parametrize("kind", ["macs", "parameters", "channels"])
def test_latency_is_not_measured_for_another_target(model, kind):
    def measure(*_arguments):
        pytest.fail("latency was measured")

    attached(model, latency=measure, **{f"keep_{kind}": 0.8})


def test_measuring_latency_does_not_change_the_model(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError):
        attached(model, keep_latency=0.3, latency=Curve(lambda _macs: 1.0))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_at_most_the_requested_fraction_remains(model, scope, kind):
    before = costs(model, IMAGES[:1])
    after = costs(attached(model, scope=scope, **{f"keep_{kind}": 0.6}).model, IMAGES[:1])
    left = getattr(after, kind) / getattr(before, kind)
    assert 0.4 < left <= 0.6


def test_widths_are_rounded_and_at_least_the_floor(model):
    pruned = attached(model, keep_channels=0.4, round_to=4, floor=0.3).model
    widths = {
        name: pruned.get_submodule(name).out_channels
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    assert all(width % 4 == 0 for width in widths.values())
    assert widths["layer3.1.conv1"] >= 0.3 * 64
    inner = [width for name, width in widths.items() if name.endswith(".conv1")]
    assert sum(inner) <= 0.5 * 3 * (16 + 32 + 64)
    assert 0.3 * 16 <= widths["conv1"] < 16, "the residual stream too, zeros that pad it and all"
    assert pruned(IMAGES).shape == (8, 10)


def test_the_channels_with_the_smallest_weights_are_removed(model):
    weight = model.layer1[0].conv1.weight.data
    small = torch.arange(1, 16, 2)
    weight[small] *= 0.01
    model.layer1[0].conv2.weight.data[:, small] *= 0.01
    kept = weight[0::2].clone()
    pruned = attached(model, keep_channels=0.5, exclude=STREAM).model
    assert torch.equal(pruned.get_submodule("layer1.0.conv1").weight, kept)


@pytest.mark.parametrize("importance", ["magnitude_l1", "taylor", "batchnorm", "fpgm", "obs", "random"])
def test_every_importance_meets_the_target(model, importance):
    data = [(IMAGES, torch.arange(8))]
    before = costs(model, IMAGES[:1]).macs
    pruned = (
        ChannelPruning(keep_macs=0.7, importance=importance, scope="global")
        .attach(model, AttachContext(data=data))
        .model
    )
    assert 0.5 < costs(pruned, IMAGES[:1]).macs / before <= 0.7


def test_a_users_importance_function_selects_the_channels(model, tmp_path, monkeypatch):
    (tmp_path / "keeps_the_last.py").write_text(
        "import torch\ndef last(group): return torch.arange(len(group.slices))\n"
    )
    monkeypatch.chdir(tmp_path)
    expected = model.layer1[0].conv1.weight[8:].clone()
    pruned = attached(model, keep_channels=0.5, importance="keeps_the_last:last", exclude=STREAM).model
    assert torch.equal(pruned.get_submodule("layer1.0.conv1").weight, expected)
    with pytest.raises(InputError, match="importance"):
        ChannelPruning(importance="magnitud")


def test_constant_outputs_of_removed_channels_are_compensated():
    """Without a BatchNorm after the layer, removing dead channels does not change the outputs."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    model[1].running_mean.uniform_(-1, 1)  # statistics that match no images
    model[1].running_var.uniform_(0.5, 2)
    with torch.no_grad():
        model[1].weight[::2], model[1].bias[::2] = 0, 0.8
    expected = model(IMAGES)
    result = attached(model, keep_channels=0.5, round_to=4, importance="batchnorm", exclude=("3",))
    assert not torch.allclose(result.model(IMAGES), expected, atol=1e-2)
    result.begin()
    assert result.model.get_submodule("0").out_channels == 4
    assert torch.allclose(result.model(IMAGES), expected, atol=1e-5)


def test_mean_and_deviation_of_batchnorm_outputs_are_restored(model):
    model.train()
    for _ in range(200):
        model(IMAGES)
    model.eval()

    def given(network):
        seen = []
        hook = network.get_submodule("layer1.0.bn2").register_forward_hook(lambda _, _given, out: seen.append(out))
        network(IMAGES)
        hook.remove()
        values = seen[0].movedim(1, 0).flatten(1)
        return torch.cat([values.mean(1), values.std(1)])

    expected = given(model)
    result = attached(model, keep_channels=0.5, exclude=STREAM)
    assert (given(result.model) - expected).abs().max() > 0.2
    result.begin()
    assert (given(result.model) - expected).abs().max() < 0.01


def test_measuring_the_inputs_of_batchnorm_does_not_change_the_network(model):
    model(IMAGES)
    before = copy.deepcopy(model.state_dict())
    found = moments_of_batches(capture(model, IMAGES), [IMAGES], 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = []
    model.bn1.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(IMAGES)
    assert torch.allclose(found["bn1"].mean, inputs[0].mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(found["bn1"].std, inputs[0].transpose(0, 1).flatten(1).std(1), atol=1e-5)
    assert model.bn1.momentum == 0.1
    assert not model.bn1.training


def test_keeping_everything_changes_nothing(model):
    before = model(IMAGES)
    result = attached(model, keep_macs=1.0)
    result.begin()
    assert torch.equal(result.model(IMAGES), before)


def test_layers_that_cannot_be_pruned_are_listed_in_the_notes(model):
    notes = attached(model, keep_macs=0.6).notes
    assert "the channels of linear are not removed, since they are outputs of the network" in notes


def test_a_network_is_pruned_and_then_quantized(model):
    result = chain([ChannelPruning(keep_macs=0.6), PTQ()], model, AttachContext(data=[IMAGES]))
    result.begin()
    assert result.model(IMAGES).isfinite().all()


class Crnn(nn.Module):
    """Convolutions, followed by a recurrent layer over the columns."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 1, 1)
        self.rnn, self.head = kind(256, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, images):
        x = torch.relu(self.b(torch.relu(self.a(images)))).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_fraction_includes_the_macs_of_recurrent_layers(kind):
    network = Crnn(kind).eval()
    before = costs(network, IMAGES[:1])
    inside = 8 * sum(weight.numel() for name, weight in network.rnn.named_parameters() if "weight" in name)
    assert before.macs == 16 * 27 * 64 + 32 * 144 * 64 + inside + 320
    after = costs(attached(network, keep_macs=0.8, round_to=2).model, IMAGES[:1])
    assert 0.6 < after.macs / before.macs <= 0.8
    read = 8 * after.layers[1].weight_shape[0]
    assert read < 256, "features that a removed channel wrote are read no more"
    assert [layer.name for layer in after.layers] == ["a", "b", "rnn", "head"]
    assert after.layers[2].macs * (256 + 32) == inside * (read + 32)


def test_a_fraction_that_is_not_reached_says_by_how_much_and_because_of_which_layers():
    network = nn.Sequential(Crnn(nn.LSTM), nn.Unflatten(1, (5, 2)), nn.LSTM(2, 64, batch_first=True)).eval()
    spent = {layer.name: layer.macs for layer in costs(network, IMAGES[:1]).layers}
    total = sum(spent.values())
    narrow = spent["0.a"] / 4 + spent["0.b"] / 4 / 8 + spent["0.rnn"] * (256 / 8 + 32) / (256 + 32)
    left = (narrow + spent["0.head"] + spent["2"]) / total
    with pytest.raises(InputError) as caught:
        attached(network, keep_macs=0.1, round_to=4)
    message = str(caught.value)
    assert f"keep_macs: 0.1 cannot be met: a fraction of {left:.3f} remains after all possible removals, " in message
    assert f", {left - 0.1:.3f} more than the target" in message
    assert f"Remaining fraction of all MACs: {spent['2'] / total:.3f} in 2 (no part of it is removed), " in message
    assert f"{narrow / total:.3f} in 0.rnn, 0.b, 0.a (as narrow as `floor` and `round_to` allow)" in message
    share = spent["0.head"] / total
    assert f"{share:.3f} in 0.head (output channels not removed: _1 fails if some of them are removed: " in message
    of_floor = ", or (in a recipe) a lower `floor`."
    assert message.endswith(f"Write {math.ceil(1000 * left) / 1000:.3f} or more, or a lower `round_to`{of_floor}")
    for floor, words in ((0.1, of_floor), (0.0, ".")):
        with pytest.raises(InputError, match=rf"Write [\d.]+ or more{re.escape(words)}$"):
            attached(network, keep_macs=0.001, round_to=1, floor=floor)


def test_uncounted_operators_are_listed_in_the_notes(model):
    class Spectrum(nn.Module):
        def forward(self, images):
            return images + torch.fft.fft2(images).real

    network = nn.Sequential(Spectrum(), model)
    assert "the MACs do not include these uncounted operators: aten._fft_c2c in 0" in attached(network).notes


def test_excluded_layers_and_similar_layers_are_listed_together_in_the_error(model):
    with pytest.raises(InputError) as caught:
        attached(model, keep_parameters=0.01, exclude=("layer2",), round_to=1, floor=0)
    message = str(caught.value)
    assert "Remaining fraction of all parameters: " in message
    assert re.search(r"0\.\d+ in layer2\.\d\.conv\d, .*, \.\.\. \(\d+ in all\) \(excluded\)", message)
    assert message.endswith(" or more.")


def test_wrong_arguments_and_unsupported_networks_raise(model):
    with pytest.raises(InputError, match="one target"):
        attached(model, keep_macs=0.5, keep_channels=0.5)
    with pytest.raises(InputError, match="needs images"):
        ChannelPruning().attach(model, AttachContext())
    with pytest.raises(InputError, match=r"cannot be met: a fraction of 0\.\d+ remain"):
        attached(model, keep_macs=0.01)
    with pytest.raises(InputError, match="no channel"):
        attached(model, exclude=("layer*",))
    masked = WeightPruning().attach(copy.deepcopy(model), AttachContext()).model
    with pytest.raises(InputError, match="before"):
        attached(masked)
    normed = copy.deepcopy(model)
    nn.utils.parametrizations.weight_norm(normed.conv1)
    with pytest.raises(InputError, match="the weight of conv1 has a _WeightNorm parametrization"):
        attached(normed)
    with pytest.raises(InputError, match="Move ChannelPruning to a separate, later stage"):
        chain([ChannelPruning(keep_macs=0.8), ChannelPruning(keep_macs=0.7)], model, AttachContext(data=[IMAGES]))


def test_a_network_with_stored_gradients_can_be_trained_after_pruning(model):
    model.train()(IMAGES).square().mean().backward()
    result = attached(model, keep_macs=0.6)
    result.begin()
    before = result.model.get_submodule("layer1.0.conv1").weight.clone()
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.1)
    result.model.train()(IMAGES).square().mean().backward()
    optimizer.step()
    assert not torch.equal(result.model.get_submodule("layer1.0.conv1").weight, before)


def test_branches_are_removed_before_channels(model):
    before = costs(model, IMAGES[:1])
    weak = model.layer2[1]
    weak.bn2.weight.data *= 1e-3
    kept = attached(copy.deepcopy(model), keep_macs=0.8, exclude=STREAM)
    result = attached(model, keep_macs=0.8, branches=1, exclude=STREAM)
    layers = dict(result.model.named_modules())
    assert "layer2.1.conv1" not in layers
    assert "removed branches: layer2.1.conv1 to layer2.1.bn2" in result.notes
    assert 0.7 < costs(result.model, IMAGES[:1]).macs / before.macs <= 0.8, "of the network with them"
    assert layers["layer1.0.conv1"].out_channels >= kept.model.get_submodule("layer1.0.conv1").out_channels
    assert sum(each.out_channels for each in convolutions(result)) > sum(
        each.out_channels for each in convolutions(kept)
    )
    result.begin()
    assert result.model(IMAGES).isfinite().all()


def convolutions(result):
    """The convolutions of all blocks except the one that is removed above."""
    layers = result.model.named_modules()
    return [each for name, each in layers if isinstance(each, nn.Conv2d) and not name.startswith("layer2.1.")]


@pytest.mark.parametrize(("kind", "removed"), [("macs", "layer1.1"), ("parameters", "layer3.1")])
def test_of_equally_important_branches_the_most_expensive_is_removed(model, kind, removed, monkeypatch):
    monkeypatch.setattr("tersor.methods.channel_pruning.removal_cost", lambda _graph, found, *_: [1.0] * len(found))
    model.layer1[1].conv1 = nn.Conv2d(16, 16, 5, padding=2, bias=False)  # more MACs than any other
    result = attached(model, **{f"keep_{kind}": 0.9}, branches=1, exclude=STREAM)
    assert f"removed branches: {removed}.conv1 to {removed}.bn2" in result.notes


def test_target_fractions_are_relative_to_the_network_with_its_branches(model):
    ratios = Curve(lambda macs: macs)
    before = costs(model, IMAGES[:1]).macs
    result = attached(copy.deepcopy(model), keep_latency=0.6, branches=2, latency=ratios)
    fraction = costs(result.model, IMAGES[:1]).macs / before
    assert 0.56 < fraction <= 0.6
    assert any(f"and {fraction:.3f} of the MACs" in note for note in result.notes)
    with pytest.raises(InputError, match=r"keep_macs: 0\.1 cannot be met: a fraction of 0\.[12]\d\d remain"):
        attached(model, keep_macs=0.1, branches=2, floor=0.5)


def test_too_many_branches_raise(model):
    with pytest.raises(InputError, match=r" has 9 that can be removed: layer1\.0\.conv1 to layer1\.0\.bn2 \.\.\. "):
        attached(model, branches=10)
    with pytest.raises(InputError, match=r"has none that can be removed\. Write branches: 0\."):
        ChannelPruning(branches=1).attach(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), AttachContext(data=[IMAGES])
        )


def test_removing_branches_can_be_enough(model):
    result = attached(model, keep_macs=0.95, branches=1, exclude=("*",))
    assert len(result.notes) == 1
    result.begin()
    result = attached(build("resnet20", 10), keep_macs=1.0, branches=9)
    assert [name for name, layer in result.model.named_modules() if isinstance(layer, nn.Conv2d)] == ["conv1"]


def test_a_network_is_not_changed_if_pruning_raises(model):
    graph = capture(model, IMAGES)
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    with pytest.raises(InputError, match="cannot be met"):
        attached(graph, keep_macs=0.01, branches=3)
    with pytest.raises(InputError, match=r"does not run on images \(4, 16, 16\)"):
        ChannelPruning(branches=1).attach(graph, AttachContext(data=[torch.rand(8, 4, 16, 16)]))
    assert graph.state_dict().keys() == before.keys()
    assert "cuts" not in graph.meta
    assert all(torch.equal(before[key], value) for key, value in graph.state_dict().items())
