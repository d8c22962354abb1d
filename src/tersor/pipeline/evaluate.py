"""An existing artifact: the metric on a test set (`tersor eval`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ConfigDict

from tersor.checkpoint.artifact import Artifact, read_artifact
from tersor.core.progress import ProgressReporter
from tersor.deploy.file_layers import stored_precision, weight_bits
from tersor.evaluation.session import Session, open_session
from tersor.pipeline.artifact_settings import (
    ImageOptions,
    chosen_on_test_images,
    class_names,
    data_source,
    normalization_line,
    numbers_of,
    original_file,
    quantized_for,
    refuse_other_classes,
    task_of_artifact,
)

if TYPE_CHECKING:  # they import torch
    from tersor.data import Batches
    from tersor.evaluation.file_inputs import FileArrays
    from tersor.tasks.task import Task

_CHANNELS = (1, 3, 4)
_COMPUTED = (
    "computed from the training images, since the file has none; if the network was trained with others, write them as "
    "--mean and --std"
)
_CHOSEN = (
    "half of the test images were the validation images of the search that made the file, so the result on all of them "
    "is optimistic; the report of the search shows the result on the other half"
)


@dataclass(frozen=True)
class Evaluation:
    """The metric on the test images, and the runtime that it was measured in."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)
    metric: str
    """Name of the metric."""
    score: float
    """The metric on the test images: in percent if the task's metric is a percentage."""
    shown: str
    """The score with its unit, and with its standard error if it is the accuracy."""
    images: int
    """Number of test images."""
    runtime: str
    """Runtime of the measurement."""
    precision: str
    """Data type of the stored weights, and of the products that stay in float, such as `int8, rest float32`."""
    score_error: float | None = None
    """One standard error of the score, in points; none for metrics other than the accuracy."""

    def __str__(self) -> str:
        """ "accuracy 91.20 ± 1.49 % on 360 test images, onnxruntime in int8, rest float32"."""
        return f"{self.metric} {self.shown} on {self.images} test images, {self.runtime} in {self.precision}"


def evaluate(
    artifact: Path,
    data: str | None,
    runtime: str | None,
    task: str | None = None,
    options: ImageOptions | None = None,
    *,
    progress: ProgressReporter,
) -> Evaluation:
    """Measure the metric of `artifact` on the test images of `data`.

    Args:
        artifact: the folder of a run, a search or one of its points, or an ONNX file.
        data: an image folder, CSV file, data set or file.py:function; by default the data of the folder's recipe.
        runtime: by default that of the folder's recipe, else the one that the file was quantized for, else ONNX
            Runtime.
        task: its name; by default that of the folder's recipe, else classification.
        options: how the images are read, where the artifact does not specify it.
        progress: reports the progress.

    Raises:
        InputError: the artifact or the data cannot be used, or an ONNX file is given without data.
    """
    from tersor.evaluation.measurement import arrays
    from tersor.evaluation.scoring import file_predictions, score, targets_of
    from tersor.evaluation.standard_error import measures_accuracy, standard_error

    found = read_artifact(artifact)
    told = numbers_of(found)
    session = open_session(found.model, runtime or told.get("runtime") or quantized_for(found) or "onnxruntime")
    made_for = quantized_for(found) or session.runtime
    if made_for != session.runtime and weight_bits(found.model):
        progress.say(
            f"warning: the file was made for {made_for} and runs in {session.runtime}, where fewer operators may be "
            f"computed in integers and the metric may differ. Write --runtime {made_for}."
        )
    options = options or ImageOptions()
    options.check(session, told)
    if chosen_on_test_images(found):
        same = "" if data is None else "if these are the images of the search, "
        progress.say(f"warning: {same}{_CHOSEN}")
    progress.say("reading the images")
    asked = task_of_artifact(found, task)
    batches, kind, classes = _test_images(found, data, asked, session, options, told, progress)
    if doubt := _more_logits(asked, session, next(iter(arrays(batches, kind))), classes):
        progress.say(f"warning: {doubt}")
    progress.start("test set", 1)
    predictions = file_predictions(session, arrays(batches, kind), asked)
    targets = targets_of(batches)
    if asked.from_original:
        original = original_file(found)
        targets = file_predictions(open_session(original, session.runtime), arrays(batches, kind), asked)
    progress.advance()
    result = score(asked, predictions, targets)
    precision, images = stored_precision(found.model, session.precision), len(batches.images)
    error = standard_error(result, images) if measures_accuracy(asked) else None
    shown = asked.shown(result) if error is None else f"{result:.2f} ± {error:.2f} %"
    return Evaluation(asked.metric, result, shown, images, session.runtime, precision, error)


def _test_images(
    artifact: Artifact,
    data: str | None,
    task: Task,
    session: Session,
    options: ImageOptions,
    told: Mapping[str, Any],
    progress: ProgressReporter,
) -> tuple[Batches, str, int]:
    """The test images as the file takes them, the kind of its input ("normalized" or "uint8"), number of classes."""
    from tersor.data import Batches, load
    from tersor.data.splitting import drawn_test_set, undivided
    from tersor.evaluation.scoring import images_at_once

    source: dict[str, Any] = data_source(artifact, data) | {"targets": "boxes" if task.boxes else "masks"}
    how = {key: told[key] for key in ("mean", "std") if key in told}
    how |= {key: value for key, value in asdict(options).items() if value is not None and key not in how}
    channels = len(how["mean"]) if told.get("mean") else session.input_shape[1]
    if options.channels is None and channels in _CHANNELS:
        how["channels"] = channels
    size = session.input_shape[2:]
    if data is not None and "image_size" not in how and len(size) == 2 and all(size):
        how["image_size"] = size
        progress.say(f"images of another size are resized to {size[0]} x {size[1]}, the input size of the file")
    splits = load(**source | how)
    images = splits.test
    if drawn := drawn_test_set(splits):
        if data is not None:
            images = undivided(load(**source | how, validation=0.0))
            drawn = f"the data has no test set of its own: all {len(images)} images are used"
        progress.say(drawn)
    refuse_other_classes(class_names(artifact.model), splits.classes)
    assert splits.mean is not None
    assert splits.std is not None
    kind = "uint8" if session.input_dtype == np.uint8 else "normalized"
    if kind == "normalized":
        origin = "from the artifact" if told.get("mean") else "given" if options.mean else _COMPUTED
        doubt = "warning: " * (origin == _COMPUTED)
        progress.say(doubt + normalization_line(splits.mean, splits.std, origin))
    at_once = images_at_once(task, images.size)
    return Batches(images, at_once, mean=splits.mean, std=splits.std), kind, len(splits.classes)


def _more_logits(task: Task, session: Session, images: FileArrays, classes: int) -> str | None:
    """A doubt about the order of the classes, if a classifier has more logits than the data has classes."""
    from tersor.evaluation.scoring import file_outputs
    from tersor.tasks.classification import Classification

    logits = task.logits(file_outputs(session, images[:1])) if isinstance(task, Classification) else None
    if logits is None or logits.ndim != 2 or not 1 < classes < logits.shape[1]:
        return None
    return (
        f"the file returns {logits.shape[1]} logits, but the data has {classes} classes. The accuracy is correct only "
        f"if these are the first {classes} classes of the network, in the same order."
    )
