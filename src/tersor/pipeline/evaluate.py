"""An existing artifact: the metric on a test set (`tersor eval`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tersor.checkpoint.artifact import read_artifact
from tersor.core.progress import ProgressReporter
from tersor.deploy.file_layers import stored_precision
from tersor.evaluation.session import open_session
from tersor.pipeline.artifact_settings import (
    class_names,
    data_source,
    normalization_line,
    numbers_of,
    original_file,
    refuse_other_classes,
    task_of_artifact,
)

_CHANNELS = (1, 3, 4)
_COMPUTED = "computed from the training images, since the file has none; they must be those of its training"


@dataclass(frozen=True)
class Evaluation:
    """The metric on the test images, and the runtime that it was measured in.

    `precision` is that of the weights, and of all else: "int8, rest float32".
    """

    metric: str
    score: float
    shown: str
    images: int
    runtime: str
    precision: str

    def __str__(self) -> str:
        """ "91.20 % of 360 test images, onnxruntime in int8, rest float32"."""
        score = f"{self.shown} of" if self.metric == "accuracy" else f"{self.metric} {self.shown} on"
        return f"{score} {self.images} test images, {self.runtime} in {self.precision}"


def evaluate(
    artifact: Path, data: str | None, runtime: str | None, task: str | None = None, *, progress: ProgressReporter
) -> Evaluation:
    """Measure the metric of `artifact` on the test images of `data`.

    Args:
        artifact: the folder of a run, or an ONNX file.
        data: an image folder, a CSV file or the name of a data set; by default the data of the folder's recipe.
        runtime: by default that of the folder's recipe, else ONNX Runtime.
        task: its name; by default that of the folder's recipe, else classification.
        progress: reports the progress.

    Raises:
        InputError: the artifact or the data cannot be used, or an ONNX file is given without data.
    """
    from tersor.data import Batches, load
    from tersor.evaluation.measurement import arrays
    from tersor.evaluation.scoring import file_predictions, images_at_once, score, targets_of

    found = read_artifact(artifact)
    numbers = numbers_of(found)
    session = open_session(found.model, runtime or numbers.get("runtime", "onnxruntime"))
    progress.say("reading the images")
    asked = task_of_artifact(found, task)
    options = data_source(found, data) | {key: numbers[key] for key in ("mean", "std") if key in numbers}
    channels = len(numbers["mean"]) if numbers.get("mean") else session.input_shape[1]
    if channels in _CHANNELS:
        options["channels"] = channels
    splits = load(**options, targets="boxes" if asked.boxes else "masks")
    refuse_other_classes(class_names(found.model), splits.classes)
    assert splits.mean is not None
    assert splits.std is not None
    batches = Batches(splits.test, images_at_once(asked, splits.test.size), mean=splits.mean, std=splits.std)
    kind = "uint8" if session.input_dtype == np.uint8 else "normalized"
    if kind == "normalized":
        source = "from the artifact" if numbers.get("mean") else _COMPUTED
        progress.say(normalization_line(splits.mean, splits.std, source))
    progress.start("test set", 1)
    predictions = file_predictions(session, arrays(batches, kind), asked)
    targets = targets_of(batches)
    if asked.from_original:
        original = original_file(found)
        targets = file_predictions(open_session(original, session.runtime), arrays(batches, kind), asked)
    progress.advance()
    result = score(asked, predictions, targets)
    precision = stored_precision(found.model, session.precision)
    return Evaluation(asked.metric, result, asked.shown(result), len(splits.test), session.runtime, precision)
