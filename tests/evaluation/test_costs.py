from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import normalize, pil_to_tensor

from tersor import tasks
from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.evaluation.costs import costs
from tersor.evaluation.scoring import agreement, images_at_once, network_predictions, network_score
from tersor.graph import multiplications
from tersor.graph.capture import capture
from tersor.models import build, load_weights, normalization
from tersor.pruning.mask import Mask
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.tasks.classification import Classification

SHARED = Path(__file__).parents[1] / "../shared"


class Largest(nn.Module):
    """Predicts the index of each image's largest value."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        return images.flatten(1)


def one_hot(classes):
    return torch.eye(8)[torch.tensor(classes)].view(-1, 2, 2, 2)


def test_accuracy_and_predictions_over_batches_of_unequal_size():
    batches = [
        Batch(one_hot([3, 1, 7]), torch.tensor([3, 1, 0])),
        Batch(one_hot([2]), torch.tensor([2])),
        Batch(one_hot([5]), torch.tensor([4])),
    ]
    model = Largest()
    assert network_score(model, batches) == 60.0
    assert network_predictions(model, batches).tolist() == [3, 1, 7, 2, 5]
    assert set(model.modes) == {(False, True)}
    assert network_predictions(model, []) is None


def test_the_score_of_a_task_without_targets_is_the_distance_from_the_original_network():
    original, changed = nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Threshold(0.5, 0.0))
    images = [torch.full((2, 3, 1, 1), 0.4), torch.full((1, 3, 1, 1), 0.8)]
    score = network_score(changed, iter([Batch(each) for each in images]), tasks.build("distance"), original)
    squares = [3 * 2 * 0.4**2, 3 * 0.8**2]
    assert score == pytest.approx(100 * (squares[0] / sum(squares)) ** 0.5, rel=1e-5)


def test_fewer_images_are_computed_at_once_if_outputs_are_as_large_as_the_images():
    assert images_at_once(Classification(), (4000, 4000)) == 500
    found = [images_at_once(tasks.build("segmentation"), size) for size in ((8, 8), (64, 128), (2000, 1000))]
    assert found == [500, 2**20 // (64 * 128), 1]


def test_every_module_keeps_its_training_mode_even_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = Batch(torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))
    network_score(model, [batch])
    costs(model, batch.images)
    with pytest.raises(InputError, match="without labels"):
        network_score(model, [Batch(batch.images)])
    with pytest.raises(RuntimeError):
        network_predictions(model, [Batch(torch.randn(1, 3, 9, 9))])
    with pytest.raises(RuntimeError):
        costs(model, torch.randn(1, 3, 9, 9))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inference_mode_is_off_between_batches():
    seen = []

    def batches():
        for _ in range(2):
            seen.append(torch.is_inference_mode_enabled())
            yield Batch(one_hot([1]), torch.tensor([1]))

    network_score(Largest(), batches())
    assert seen == [False, False]


def test_accuracy_without_images_raises():
    with pytest.raises(InputError, match="without images"):
        network_score(Largest(), [])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_agreement_is_the_percentage_of_equal_predictions(pairs):
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    assert agreement(Classification(), first, second) == pytest.approx(100 * sum(a == b for a, b in pairs) / len(pairs))


@pytest.mark.parametrize(
    ("name", "size", "macs", "parameters"),
    [
        ("resnet20", 32, 40_551_040, 269_722),
        ("resnet56", 32, 125_485_696, 853_018),
        ("resnet18", 224, 1_814_073_344, 11_689_512),  # torchvision's page: 1.81 G
        ("mobilenet_v2", 224, 300_774_272, 3_504_872),  # 0.3 G
        ("swin_t", 224, 4_490_566_656, 28_288_354),  # 4.49 G, with products outside of layers
    ],
)
def test_costs_as_published(name, size, macs, parameters):
    measured = costs(build(name), torch.zeros(1, 3, size, size))
    assert (measured.macs, measured.parameters) == (macs, parameters)
    assert measured.bit_operations == macs * 32 * 32
    assert sum(layer.macs for layer in measured.layers) == macs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "macs"),
    [
        ("resnet50", 224, 4_089_184_256),
        ("vit_b_16", 224, 17_563_828_224),
        ("densenet121", 224, 2_834_161_664),
        ("efficientnet_b0", 224, 385_814_752),
        ("googlenet", 224, 1_498_376_192),
        ("convnext_tiny", 224, 4_455_531_264),
        ("shufflenet_v2_x1_0", 224, 144_907_992),
        ("regnet_y_400mf", 224, 401_842_848),
        ("timm/cait_xxs24_224", 224, 2_523_475_200),
        ("timm/xcit_nano_12_p16_224", 224, 550_952_448),
        ("timm/levit_128s", 224, 304_660_832),
        ("timm/mobilevit_s", 256, 2_000_831_488),
        ("timm/halonet26t", 256, 3_172_810_752),
        ("timm/volo_d1_224", 224, 6_918_741_504),
        ("timm/hrnet_w18_small", 224, 1_601_508_352),
    ],
)
def test_costs_equal_those_of_torch(name, size, macs):
    """The numbers are from `torch.utils.flop_counter.FlopCounterMode`, with unfused attention."""
    source, _, own = name.rpartition("/")
    network = (
        pytest.importorskip("timm").create_model(own) if source else getattr(torchvision.models, own)(weights=None)
    )
    measured = costs(network.eval(), torch.zeros(1, 3, size, size))
    assert (measured.macs, measured.uncounted) == (macs, ())


class Crnn(nn.Module):
    """Convolutions, followed by an LSTM over the columns."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.rnn, self.head = nn.LSTM(256, 64, batch_first=True, bidirectional=True), nn.Linear(128, 10)

    def forward(self, images):
        x = torch.relu(self.b(torch.relu(self.a(images)))).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("captured", [False, True])
def test_an_lstm_is_a_layer_with_macs(captured):
    model, images = Crnn(), torch.randn(2, 3, 32, 32)
    measured = costs(capture(model, images) if captured else model, images)
    convolutions, head = {"a": 16 * 27 * 16 * 16, "b": 32 * 144 * 8 * 8}, {"head": 1280}
    columns, gates, directions = 8, 4, 2
    lstm = {"rnn": columns * directions * gates * 64 * (256 + 64)}
    assert {layer.name: layer.macs for layer in measured.layers} == convolutions | lstm | head
    (rnn,) = (layer for layer in measured.layers if layer.name == "rnn")
    assert rnn.kind == "LSTM"
    assert rnn.weight_shape == ()
    assert rnn.parameters == directions * (gates * 64 * (256 + 64) + 2 * gates * 64)
    assert measured.bit_operations == measured.macs * 32 * 32


def test_uncounted_operators_are_named():
    class Spectrum(nn.Module):
        def forward(self, images):
            return torch.fft.rfft2(images).abs()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Spectrum())
    assert costs(model, torch.randn(1, 3, 8, 8)).uncounted == ("aten._fft_r2c in 1",)
    assert costs(model[0], torch.randn(1, 3, 8, 8)).uncounted == ()


def test_fused_attention_is_counted():
    fast = torch.backends.mha.get_fastpath_enabled()
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    measured = costs(model, torch.zeros(1, 5, 8))
    attention = 5 * 8 * 24 + 5 * 8 * 8 + 2 * 5 * 5 * 8
    assert measured.macs == attention + 2 * 5 * 8 * 16
    assert {layer.name: layer.macs for layer in measured.layers}["self_attn"] == attention
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_an_expanded_parameter_is_counted():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.linear = nn.Parameter(torch.zeros(1, 8)), nn.Linear(8, 3)
            self.linear.bias.requires_grad_(False)

        def forward(self, x):
            return self.linear(self.token.expand(len(x), -1))

    model = Token()
    assert costs(model, torch.zeros(1, 8)).macs == 24
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False]


def test_costs_of_each_layer_for_one_input():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), nn.Flatten(), nn.Linear(24, 5))
    first, linear = costs(model, torch.zeros(7, 4, 5, 5)).layers
    assert (first.name, first.kind, first.weight_shape) == ("0", "Conv2d", (6, 2, 3, 3))
    assert (first.macs, first.parameters) == (6 * 2 * 2 * 2 * 9, 6 * 2 * 9)
    assert (linear.name, linear.kind, linear.weight_shape) == ("2", "Linear", (5, 24))
    assert (linear.macs, linear.parameters) == (120, 125)


def test_a_captured_graph_has_the_costs_of_its_network():
    model, example = build("resnet20"), torch.zeros(1, 3, 16, 16)
    assert costs(capture(model, example), example) == costs(model, example)


class Scores(nn.Module):
    """Products of all pairs of positions; no parameters, so that a captured network has no module for it."""

    def forward(self, values: Tensor) -> Tensor:
        return values @ values.transpose(1, 2)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.scores = nn.Linear(8, 4), Scores()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(self.embedding(tokens)).sum(-1)


def test_products_in_a_captured_network_are_counted_for_the_module_that_computes_them():
    model = nn.Sequential(nn.Flatten(2), Attending())
    images = torch.randn(2, 5, 2, 4)
    captured = capture(model, images)
    found = {layer.name: layer.macs for layer in costs(model, images).layers}
    assert found == {"1.embedding": 5 * 8 * 4, "1.scores": 5 * 4 * 5}
    assert {layer.name: layer.macs for layer in costs(captured, images).layers} == {
        "1.embedding": 5 * 8 * 4,
        "1": 5 * 4 * 5,
    }


class Zero(nn.Module):
    """Sets the first half to zero."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(weight[: len(weight) // 2]), weight[len(weight) // 2 :]])


def test_sparsity_is_computed_from_the_effective_weights_of_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 5))
    nn.init.zeros_(model[3].weight)
    parametrize.register_parametrization(model[0], "weight", Zero())
    measured = costs(model, torch.zeros(1, 3, 3, 3))
    assert [layer.sparsity for layer in measured.layers] == [0.5, 0, 1]
    assert measured.sparsity == 54 / (108 + 8)
    assert measured.layers[0].kind == "Conv2d"
    assert measured.layers[0].parameters == 108 + 4
    assert measured.parameters == 112 + 10 + 15


def test_without_convolutions_sparsity_is_computed_from_linear_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    assert costs(model, torch.zeros(1, 4)).sparsity == 8 / 24
    assert costs(nn.Identity(), torch.zeros(1, 4)).sparsity == 0


def test_masked_weights_are_distinguished_from_other_zeros():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    nn.init.zeros_(model[1].weight)
    mask = Mask(model[0].weight.shape)
    mask.mask[:2] = False
    parametrize.register_parametrization(model[0], "weight", mask)
    measured = costs(model, torch.zeros(1, 3, 3, 3))
    assert [layer.masked for layer in measured.layers] == [0.5, 0]
    assert [layer.sparsity for layer in measured.layers] == [0.5, 1]
    assert measured.masked == 54 / (108 + 8)


def quantizer(grid: Grid) -> FakeQuantize:
    made = FakeQuantize(grid)
    made.set_grid(torch.tensor(0.1))
    return made


def test_bit_widths_are_read_from_enabled_quantizers():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    parametrize.register_parametrization(model[0], "weight", Zero())
    parametrize.register_parametrization(model[0], "weight", quantizer(Grid.signed(4)))
    parametrize.register_parametrization(model[1], "weight", FakeQuantize(Grid.signed(8)))
    model.eval()

    recorded = fx.Graph()
    value = recorded.placeholder("images")
    for name, _ in model.named_children():
        value = recorded.call_module(name, (value,))
    recorded.output(value)
    graph = fx.GraphModule(model, recorded)
    first, second, third, _ = (node for node in graph.graph.nodes if node.op == "call_module")
    for name, node, made in [
        ("a", first, quantizer(Grid.unsigned(8))),
        ("b", second, quantizer(Grid.unsigned(2))),
        ("c", third, FakeQuantize(Grid.unsigned(8))),
    ]:
        graph.add_submodule(name, made)
        with graph.graph.inserting_before(node):
            node.replace_input_with(node.args[0], graph.graph.call_module(name, node.args))
    graph.recompile()
    measured = costs(graph, torch.zeros(1, 4))
    assert [layer.name for layer in measured.layers] == ["0", "1", "2", "3"]
    assert [layer.weight_bits for layer in measured.layers] == [4, 32, 32, 32]
    assert [layer.activation_bits for layer in measured.layers] == [8, 2, 32, 32]
    assert measured.bit_operations == 16 * (4 * 8 + 32 * 2 + 32 * 32 + 32 * 32)
    assert measured.parameters == 80


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared weights and images are not beside the checkout")
def test_the_accuracy_of_the_shared_network_matches_the_published_one():
    """89.2 % of the first 100 test images of each class; 88.57 % of all."""
    model = build("resnet20", 10)
    channels = normalization(load_weights(model, SHARED / "models/resnet20-cifar10-jpeg.safetensors"))
    assert channels is not None
    images: dict[str, list[Tensor]] = {}
    with tarfile.open(SHARED / "data/cifar10-jpeg.tar.gz", "r|gz") as archive:
        for member in archive:
            if "/train" in member.name:
                break
            path = Path(member.name)
            if member.isfile() and int(path.stem) < 100:
                pixels = pil_to_tensor(Image.open(archive.extractfile(member)).convert("RGB"))
                images.setdefault(path.parent.name, []).append(normalize(pixels / 255, *channels))
    batches = [
        Batch(torch.stack(images[name]), torch.full((len(images[name]),), label))
        for label, name in enumerate(sorted(images))
    ]
    assert sum(len(batch.images) for batch in batches) == 1000
    assert network_score(model, batches) == pytest.approx(89.2, abs=0.2)


def test_a_recurrent_layer_multiplies_at_every_position_of_every_sequence():
    sequences = torch.randn(5, 3, 8)
    with FlopCounterMode(display=False, custom_mapping=multiplications._OURS) as counter:
        nn.LSTM(8, 4)(sequences)
    assert counter.get_total_flops() == 2 * 5 * 3 * (16 * 8 + 16 * 4)
