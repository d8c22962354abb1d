"""A network without some of its channels, and the reconstruction of their outputs before training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tersor.graph.batchnorm_statistics import fit, in_unit_of, moments_of_batches, with_statistics
from tersor.pruning.channel_groups import Cut
from tersor.pruning.least_squares import apply_fits, fit_layers
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext


class RemovalAttachment(Attachment):
    """A pruned network; `begin` refits the layers after removed channels and corrects BatchNorm statistics."""

    holds_shapes = True

    def __init__(
        self,
        graph: fx.GraphModule,
        original: fx.GraphModule,
        cuts: Sequence[Cut],
        context: AttachContext,
        images: int,
        notes: Sequence[str],
    ) -> None:
        super().__init__(graph, notes=notes)
        self.graph = graph
        self.original: fx.GraphModule | None = original
        self.cuts = cuts
        self.context = context
        self.images = images

    def begin(self) -> None:
        """Three passes over the images: layer inputs, and BatchNorm inputs of the original and the pruned network."""
        original, graph, data, progress = self.original, self.graph, self.context.data, self.context.progress
        assert original is not None, "begin runs once"
        assert data is not None
        graph.eval()
        removed = {cut.layer: cut.channels for cut in self.cuts if cut.axis == "out"}
        moments = moments_of_batches(original, data, self.images, progress)
        targets = {
            name: in_unit_of(moments[name], norm).without(removed.get(name, ()))
            for name, norm in with_statistics(original).items()
        }
        apply_fits(graph, fit_layers(original, self.cuts, data, self.images, progress))
        self.original = None
        moments = moments_of_batches(graph, data, self.images, progress)
        for name, norm in with_statistics(graph).items():
            fit(norm, moments[name], targets[name], variances=True)
