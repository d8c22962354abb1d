"""Training options of a stage, as validated data; does not import torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field

from tersor.core.plain_values import PlainRecord

PLAIN = ConfigDict(extra="forbid", frozen=True)


FROM_SCRATCH = {"sgd": 0.1, "adamw": 1e-3}
FINE_TUNING = {"sgd": 0.01, "adamw": 1e-4}
"""Default learning rates; those for fine-tuning were chosen by `bench/fine_tuning_rates.py`."""


class OptimizerOptions(PlainRecord):
    """The optimizer of a stage."""

    model_config = PLAIN
    name: Annotated[Literal["sgd", "adamw"], Field(description="SGD with momentum, or AdamW")] = "sgd"
    learning_rate: Annotated[
        float | None,
        Field(
            gt=0,
            description="by default 0.1 (adamw: 0.001) from random weights and 0.01 (adamw: 0.0001) from trained ones",
        ),
    ] = None
    momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of SGD; ignored by AdamW")] = 0.9
    nesterov: Annotated[bool, Field(description="Nesterov momentum of SGD; ignored by AdamW")] = True
    weight_decay: Annotated[float, Field(ge=0, description="coefficient of the weight decay")] = 5e-4


class LearningRateSchedule(PlainRecord):
    """Factor applied to the learning rate over a stage, after `warmup_epochs` of linear warm-up."""

    model_config = PLAIN
    name: Annotated[
        Literal["cosine", "linear", "step", "constant"], Field(description="shape of the curve after the warm-up")
    ] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0, description="epochs in which the rate rises linearly from 0")] = 0
    milestones: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Field(description="`step` schedule: fractions of the stage after which the learning rate drops"),
    ] = (0.5, 0.75)
    factor: Annotated[float, Field(gt=0, lt=1, description="`step` schedule: factor of each drop")] = 0.1


class Training(PlainRecord):
    """Training options of a stage, except its length and its methods."""

    model_config = PLAIN
    batch_size: Annotated[int, Field(ge=1, description="images per batch and process")] = 128
    optimizer: Annotated[OptimizerOptions, Field(description="the optimizer")] = OptimizerOptions()
    lr_schedule: Annotated[LearningRateSchedule, Field(description="learning rate over the stage")] = (
        LearningRateSchedule()
    )
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="label smoothing in the cross entropy, as in torch")
    ] = 0.0
    clip_norm: Annotated[float | None, Field(gt=0, description="maximum norm of the whole gradient")] = None
    accumulate: Annotated[int, Field(ge=1, description="batches per optimizer step")] = 1
    ema: Annotated[
        float | None, Field(gt=0, lt=1, description="decay of an exponential moving average of the weights")
    ] = None
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="auto: bfloat16 where the device has units for it (AVX512-BF16, AMX, GPUs), else float32"),
    ] = "auto"

    def learning_rate(self, *, trained: bool = False) -> float:
        """The peak learning rate: as given, or the default for random or `trained` weights."""
        defaults = FINE_TUNING if trained else FROM_SCRATCH
        return self.optimizer.learning_rate or defaults[self.optimizer.name]

    def with_learning_rate(self, *, trained: bool) -> Self:
        """The same options with the learning rate written out."""
        rate = {"learning_rate": self.learning_rate(trained=trained)}
        return self.model_copy(update={"optimizer": self.optimizer.model_copy(update=rate)})
