"""The measurements of a run: the schema of `numbers.json`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tersor.core.target import Runtime, Target
from tersor.evaluation.metric import Metric

VERSION = 1
Reference = Literal["original", "baseline"]
Percent = Annotated[float, Field(ge=0, le=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
BatchSize = Annotated[str, Field(pattern="^[1-9][0-9]{0,5}$")]


def _unicode(text: Any) -> Any:
    """File names can hold bytes that are not Unicode; JSON cannot."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


Text = Annotated[str, BeforeValidator(_unicode)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Spread(_Record):
    """Latencies of one batch: median and percentiles."""

    median: Positive
    """Median, in milliseconds."""
    p10: Positive
    """10th percentile, in milliseconds."""
    p90: Positive
    """90th percentile, in milliseconds."""
    n: Count
    """Number of rounds; the time of a round is the median of up to five runs."""


class Speedup(_Record):
    """A ratio of two latencies, measured in the same rounds. Above 1, the second file is faster."""

    value: Positive
    """Latency of the first file divided by that of the second."""
    low: Positive
    """Lower end of the 95 % interval of the ratio."""
    high: Positive
    """Upper end of the 95 % interval of the ratio."""
    n: Count
    """Number of rounds."""
    groups: Count
    """Number of groups of rounds; all files are opened again for each group."""


class Machine(_Record):
    """What a measurement depends on: processor, cores, instruction sets, versions."""

    cpu: Text
    """Name of the processor."""
    cpu_kind: Text
    """How 8-bit products are summed: `vnni` and `arm64` in 32 bits, `avx2` in 16."""
    cores: int | None = None
    """Number of physical cores."""
    threads: Count
    """Number of threads in the measurements."""
    instruction_sets: list[Text] = []
    """Instruction sets that matter here, such as `avx512_vnni`; only known on Linux."""
    system: Text
    """Operating system and architecture."""
    python: str = ""
    """Version of Python."""
    versions: dict[str, str | None]
    """Version of each runtime and of torch; null for a package that is not installed."""


class Execution(_Record):
    """The runtime and the precision of a file."""

    runtime: Runtime
    """Runtime that runs the file."""
    precision: Text
    """Data type of the stored weights, and of the products that stay in float, such as `int8, rest float32`."""


class Peak(Execution):
    """The peak throughput of this machine, reached by large convolutions (see `multiply_peak.py`)."""

    precision: Text
    """Precision of the products: `float32`, `bfloat16`, `float16` or `int8`."""
    macs_per_second: Positive
    """Multiply-accumulate operations per second in the fastest run."""
    median: Positive
    """Multiply-accumulate operations per second in the median run; far below the fastest on a loaded machine."""
    n: Count
    """Number of runs."""


class FloatOperator(_Record):
    """An operator that is not computed in integers."""

    name: Text
    """Path of the layer, or of the module that contains the operator; empty for the network itself."""
    kind: Text
    """Class of the layer, or name of the function."""
    macs: Count
    """Multiply-accumulate operations for one image."""
    share: Fraction
    """Fraction of the MACs of the network, from 0 to 1."""
    reason: Text
    """Why it is computed in float."""


class FileResults(Execution):
    """The measurements of one file in one runtime."""

    float_precision: Text
    """Data type of everything that the runtime does not compute in integers."""
    batch: int | None = None
    """Fixed batch size of the file; null if it accepts any."""
    score: float
    """The metric on the test images, in the unit of `metric`."""
    score_error: float | None = None
    """One standard error of the score, in points; null for metrics other than the accuracy."""
    difference_error: float | None = None
    """One standard error of the difference from the original, in points, on the same images; null for the original, and
    for metrics other than the accuracy."""
    agreement: Percent
    """Agreement of the predictions with those of the original file, in percent; for a classifier, the percentage of
    images with the same predicted class."""
    bytes: Count
    """Size of all files that the runtime needs, in bytes."""
    compressed_bytes: Count
    """Size of the same files after compression with deflate, as in zip and gzip, in bytes."""
    parameters: Count = 0
    """Number of trainable parameters."""
    macs: Count
    """Multiply-accumulate operations for one image."""
    bit_operations: Count
    """Sum of the MACs for one image, each multiplied by the bits of both operands."""
    sparsity: Fraction
    """Fraction of zeros in the prunable weights, from 0 to 1."""
    masked: Fraction
    """Fraction of the prunable weights that is masked, from 0 to 1."""
    peak_memory_bytes: Count
    """Peak memory that opening the file and running one image add to a process, in bytes."""
    load_ms: float
    """Time to open the file, in milliseconds: the median of three."""
    latency_ms: dict[BatchSize, Spread]
    """Latency by batch size."""
    latency_runs_ms: dict[BatchSize, list[list[Positive]]]
    """Every latency by batch size, in milliseconds, in groups of interleaved rounds."""
    integer_macs_share: Fraction | None = None
    """Fraction of the MACs computed in integers, from 0 to 1; null for a float network."""
    float_operators: list[FloatOperator] = []
    """Operators that a quantized network computes in float."""
    uncounted_operators: list[Text] = []
    """Operators that multiply and are not included in the MACs, each with its module."""


class StageRecord(BaseModel):
    """What a stage did. Metrics of its methods (`masks`, `bits`, `reconstruction`, ...) are further fields."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
    name: Text
    """Name of the stage."""
    methods: list[Any]
    """Methods and parameters, as in the recipe."""
    steps: Count
    """Number of optimizer steps."""
    notes: list[Text] = []
    """Information for the user, such as the default learning rate."""
    minutes: float
    """Time of preparation and training, in minutes, including that of interrupted processes; measurements are not
    included."""
    validation_score: float | None = None
    """The metric on the validation images after the stage; null without validation images."""
    losses: dict[str, float] = {}
    """Mean of each loss over the last epoch, by name."""
    precision: Text | None = None
    """Precision of the training: `float32` or `bfloat16`."""
    training_seconds: float | None = None
    """Time of the training alone, in seconds."""
    validation_by_epoch: list[float] = []
    """The metric on the validation images during the training."""
    validated_at: list[Count] = []
    """Optimizer steps after which `validation_by_epoch` was measured."""
    score: float | None = None
    """The metric of the exported file on the test images."""
    bytes: Count | None = None
    """Size of the exported file, in bytes."""
    compressed_bytes: Count | None = None
    """Size of the exported file after compression with deflate, in bytes."""
    macs: Count | None = None
    """Multiply-accumulate operations of the network for one image."""
    sparsity: Fraction | None = None
    """Fraction of zeros in the prunable weights, from 0 to 1."""
    latency_ms: dict[BatchSize, Spread] | None = None
    """Latency of the exported file by batch size."""
    speedup: dict[BatchSize, Speedup] | None = None
    """Latency of the original divided by that of the exported file, by batch size."""
    speedup_of_quantization: dict[BatchSize, Speedup] | None = None
    """Latency of the file before the stage divided by that of the exported file, if the bits of weights changed."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the methods."""
        return self.model_extra or {}


class Rounds(_Record):
    """How long latency was measured."""

    time_limit_seconds: float
    """Time limit of each batch size, in seconds."""
    interval_width: float
    """The measurement of a batch size ends when all intervals are narrower than this fraction of the ratio."""
    ended_by: dict[BatchSize, Literal["interval", "time"]]
    """What ended the measurement of each batch size: narrow intervals, or the time limit."""


class Results(_Record):
    """The measurements of a run."""

    version: Literal[1] = VERSION
    """Version of this schema."""
    runtime: Runtime
    """The target runtime."""
    target: Target | None = None
    """Runtime and processor type that the compressed file is made for."""
    metric: Metric
    """The metric of every score."""
    machine: Machine
    """The machine that everything was measured on."""
    seed: Count
    """Random seed of the run."""
    date: Text
    """Date and time of the measurements, in UTC."""
    original: FileResults
    """The file before compression, in float32, in the target runtime."""
    candidates: dict[Runtime, FileResults]
    """The original file in every installed runtime, at the default precision of the runtime."""
    latency_measured: bool = True
    """Whether latency was measured. If not, `baseline`, `speedup`, `peaks` and every `latency_ms` are empty."""
    baseline: dict[BatchSize, Execution]
    """The fastest candidate by batch size."""
    artifact: FileResults
    """The compressed file in the target runtime."""
    agreement_with_torch: Percent | None = None
    """Agreement of the compressed file's predictions with those of the network in torch, in percent."""
    speedup: dict[Reference, dict[BatchSize, Speedup]]
    """Latency of the original, and of the baseline, divided by that of the compressed file, by batch size."""
    rounds: Rounds | None
    """Time limit of the latency measurement, and what ended it at each batch size; null if latency was not measured."""
    peaks: list[Peak] = []
    """Peak throughput of the machine, by runtime and precision."""
    test_images: Count
    """Number of test images."""
    stages: list[StageRecord] = []
    """The stages, in order."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, from 0 to 1. Subtract it from the pixels divided by 255."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, from 0 to 1. Divide by it after subtracting the mean."""
    classes: list[Text] = []
    """Names of the classes, in the order of the logits."""

    def to_json(self) -> str:
        """The text of `numbers.json`."""
        return self.model_dump_json(indent=1, exclude_unset=True)
