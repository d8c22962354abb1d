"""How a stage trains, as checked data. No tensor is touched here, and torch is not imported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PLAIN = ConfigDict(extra="forbid", frozen=True)


class OptimizerOptions(BaseModel):
    """The optimizer of a stage."""

    model_config = PLAIN
    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1, description="of SGD; AdamW has its own")] = 0.9
    nesterov: Annotated[bool, Field(description="of SGD")] = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4


class LearningRateSchedule(BaseModel):
    """The factor on the learning rate over a stage, after `warmup_epochs` of linear rise."""

    model_config = PLAIN
    name: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    milestones: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Field(description="of `step`: fractions of the stage after which the rate drops"),
    ] = (0.5, 0.75)
    factor: Annotated[float, Field(gt=0, lt=1, description="of `step`: what a drop multiplies by")] = 0.1


class Training(BaseModel):
    """Everything about a stage's loop but its length and its methods."""

    model_config = PLAIN
    batch_size: Annotated[int, Field(ge=1, description="images a step and process")] = 128
    optimizer: OptimizerOptions = OptimizerOptions()
    lr_schedule: LearningRateSchedule = LearningRateSchedule()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float | None, Field(gt=0, description="largest norm of the whole gradient")] = None
    accumulate: Annotated[int, Field(ge=1, description="batches whose gradients make one step")] = 1
    ema: Annotated[float | None, Field(gt=0, lt=1, description="decay of a running mean of the weights")] = None
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="auto: bfloat16 where the device has matrix units for it, else float32"),
    ] = "auto"
