"""The predicted loss of removing channels, compared with the measured loss on networks where the formula is exact."""

import copy

import pytest
import torch
from torch import nn

from tersor import tasks
from tersor.core.errors import InputError
from tersor.graph.capture import capture
from tersor.pruning.channel_groups import coupled_channels, merge_cuts, remove
from tersor.pruning.least_squares import apply_fits, fit_layers
from tersor.pruning.optimal_brain_surgeon import loss_increases

IMAGES = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = IMAGES.split(16)
"""All images are used."""


def net(width=6):
    """The logits read the channels directly, so that they are linear in them."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)
    return nn.Sequential(*layers).eval()


def lost(model, data=DATA, images=64, **options):
    """The group of the first layer, and the loss of removing each of its channels."""
    graph = capture(copy.deepcopy(model), IMAGES)
    (group,) = [group for group in coupled_channels(graph, IMAGES)[0] if group.root == "0"]
    (found,) = loss_increases(graph, [group], data, images, **options)
    return group, found


@torch.no_grad()
def measured(model, group, channels):
    """Half of the mean squared change of the centered logits, with the next layer fitted."""
    graph = capture(copy.deepcopy(model), IMAGES)
    cuts, before = merge_cuts(group.cuts(channels)), graph(IMAGES)
    fits = fit_layers(graph, cuts, DATA, len(IMAGES))
    remove(graph, cuts)
    apply_fits(graph, fits)
    change = graph(IMAGES) - before
    return float((change - change.mean(1, keepdim=True)).square().sum(1).mean()) / 2


@pytest.fixture
def even_signs(monkeypatch):
    """Random signs whose mean product is exactly the identity: each image selects one logit, in turn."""

    def drawn(_low, _high, shape, generator):
        one_hot = nn.functional.one_hot(torch.arange(shape[0]) % shape[1], shape[1]) * shape[1] ** 0.5
        return (one_hot + 1) / 2  # 0 and 1 are converted to signs

    monkeypatch.setattr(torch, "randint", drawn)


@pytest.mark.usefixtures("even_signs")
def test_predicted_loss_equals_measured_loss_for_one_and_several_channels():
    model = net()
    group, found = lost(model)
    order = found.argsort().tolist()
    alone = [measured(model, group, [channel]) for channel in range(6)]
    assert order[0] == min(range(6), key=alone.__getitem__)
    for count in range(1, 6):
        together = float(found[order[:count]].sum())
        assert together == pytest.approx(measured(model, group, order[:count]), rel=0.01), count


def test_of_two_proportional_channels_only_the_second_removal_is_expensive():
    model = net()
    for tensor in (model[0].weight, model[0].bias):
        tensor.data[4] = 2 * tensor.data[1]
    _, found = lost(model)
    assert sorted(found.argsort().tolist().index(channel) for channel in (1, 4))[0] == 0
    assert float(found[[1, 4]].min()) < 0.02 * float(found[[1, 4]].max())


@pytest.mark.usefixtures("even_signs")
def test_channels_that_cancel_each_other_are_removed_together():
    """Two channels nearly cancel each other: without one of them, the other has hardly any weight left."""
    model = net()
    model[0].weight.data[4] = model[0].weight.data[1] + 0.5 * model[0].weight.data[0]
    model[0].bias.data[4] = model[0].bias.data[1]
    model[-1].weight.data[:, 4] = -1.001 * model[-1].weight.data[:, 1]
    group, found = lost(model)
    order = found.argsort(stable=True).tolist()
    assert set(order[:2]) == {1, 4}
    assert float(found[order[0]]) == pytest.approx(measured(model, group, order[:1]), rel=0.1)


def test_with_too_few_positions_equal_channels_do_not_replace_each_other():
    """With few positions, neither of two equal channels can replace the other."""
    model = net()
    for tensor in (model[0].weight, model[0].bias):
        tensor.data[4] = tensor.data[1]
    model[-1].weight.data[:, 4] = model[-1].weight.data[:, 1]
    _, found = lost(model, [IMAGES[:4]], 4)
    assert float(found[1]) == pytest.approx(float(found[4]), rel=1e-4)
    assert float(found[1]) > 0


def test_the_losses_of_all_layers_that_read_a_channel_are_added():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return (self.left(x).relu() + self.right(x).relu()).mean((2, 3))

    torch.manual_seed(0)
    graph = capture(Forked().eval(), IMAGES)
    (group,) = [group for group in coupled_channels(graph, IMAGES)[0] if group.root == "first"]
    graph.left.weight.data[:, :3] = 0
    graph.right.weight.data[:, 2:] = 0
    (found,) = loss_increases(graph, [group], DATA, len(IMAGES))
    assert int(found.argmin()) == 2, "which neither reads"
    assert float(found[2]) < 1e-30
    assert float(found[[0, 1, 3, 4, 5]].min()) > 0


def test_a_group_read_only_by_a_grouped_convolution_has_no_score():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = capture(model.eval(), IMAGES)
    groups = [group for group in coupled_channels(graph, IMAGES)[0] if group.root == "0"]
    assert loss_increases(graph, groups, DATA, 64) == [None] * len(groups)


def test_scoring_does_not_change_the_network():
    model = net().train()
    model.requires_grad_(requires_grad=False)
    graph = capture(model, IMAGES)
    (group,) = [group for group in coupled_channels(graph, IMAGES)[0] if group.root == "0"]
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    (found,) = loss_increases(graph, [group], DATA, 32)
    assert float(found.sum()) > 0, "frozen weights lose no less"
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.state_dict().items())
    assert graph.training
    assert all(parameter.grad is None for parameter in graph.parameters())
    assert not any(module._forward_hooks for module in graph.modules())


@pytest.mark.parametrize("width", [6, 256])
def test_removing_one_of_two_equal_channels_costs_nothing(width):
    """Also in a group so wide that several channels are removed at once."""
    model = net(width)
    for tensor in (model[0].weight, model[0].bias):
        tensor.data[4] = tensor.data[1]
    model[-1].weight.data[:, [1, 4]] = torch.tensor([[3.0, -3, 3, -3]]).T.expand(4, 2)
    images = torch.randn(1024, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    _, found = lost(model, images.split(256), 1024)
    assert float(found[[1, 4]].max()) > 50 * float(found[[1, 4]].min())


def test_a_mean_much_larger_than_the_deviation_does_not_change_the_scores():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(*layers).eval()
    images = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    _, near = lost(model, images.split(16))
    model[0].bias.data += 300
    model[1].bias.data -= 300 * model[1].weight.sum((1, 2, 3)).detach()
    _, far = lost(model, images.split(16))
    assert torch.allclose(near, far, rtol=0.02)


def test_a_network_with_one_logit_has_nonzero_scores():
    model = net()
    model[-1] = nn.Linear(6, 1)
    _, found = lost(model)
    assert float(found.min()) > 1e-12


class Wrapped(nn.Module):
    """Wraps a network: `before` is applied to the input, `behind` to the output."""

    def __init__(self, inner, before=lambda x: x, behind=lambda x: x):
        super().__init__()
        self.inner, self.before, self.behind = inner, before, behind

    def forward(self, x):
        return self.behind(self.inner(self.before(x)))


def lost_by(model, data=DATA):
    graph = capture(model.eval(), IMAGES)
    groups, _ = coupled_channels(graph, IMAGES)
    return loss_increases(graph, groups, data, 64)


def test_networks_that_change_their_input_in_place_and_inference_tensors_are_supported():
    expected = lost_by(Wrapped(net(), before=lambda x: x - 0.5))
    with torch.inference_mode():
        data = [images.clone() for images in DATA]
    found = lost_by(Wrapped(net(), before=lambda x: x.sub_(0.5)), data)
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
    assert torch.equal(data[0], DATA[0])


def test_gradients_are_computed_under_inference_mode():
    expected = lost_by(net())
    graph = capture(net(), IMAGES)
    groups, _ = coupled_channels(graph, IMAGES)
    with torch.inference_mode():
        found = loss_increases(graph, groups, DATA, 64)
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))


@pytest.mark.parametrize(("width", "batches"), [(6, 1), (20, 3)])
def test_more_images_are_read_if_a_layer_needs_more_positions(width, batches):
    """With one position per image: 16 are enough for 6 channels, and 40 are needed for 20."""
    read_batches = []

    def data():
        for batch in DATA:
            read_batches.append(batch)
            yield batch

    lost(net(width), data(), 16)
    assert len(read_batches) == batches


def test_a_group_that_does_not_depend_on_the_images_has_no_score():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.first, self.second = net(), nn.Linear(5, 8), nn.Linear(8, 1)
            self.register_buffer("table", torch.randn(2, 5))

        def forward(self, x):
            return self.inner(x) + self.second(self.first(self.table).relu()).mean()

    graph = capture(Apart().eval(), IMAGES)
    groups, _ = coupled_channels(graph, IMAGES)
    found = dict(zip([group.root for group in groups], loss_increases(graph, groups, DATA, 64), strict=True))
    assert found["first"] is None
    assert found["inner.0"] is not None


class Detached(nn.Module):
    """Normalizes the images without gradients."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        with torch.no_grad():
            x = x + 0
        return self.inner(x)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_start_after_detached_values(frozen):
    expected = lost(net())[1]
    network = Detached().requires_grad_(not frozen)
    (found,) = lost_by(network, DATA)
    assert torch.equal(found, expected)
    assert all(each.requires_grad != frozen for each in network.parameters())


def test_attention_with_an_output_projection_that_is_not_called_has_scores():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 1, 4, 64, 128, num_classes=10)
    nn.init.normal_(model.heads.head.weight)
    images = torch.randn(8, 3, 32, 32)
    graph = capture(model.eval(), images)
    groups, _ = coupled_channels(graph, images)
    assert any(each is not None and float(each.sum()) > 0 for each in loss_increases(graph, groups, [images], 8))


def test_the_logits_are_found_among_several_outputs():
    expected = lost(net())[1]
    found = lost_by(Wrapped(net(), behind=lambda x: {"logits": x, "others": x.square()}), DATA)
    assert torch.equal(found[0], expected)


@pytest.mark.usefixtures("even_signs")
def test_without_logits_the_loss_is_the_relative_error_of_all_outputs():
    """With one output it is half of the squared change, relative to the squared outputs and not centered."""
    group, found = lost(net(), task=tasks.build("distance"))
    for channel in range(6):
        assert float(found[channel]) >= 0
    graph = capture(copy.deepcopy(net()), IMAGES)
    first = int(found.argmin())
    cuts, before = merge_cuts(group.cuts([first])), graph(IMAGES).detach()
    fits = fit_layers(graph, cuts, DATA, len(IMAGES))
    remove(graph, cuts)
    apply_fits(graph, fits)
    with torch.no_grad():
        change = graph(IMAGES) - before
    relative = sum(
        float(one.square().sum() / other.square().sum()) * len(one)
        for one, other in zip(change.split(16), before.split(16), strict=True)
    )
    assert float(found[first]) == pytest.approx(relative / len(IMAGES) / 2, rel=0.02)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (Wrapped(net(), behind=lambda x: (x.argmax(1), x.argmin(1))), DATA, "no floating-point tensor"),
        (Wrapped(net(), behind=lambda x: x.detach()), DATA, "do not depend on the images"),
        (net(), [torch.full_like(IMAGES, torch.nan)], "not finite"),
    ],
)
def test_outputs_without_usable_gradients_raise(model, data, words):
    with pytest.raises(InputError, match=words):
        lost_by(model, data)


def test_missing_images_raise():
    with pytest.raises(InputError, match="needs images"):
        lost(net(), [])
