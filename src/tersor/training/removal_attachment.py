"""A network that has lost channels, as the training loop sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import fx

from tersor.core.progress import Progress
from tersor.graph.batchnorm_statistics import fit, in_unit_of, moments_of_batches, with_statistics
from tersor.pruning.channel_groups import Cut
from tersor.pruning.least_squares import fitted, take_over
from tersor.training.attachment import Attachment


class RemovalAttachment(Attachment):
    """A network that has lost channels; `begin` lets those that stay make up for them."""

    holds_shapes = True

    def __init__(
        self,
        graph: fx.GraphModule,
        before: fx.GraphModule,
        cuts: Sequence[Cut],
        data: Iterable[Any],
        images: int,
        notes: Sequence[str],
    ) -> None:
        super().__init__(graph, notes=notes)
        self.graph = graph
        self.before: fx.GraphModule | None = before
        self.cuts = cuts
        self.data = data
        self.images = images

    def begin(self) -> Iterator[Progress]:
        """Passes over the images: what the channels gave; then what reached every BatchNorm, with them and without."""
        before, graph = self.before, self.graph
        assert before is not None, "begun once"
        graph.eval()
        gone = {cut.layer: cut.channels for cut in self.cuts if cut.axis == "out"}
        seen = yield from moments_of_batches(before, self.data, self.images)
        norms = with_statistics(before)
        wanted = {name: in_unit_of(seen[name], norm).without(gone.get(name, ())) for name, norm in norms.items()}
        take_over(graph, (yield from fitted(before, self.cuts, self.data, self.images)))
        self.before = None
        found = yield from moments_of_batches(graph, self.data, self.images)
        for name, norm in with_statistics(graph).items():
            fit(norm, found[name], wanted[name], spreads=True)
