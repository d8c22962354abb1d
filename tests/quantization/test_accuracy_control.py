from __future__ import annotations

import copy
import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recorded_progress import RecordedProgress, Task
from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.core.target import Target
from tersor.data.batch import Batch
from tersor.deploy.onnx import export
from tersor.methods.lsq import LSQ
from tersor.methods.ptq import PTQ
from tersor.methods.qat import QAT
from tersor.quantization import accuracy_control
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.training.attachment import Chain
from tersor.training.context import AttachContext

OPTIONS = {"bits": 5, "max_drop": 5.0}


class Sensitive(nn.Module):
    """Layers with one `huge` weight in every channel, on whose grids all other weights become zeros.

    It reads a channel of zeros, so that in float it changes nothing.
    """

    def __init__(self, huge=("conv2",)):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)
        with torch.no_grad():
            for layer in (self.conv1, self.conv2, self.conv3):
                layer.weight[0] = 0
                layer.bias.zero_()
            for layer in map(self.get_submodule, huge):
                layer.weight[:, 0, 1, 1] = 40
            nn.init.normal_(self.linear.weight)
            self.linear.bias.sub_(self(images()).mean(0))

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = x + F.relu(self.conv2(x)) * 4
        return self.linear(F.relu(self.conv3(x)).mean((2, 3)))


def images(count=120, seed=1):
    """Images that differ in color, so that the predictions differ."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 1, 1, generator=draw) * 2 + torch.randn(count, 3, 8, 8, generator=draw)


def predictions_of(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def quantized(model=None, data=None, target=None, **options):
    attached = PTQ(**{**OPTIONS, **options}).attach(
        (model or Sensitive()).eval(),
        AttachContext(data=[images()] if data is None else data, target=target or Target(cpu="vnni")),
    )
    attached.begin()
    return attached


def in_float(attached):
    """Layers and activations whose quantizers are disabled."""
    quantizers = attached.quantizers
    return (
        {name for name in quantizers.layers if not quantizers.of_weight(name).enabled},
        {
            name.removeprefix("quantizers.")
            for name in quantizers.activations
            if not quantizers.of_activation(name).enabled
        },
    )


def measured(attached, x, labels=None):
    """The definition of `drop`: lost points of accuracy, or percent of changed predictions."""
    exact, found = predictions_of(Sensitive().eval(), x), predictions_of(attached.model, x)
    labels = exact if labels is None else labels
    return 100 * ((exact == labels).float().mean() - (found == labels).float().mean()).item()


def test_the_toy_network_predicts_several_classes():
    """The other tests need different predictions."""
    assert (predictions_of(Sensitive().eval(), images()).bincount() > 0).sum() == 5


@pytest.mark.parametrize("bias_correction", [False, True])
def test_no_layer_stays_in_float_if_the_drop_is_small_enough(bias_correction):
    attached = quantized(max_drop=100, bias_correction=bias_correction)
    assert in_float(attached) == (set(), set())
    assert attached.metrics["left_in_float"] == []
    assert attached.metrics["drop"] == pytest.approx(measured(attached, images()))
    assert attached.metrics["drop"] > 20
    assert attached.notes == ()


@pytest.mark.parametrize(
    "options", [{}, {"bias_correction": True}, {"equalize": True}, {"per_channel": False}], ids=str
)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_only_the_sensitive_layer_stays_in_float(runtime, options):
    attached = quantized(target=Target(runtime=runtime, cpu="vnni"), **options)
    assert attached.metrics["left_in_float"] == ["conv2"]
    assert in_float(attached) == ({"conv2"}, {"relu_1"}), "what the addition reads, which is in float then"
    assert 0 <= attached.metrics["drop"] <= OPTIONS["max_drop"]
    assert attached.metrics["drop"] == pytest.approx(measured(attached, images()))
    assert [note for note in attached.notes if "in float" in note and "conv2" in note]
    conv2 = attached.model.conv2
    assert torch.equal(conv2.weight, conv2.parametrizations.weight.original)
    assert len(attached.model.conv3.weight[1].unique()) < 32


def test_two_consecutive_sensitive_layers_stay_in_float():
    """Keeping only one of them in float does not help."""
    attached = quantized(Sensitive(("conv2", "conv3")))
    assert sorted(attached.metrics["left_in_float"]) == ["conv2", "conv3"]


def test_no_metrics_without_max_drop():
    assert quantized(max_drop=None).metrics == {}


@pytest.mark.parametrize(
    "wrap", [lambda x, y: (x, y), Batch, lambda x, y: [x, y, "path"]], ids=["tuple", "Batch", "list"]
)
def test_with_labels_the_drop_is_that_of_the_accuracy(wrap):
    x = images()
    rounds = predictions_of(quantized(max_drop=None).model, x)
    data = [wrap(*pair) for pair in zip(x.split(50), rounds.split(50), strict=True)]
    attached = quantized(
        data=data
    )  # the labels are the predictions of the quantized network: in float the accuracy is lower
    assert attached.metrics["left_in_float"] == []
    assert attached.metrics["drop"] == pytest.approx(measured(attached, x, rounds))
    assert attached.metrics["drop"] < -20


def test_the_note_mentions_the_metric_only_with_labels():
    x, kept = images(), "these layers stay in float because of max_drop: conv2"
    unlabelled = quantized()
    assert f"{kept}; {unlabelled.metrics['drop']:.2f} % of the predictions still change" in unlabelled.notes
    labelled = quantized(data=[(x, predictions_of(Sensitive().eval(), x))])
    assert f"{kept}; the remaining drop is {labelled.metrics['drop']:.2f} points" in labelled.notes


def test_labels_are_ignored_if_some_batches_have_none():
    x = images()
    wrong = torch.zeros(60, dtype=torch.int64)
    attached = quantized(data=[(x[:60], wrong), x[60:]])
    assert attached.metrics["left_in_float"] == ["conv2"]
    assert attached.metrics["drop"] == pytest.approx(measured(attached, x))


def test_the_number_of_evaluated_images_is_limited(monkeypatch):
    monkeypatch.setattr(accuracy_control, "EVALUATED", 100)
    x = images()
    labels = predictions_of(Sensitive().eval(), x)
    labels[100:] = 0
    attached = quantized(data=[(x[:0], labels[:0]), (x[:70], labels[:70]), (x[70:], labels[70:])], max_drop=60)
    assert attached.metrics["drop"] == pytest.approx(measured(attached, x[:100], labels[:100]))


@pytest.mark.parametrize("bias_correction", [False, True])
def test_with_all_layers_in_float_the_drop_is_zero(bias_correction):
    attached = quantized(bits=2, first_last_bits=2, max_drop=0, bias_correction=bias_correction)
    layers, activations = in_float(attached)
    assert layers == set(attached.metrics["left_in_float"]) == set(attached.quantizers.layers)
    assert len(activations) == len(attached.quantizers.activations)
    assert attached.metrics["drop"] == 0
    with torch.no_grad():
        torch.testing.assert_close(attached.model(images()), Sensitive().eval()(images()), rtol=0, atol=1e-4)
    state = copy.deepcopy(attached.model.state_dict())
    attached.begin()  # a second time
    assert all(torch.equal(value, state[key]) for key, value in attached.model.state_dict().items())


def test_progress_is_reported():
    progress = RecordedProgress()
    context = AttachContext(data=[images()], target=Target(cpu="vnni"), progress=progress)
    PTQ(**OPTIONS).attach(Sensitive().eval(), context).begin()
    assert [task for task in progress.tasks if task.name != "calibration"] == [
        Task("error of each quantized layer", 4, [1, 2, 3, 4])
    ]


class StopsAtLayers(NullProgress):
    """Interrupts after the error of the first layer is measured."""

    def start(self, task, total):
        self.layers = task != "calibration"

    def advance(self, items=1, **values):
        if self.layers:
            raise KeyboardInterrupt


def test_layers_are_evaluated_with_their_original_biases():
    before = Sensitive().state_dict()
    context = AttachContext(data=[images()], progress=StopsAtLayers())
    attached = PTQ(**OPTIONS, bias_correction=True).attach(Sensitive().eval(), context)
    with pytest.raises(KeyboardInterrupt):
        attached.begin()
    for name in attached.quantizers.layers:
        bias = attached.model.get_submodule(name).bias
        torch.testing.assert_close(bias, before[f"{name}.bias"], rtol=0, atol=1e-5, check_stride=False)


def test_data_that_can_be_read_only_once_raises():
    with pytest.raises(InputError, match=r"cannot be read again.*DataLoader"):
        quantized(data=iter([images()]), activation_range="minmax")  # which needs one pass


def test_the_exported_file_agrees_with_the_network(tmp_path):
    attached = quantized(target=Target())  # for this processor, which may accumulate in 16 bits
    path = export(attached.model.eval(), images()[:2], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(seed=3)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        expected = attached.model(x)
    off = (torch.from_numpy(np.array(found)) - expected).abs().amax(1) / expected.std()
    assert (off < 0.02).float().mean() > 0.95, "an activation between two points of a grid may be rounded either way"
    assert off.max() < 0.1


def test_a_checkpoint_contains_which_quantizers_are_enabled():
    attached = quantized()
    again = rebuild(Sensitive(), json.loads(json.dumps(structure(attached.model)))).eval()
    again.load_state_dict(attached.model.state_dict())
    assert torch.equal(again(images()), attached.model(images()))
    assert not again.conv2.parametrizations.weight[0].enabled
    assert not again.get_submodule("quantizers.relu_1").enabled


def trains(attached):
    """Train one step; return for each quantizer whether it rounds."""
    attached.begin()
    attached.model.train()
    optimizer = torch.optim.SGD(attached.model.parameters(), lr=1e-3)
    handle = attached.bind(optimizer)
    attached.model(images()).square().sum().backward()
    optimizer.step()
    handle.remove()
    attached.finish()
    return {name: each.enabled for name, each in attached.model.named_modules() if isinstance(each, FakeQuantize)}


@pytest.mark.parametrize("method", [QAT(), LSQ()], ids=["qat", "lsq"])
def test_training_quantizes_the_same_layers(method):
    attached = method.attach(quantized().model, AttachContext(data=[images()], steps=1))
    assert attached.quantizers.layers == ("conv1", "conv3", "linear")
    ready = trains(attached)
    assert [name for name, rounds in ready.items() if not rounds] == [
        "conv2.parametrizations.weight.0",
        "quantizers.relu_1",
    ]


@pytest.mark.parametrize("method", [QAT(), LSQ()], ids=["qat", "lsq"])
def test_training_in_the_same_stage_quantizes_the_same_layers(method):
    first = PTQ(**OPTIONS).attach(Sensitive().eval(), AttachContext(data=[images()], target=Target(cpu="vnni")))
    second = method.attach(first.model, AttachContext(data=[images()], target=Target(cpu="vnni"), steps=1))
    ready = trains(Chain(second.model, [first, second], ["m:A", "m:B"]))
    assert [name for name, rounds in ready.items() if not rounds] == [
        "conv2.parametrizations.weight.0",
        "quantizers.relu_1",
    ]
