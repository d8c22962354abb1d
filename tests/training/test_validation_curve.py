"""Validation accuracy during training: its values, and that measuring does not change the training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_loop import Hooked, InMemoryCheckpointer, Recorder, Toy, linear
from torch import nn
from torch.nn.utils import parametrize

from tersor.checkpoint.store import Checkpoints
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.evaluation.scoring import network_score
from tersor.pipeline.experiment import EVALUATION_BATCH
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import run_stages
from tersor.pruning.mask import Mask
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.recipe import parse
from tersor.training.attachment import Attachment
from tersor.training.loop import fit
from tersor.training.options import Training
from tersor.training.validation_curve import ValidationCurve
from two_processes import run_in_two_processes

EPOCH = 8  # steps of Toy

RECIPE = """\
model: {name: "toy_networks:resnet8"}
data: {name: digits, limit: 160}
stages:
  - name: prune
    epochs: 2
    batch_size: 32
    validate_every: 1
    methods: [{weight_pruning: {sparsity: 0.9}}]
"""


def stateful_network():
    """A network with BatchNorm, dropout, a moving range and a mask."""
    torch.manual_seed(3)
    quantizer = FakeQuantize(Grid.unsigned(8)).track_activations(0.1)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(3.0))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), quantizer, nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 3)
    )
    mask = Mask(model[0].weight.shape)
    mask.mask[1] = False
    parametrize.register_parametrization(model[0], "weight", mask)
    return model


def validation_accuracy(model):
    """Accuracy on validation images in percent; also draws random numbers."""
    torch.rand(5)
    assert not any(module.training for module in model.modules())
    images = torch.randn(300, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        return 100 * (model(images).argmax(1) == images.flatten(1)[:, :3].argmax(1)).double().mean().item()


@pytest.mark.parametrize("ema", [None, 0.9])
def test_measuring_does_not_change_the_training(ema):
    ends = []
    for curve in (None, ValidationCurve(1, validation_accuracy)):
        model = stateful_network()
        progress = Recorder()
        fit(
            Attachment(model), Toy(shape=(3, 4, 4)), Training(ema=ema), steps=12, seed=5, curve=curve, progress=progress
        )
        losses = [values["labels"] for values in progress.values]
        ends.append({**model.state_dict(), "losses": torch.tensor(losses)})
    assert len(curve.values) == 12
    assert len(set(curve.values)) > 3
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_each_value_is_measured_after_its_epoch():
    hooked = Hooked(linear())
    curve = ValidationCurve(EPOCH, lambda model: model.weight.double().sum().item())
    fit(hooked, Toy(), Training(), steps=3 * EPOCH - 1, curve=curve)
    assert curve.steps == [EPOCH, 2 * EPOCH]
    assert curve.values == [hooked.after[step - 1][1].double().sum().item() for step in curve.steps]


def test_with_ema_the_averaged_weights_are_measured():
    hooked = Hooked(linear())
    curve = ValidationCurve(5, lambda model: model.weight.double().sum().item())
    fit(hooked, Toy(), Training(ema=0.9), steps=10, curve=curve)
    assert curve.values[-1] == hooked.model.weight.double().sum().item(), "the final weights"
    assert curve.values[-1] != hooked.after[-1][1].double().sum().item()


@pytest.mark.parametrize("until", [2, EPOCH, EPOCH + 3])
def test_the_curve_of_a_resumed_training_is_complete(until):
    def run(checkpointer):
        curve = ValidationCurve(EPOCH, validation_accuracy)
        fit(
            Attachment(stateful_network()),
            Toy(shape=(3, 4, 4)),
            Training(),
            steps=20,
            checkpointer=checkpointer,
            curve=curve,
        )
        return curve.values

    expected = run(None)
    stopped = InMemoryCheckpointer(until=until)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    assert len(expected) == 2
    assert run(InMemoryCheckpointer(resume_state=(until, stopped.saved[until]))) == expected


def test_progress_shows_the_latest_accuracy_and_training_time_excludes_validation(monkeypatch):
    now = 0.0
    monkeypatch.setattr("tersor.training.history.time.perf_counter", lambda: now)

    def slow(_model):
        nonlocal now
        now += 100.0
        return 50.0 + len(curve.values)

    class Ticking(Toy):
        def __iter__(self):
            nonlocal now
            for batch in super().__iter__():
                now += 1.0
                yield batch

    progress, curve = Recorder(), ValidationCurve(EPOCH, slow)
    fitted = fit(Attachment(linear()), Ticking(), Training(), steps=2 * EPOCH, curve=curve, progress=progress)
    assert "validation" not in progress.values[EPOCH - 2]
    assert [progress.values[step]["validation"] for step in (EPOCH - 1, EPOCH, 2 * EPOCH - 1)] == [50, 50, 51]
    assert 2 * EPOCH - 2 <= fitted.seconds <= 2 * EPOCH + 2


def run_recipe(text, folder):
    experiment = prepare(parse(text, "recipe.yaml"), model=None, data=None, progress=NullProgress())
    model, (record,) = run_stages(experiment, Checkpoints(folder), NullProgress())
    return experiment, model, record.model_dump(exclude_unset=True)


def test_a_stage_records_the_curve_of_the_masked_network(tmp_path):
    experiment, model, record = run_recipe(RECIPE, tmp_path / "a")
    assert len(record["validation_by_epoch"]) == 2
    assert record["validated_at"] == [record["steps"] // 2, record["steps"]]
    assert record["validation_by_epoch"][-1] == record["validation_score"]
    for module in model.modules():
        if isinstance(module, Mask):
            module.mask.fill_(True)
    batches = experiment.batches(experiment.data.validation, EVALUATION_BATCH)
    assert network_score(model, batches) != record["validation_score"]
    *_, without_curve = run_recipe(RECIPE.replace("    validate_every: 1\n", ""), tmp_path / "b")
    assert "validation_by_epoch" not in without_curve
    assert without_curve["validation_score"] == record["validation_score"]


def test_a_curve_without_validation_images_raises_before_training():
    given = parse(RECIPE.replace("limit: 160", "limit: 320, validation: 0"), "recipe.yaml")
    with pytest.raises(InputError, match=r"'prune' has validate_every.*Write data\.validation"):
        prepare(given, model=None, data=None, progress=NullProgress())


def test_a_curve_without_steps_raises():
    with pytest.raises(InputError, match=r"line 7: .*stage 'prune' has 0 steps\. Remove validate_every"):
        parse(RECIPE.replace("epochs: 2", "epochs: 0"), "recipe.yaml")


SHARE = """
import sys, torch
sys.path.insert(0, {here!r})
from test_loop import Attachment, Toy, Training, fit, linear
from tersor.training.validation_curve import ValidationCurve

rank = int(sys.argv[1])

class Share(Toy):
    def __len__(self):
        return super().__len__() // 2

    def __iter__(self):
        return (batch for number, batch in enumerate(super().__iter__()) if number % 2 == rank)

def measure(model):
    assert rank == 0, "only the first process measures"
    return model.weight.double().sum().item()

curve = ValidationCurve(3, measure)
fit(Attachment(linear()), Share(), Training(precision="float32"), steps=8, curve=curve)
torch.save(torch.tensor(curve.values, dtype=torch.float64), sys.argv[2])
"""


@pytest.mark.slow
def test_the_first_process_measures_for_all_processes(tmp_path):
    first, second = run_in_two_processes(SHARE.format(here=str(Path(__file__).parent)), tmp_path)
    assert len(first) == 2
    assert torch.equal(first, second)


def test_a_curve_without_values_from_a_damaged_checkpoint_is_measured_again():
    curve = ValidationCurve(2, lambda _model: 90.0)
    curve.load_state({"values": torch.empty(0)})
    curve.measure_again(4, nn.Linear(1, 1))
    assert curve.values == [90.0]
