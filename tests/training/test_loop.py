from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from recorded_progress import RecordedProgress
from tersor.core.errors import InputError, NonFiniteLoss, NonFiniteWeights
from tersor.data.batch import Batch
from tersor.training.attachment import Attachment
from tersor.training.loop import fit
from tersor.training.objective import LossTerm
from tersor.training.options import LearningRateSchedule, OptimizerOptions, Training
from tersor.training.schedule import steps_per_epoch
from two_processes import run_in_two_processes

STEADY = LearningRateSchedule(name="constant")
PLAIN_SGD = OptimizerOptions(learning_rate=0.1, momentum=0, nesterov=False, weight_decay=0)


class Toy:
    """Linearly separable points of three classes; the epoch determines their order."""

    def __init__(self, count=64, batch_size=8, shape=(5,)):
        draw = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, *shape, generator=draw)
        self.targets = self.images.flatten(1)[:, :3].argmax(1)
        self.batch_size = batch_size
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __len__(self):
        return len(self.images) // self.batch_size

    def __iter__(self):
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epochs[-1]))
        for index in order.split(self.batch_size):
            yield Batch(self.images[index], self.targets[index], index)


class Recorder:
    def __init__(self):
        self.tasks, self.values, self.lines = [], [], []

    def start(self, task, total):
        self.tasks.append((task, total))

    def advance(self, items=1, **values):
        assert items == 1
        self.values.append(values)

    def say(self, line):
        self.lines.append(line)


class Hooked(Attachment):
    """Records step, gradient norm and weight in its hooks."""

    def __init__(self, model, terms=(), label_weight=1.0):
        super().__init__(model, terms, label_weight)
        self.before, self.after = [], []

    def before_step(self, step, optimizer):
        norm = torch.stack([parameter.grad.norm() for parameter in self.model.parameters()]).norm()
        self.before.append((step, norm.item(), self.model.weight.detach().clone()))

    def after_step(self, step, optimizer):
        self.after.append((step, self.model.weight.detach().clone()))


def linear():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(16, 3)
    )


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize("optimizer", [OptimizerOptions(), OptimizerOptions(name="adamw", learning_rate=0.2)])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
def test_a_linear_model_learns(optimizer, schedule):
    model, batches, progress = linear(), Toy(), Recorder()
    training = Training(
        optimizer=optimizer, lr_schedule=LearningRateSchedule(name=schedule, warmup_epochs=1), precision="float32"
    )
    right = lambda: (model(batches.images).argmax(1) == batches.targets).float().mean().item()  # noqa: E731
    assert right() < 0.6
    fitted = fit(Attachment(model), batches, training, steps=80, progress=progress, name="toy")
    assert right() > 0.9
    assert fitted.steps == 80
    assert fitted.seconds > 0
    assert fitted.precision == "float32"
    assert fitted.losses["labels"] < 0.5
    assert batches.epochs == list(range(10))
    assert progress.tasks == [("toy", 80)]
    assert len(progress.values) == 80
    assert set(progress.values[0]) == {"labels", "learning_rate"}
    assert progress.values[0]["learning_rate"] == pytest.approx(training.learning_rate() / 8)
    assert progress.values[8]["learning_rate"] == training.learning_rate()
    assert "float32" in progress.lines[0]
    assert "cpu" in progress.lines[0] or torch.cuda.is_available()


def test_the_same_seed_is_bit_identical_and_the_global_random_state_is_unchanged():
    results = []
    for seed in (3, 3, 4):
        model = convolutional()
        torch.manual_seed(9)
        state = torch.get_rng_state()
        fit(Attachment(model), Toy(shape=(3, 4, 4)), Training(), steps=12, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_model_keeps_its_parameters_and_layout():
    model = convolutional()
    parameters = [*model.parameters()]
    fit(Attachment(model), Toy(shape=(3, 4, 4)), Training(), steps=2)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.is_contiguous() and parameter.grad is None for parameter in parameters)
    assert not model.training


def test_accumulated_batches_equal_a_large_batch():
    small, large = linear(), linear()
    training = Training(optimizer=PLAIN_SGD, lr_schedule=STEADY, precision="float32")
    fit(Attachment(small), Toy(batch_size=4), training.model_copy(update={"accumulate": 2}), steps=20)
    fit(Attachment(large), Toy(batch_size=8), training, steps=20)
    torch.testing.assert_close(weights(small), weights(large))


def test_the_last_step_of_an_epoch_averages_over_the_remaining_batches():
    training = Training(optimizer=PLAIN_SGD, lr_schedule=STEADY, precision="float32", accumulate=3)
    batches = Toy(count=32, batch_size=8)
    assert steps_per_epoch(batches, training) == 2
    model, alone = linear(), linear()
    fit(Attachment(model), batches, training, steps=2)
    fit(Attachment(alone), batches, training, steps=1)
    batches.set_epoch(0)
    *_, last = batches
    nn.functional.cross_entropy(alone(last.images), last.targets).backward()
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(weights(model), weights(alone))
    assert batches.epochs == [0, 0, 0]


def test_hooks_are_called_once_per_accumulated_step():
    model = linear()
    first = model.weight.detach().clone()
    hooked = Hooked(model)
    training = Training(optimizer=PLAIN_SGD, clip_norm=0.01, accumulate=4)
    fit(hooked, Toy(), training, steps=5)
    assert [word[0] for word in hooked.before] == [word[0] for word in hooked.after] == list(range(5))
    assert torch.equal(hooked.before[0][2], first)
    for (_, norm, weight), (_, moved), after in zip(hooked.before, hooked.after, hooked.before[1:], strict=False):
        assert norm == pytest.approx(0.01, rel=1e-3)  # clipped before the hooks see it
        assert not torch.equal(weight, moved)
        assert torch.equal(moved, after[2])


def test_hooks_are_removed_even_after_an_interruption():
    class Impatient(Recorder):
        def advance(self, items=1, **values):
            raise KeyboardInterrupt

    class RemembersOptimizer(Attachment):
        def bind(self, optimizer, start=0):
            self.optimizer = optimizer
            return super().bind(optimizer, start)

    attachment = RemembersOptimizer(linear())
    with pytest.raises(KeyboardInterrupt):
        fit(attachment, Toy(), Training(), steps=3, progress=Impatient())
    assert not attachment.optimizer._optimizer_step_pre_hooks
    assert not attachment.optimizer._optimizer_step_post_hooks


def test_every_step_uses_the_reported_learning_rate():
    class Reads(Attachment):
        def __init__(self, model):
            super().__init__(model)
            self.rates = []

        def before_step(self, step, optimizer):
            self.rates += [group["lr"] for group in optimizer.param_groups]

    attachment, progress = Reads(linear()), Recorder()
    fit(attachment, Toy(), Training(lr_schedule=LearningRateSchedule(warmup_epochs=0.5)), steps=20, progress=progress)
    assert attachment.rates == [values["learning_rate"] for values in progress.values]
    assert len(set(attachment.rates)) > 10


def test_clipping_bounds_the_step():
    model = linear()
    before = weights(model)
    fit(Attachment(model), Toy(), Training(optimizer=PLAIN_SGD, lr_schedule=STEADY, clip_norm=1e-3), steps=1)
    assert (weights(model) - before).norm().item() == pytest.approx(1e-3 * 0.1, rel=1e-2)


def test_the_model_ends_with_the_moving_average():
    hooked = Hooked(linear())
    mean = hooked.model.weight.detach().clone()
    fit(hooked, Toy(), Training(ema=0.2, precision="float32"), steps=15)
    for step, weight in hooked.after:
        decay = min(0.2, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight
    torch.testing.assert_close(hooked.model.weight.detach(), mean)
    assert not torch.equal(hooked.model.weight, hooked.after[-1][1])


class InMemoryCheckpointer:
    """Stores every snapshot in memory, and stops the training after `until` steps."""

    every = 1
    last = "stage-1/clock.json"

    def __init__(self, resume_state=None, until=None):
        self.resume_state, self.until, self.saved = resume_state, until, {}

    def save(self, step, tensors):
        self.saved[step] = tensors
        if step == self.until:
            raise KeyboardInterrupt


class Noise(LossTerm):
    """Draws a random number in every step, and has a trainable weight."""

    name = "noise"

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.zeros(()))

    def forward(self, batch, student, teacher):
        return (student.logits.mean() - self.own) * torch.rand(())


def small():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("accumulate", "ema"), [(1, None), (3, 0.9)])
@pytest.mark.parametrize("until", [1, 4, 8, 11])
def test_resumed_training_is_bit_identical(optimizer, accumulate, ema, until):
    options = OptimizerOptions(name=optimizer, learning_rate=0.01)
    training = Training(optimizer=options, accumulate=accumulate, ema=ema)

    def run(checkpointer):
        attached = Attachment(small(), [Noise()])
        fit(attached, Toy(shape=(3, 4, 4)), training, steps=12, checkpointer=checkpointer, seed=5)
        return {**attached.model.state_dict(), "own": attached.terms[0].own.detach()}

    expected = run(None)
    stopped = InMemoryCheckpointer(until=until)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    found = run(InMemoryCheckpointer(resume_state=(until, stopped.saved[until])))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_resumed_training_keeps_seconds_and_losses():
    stopped = InMemoryCheckpointer(until=6)
    with pytest.raises(KeyboardInterrupt):
        fit(Attachment(linear()), Toy(), Training(), steps=8, checkpointer=stopped)
    earlier = float(stopped.saved[6]["log.seconds"])
    stopped.saved[6]["log.seconds"] += 100
    recorder = RecordedProgress()
    resumed = fit(
        Attachment(linear()),
        Toy(),
        Training(),
        steps=8,
        checkpointer=InMemoryCheckpointer(resume_state=(6, stopped.saved[6])),
        progress=recorder,
    )
    (line,) = recorder.lines
    assert line.startswith("train: 8 steps in ")
    assert line.endswith(", on cpu; resuming after step 6")
    whole = fit(Attachment(linear()), Toy(), Training(), steps=8)
    assert resumed.earlier_seconds == pytest.approx(100 + earlier)
    assert 100 < resumed.seconds < 110
    assert resumed.losses == pytest.approx(whole.losses)
    nothing_left = fit(
        Attachment(linear()),
        Toy(),
        Training(),
        steps=6,
        checkpointer=InMemoryCheckpointer(resume_state=(6, stopped.saved[6])),
    )
    assert nothing_left.losses.keys() == whole.losses.keys()


def test_resuming_with_another_number_of_processes_raises():
    stopped = InMemoryCheckpointer(until=2)
    with pytest.raises(KeyboardInterrupt):
        fit(Attachment(linear()), Toy(), Training(), steps=8, checkpointer=stopped)
    of_two = {**stopped.saved[2], "random.cpu1": stopped.saved[2]["random.cpu0"]}
    with pytest.raises(InputError, match=r"number of processes was 2 when the run was started, and is 1 now"):
        fit(
            Attachment(linear()),
            Toy(),
            Training(),
            steps=8,
            checkpointer=InMemoryCheckpointer(resume_state=(2, of_two)),
        )


def test_ctrl_c_finishes_the_step_and_saves_it():
    class Presses(Attachment):
        def before_step(self, step, optimizer):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    checkpointer, before = InMemoryCheckpointer(), signal.getsignal(signal.SIGINT)
    checkpointer.every = 100
    model = linear()
    with pytest.raises(KeyboardInterrupt):
        fit(Presses(model), Toy(), Training(), steps=8, checkpointer=checkpointer)
    assert list(checkpointer.saved) == [3]
    assert torch.equal(checkpointer.saved[3]["model.weight"], model.weight)
    assert signal.getsignal(signal.SIGINT) is before


class Breaks(LossTerm):
    name = "fragile"

    def __init__(self, at, value):
        super().__init__()
        self.calls, self.at, self.value = 0, at, value

    def forward(self, batch, student, teacher):
        self.calls += 1
        return student.logits.mean() * (self.value if self.calls == self.at else 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("accumulate", "at"), [(1, 4), (2, 7)])
def test_a_nonfinite_loss_stops_before_the_update(value, accumulate, at):
    model = linear()
    hooked = Hooked(model, [Breaks(at, value)])
    training = Training(accumulate=accumulate, optimizer=PLAIN_SGD, lr_schedule=STEADY)
    with pytest.raises(NonFiniteLoss, match=r"'fragile'.*step 4.*0\.1.*checkpoint: stage-1/clock\.json") as caught:
        fit(hooked, Toy(), training, steps=8, checkpointer=InMemoryCheckpointer())
    assert (caught.value.step, caught.value.term) == (4, "fragile")
    assert isinstance(caught.value, InputError)
    assert len(hooked.before) == 3
    assert torch.equal(model.weight, hooked.after[-1][1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_error_says_that_no_checkpoint_was_written():
    with pytest.raises(NonFiniteLoss, match="none was written"):
        fit(Attachment(linear(), [Breaks(2, float("nan"))]), Toy(), Training(), steps=2)


def test_a_nonfinite_loss_in_the_first_step_is_not_attributed_to_the_learning_rate():
    with pytest.raises(NonFiniteLoss, match="'fragile' is nan before any update of the weights") as raised:
        fit(Attachment(linear(), [Breaks(1, float("nan"))]), Toy(), Training(), steps=1)
    assert "learning_rate" not in str(raised.value)


def test_nonfinite_weights_after_the_last_step_raise():
    wild = OptimizerOptions(learning_rate=1e38, momentum=0, weight_decay=1e3)
    with pytest.raises(NonFiniteWeights, match="toy: the last step made weights"):
        fit(Attachment(linear()), Toy(), Training(optimizer=wild, lr_schedule=STEADY), steps=1, name="toy")


class Follows(LossTerm):
    name = "follow"

    def forward(self, batch, student, teacher):
        return (student.logits - teacher.logits).square().mean()


def test_the_student_learns_from_an_unchanged_teacher():
    teacher = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    before = copy.deepcopy(teacher.state_dict())
    model, batches = linear(), Toy()
    fitted = fit(Attachment(model, [Follows()], 0.0), batches, Training(), steps=80, teacher=teacher)
    assert list(fitted.losses) == ["follow"]
    assert fitted.losses["follow"] < 0.01
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


def test_the_weights_of_a_term_are_trained():
    class Translated(LossTerm):
        name = "translated"

        def __init__(self):
            super().__init__()
            self.translator = nn.Linear(3, 1)

        def forward(self, batch, student, teacher):
            return (self.translator(student.logits) - 1).square().mean()

    term = Translated()
    before = weights(term)
    fit(Attachment(linear(), [term]), Toy(), Training(), steps=1)
    assert not torch.equal(weights(term), before)


def test_reported_losses_are_means_over_the_last_epoch():
    class Counts(LossTerm):
        name = "count"
        calls = 0

        def forward(self, batch, student, teacher):
            self.calls += 1
            return student.logits.sum() * 0 + self.calls

    fitted = fit(Attachment(linear(), [Counts()]), Toy(), Training(), steps=12)
    assert fitted.losses["count"] == pytest.approx((9 + 10 + 11 + 12) / 4)


def test_training_in_bfloat16():
    fitted = fit(Attachment(linear()), Toy(), Training(precision="bfloat16"), steps=40)
    assert fitted.precision == "bfloat16"
    assert fitted.losses["labels"] < 0.6


def test_zero_steps_change_nothing():
    model = linear()
    before = weights(model)
    assert fit(Attachment(model), Toy(), Training(), steps=0).losses == {}
    assert torch.equal(weights(model), before)


def test_a_set_smaller_than_one_batch_raises_and_names_the_batch_size():
    with pytest.raises(InputError, match="fewer images than one batch of 128"):
        fit(Attachment(linear()), Toy(count=4, batch_size=8), Training(), steps=1)


def test_a_warm_up_as_long_as_the_stage_raises():
    training = Training(lr_schedule=LearningRateSchedule(warmup_epochs=2))
    with pytest.raises(InputError, match=r"warmup_epochs is 2, which is 16 steps, but the stage has only 16 steps"):
        fit(Attachment(linear()), Toy(), training, steps=16)


def test_training_without_a_loss_raises():
    with pytest.raises(InputError, match="no loss: label_weight is 0"):
        fit(Attachment(linear(), label_weight=0.0), Toy(), Training(), steps=1)


SHARE = """
import sys, torch
sys.path.insert(0, {here!r})
from test_loop import Attachment, STEADY, PLAIN_SGD, Toy, Training, fit, linear, weights

rank = int(sys.argv[1])

class Share(Toy):
    def __len__(self):
        return super().__len__() // 2

    def __iter__(self):
        return (batch for number, batch in enumerate(super().__iter__()) if number % 2 == rank)

model = linear()
if rank:
    torch.nn.init.zeros_(model.weight)
training = Training(optimizer=PLAIN_SGD, lr_schedule=STEADY, precision="float32", accumulate=2, clip_norm=0.5)
fit(Attachment(model), Share(), training, steps=6)
torch.save(weights(model), sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates_twice_as_many_batches(tmp_path):
    first, second = run_in_two_processes(SHARE.format(here=str(Path(__file__).parent)), tmp_path)
    alone = linear()
    training = Training(optimizer=PLAIN_SGD, lr_schedule=STEADY, precision="float32", accumulate=4, clip_norm=0.5)
    fit(Attachment(alone), Toy(), training, steps=6)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weights(alone))


def test_a_time_limit_shortens_the_schedule_and_a_resumed_training_gets_its_own_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tersor.training.history.time.perf_counter", lambda: now[0])

    class OneSecondSteps(Recorder):
        def advance(self, items=1, **values):
            super().advance(min(items, 1), **values)
            now[0] += 1.0

    progress = OneSecondSteps()
    options = {"seconds": 10.0, "progress": progress}
    fitted = fit(Attachment(linear()), Toy(), Training(), steps=1000, **options)
    assert fitted.steps == 10
    rates = [each["learning_rate"] for each in progress.values]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 * rates[0]

    stopped = InMemoryCheckpointer(until=6)
    with pytest.raises(KeyboardInterrupt):
        fit(Attachment(linear()), Toy(), Training(), steps=1000, checkpointer=stopped, **options)
    resumed = InMemoryCheckpointer(resume_state=(6, stopped.saved[6]))
    again = fit(Attachment(linear()), Toy(), Training(), steps=1000, checkpointer=resumed, **options)
    assert again.steps == 16
