"""Running statistics of BatchNorm after a training run that is too short for their momentum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tersor.data.batch import Batch
from tersor.graph.batchnorm import freezable
from tersor.training.attachment import Attachment
from tersor.training.loop import fit
from tersor.training.norm_statistics import average_again
from tersor.training.objective import Objective
from tersor.training.options import OptimizerOptions, Training
from tersor.training.snapshot import Checkpointer

TRAINING = Training(optimizer=OptimizerOptions(learning_rate=0.05), precision="float32")


class Shifted:
    """Images of three classes whose mean is 3 and whose standard deviation is 2."""

    def __init__(self, batches=4):
        draw = torch.Generator().manual_seed(1)
        images = 3 + 2 * torch.randn(batches * 16, 3, 4, 4, generator=draw)
        self.all = [Batch(part, part.mean((2, 3)).argmax(1)) for part in images.split(16)]

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return len(self.all)

    def __iter__(self):
        return iter(self.all)


class Lines:
    def __init__(self):
        self.lines = []

    def start(self, task, total):
        pass

    def advance(self, items=1, **values):
        pass

    def say(self, line):
        self.lines.append(line)


class OnlyInTraining(nn.Sequential):
    """Its first norm runs only in training mode."""

    def forward(self, images):
        first, *others = self
        for module in [first, *others] if self.training else others:
            images = module(images)
        return images


def network(momentum):
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    return nn.Sequential(norms[0], nn.Conv2d(3, 4, 3), norms[1], nn.Flatten(), nn.Linear(16, 3))


def trained(model, steps, source=None, **options):
    progress = Lines()
    fit(Attachment(model), source or Shifted(), TRAINING, steps=steps, progress=progress, name="short", **options)
    return model, [line for line in progress.lines if "BatchNorm" in line]


def average(source):
    variances = torch.stack([batch.images.var((0, 2, 3)) for batch in source])
    return torch.stack([batch.images.mean((0, 2, 3)) for batch in source]).mean(0), variances.mean(0)


def test_statistics_that_lag_behind_are_recomputed_from_the_images():
    model, lines = trained(network(0.01), 8)
    mean, variance = average(Shifted())
    assert torch.allclose(model[0].running_mean, mean)
    assert torch.allclose(model[0].running_var, variance)
    assert model[0].momentum == 0.01
    assert len(lines) == 1
    assert lines[0] == (
        "short: statistics of 2 BatchNorm layers recomputed as averages over 64 training images: for a momentum of "
        "0.01, there were too few batches (8)"
    )


class LateChanges(Attachment):
    """A method that changes a fraction of the weights in one step."""

    def __init__(self, model, step, share):
        super().__init__(model)
        self.change = step, share

    @property
    def changes(self):
        return [self.change]


@pytest.mark.parametrize(
    ("step", "share", "again"), [(20, 0.2, False), (20, 0.6, True), (10, 0.6, False), (40, 0.06, True)]
)
def test_statistics_are_recomputed_after_a_late_large_change_of_masks(step, share, again):
    """After 20 batches, 0.9^20 = 12 % of the old statistics remain: 2 % for a share of 0.2, 7 % for 0.6."""
    progress = Lines()
    fit(LateChanges(network(0.1), step, share), Shifted(), TRAINING, steps=40, progress=progress, name="short")
    lines = [line for line in progress.lines if "BatchNorm" in line]
    assert bool(lines) == again
    ending = "for a momentum of 0.1, there were too few batches after the last changes of the masks"
    assert all(line.endswith(ending) for line in lines)


def test_batches_after_a_change_are_counted_with_accumulation():
    attachment, progress = LateChanges(network(0.1), 8, 0.5), Lines()
    fit(attachment, Shifted(), TRAINING.model_copy(update={"accumulate": 4}), steps=12, progress=progress)
    assert [line for line in progress.lines if "BatchNorm" in line]  # 16 batches leave 0.9^16 * 0.5 = 9 %
    attachment, progress = LateChanges(network(0.1), 5, 0.5), Lines()
    fit(attachment, Shifted(), TRAINING.model_copy(update={"accumulate": 4}), steps=12, progress=progress)
    assert not [line for line in progress.lines if "BatchNorm" in line]  # 28 batches leave 3 %


def test_at_most_a_thousand_images_are_used():
    source = Shifted(batches=70)
    model, lines = trained(network(0.01), 8, source)
    assert torch.allclose(model[0].running_mean, average(source.all[:64])[0])
    assert "averages over 1024 training images" in lines[0]


@pytest.mark.parametrize(("momentum", "steps", "again"), [(0.1, 28, True), (0.1, 29, False), (0.5, 5, False)])
def test_after_enough_steps_statistics_are_not_recomputed(momentum, steps, again):
    assert bool(trained(network(momentum), steps)[1]) == again


def test_accumulated_batches_are_counted():
    model = network(0.1)
    progress = Lines()
    fit(Attachment(model), Shifted(), TRAINING.model_copy(update={"accumulate": 4}), steps=8, progress=progress)
    assert not any("BatchNorm" in line for line in progress.lines)


def test_fewer_batches_are_counted_if_the_epoch_is_not_a_multiple_of_accumulate():
    progress, training = Lines(), TRAINING.model_copy(update={"accumulate": 4})
    fit(Attachment(network(0.1)), Shifted(batches=5), training, steps=9, progress=progress)
    (line,) = (line for line in progress.lines if "BatchNorm" in line)
    assert line.endswith("too few batches (24)")


def test_a_small_last_batch_is_not_used():
    source = Shifted()
    mean, variance = average(source)
    source.all.append(Batch(torch.full((2, 3, 4, 4), 50.0), torch.tensor([0, 1])))
    model, lines = trained(network(0.01), 5, source)
    assert torch.allclose(model[0].running_mean, mean)
    assert torch.allclose(model[0].running_var, variance)
    assert "averages over 64 training images" in lines[0]


def test_frozen_statistics_are_not_recomputed():
    model = network(0.01)
    model[0] = freezable(model[0])
    model[0].freeze()
    before = copy.deepcopy(dict(model[0].named_buffers()))
    _, lines = trained(model, 8)
    assert all(torch.equal(value, before[name]) for name, value in model[0].named_buffers())
    assert "1 BatchNorm layer recomputed" in lines[0]


def test_a_norm_that_runs_only_in_training_keeps_its_statistics():
    model = OnlyInTraining(
        nn.BatchNorm2d(3, momentum=0.01), nn.BatchNorm2d(3, momentum=0.01), nn.Flatten(), nn.Linear(48, 3)
    )
    trained(model, 8)
    assert torch.allclose(model[0].running_mean, (1 - 0.99**8) * torch.tensor(3.0), atol=0.05)
    assert model[0].num_batches_tracked == 8
    assert torch.allclose(model[1].running_mean, torch.tensor(3.0), atol=0.2)


class Stored(Checkpointer):
    """Stores every snapshot in memory."""

    every = 4
    last = None

    def __init__(self, resume_state=None):
        self.resume_state, self.saved = resume_state, {}

    def save(self, step, state):
        self.saved[step] = state


@pytest.mark.parametrize("step", [4, 8])
def test_resumed_training_has_the_same_statistics(step):
    stored = Stored()
    whole, _ = trained(network(0.01), 8, checkpointer=stored)
    resumed, _ = trained(network(0.01), 8, checkpointer=Stored((step, stored.saved[step])))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_an_interrupted_recomputation_does_not_change_the_network():
    model = network(0.01).train()
    source = Shifted()
    objective = Objective(model)
    before = copy.deepcopy(dict(model.named_buffers()))

    def interrupted(batch):
        if batch is source.all[1]:
            raise KeyboardInterrupt
        return batch

    with pytest.raises(KeyboardInterrupt):
        list(average_again(objective, source, interrupted, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert [model[0].momentum, model[2].momentum] == [0.01, 0.01]


def test_statistics_with_a_momentum_of_zero_are_frozen():
    model = network(0.01)
    model[0].momentum = 0.0
    before = copy.deepcopy(dict(model[0].named_buffers()))
    _, lines = trained(model, 8)
    assert torch.equal(model[0].running_mean, before["running_mean"])
    assert "1 BatchNorm layer recomputed" in lines[0]


def test_layers_that_never_run_are_not_counted():
    model = OnlyInTraining(nn.BatchNorm2d(3, momentum=0.01), *network(0.01))
    assert "statistics of 2 BatchNorm layers" in trained(model, 8)[1][0]
