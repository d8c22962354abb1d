"""The training loop: an optimizer minimizes the sum of an Objective's losses.

accelerate prepares only the Objective and the optimizer:

* The Objective autocasts itself (`mixed_precision="no"`): all Accelerators of a process share one precision.
* The hooks of an Attachment bind to torch's own optimizer, inside accelerate's wrapper, which has no hooks. Its `step`
  is called once for all accumulated batches, after clipping, so `before_step` receives the averaged gradient.
* The loop accumulates gradients itself, within one epoch: the last step of an epoch averages over the remaining
  batches. accelerate's counter does not include the epochs of batches that it has not prepared.
* The learning rate is set before every step by a pure function. accelerate's scheduler would step once per process.
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

from tersor.core.device import layout_for, precision_for, restore_device_and_layout, seeded, set_layout
from tersor.core.distributed import any_rank, broadcast_from_rank0, init_process_group, others_alive
from tersor.core.errors import InputError, NonFiniteLoss, NonFiniteWeights, Origin
from tersor.core.progress import NullProgress, ProgressReporter
from tersor.core.resources import enough_memory, less_memory
from tersor.data.batch import Batch
from tersor.data.batch_errors import explain_batchnorm_error
from tersor.data.batch_source import BatchSource, Group, groups
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task, with_label_smoothing
from tersor.training.attachment import Attachment
from tersor.training.ema import WeightEMA
from tersor.training.history import LossHistory
from tersor.training.norm_statistics import average_again
from tersor.training.objective import Objective
from tersor.training.optimizer import optimizer_for
from tersor.training.options import Training
from tersor.training.schedule import learning_rates, rates_in_time
from tersor.training.snapshot import Checkpointer, defer_sigint, restore, restoring, snapshot, with_prefix
from tersor.training.teacher_cache import TeacherCache
from tersor.training.validation_curve import ValidationCurve

REPORT_EVERY = 20
"""Steps between two reports of the losses; reading them waits for the device."""


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training run.

    Attributes:
        steps: optimizer steps.
        seconds: wall time of these steps, data loading and earlier processes included, validation excluded.
        earlier_seconds: the part of `seconds` that earlier processes of a resumed run took.
        losses: mean of each loss, by name, over the steps of the last epoch.
        precision: data type in which the networks ran.
    """

    steps: int
    seconds: float
    earlier_seconds: float
    losses: dict[str, float]
    precision: Literal["float32", "bfloat16"]


def fit(
    attachment: Attachment,
    batches: BatchSource,
    training: Training,
    *,
    steps: int,
    teacher: nn.Module | None = None,
    progress: ProgressReporter | None = None,
    seed: int = 0,
    name: str = "train",
    task: Task | None = None,
    checkpointer: Checkpointer | None = None,
    cache_batches: BatchSource | None = None,
    curve: ValidationCurve | None = None,
    seconds: float | None = None,
    origin: Origin = "recipe",
) -> TrainingResult:
    """Train `attachment.model` in place, on the device that accelerate selects, and return it to eval mode.

    The caller runs `attachment.begin` before and `attachment.finish` afterwards.

    Args:
        attachment: the model, its loss terms and its hooks, which are removed afterwards.
        batches: this process's share of the images; all processes end with the same weights, masks and grids.
        training: optimizer, schedule and the other options of a stage.
        steps: optimizer steps in total.
        teacher: the network to learn from, in eval mode and without gradients.
        progress: reports steps, losses and the learning rate.
        seed: seed of random numbers in modules and methods (dropout); the order of the data has a seed of its own.
        name: name of the training in progress lines.
        task: the task of the network; classification by default.
        checkpointer: holds the state to resume from, and saves the state every few steps and on Ctrl-C.
        cache_batches: all images in order, for data without augmentation; the teacher's outputs for them are cached.
        curve: measures the metric on the validation images every few steps.
        seconds: time limit for this process, over which the learning rate schedule then runs; at least one step runs.
        origin: where the options are from, to which errors refer.

    Raises:
        KeyboardInterrupt: Ctrl-C; with a checkpointer, after the step was finished and saved.
        InputError: no batch, no loss, a warm-up longer than the training, or too little memory.
        NonFiniteLoss, NonFiniteWeights: a loss or a weight is infinite or NaN.
        ProcessLost: another process has died.
    """
    if not attachment.terms and not attachment.label_weight:
        raise InputError("no loss: label_weight is 0 and no method adds one. Increase label_weight or add a loss term.")
    rates = learning_rates(batches, training, steps)
    # without the loss on the labels the classifier may get no gradient: a term may use inner layers alone
    ddp = DistributedDataParallelKwargs(find_unused_parameters=not attachment.label_weight)
    plugin = GradientAccumulationPlugin(num_steps=1)
    cpu = init_process_group()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", gradient_accumulation_plugin=plugin, kwargs_handlers=[ddp])
    device = accelerator.device
    objective = Objective(
        attachment.model,
        attachment.terms,
        teacher,
        label_weight=attachment.label_weight,
        layers=attachment.layers,
        task=with_label_smoothing(task or Classification(), training.label_smoothing),
        autocast=precision_for(device, training.precision),
    )
    with (
        others_alive(),
        enough_memory(less_memory(origin, training.batch_size, training.accumulate)),
        restore_device_and_layout(objective),
        seeded(seed + accelerator.process_index, device),
    ):
        loop = _Loop(accelerator, objective, attachment, training, progress, checkpointer, curve, origin)
        resumed = checkpointer.resume_state if checkpointer else None
        handle = attachment.bind(loop.torch_optimizer, start=resumed[0] if resumed else 0)
        try:
            if cache_batches is not None and (attachment.terms or objective.context.task.from_original):
                loop.cache_teacher(cache_batches, name)
            return loop.run(batches, rates, name, seconds)
        finally:
            handle.remove()


class _Loop:
    """The steps of one training run, through accelerate."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        attachment: Attachment,
        training: Training,
        progress: ProgressReporter | None,
        checkpointer: Checkpointer | None,
        curve: ValidationCurve | None,
        origin: Origin,
    ) -> None:
        self.accelerator = accelerator
        self.unwrapped = objective
        self.attachment = attachment
        self.model = objective.model
        self.training = training
        self.progress = progress or NullProgress()
        self.checkpointer = checkpointer
        self.curve = curve
        self.origin: Origin = origin
        self.precision: Literal["float32", "bfloat16"] = "bfloat16" if objective.context.autocast else "float32"
        self.layout = layout_for(accelerator.device)
        set_layout(objective, self.layout)
        self.torch_optimizer = optimizer_for(objective, training)
        self.objective, self.optimizer = accelerator.prepare(objective.train(), self.torch_optimizer)

    def cache_teacher(self, batches: BatchSource, name: str) -> None:
        """Compute the teacher's outputs for all images; a resumed training computes the same bits again."""
        self.progress.start(f"{name}: computing teacher outputs", len(batches))
        cache: TeacherCache | None = None
        for batch in batches:
            cache = cache or TeacherCache(len(batches) * len(batch.images))
            cache.add(batch, self.unwrapped.teacher_forward(self._to_device(batch)))
            self.progress.advance()
        self.unwrapped.teacher_cache = cache

    def run(self, batches: BatchSource, rates: list[float], name: str, seconds: float | None) -> TrainingResult:
        """One step for each learning rate; with a time limit, rates are skipped if the steps are too slow."""
        layout = str(self.layout).removeprefix("torch.")
        how = f"{len(rates)} steps in {self.precision}, {layout}, on {self.accelerator.device}"
        self.progress.start(name, len(rates))
        ema = WeightEMA(self.model, self.training.ema) if self.training.ema else None
        first, history = self._resume(ema)
        self.progress.say(f"{name}: {how}{f'; resuming after step {first}' if first else ''}")
        done, reported = first, dict[str, float]()
        steps = groups(batches, self.training.accumulate, first)
        limit = None if seconds is None else history.earlier_seconds + seconds
        due = rates_in_time(rates, first, lambda: history.seconds, limit)
        with defer_sigint(self.checkpointer is not None) as interrupted:
            for step, (rate, group) in enumerate(zip(due, steps, strict=False), first):
                losses = self._backward(group)
                values = torch.stack([*losses.values()])
                self._check_finite(losses, values, step, rate)
                self._optimizer_step(rate)
                if ema:
                    ema.update(self.model, step)
                history.add(losses, first=group.first)
                if step % REPORT_EVERY == 0 or not reported:
                    reported = dict(zip(losses, values.tolist(), strict=True))
                done = step + 1
                validated = self._validate(done, ema, history)
                self.progress.advance(1, **reported, **validated, learning_rate=rate)
                if self.checkpointer:
                    self._checkpoint(self.checkpointer, done, interrupted(), ema, history)
        if any_rank(not all(bool(weight.isfinite().all()) for weight in self.model.parameters())):
            raise NonFiniteWeights(name, origin=self.origin)
        if ema:
            ema.copy_to(self.model)
        with history.paused():
            accumulate, changes = self.training.accumulate, self.attachment.changes
            for line in average_again(self.unwrapped, batches, self._to_device, done, accumulate, changes):
                self.progress.say(f"{name}: {line}")
                if self.curve:
                    self.curve.measure_again(done, self.model)
        broadcast_from_rank0(self.model)  # running statistics and ranges differ after each process's last batch
        broadcast_from_rank0(self.unwrapped.terms)
        return TrainingResult(done, history.seconds, history.earlier_seconds, history.means(), self.precision)

    def _resume(self, ema: WeightEMA | None) -> tuple[int, LossHistory]:
        """The first step, and the loss history up to it."""
        if self.checkpointer is None or self.checkpointer.resume_state is None:
            return 0, LossHistory({})
        first, state = self.checkpointer.resume_state
        with restoring(self.checkpointer.last):
            restore(state, self.unwrapped, self.torch_optimizer, ema)
            self.attachment.load_state_dict(with_prefix(state, "attachment"))
            self.progress.advance(first)
            if self.curve:
                self.curve.load_state(with_prefix(state, "curve"))
            return first, LossHistory(with_prefix(state, "log"))

    def _validate(self, done: int, ema: WeightEMA | None, history: LossHistory) -> dict[str, float]:
        """The latest validation score, as the progress shows it."""
        with history.paused():
            if self.curve:
                self.curve.measure_if_due(done, self.model, ema)
        return self.curve.latest if self.curve else {}

    def _checkpoint(
        self, checkpointer: Checkpointer, done: int, interrupted: bool, ema: WeightEMA | None, history: LossHistory
    ) -> None:
        """Save a snapshot every few steps. If Ctrl-C was pressed in any process, save one in all, and stop.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        stop = any_rank(interrupted)
        if stop or done % checkpointer.every == 0:
            state = {f"log.{name}": value for name, value in history.state().items()}
            state |= {f"attachment.{name}": value for name, value in self.attachment.state_dict().items()}
            if self.curve:
                state |= {f"curve.{name}": value for name, value in self.curve.state().items()}
            checkpointer.save(done, snapshot(self.unwrapped, self.torch_optimizer, ema) | state)
        if stop:
            raise KeyboardInterrupt

    def _backward(self, group: Group) -> dict[str, Tensor]:
        """Accumulate the gradient of the mean over the group's batches; return the mean losses by name."""
        means: dict[str, Tensor] = {}
        for place, batch in enumerate(group.batches, 1):
            sync = self.accelerator.no_sync(self.objective) if place < group.size else nullcontext()
            with sync, explain_batchnorm_error(len(batch.images)):
                losses: dict[str, Tensor] = self.objective(self._to_device(batch))
                self.accelerator.backward(torch.stack([*losses.values()]).sum() / group.size)
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / group.size
        return means

    def _to_device(self, batch: Batch) -> Batch:
        batch = batch.to(self.accelerator.device)
        if not isinstance(batch.images, Tensor) or batch.images.ndim != 4:
            return batch
        return Batch(batch.images.contiguous(memory_format=self.layout), batch.targets, batch.index)

    def _check_finite(self, names: Iterable[str], values: Tensor, step: int, rate: float) -> None:
        # After the backward pass was started: on a GPU the wait is then no longer than the pass.
        if any_rank(not bool(values.isfinite().all())):
            here = [loss for loss in zip(names, values.tolist(), strict=True) if not math.isfinite(loss[1])]
            (name, value), saver = (*here, ("", math.nan))[0], self.checkpointer  # "": a loss in another process
            raise NonFiniteLoss(step + 1, name, value, rate, saver.last if saver else None, origin=self.origin)

    def _optimizer_step(self, rate: float) -> None:
        for group in self.torch_optimizer.param_groups:
            group["lr"] = rate
        if self.training.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
