"""The metric of a task: name and unit of the scores in `numbers.json`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Metric(BaseModel):
    """The metric of the task: the name and the unit of every score."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    name: str
    """Name, such as "accuracy"."""
    unit: str
    """Unit: "%", or empty."""
    higher_is_better: bool
    """Whether a higher score is better."""

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
