"""The measurements of a run: the schema of `numbers.json`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tersor.core.target import Runtime, Target

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
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Spread(_Record):
    """Median and percentiles of `n` latencies in milliseconds."""

    median: Positive
    p10: Positive
    p90: Positive
    n: Count


class Speedup(_Record):
    """A ratio of latencies with its 95 % interval, from `n` rounds in `groups`."""

    value: Positive
    low: Positive
    high: Positive
    n: Count
    groups: Count


class Machine(_Record):
    """What a measurement depends on: processor, cores, instruction sets, versions."""

    cpu: Text
    cpu_kind: Text
    cores: int | None = None
    threads: Count
    instruction_sets: list[Text] = []
    system: Text
    python: str = ""
    versions: dict[str, str | None]


class Execution(_Record):
    """Where a file runs: the runtime, and the precision: "float32", "int8", or "int8, rest float32"."""

    runtime: Runtime
    precision: Text


class Peak(Execution):
    """Multiply-accumulate operations per second that large convolutions reach (see `multiply_peak.py`).

    Attributes:
        precision: precision of the products: "float32", "bfloat16", "float16" or "int8".
        macs_per_second: rate in the fastest of `n` runs.
        median: rate in the median run; far below the fastest on a loaded machine.
    """

    macs_per_second: Positive
    median: Positive
    n: Count


class Metric(_Record):
    """The task's metric, which every `score` has: "accuracy" in "%"."""

    name: Text
    unit: Text
    higher_is_better: bool

    @property
    def digits(self) -> int:
        """Decimal places to show."""
        return 2 if self.unit else 4

    @property
    def title(self) -> str:
        """ "accuracy, %"."""
        return self.titled(self.name)

    def titled(self, name: str) -> str:
        """ "validation, %": the name of a score, with the unit of the metric."""
        return f"{name}, {self.unit}" if self.unit else name

    def shown(self, score: float) -> str:
        """ "91.20 %"."""
        return f"{score:.{self.digits}f} {self.unit}".rstrip()

    def loss(self, before: float, after: float) -> float:
        """By how much `after` is worse than `before`."""
        return before - after if self.higher_is_better else after - before

    def change(self, before: float, after: float) -> str:
        """ "accuracy 0.4 points lower", from two scores."""
        change = after - before
        if abs(change) < (0.005 if self.unit else 0.0005 * abs(before)):
            return f"{self.name} unchanged"
        size = f"{abs(change):.{1 if abs(change) >= 0.1 else 2}f} points" if self.unit else f"{abs(change):.3g}"
        return f"{self.name} {size} {'lower' if change < 0 else 'higher'}"


class FloatOperator(_Record):
    """An operator that is not computed in integers."""

    name: Text
    kind: Text
    macs: Count
    share: Fraction
    reason: Text


class FileResults(Execution):
    """Everything measured of one file in one runtime.

    Attributes:
        precision: of the stored weights, and of products that are not quantized: "int8, rest float32".
        float_precision: data type of everything that the runtime does not compute in integers.
        score: the metric on the test set.
        agreement: share of predictions that equal those of the original file, in percent.
        latency_ms: latencies by batch size.
        latency_runs_ms: every run by batch size, in groups of interleaved rounds.
        masked: fraction of the prunable weights under masks.
        integer_macs_share: fraction of the MACs computed in integers; None for a float network.
    """

    float_precision: Text
    batch: int | None = None
    score: float
    agreement: Percent
    bytes: Count
    compressed_bytes: Count
    parameters: Count = 0
    macs: Count
    bit_operations: Count
    sparsity: Fraction
    masked: Fraction
    peak_memory_bytes: Count
    load_ms: float
    latency_ms: dict[BatchSize, Spread]
    latency_runs_ms: dict[BatchSize, list[list[Positive]]]
    integer_macs_share: Fraction | None = None
    float_operators: list[FloatOperator] = []
    uncounted_operators: list[Text] = []


class StageRecord(BaseModel):
    """What a stage did. Metrics of its methods (`masks`, `bits`, `reconstruction`, ...) are further fields.

    Attributes:
        methods: as in the recipe.
        minutes: preparation (calibration, ranking) and training, over all processes of an interrupted run; without
            validation at the end, export and measurements.
        training_seconds: of these, the training alone.
        validation_score: the metric on the validation images; None without any.
        losses: mean of each loss over the last epoch, by name.
        validation_by_epoch, validated_at: validation scores, and the steps at which they were measured.
        score, ..., speedup: of the exported file after the stage; the speedup is over the original.
        speedup_of_quantization: over the file before the stage, if the stage changed the stored bits of the weights.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    name: Text
    methods: list[Any]
    steps: Count
    notes: list[Text] = []
    minutes: float
    validation_score: float | None = None
    losses: dict[str, float] = {}
    precision: Text | None = None
    training_seconds: float | None = None
    validation_by_epoch: list[float] = []
    validated_at: list[Count] = []
    score: float | None = None
    bytes: Count | None = None
    compressed_bytes: Count | None = None
    macs: Count | None = None
    sparsity: Fraction | None = None
    latency_ms: dict[BatchSize, Spread] | None = None
    speedup: dict[BatchSize, Speedup] | None = None
    speedup_of_quantization: dict[BatchSize, Speedup] | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the methods."""
        return self.model_extra or {}


class Rounds(_Record):
    """How long latency was measured, and why it ended, by batch size."""

    time_limit_seconds: float
    interval_width: float
    ended_by: dict[BatchSize, Literal["interval", "time"]]


class Results(_Record):
    """`numbers.json`.

    `metric` is that of every score. `original` is the uncompressed file in float32 in the target runtime. `candidates`
    are the same file in every installed runtime at its default precision; the fastest of them is the `baseline` of a
    batch size. `artifact` is the compressed file in the target runtime.
    """

    version: Literal[1] = VERSION
    runtime: Runtime
    target: Target | None = None
    metric: Metric
    machine: Machine
    seed: Count
    date: Text
    original: FileResults
    candidates: dict[Runtime, FileResults]
    baseline: dict[BatchSize, Execution]
    artifact: FileResults
    agreement_with_torch: Percent | None = None
    speedup: dict[Reference, dict[BatchSize, Speedup]]
    rounds: Rounds
    peaks: list[Peak] = []
    test_images: Count
    stages: list[StageRecord] = []
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: list[Text] = []

    def to_json(self) -> str:
        """The text of `numbers.json`."""
        return self.model_dump_json(indent=1, exclude_unset=True)
