"""A vector for each image, compared by direction; the targets are the vectors of the original network."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.tasks.network_outputs import given_instead, logits_in
from tersor.tasks.task import PLAIN_VALUES, Pairs, Task, required


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class Embedding(Task):
    """One tensor (N, dimensions); the targets are those of the original network, so the images need no labels."""

    metric: ClassVar[str] = "cosine similarity"
    unit: ClassVar[str] = ""
    from_original: ClassVar[bool] = True

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """One minus the mean cosine similarity."""
        return 1 - F.cosine_similarity(_vectors(outputs), _vectors(targets), dim=1).mean()

    def predictions(self, outputs: Any) -> Tensor:
        """The vectors (N, dimensions)."""
        return _vectors(outputs).detach().cpu()

    def score(self, pairs: Pairs) -> float:
        """Mean cosine similarity with the vectors of the original network."""
        found = [self.agreement(predictions, targets) for predictions, targets in required(pairs, self)]
        return float(torch.cat(found).mean())

    def agreement(self, predictions: Any, reference: Any) -> Tensor:
        """The cosine similarity of each image (N,); negative values are set to 0."""
        first, second = (_vectors(each).cpu().double() for each in (predictions, reference))
        return F.cosine_similarity(first, second, dim=1).clamp(min=0)


def _vectors(outputs: Any) -> Tensor:
    vectors = logits_in(outputs)
    if vectors is None or vectors.ndim < 2:
        given = given_instead(outputs, vectors)
        raise InputError(f"an embedding network returns one tensor (N, dimensions), not {given}.")
    return vectors.flatten(1)
