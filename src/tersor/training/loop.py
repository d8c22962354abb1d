"""The one loop: batches go through an Objective, and its losses move the weights.

accelerate prepares two things only, the Objective and the optimizer:

* The Objective autocasts itself (`mixed_precision="no"`): all Accelerators of a process have to share one precision.
* The hooks of an Attachment bind to torch's own optimizer, inside accelerate's wrapper, which has none. Its `step` is
  called once for all accumulated batches, after clipping: `before_step` finds the averaged gradient of the whole step.
* Accumulation is ours, over the batches of one epoch: the last step of an epoch takes what is left, and its gradient
  is the mean over those. accelerate's counter knows no epoch of batches that it has not prepared.
* The learning rate is set before every step by a pure function. accelerate's scheduler steps once for each process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn

from tersor.core.device import layout_for, precision_for, restore_device_and_layout, set_layout
from tersor.core.distributed import any_rank, broadcast_from_rank0, init_process_group, others_alive
from tersor.core.errors import InputError, NonFiniteLoss, NonFiniteWeights
from tersor.core.progress import NullProgress, ProgressReporter
from tersor.core.resources import enough_memory, smaller_batch
from tersor.core.seeded import seeded
from tersor.data.batch import Batch
from tersor.data.batch_errors import single_images_refused
from tersor.data.batch_source import BatchSource, Group, groups
from tersor.training.accuracy_curve import AccuracyCurve
from tersor.training.attachment import Attachment
from tersor.training.ema import RunningMean
from tersor.training.history import LossLog
from tersor.training.objective import Objective
from tersor.training.optimizer import optimizer_for
from tersor.training.options import Training
from tersor.training.schedule import learning_rate_factor
from tersor.training.snapshot import Keeper, defer_sigint, fitting, part, restore, snapshot
from tersor.training.teacher_cache import TeacherCache

REPORT_EVERY = 20
"""Steps between two looks at the losses' values."""


@dataclass(frozen=True)
class Fitted:
    """What a run of the loop was.

    Attributes:
        steps: optimizer steps.
        seconds: wall time of these steps, data included, also of those that a process before took.
        earlier: of these seconds, those of processes before.
        losses: mean of each loss, by name, over the steps of the last epoch that was begun.
        precision: what the networks ran in.
    """

    steps: int
    seconds: float
    earlier: float
    losses: dict[str, float]
    precision: Literal["float32", "bfloat16"]


def steps_per_epoch(batches: BatchSource, training: Training) -> int:
    """Optimizer steps in one epoch; the last may accumulate fewer batches than the others.

    Raises:
        InputError: there is no batch.
    """
    if not len(batches):
        raise InputError(
            f"there is no batch to train on: there are fewer images than one batch of {training.batch_size}. "
            "Give more images, or a smaller batch_size."
        )
    return math.ceil(len(batches) / training.accumulate)


def fit(
    attachment: Attachment,
    batches: BatchSource,
    training: Training,
    *,
    steps: int,
    teacher: nn.Module | None = None,
    progress: ProgressReporter | None = None,
    seed: int = 0,
    task: str = "train",
    keeper: Keeper | None = None,
    once: BatchSource | None = None,
    curve: AccuracyCurve | None = None,
) -> Fitted:
    """Trains `attachment.model` in place on the device that accelerate finds; it comes back in eval, where it was.

    `attachment.begin` was run before, and `attachment.finish` is called afterwards, by the caller.

    Args:
        attachment: the model, its loss terms and its hooks, which are gone afterwards.
        batches: this process's share of the images; all come to the same weights, masks and grids.
        training: optimizer, schedule and the rest of a stage.
        steps: optimizer steps in total.
        teacher: what the terms compare with; always in eval, and its parameters ask for no gradient any more.
        progress: reports the progress.
        seed: of the numbers that modules and methods draw (dropout); the order of the data has its own.
        task: its name in the progress.
        keeper: where this training goes on from, and what keeps it every few steps and when Ctrl-C is pressed.
        once: all images in their order, where they come as they are in every epoch: the teacher is asked about them
            before the first step, and what it gives is kept.
        curve: measures the network every few steps, and has its values afterwards.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; with a keeper, after the step was ended and kept.
        InputError: there is no batch, no loss, nothing but warm-up, or too little memory.
        NonFiniteLoss, NonFiniteWeights: a loss is infinite or NaN, or what the last step leaves.
        ProcessLost: another process has died.
    """
    if not attachment.terms and not attachment.label_weight:
        raise InputError("nothing is asked of the network: label_weight is 0 and no method adds a loss.")
    rates = learning_rates(batches, training, steps)
    # without labels nothing may ask the classifier: a term may look at layers alone
    of_several = DistributedDataParallelKwargs(find_unused_parameters=not attachment.label_weight)
    accelerator = Accelerator(
        cpu=init_process_group(),
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[of_several],
    )
    device = accelerator.device
    objective = Objective(
        attachment.model,
        attachment.terms,
        teacher,
        label_weight=attachment.label_weight,
        layers=attachment.layers,
        label_smoothing=training.label_smoothing,
        autocast=precision_for(device, training.precision),
    )
    remedy = smaller_batch(training.batch_size, training.accumulate)
    with (
        others_alive(),
        enough_memory(remedy),
        restore_device_and_layout(objective),
        seeded(seed + accelerator.process_index, device),
    ):
        loop = _Loop(accelerator, objective, attachment, training, progress or NullProgress(), keeper, curve)
        begun = keeper.resume_state if keeper else None
        handle = attachment.bind(loop.torch_optimizer, start=begun[0] if begun else 0)
        try:
            if once is not None and attachment.terms:
                loop.remember(once, task)
            return loop.run(batches, rates, task)
        finally:
            handle.remove()


class _Loop:
    """Batches -> gradients -> moved weights, through accelerate."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        attachment: Attachment,
        training: Training,
        progress: ProgressReporter,
        keeper: Keeper | None,
        curve: AccuracyCurve | None,
    ) -> None:
        self.accelerator = accelerator
        self.plain = objective
        self.attachment = attachment
        self.model = objective.model
        self.training = training
        self.progress = progress
        self.keeper = keeper
        self.curve = curve
        self.precision: Literal["float32", "bfloat16"] = "bfloat16" if objective.autocast else "float32"
        self.layout = layout_for(accelerator.device)
        set_layout(objective, self.layout)
        self.torch_optimizer = optimizer_for(objective, training.optimizer)
        self.objective, self.optimizer = accelerator.prepare(objective.train(), self.torch_optimizer)

    def remember(self, once: BatchSource, task: str) -> None:
        """Asks the teacher about all images. Also where a training goes on: the bits are the same, batch by batch."""
        self.progress.start(f"{task}: what the teacher gives", len(once))
        kept: TeacherCache | None = None
        for batch in once:
            kept = kept or TeacherCache(len(once) * len(batch.images))
            kept.add(batch, self.plain.teacher_forward(self._placed(batch)))
            self.progress.advance()
        self.plain.answers = kept

    def run(self, batches: BatchSource, rates: list[float], task: str) -> Fitted:
        """One step for each of the learning rates."""
        keeper = self.keeper
        layout = str(self.layout).removeprefix("torch.")
        self.progress.say(f"{task}: {len(rates)} steps in {self.precision}, {layout}, on {self.accelerator.device}")
        self.progress.start(task, len(rates))
        mean = RunningMean(self.model, self.training.ema) if self.training.ema else None
        first, kept = keeper.resume_state if keeper and keeper.resume_state else (0, None)
        with fitting(keeper.last if keeper else None):
            if kept is not None:
                restore(kept, self.plain, self.torch_optimizer, mean)
                self.attachment.load_state_dict(part(kept, "attachment"))
                self.progress.advance(first)
                if self.curve:
                    self.curve.go_on(part(kept, "curve"))
            log = LossLog(part(kept or {}, "log"))
        shown: dict[str, float] = {}
        steps = groups(batches, self.training.accumulate, first)
        with defer_sigint(keeper is not None) as asked:
            for step, (rate, group) in enumerate(zip(rates[first:], steps, strict=False), first):
                losses = self._gradients(group)
                values = torch.stack([*losses.values()])
                self._stop_unless_finite(losses, values, step, rate)
                self._move(rate)
                if mean:
                    mean.update(self.model, step)
                log.add(losses, first=group.first)
                if step % REPORT_EVERY == 0 or not shown:
                    shown = dict(zip(losses, values.tolist(), strict=True))
                measured = self._measured(step + 1, mean, log)
                self.progress.advance(1, **shown, **measured, learning_rate=rate)
                if keeper:
                    self._keep(keeper, step + 1, asked(), mean, log)
        if any_rank(not all(bool(weight.isfinite().all()) for weight in self.model.parameters())):
            raise NonFiniteWeights(task)
        if mean:
            mean.copy_to(self.model)
        broadcast_from_rank0(self.model)  # the last batch has moved running statistics and ranges in each apart
        broadcast_from_rank0(self.plain.terms)
        return Fitted(len(rates), log.seconds, log.earlier, log.means(), self.precision)

    def _measured(self, done: int, mean: RunningMean | None, log: LossLog) -> dict[str, float]:
        """What the curve has last, to be shown."""
        if self.curve is None:
            return {}
        with log.paused():
            self.curve.after(done, self.model, mean)
        return self.curve.latest

    def _keep(self, keeper: Keeper, done: int, asked: bool, mean: RunningMean | None, log: LossLog) -> None:
        """A snapshot every few steps, and where Ctrl-C was pressed in any process; then all stop.

        Raises:
            KeyboardInterrupt: it was pressed.
        """
        stop = any_rank(asked)
        if stop or done % keeper.every == 0:
            told = {f"log.{name}": value for name, value in log.tensors().items()}
            told |= {f"attachment.{name}": value for name, value in self.attachment.state_dict().items()}
            if self.curve:
                told |= {f"curve.{name}": value for name, value in self.curve.tensors().items()}
            keeper.keep(done, snapshot(self.plain, self.torch_optimizer, mean) | told)
        if stop:
            raise KeyboardInterrupt

    def _gradients(self, group: Group) -> dict[str, Tensor]:
        """Leaves the gradient of the mean over the group's batches in the parameters; the mean losses by name."""
        means: dict[str, Tensor] = {}
        for place, batch in enumerate(group.batches, 1):
            waits = self.accelerator.no_sync(self.objective) if place < group.size else nullcontext()
            with waits, single_images_refused(len(batch.images)):
                losses: dict[str, Tensor] = self.objective(self._placed(batch))
                self.accelerator.backward(torch.stack([*losses.values()]).sum() / group.size)
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / group.size
        return means

    def _placed(self, batch: Batch) -> Batch:
        batch = batch.to(self.accelerator.device)
        if batch.images.ndim != 4:
            return batch
        return Batch(batch.images.contiguous(memory_format=self.layout), batch.labels, batch.index)

    def _stop_unless_finite(self, names: Iterable[str], values: Tensor, step: int, rate: float) -> None:
        # Looked at after the backward pass was started: on a GPU the wait is then no longer than the pass.
        if any_rank(not bool(values.isfinite().all())):
            told = zip(names, values.tolist(), strict=True)
            name, value = next((pair for pair in told if not math.isfinite(pair[1])), ("of another process", math.nan))
            last = self.keeper.last if self.keeper else None
            raise NonFiniteLoss(step + 1, name, value, rate, last)

    def _move(self, rate: float) -> None:
        for group in self.torch_optimizer.param_groups:
            group["lr"] = rate
        if self.training.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def learning_rates(batches: BatchSource, training: Training, steps: int) -> list[float]:
    """The rate of every step.

    Raises:
        InputError: the warm-up is as long as the training.
    """
    schedule, base = training.lr_schedule, training.optimizer.learning_rate
    warmup = round(schedule.warmup_epochs * steps_per_epoch(batches, training))
    if warmup and steps and warmup >= steps:
        raise InputError(
            f"a warm-up of {schedule.warmup_epochs:g} epochs ({warmup} steps) leaves nothing of a stage of {steps} "
            "steps. Write fewer warmup_epochs, or train longer."
        )
    return [base * learning_rate_factor(schedule, step, steps, warmup) for step in range(steps)]
