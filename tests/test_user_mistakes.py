"""Unusual networks and mistakes of users: each works in every function, or raises one correct error with advice."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import tersor
from tersor.core.errors import CompressionWarning, InputError
from tersor.data.loader import batches_of
from tersor.evaluation.file_inputs import FileInput
from tersor.evaluation.scoring import file_predictions
from tersor.evaluation.session import Session
from tersor.graph.plain_network import plain_copy, unwrapped
from tersor.pipeline.arguments import student_of
from tersor.training.objective import Objective

torch.manual_seed(0)
IMAGES = torch.randn(40, 3, 8, 8)
LABELS = torch.arange(40) % 10


def small(channels=3, classes=10, *behind):
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), *pool, nn.Linear(8, classes), *behind)


class Around(nn.Module):
    """A network whose forward is `run(self, images)`, with additional attributes."""

    def __init__(self, run, **more):
        super().__init__()
        self.inner, self.run = small(), run
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, images):
        return self.run(self, images)


class NeedsMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = small()

    def forward(self, images, mask):
        return self.inner(images) * mask


def keeping(network, images):
    network.last = network.inner(images)
    network.all = [network.last]
    return network.last


def squeezing(network, images):
    head, body = network.inner[-1], network.inner[:-2]
    return head(body(images).squeeze())


def with_norm(norm):
    network = small()
    for place in (0, 4):
        norm(network[place])
    network(IMAGES)
    return network


def kept_map():
    network = Around(keeping)
    network(IMAGES)
    return network


def parts_wrapped(network):
    network[0] = nn.DataParallel(network[0])
    network[4] = torch.compile(network[4])
    return network


def pruned_by_torch(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "weight", 0.1)


WRAPPED = {
    "DataParallel": nn.DataParallel,
    "torch.compile": torch.compile,
    "AveragedModel": AveragedModel,
    "one in the other": lambda network: nn.DataParallel(torch.compile(AveragedModel(network))),
    "parts": parts_wrapped,
}
WORKS = {
    "weight_norm": lambda: with_norm(utils.weight_norm),
    "weight_norm of all": lambda: with_norm(lambda layer: utils.weight_norm(layer, dim=None)),
    "weight_norm, new": lambda: with_norm(utils.parametrizations.weight_norm),
    "spectral_norm": lambda: with_norm(utils.spectral_norm),
    "spectral_norm, new": lambda: with_norm(utils.parametrizations.spectral_norm),
    "prune": lambda: with_norm(pruned_by_torch),
    "no leaf": kept_map,
    "half": lambda: small().half(),
    "bfloat16": lambda: small().bfloat16(),
    "double": lambda: small().double(),
    "frozen": lambda: small().requires_grad_(False),
    "frozen norm": lambda: nn.Sequential(nn.BatchNorm2d(3).eval(), small()).train(),
    "gray": lambda: small(1),
    "four channels": lambda: small(4),
    "one logit": lambda: small(3, 1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_removed_from_a_copy(kind):
    network = small()
    with torch.no_grad():
        wanted = network(IMAGES)
    wrapped = WRAPPED[kind](network)
    keys = list(wrapped.state_dict())
    plain = plain_copy(wrapped)
    torch.testing.assert_close(plain(IMAGES), wanted)
    assert list(plain.state_dict()) == list(small().state_dict())
    assert list(wrapped.state_dict()) == keys
    quantized = tersor.quantize(wrapped, [IMAGES])
    assert (quantized(IMAGES) - wanted).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WORKS)
def test_unusual_networks_work_and_are_not_changed(kind):
    network = WORKS[kind]()
    images = {"gray": IMAGES[:, :1], "four channels": IMAGES[:, [0, 1, 2, 0]]}.get(kind, IMAGES)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    plain = plain_copy(network)
    assert list(before) == list(network.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert modes == [module.training for module in network.modules()]
    assert {each.dtype for each in plain.parameters()} == {torch.float32}
    assert not any("_orig" in key or "parametrizations" in key or key.endswith("_v") for key in plain.state_dict())
    with torch.no_grad():
        wanted = network.eval()(images.to(next(network.parameters()).dtype)).float()
        low = kind in ("half", "bfloat16")
        torch.testing.assert_close(plain(images), wanted, atol=0.05 if low else 1e-5, rtol=0.05 if low else 1e-5)
    if kind in ("weight_norm", "prune", "half", "no leaf", "gray", "one logit"):
        tersor.quantize(network, [images])
        pruned = tersor.prune(network, images, round_to=2)
        assert sum(each.numel() for each in pruned.parameters()) < sum(each.numel() for each in plain.parameters())


@pytest.mark.filterwarnings("ignore")
def test_every_function_unwraps_networks(tmp_path):
    for wrap in (nn.DataParallel, AveragedModel):
        network = small()
        student = wrap(small())
        assert tersor.distill(student, wrap(small()), [(IMAGES, LABELS)]) is unwrapped(student)
        folder = tersor.save(wrap(network), tmp_path / wrap.__name__)
        torch.testing.assert_close(tersor.load(wrap(small()), folder)(IMAGES), network(IMAGES))
    path = tersor.export(nn.DataParallel(network), IMAGES, tmp_path / "n.onnx")
    found = tersor.compare(AveragedModel(network), path, [(IMAGES, LABELS)], seconds=0.01)
    assert found["artifact"]["agreement"] == 100


REFUSED = {
    "class": (lambda: NeedsMask, r"is the class NeedsMask\. Pass an instance"),
    "path": (lambda: "w.pt", r"not a path.*load_weights\(network, 'w.pt'\)"),
    "name": (lambda: "resnet20", r"not a name: tersor.models.build\('resnet20'\)"),
    "state_dict": (lambda: small().state_dict(), "load_state_dict"),
    "none": (lambda: None, "is of type NoneType"),
    "meta": (lambda: small().to("meta"), "0.weight .*meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten()), "0.weight .*no shape yet"),
    "NaN": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).apply(spoil), "0.weight .*not finite"),
    "TorchScript": (lambda: torch.jit.trace(small(), IMAGES[:1]), "TorchScript"),
    "lock": (lambda: Around(lambda self, x: self.inner(x), lock=threading.Lock()), r"because of lock \(lock\)"),
    "no weights": (lambda: nn.Sequential(nn.Flatten()), "no parameters"),
    "no layers": (lambda: nn.Sequential(), "no parameters"),
    "two inputs": (
        NeedsMask,
        r"needs 2 inputs: images, mask, but a batch has one. .*batches \(\(images, mask\), targets\)",
    ),
    "squeeze, then flatten": (
        lambda: Around(lambda self, x: self.inner[-1](self.inner[:-2](x).squeeze().flatten(1))),
        "runs on two images, but not on one: .*squeezes",
    ),
    "squeeze": (lambda: Around(squeezing), r"\(2, 10\) for two images and \(10,\) for one"),
}


def spoil(module):
    if isinstance(module, nn.Conv2d):
        module.weight.data[0] = torch.nan


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_one_message_in_every_verb(kind, tmp_path):
    make, words = REFUSED[kind]
    loader = [(IMAGES, LABELS)]
    calls = [
        lambda: tersor.quantize(make(), loader),
        lambda: tersor.prune(make(), IMAGES),
        lambda: tersor.distill(small(), make(), loader),
        lambda: tersor.distill(make(), small(), loader),
        lambda: tersor.export(make(), IMAGES, tmp_path / "n.onnx"),
    ]
    calls = calls[:2] + calls[4:] if kind == "lock" else calls[: 4 if kind.startswith("no ") else 5]
    for call in calls:
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_exported_raise(tmp_path):
    network = Around(lambda self, images: (self.inner(images), 3))
    with pytest.raises(InputError, match=r"returns a tuple of shape \(2, 10\), a int\. Possible: tensors"):
        tersor.export(network, IMAGES, tmp_path / "n.onnx")


def test_a_student_that_cannot_be_trained_raises():
    with pytest.raises(InputError, match=r"frozen\. Call student.requires_grad_\(True\)"):
        student_of(small().requires_grad_(requires_grad=False))
    with pytest.raises(InputError, match=r"torch.float16.*student.float\(\)"):
        student_of(small().half())
    with pytest.raises(InputError, match="one logit"):
        tersor.distill(small(3, 1), small(3, 1), [(IMAGES, LABELS)])


LOADERS = {
    "empty": ([], "loader is empty"),
    "empty batch": ([(IMAGES[:0], LABELS[:0])], "the first batch has no image"),
    "none": (None, "of type NoneType"),
    "a batch": ((IMAGES, LABELS), r"Pass a list of batches: \[\(images, labels\)\]"),
    "single images": ([(IMAGES[0], 1)], r"a single image.*DataLoader"),
    "dicts with two images": ([{"image": IMAGES, "mask": IMAGES}], r"of type dict.*'image', 'mask'.*\[\(batch"),
    "dicts without images": ([{"labels": LABELS}], r"of type dict.*'labels'.*\[\(batch"),
    "numpy": ([(IMAGES.numpy(), LABELS)], r"torch.from_numpy"),
    "uint8": ([IMAGES.to(torch.uint8)], "torch.uint8"),
    "channels last": ([IMAGES.permute(0, 2, 3, 1)], r"permute\(0, 3, 1, 2\)"),
    "gray": ([IMAGES[:, :1]], r"takes images \(N, 3, H, W\)"),
    "meta": ([IMAGES.to("meta")], "meta device"),
    "NaN": ([IMAGES * torch.nan], "NaN"),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_an_invalid_loader_raises(kind):
    loader, words = LOADERS[kind]
    for verb in (tersor.quantize, tersor.prune):
        with pytest.raises(InputError, match=words):
            verb(small(), loader)


@pytest.mark.filterwarnings("ignore")
def test_batches_can_be_dicts_with_a_single_image_tensor():
    torch.manual_seed(0)
    network, student, same = small(), small(), small()
    same.load_state_dict(student.state_dict())
    named = [{"labels": LABELS, "pixel_values": IMAGES}]
    pairs = [(IMAGES, LABELS)]
    assert torch.equal(tersor.quantize(network, named)(IMAGES), tersor.quantize(network, pairs)(IMAGES))
    assert torch.equal(
        tersor.prune(network, named, round_to=2)(IMAGES), tersor.prune(network, pairs, round_to=2)(IMAGES)
    )
    tersor.distill(student, network, named)
    tersor.distill(same, network, pairs)
    assert torch.equal(student(IMAGES), same(IMAGES))


def test_a_generator_is_read_only_as_far_as_needed_and_other_precisions_are_converted():
    batches = iter([IMAGES[:16], IMAGES[16:32], IMAGES[32:]])
    kept, first = batches_of(batches, 20)
    assert [len(each) for each in kept] == [16, 16]
    assert first is not None
    assert next(batches).shape[0] == 8
    quantized = [tersor.quantize(network, given) for network, given in _same_twice()]
    assert torch.equal(quantized[0](IMAGES), quantized[1](IMAGES))


def _same_twice():
    network = small()
    return [(network, [IMAGES, IMAGES]), (network, (each.double() for each in [IMAGES, IMAGES]))]


LABELLED = {
    "from 1": (LABELS + 1, "from 1 to 10, but the 10 classes .* from 0 to 9. Write labels - 1"),
    "below 0": (LABELS - 1, "from -1 to 8.*unlabeled"),
    "too high": (LABELS + 3, "from 3 to 12"),
    "floats": (LABELS.float(), r"labels.long\(\)"),
    "one-hot": (torch.eye(10)[LABELS], r"labels.argmax\(1\)"),
    "(N, 1)": (LABELS[:, None], r"labels.squeeze\(1\)"),
    "too few": (LABELS[:5], r"the shape \(5,\)"),
    "numpy": (LABELS.numpy(), "torch.from_numpy"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LABELLED)
def test_labels_that_are_not_class_indices_raise(kind, artifact):
    labels, words = LABELLED[kind]
    loader = [(IMAGES, labels)]
    calls = [
        lambda: tersor.distill(small(), small(), loader),
        lambda: tersor.prune(small(), loader, importance="taylor"),
        lambda: tersor.compare(artifact, artifact, loader, seconds=0.01),
    ]
    for call in calls:
        with pytest.raises(InputError, match=words):
            call()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tersor.export(small(), IMAGES, tmp_path_factory.mktemp("artifact") / "n.onnx")


def test_a_single_logit_is_compared_with_zero_unless_it_could_be_a_probability():
    session = Session(
        "onnxruntime",
        "float32",
        1,
        (FileInput("images", IMAGES.numpy().dtype, (None, 3, 8, 8)),),
        lambda array: array[:, 0, 0, :1],
    )
    expected = (IMAGES[:, 0, 0, 0] > 0).long()
    assert file_predictions(session, [IMAGES.numpy()]).tolist() == expected.tolist()
    with pytest.raises(InputError, match="not clear whether these are logits or probabilities"):
        file_predictions(session, [IMAGES.sigmoid().numpy()])


def test_distill_warns_about_its_teacher_and_trains():
    with pytest.warns(CompressionWarning, match="sum to 1.000"):
        tersor.distill(small(), small(3, 10, nn.Softmax(1)), [(IMAGES, LABELS)], label_weight=0)
    with pytest.warns(CompressionWarning, match=r"% of 40 labeled images .* by chance \(10.0 % for 10 classes\)"):
        tersor.distill(small(), small(), [(IMAGES, LABELS)])


def in_place(network, images):
    images -= 0.5
    return network.inner(images)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", ["quantize", "prune", "export"])
def test_images_are_not_changed_by_a_forward_that_works_in_place(verb, tmp_path):
    images = IMAGES.clone()
    if verb == "export":
        tersor.export(Around(in_place).eval(), images, tmp_path / "m.onnx")
    else:
        options = {"round_to": 2, "keep_macs": 0.9} if verb == "prune" else {}
        getattr(tersor, verb)(Around(in_place).eval(), [images], **options)
    assert torch.equal(images, IMAGES)


class OptionalMask(Around):
    def forward(self, images, mask=None):
        return self.inner(images if mask is None else images * mask)


SPELLED = {
    "a slice of a Sequential": lambda: Around(lambda net, x: net.inner[2:](net.inner[:2](x))),
    "a module made in forward": lambda: Around(lambda net, x: net.inner(nn.ReLU()(x))),
    "an optional input": lambda: OptionalMask(None),
    "a branch on the shape": lambda: Around(lambda net, x: net.inner(x) if x.shape[1] == 3 else x),
    "isinstance": lambda: Around(lambda net, x: net.inner(x) if isinstance(x, torch.Tensor) else x),
    "a functional convolution": lambda: Around(
        lambda net, x: net.inner[1:](nn.functional.conv2d(x, net.inner[0].weight, net.inner[0].bias))
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", SPELLED)
def test_a_network_is_quantized_and_pruned_however_its_forward_is_written(variant):
    network = SPELLED[variant]().eval()
    with torch.no_grad():
        expected = network(IMAGES)
    quantized = tersor.quantize(network, [IMAGES])
    assert 0 < (quantized(IMAGES) - expected).abs().max() < 0.1
    assert tersor.integer_coverage(quantized, IMAGES).share == 1
    pruned = tersor.prune(network, IMAGES, round_to=2)
    convolution, linear = (each for each in pruned.modules() if isinstance(each, nn.Conv2d | nn.Linear))
    assert convolution.out_channels == linear.in_features < 8
    kept = [
        channel
        for channel, weight in enumerate(network.inner[0].weight)
        if any(torch.equal(weight, each) for each in convolution.weight)
    ]
    assert len(kept) == convolution.out_channels
    with torch.no_grad():  # the weights fitted after the removal
        network.inner[4].weight.zero_()[:, kept] = linear.weight
        network.inner[4].bias.copy_(linear.bias)
        torch.testing.assert_close(pruned(IMAGES), network(IMAGES))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda net, x: net.inner(x) if x.sum() > 0 else -net.inner(x),
            r"branches on the values of a tensor \(test_user_mistakes\.py, line \d+: .*x\.sum\(\) > 0",
        ),
        (lambda net, x: net.inner(x) if len(x) == 2 else 2 * net.inner(x), "its forward method fixes the batch size"),
        (lambda net, x: net.named["class"](x), r"named\.class is a Python keyword"),
    ],
)
def test_a_network_that_cannot_be_captured_raises_one_error(run, message):
    named = {"named": nn.ModuleDict({"class": small()})} if "keyword" in message else {}
    network = Around(run, **named).eval()
    for verb in (tersor.quantize, tersor.prune):
        with pytest.raises(InputError, match=message) as caught:
            verb(network, [IMAGES])
        assert "\n" not in str(caught.value)


def test_batches_of_several_sizes_raise_if_the_network_depends_on_the_size():
    def positions(network, images):
        return network.inner(images + nn.functional.interpolate(network.position, images.shape[2:]))

    network = Around(positions, position=nn.Parameter(torch.randn(1, 3, 8, 8))).eval()
    with pytest.raises(InputError, match=r"captured graph of Around does not run on images \(3, 8, 12\).*that size"):
        tersor.quantize(network, [IMAGES[:8], torch.randn(8, 3, 8, 12)])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda net, x: net.inner(x) if len(x) == 1 else 2 * net.inner(x), "On one image the outputs agree"),
        (lambda net, x: net.inner(nn.functional.dropout(x, 0.5)), "uses random numbers in eval mode"),
    ],
)
def test_an_incorrect_exported_file_raises(run, message, tmp_path):
    with pytest.raises(InputError, match=message):
        tersor.export(Around(run).eval(), IMAGES, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "abcdefghij"}, "Pass a list of names"),
        ({"classes": ["a"] * 10}, "classes contains 'a' twice. Pass distinct strings"),
        ({"classes": ["a", 1]}, "classes contains 1, which is not a string. Pass distinct strings"),
        ({"pixels": ([0.5] * 3, [-1.0] * 3)}, "the second above 0"),
        ({"pixels": [0.5] * 3}, "two lists of 3 numbers"),
        ({"pixels": ([127.0] * 3, [60.0] * 3)}, "not in 0 to 255"),
    ],
)
def test_invalid_metadata_raises(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        tersor.export(small().eval(), IMAGES, tmp_path / "m.onnx", **options)


def test_a_wrong_number_of_class_names_and_unwritable_paths_raise(tmp_path):
    network = small().eval()
    with pytest.raises(InputError, match="1 class names are given, and the network has 10 logits"):
        tersor.export(network, IMAGES, tmp_path / "m.onnx", classes=["a"])
    for path in (None, "m\0.onnx", tmp_path / f"{'a' * 300}.onnx", tmp_path / "absent" / "m.onnx"):
        with pytest.raises(InputError, match=r"cannot write|type NoneType"):
            tersor.export(network, IMAGES, path)


def test_a_student_that_shares_a_layer_with_its_teacher_raises():
    student, teacher = small(), small()
    student[0] = teacher[0]
    with pytest.raises(InputError, match=r"share 0\.weight, 0\.bias"):
        tersor.distill(student, teacher, [(IMAGES, LABELS)])


@pytest.mark.filterwarnings("ignore")
def test_a_last_batch_of_one_image_with_batchnorm_raises():
    student = nn.Sequential(*small()[:-1], nn.BatchNorm1d(8), nn.Linear(8, 10))
    with pytest.raises(InputError, match=r"a batch has 1 image\. Drop a short last batch"):
        tersor.distill(student, small(), [(IMAGES, LABELS), (IMAGES[:1], LABELS[:1])])


@pytest.mark.filterwarnings("ignore")
def test_advice_of_distill_mentions_only_its_own_arguments(monkeypatch):
    batches = [(IMAGES, LABELS)] * 3
    with pytest.raises(InputError, match=r"not updated in this step\. Try a smaller learning_rate\.$"):
        tersor.distill(small(), small(), batches, learning_rate=1e30)
    monkeypatch.setattr(Objective, "forward", raising(MemoryError()))
    with pytest.raises(InputError, match=r"Pass a loader with a smaller batch size\.$"):
        tersor.distill(small(), small(), batches)


def raising(error):
    def fails(*_given, **_options):
        raise error

    return fails


def test_integer_coverage_raises_for_invalid_arguments():
    for model, example in ((small(), None), (small(), IMAGES[0]), (small(), IMAGES[:0]), ("net", IMAGES)):
        with pytest.raises(InputError):
            tersor.integer_coverage(model, example)


def test_rounding_that_keeps_all_channels_is_named_as_the_reason():
    with pytest.raises(InputError, match=r"as narrow as `floor` and `round_to` allow"):
        tersor.prune(small().eval(), IMAGES, round_to=1000)
