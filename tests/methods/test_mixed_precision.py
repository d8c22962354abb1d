import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recorded_progress import RecordedProgress, Task
from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.evaluation.scoring import file_predictions
from tersor.evaluation.session import open_session
from tersor.graph.capture import capture
from tersor.methods.lsq import LSQ
from tersor.methods.mixed_precision import MixedPrecision, assign
from tersor.methods.ptq import PTQ
from tersor.methods.qat import QAT
from tersor.quantization.fake_quantize import weight_quantizer
from tersor.quantization.grid import Grid
from tersor.quantization.quantizer_options import Precision
from tersor.quantization.quantizers import insert_quantizers
from tersor.quantization.sensitivity import sensitivity
from tersor.training.context import AttachContext
from tersor.training.method import chain

VNNI = Target(cpu="vnni")
SIZES = {"conv1": 216, "conv2": 288, "conv3": 576, "linear": 40}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x + F.relu(self.conv2(x))
        return self.linear(F.relu(self.conv3(x)).mean((2, 3)))


def images(count=24, seed=1):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def begun(method, model=None, data=None, target=VNNI):
    progress = RecordedProgress()
    context = AttachContext(data=data or [images()], target=target, progress=progress)
    attached = method.attach(model or Small().eval(), context)
    attached.begin()
    return attached, progress.tasks


def bits_of(graph):
    return {name: weight_quantizer(graph.get_submodule(name)).grid.bits for name in SIZES}


def mean(bits, sizes=SIZES):
    return sum(sizes[name] * bits[name] for name in bits) / sum(sizes[name] for name in bits)


def best(errors, sizes, average):
    """The lowest error, by exhaustive search."""
    names = list(errors)
    choices = (dict(zip(names, bits, strict=True)) for bits in itertools.product(*errors.values()))
    total = sum(sizes.values())
    legal = [c for c in choices if sum(sizes[n] * c[n] for n in names) <= average * total + 1e-6]
    return min(sum(errors[name][choice[name]] for name in names) for choice in legal)


WIDTHS = st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=1, max_size=4, unique=True)
ERRORS = st.lists(
    st.tuples(WIDTHS, st.lists(st.floats(0, 10), min_size=4, max_size=4), st.integers(1, 500)), min_size=1, max_size=5
)


@settings(max_examples=150)
@given(ERRORS, st.floats(0, 1))
def test_the_assignment_of_bits_has_the_lowest_error(layers, share):
    errors = {str(n): dict(zip(widths, costs, strict=False)) for n, (widths, costs, _) in enumerate(layers)}
    sizes = {str(n): size for n, (_, _, size) in enumerate(layers)}
    low, high = (mean({n: end(errors[n]) for n in errors}, sizes) for end in (min, max))
    average = low + share * (high - low)
    found = assign(errors, sizes, average)
    assert mean(found, sizes) <= average + 1e-6
    assert sum(errors[n][found[n]] for n in errors) == pytest.approx(best(errors, sizes, average), abs=1e-9)


def test_a_budget_that_can_be_met_exactly_is_used_completely():
    errors = {name: {2: 1.0, 4: 0.1} for name in "abc"}
    assert assign(errors, {"a": 10, "b": 20, "c": 30}, 4) == dict.fromkeys("abc", 4)
    assert assign(errors, {"a": 10, "b": 20, "c": 30}, 2) == dict.fromkeys("abc", 2)
    assert 4.35 * 100 < 435, "in floating point"
    assert assign({"a": {2: 1.0, 8: 0.5}, "b": {2: 1.0, 3: 0.5}}, {"a": 27, "b": 73}, 4.35) == {"a": 8, "b": 3}
    assert assign({"a": {2: 1.0, 4: 1.0}}, {"a": 7}, 4) == {"a": 2}, "of equal ones the fewest"


@pytest.mark.parametrize("cells", [3, 10, 50])
def test_the_budget_is_not_exceeded_with_coarse_units(cells, monkeypatch):
    monkeypatch.setattr("tersor.methods.mixed_precision._CELLS", cells)
    sizes = {"a": 101, "b": 211, "c": 53, "d": 7}
    errors = {name: {bits: size * 4.0**-bits for bits in (2, 3, 4, 6, 8)} for name, size in sizes.items()}
    for average in torch.arange(2, 8, 0.05).tolist():
        assert mean(assign(errors, sizes, average), sizes) <= average + 1e-6


def test_for_sizes_without_a_common_divisor_the_assignment_is_nearly_optimal():
    sizes = {"a": 1_000_003, "b": 2_000_029, "c": 500_009, "d": 10_007}
    errors = {name: {b: size**0.5 * 4.0**-b for b in (2, 3, 4, 6, 8)} for name, size in sizes.items()}
    found = assign(errors, sizes, 4.3)
    assert mean(found, sizes) <= 4.3
    assert sum(errors[n][found[n]] for n in errors) <= best(errors, sizes, 4.3 - 1e-4)


@pytest.mark.parametrize("average", [2.5, 3.5, 5])
def test_bits_minimize_the_measured_error(average):
    method = MixedPrecision(average_bits=average)
    attached, progress = begun(method)
    graph = capture(Small().eval(), images())
    quantizers = insert_quantizers(graph, Precision(), exclude=(), target=VNNI, method="test")
    requested = [(name, bits) for name in SIZES for bits in method.widths]
    errors = {name: {} for name in SIZES}
    for cost in sensitivity(quantizers, [images()], requested, target=VNNI):
        errors[cost.layer][cost.bits] = cost.error
    found = bits_of(attached.model)
    assert mean(found) <= average
    assert sum(errors[n][found[n]] for n in SIZES) == pytest.approx(best(errors, SIZES, average), abs=1e-12)
    assert len(set(found.values())) > 1
    assert attached.metrics == {"bits": found, "average_bits": pytest.approx(mean(found))}
    assert attached.notes[0].startswith("weight bits: ")
    assert f"{mean(found):.2f} on average" in attached.notes[0]
    assert [task for task in progress if task.name == "sensitivity"] == [Task("sensitivity", 24, [*range(1, 25)])]


def test_weights_and_activations_are_on_their_grids():
    graph = begun(MixedPrecision(average_bits=3, activation_bits=4))[0].model
    for name, bits in bits_of(graph).items():
        assert all(len(channel.unique()) <= 2**bits - 1 for channel in graph.get_submodule(name).weight)
    edges = {name.removeprefix("quantizers."): each.grid for name, each in graph.quantizers.named_children()}
    assert edges.pop("x") == edges.pop("mean") == Grid.unsigned(8), "what enters the first and the last layer"
    assert edges
    assert set(edges.values()) == {Grid.unsigned(4)}


def test_an_average_of_the_largest_width_equals_ptq():
    mixed = begun(MixedPrecision(average_bits=8))[0].model
    mine = copy.deepcopy(Small().eval())
    plain = PTQ(weight_range="mse", bias_correction=False).attach(mine, AttachContext(data=[images()], target=VNNI))
    plain.begin()
    assert set(bits_of(mixed).values()) <= {6, 8}
    same = begun(MixedPrecision(average_bits=8, widths=(8,)))[0]
    assert torch.equal(same.model(images()), plain.model(images()))


def test_first_last_bits_are_included_in_the_average():
    method = MixedPrecision(average_bits=4.5, first_last_bits=8)
    attached, progress = begun(method)
    found = bits_of(attached.model)
    assert found["conv1"] == found["linear"] == 8
    assert mean(found) <= 4.5
    assert {task.total for task in progress if task.name == "sensitivity"} == {12}, "nothing to choose at the ends"
    advice = r"Write a larger average_bits, or leave out first_last_bits\.$"  # 2 bits are in `widths`, and the smallest
    with pytest.raises(InputError, match=rf"average_bits: 3 is too low.*3\.37\. {advice}"):
        MixedPrecision(average_bits=3, first_last_bits=8).attach(Small().eval(), AttachContext(data=[images()]))
    with pytest.raises(InputError, match=r"average_bits: 3\.5 is too low.*4\.00.*`widths`\.$"):
        MixedPrecision(average_bits=3.5, widths=(8, 4)).attach(Small().eval(), AttachContext(data=[images()]))
    smaller = MixedPrecision(average_bits=3.5, widths=(8, 4), first_last_bits=3)
    with pytest.raises(InputError, match=r"Write a larger average_bits, or add a smaller width to `widths`\.$"):
        smaller.attach(Small().eval(), AttachContext(data=[images()]))


def test_excluded_layers_are_not_included_in_the_average():
    attached, _ = begun(MixedPrecision(average_bits=3, exclude=("conv3",)))
    assert set(attached.metrics["bits"]) == {"conv1", "conv2", "linear"}
    assert weight_quantizer(attached.model.conv3) is None
    assert mean(attached.metrics["bits"]) == pytest.approx(attached.metrics["average_bits"])
    assert attached.metrics["average_bits"] <= 3


def test_begin_does_nothing_the_second_time_and_reads_the_images_once():
    attached = MixedPrecision(activation_range="mse").attach(
        Small().eval(), AttachContext(data=iter([images(8), images(8)]))
    )
    attached.begin()
    before = copy.deepcopy(attached.model.state_dict())
    attached.begin()
    assert all(torch.equal(before[key], value) for key, value in attached.model.state_dict().items())


def test_a_checkpoint_contains_the_bits():
    attached, _ = begun(MixedPrecision(average_bits=3.5))
    again = rebuild(Small().eval(), structure(attached.model))
    again.load_state_dict(attached.model.state_dict())
    assert bits_of(again) == bits_of(attached.model)
    assert torch.equal(again(images()), attached.model(images()))
    resumed = MixedPrecision(average_bits=3.5).attach(Small().eval(), AttachContext(data=[images()], target=VNNI))
    resumed.model.load_state_dict(attached.model.state_dict())
    assert resumed.metrics == attached.metrics, "what a stage tells that went on from a checkpoint"


@pytest.mark.parametrize("method", [QAT, LSQ])
@pytest.mark.parametrize("together", [True, False], ids=["in one stage", "in the next stage"])
def test_training_keeps_the_bits(method, together):
    first = MixedPrecision(average_bits=3.5)
    expected = bits_of(begun(first)[0].model)
    if together:
        attached = chain([first, method()], Small().eval(), AttachContext(data=[images()], steps=2, target=VNNI))
    else:
        attached = method().attach(begun(first)[0].model, AttachContext(data=[images()], steps=2, target=VNNI))
    attached.begin()
    optimizer = torch.optim.SGD(attached.model.parameters(), lr=0.05)
    handle = attached.bind(optimizer)
    attached.model.train()
    for _ in range(2):
        optimizer.zero_grad()
        attached.model(images()).square().mean().backward()
        optimizer.step()
    handle.remove()
    attached.finish()
    assert bits_of(attached.model) == expected
    assert len(set(expected.values())) > 1
    for name, bits in expected.items():
        assert all(len(channel.unique()) <= 2**bits - 1 for channel in attached.model.get_submodule(name).weight)
    if together:
        assert attached.metrics["bits"] == expected


def test_training_with_other_bits_raises():
    attached, _ = begun(MixedPrecision(average_bits=3.5))
    with pytest.raises(InputError, match="Leave out bits"):
        QAT(bits=4).attach(attached.model, AttachContext(data=[images()], steps=1))


def test_the_exported_file_equals_torch(tmp_path):
    attached, _ = begun(MixedPrecision(average_bits=4))
    found = bits_of(attached.model).values()
    assert min(found) <= 4 < max(found), "weights in nibbles and in bytes"
    x = images(300, seed=5)
    path = export(attached.model, x[:1], tmp_path / "model.onnx")
    predictions = file_predictions(open_session(path, "onnxruntime"), [x.numpy()])
    assert (predictions == attached.model(x).argmax(1)).float().mean() >= 0.99


def test_mixed_precision_has_a_smaller_error_than_uniform_bits():
    model, x = Small().eval(), images()
    before = model(x).detach()
    uniform = PTQ(bits=3, first_last_bits=3, weight_range="mse").attach(
        copy.deepcopy(model), AttachContext(data=[x], target=VNNI)
    )
    uniform.begin()
    mixed = begun(MixedPrecision(average_bits=3), copy.deepcopy(model))[0]
    errors = [float((each.model(x).detach() - before).square().mean()) for each in (mixed, uniform)]
    assert errors[0] < errors[1]


def test_missing_images_and_invalid_options_raise():
    with pytest.raises(InputError, match="needs images"):
        MixedPrecision().attach(Small(), AttachContext())
    with pytest.raises(InputError, match="needs images, and the data contains none"):
        begun(MixedPrecision(), data=[images(0)])
    with pytest.raises(InputError, match="hold NaN or infinity"):
        begun(MixedPrecision(), data=[images() / 0])
    for wrong in ({"average_bits": 2}, {"average_bits": 8.5}, {"widths": ()}, {"widths": (1, 4)}, {"bits": 4}):
        with pytest.raises(InputError):
            MixedPrecision(**wrong)
