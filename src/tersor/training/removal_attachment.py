"""A network that has lost channels, as the training loop sees it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tersor.graph.batchnorm_statistics import fit, in_unit_of, moments_of_batches, with_statistics
from tersor.pruning.channel_groups import Cut
from tersor.pruning.least_squares import fitted, take_over
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext


class RemovalAttachment(Attachment):
    """A network that has lost channels; `begin` lets those that stay make up for them."""

    holds_shapes = True

    def __init__(
        self,
        graph: fx.GraphModule,
        before: fx.GraphModule,
        cuts: Sequence[Cut],
        context: AttachContext,
        images: int,
        notes: Sequence[str],
    ) -> None:
        super().__init__(graph, notes=notes)
        self.graph = graph
        self.before: fx.GraphModule | None = before
        self.cuts = cuts
        self.context = context
        self.images = images

    def begin(self) -> None:
        """Passes over the images: what the channels gave; then what reached every BatchNorm, with them and without."""
        before, graph, data, progress = self.before, self.graph, self.context.data, self.context.progress
        assert before is not None, "begun once"
        assert data is not None
        graph.eval()
        gone = {cut.layer: cut.channels for cut in self.cuts if cut.axis == "out"}
        seen = moments_of_batches(before, data, self.images, progress)
        norms = with_statistics(before)
        wanted = {name: in_unit_of(seen[name], norm).without(gone.get(name, ())) for name, norm in norms.items()}
        take_over(graph, fitted(before, self.cuts, data, self.images, progress))
        self.before = None
        found = moments_of_batches(graph, data, self.images, progress)
        for name, norm in with_statistics(graph).items():
            fit(norm, found[name], wanted[name], variances=True)
