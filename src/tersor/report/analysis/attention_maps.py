"""Where networks look: attention maps of real images, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.data import Batches
from tersor.graph.feature_extraction import FeatureExtractor, as_map, last_feature_maps
from tersor.report.analysis.predictions import png

_IMAGES = 6
_SIDE = 48


@torch.no_grad()
def attention_maps(networks: Mapping[str, nn.Module], test: Batches, index: Tensor) -> dict[str, Any]:
    """The mean over the channels of a layer's squared output, for some images, in the last layer at each resolution.

    Args:
        networks: by name, in eval mode, on the CPU.
        test: images, normalised as the networks want them.
        index: (N,) places in it to choose from.

    Returns:
        `layers`: network -> names of its layers; `images`: of each its number, label, PNG and `maps`: network -> a PNG
        for each layer, from black (its least) to white (its most). A network without a feature map is left out.
    """
    chosen = index[torch.linspace(0, len(index) - 1, min(_IMAGES, len(index))).round().long()]
    batch = test.take(chosen)
    assert batch.labels is not None
    layers: dict[str, list[str]] = {}
    maps: dict[str, list[list[str]]] = {}
    for name, network in networks.items():
        try:
            paths = last_feature_maps(network, batch.images)
            _, given = FeatureExtractor(network, paths)(batch.images)
        except InputError:
            continue
        layers[name] = list(paths)
        maps[name] = [[_drawn(attention) for attention in as_map(given[path]).square().mean(1)] for path in paths]
    return {
        "layers": layers,
        "images": [
            {
                "index": int(chosen[place]),
                "label": int(batch.labels[place]),
                "png": png(test.images.take(chosen[place : place + 1])[0]),
                "maps": {name: [of_layer[place] for of_layer in found] for name, found in maps.items()},
            }
            for place in range(len(chosen))
        ],
    }


def _drawn(attention: Tensor) -> str:
    """(H, W) -> a data URI."""
    span = (attention.max() - attention.min()).clamp(min=1e-12)
    grey = (255 * (attention - attention.min()) / span).round().to(torch.uint8)
    return png(F.interpolate(grey[None, None], (_SIDE, _SIDE))[0].expand(3, -1, -1))
