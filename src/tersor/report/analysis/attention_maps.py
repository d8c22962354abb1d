"""Attention maps of test images, by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.data import Batches
from tersor.graph.feature_extraction import FeatureExtractor, as_map, last_feature_maps
from tersor.report.analysis.predictions import evenly_spaced, image_entry, png

_IMAGES = 6
_SIDE = 48


@torch.no_grad()
def attention_maps(networks: Mapping[str, nn.Module], test: Batches, index: Tensor) -> dict[str, Any]:
    """Mean over the channels of a layer's squared output, for six images and the last layer at each resolution.

    Args:
        networks: by name, in eval mode, on the CPU.
        test: images, normalized as the networks expect them.
        index: (N,) indices of the images to choose from.

    Returns:
        `layers`: network -> names of its layers; `images`: index, label, PNG and `maps` of each, where maps are
        network -> a PNG for each layer, from black (smallest) to white (largest). Networks without a feature map are
        left out.
    """
    chosen = index[evenly_spaced(len(index), _IMAGES)]
    images = test.take(chosen).images
    layers: dict[str, list[str]] = {}
    maps: dict[str, list[list[str]]] = {}
    for name, network in networks.items():
        try:
            paths = last_feature_maps(network, images)
            _, features = FeatureExtractor(network, paths)(images)
        except InputError:
            continue
        layers[name] = list(paths)
        maps[name] = [[_map_png(attention) for attention in as_map(features[path]).square().mean(1)] for path in paths]
    return {
        "layers": layers,
        "images": [
            image_entry(test.images, index)
            | {"maps": {name: [layer[order] for layer in by_layer] for name, by_layer in maps.items()}}
            for order, index in enumerate(chosen.tolist())
        ],
    }


def _map_png(attention: Tensor) -> str:
    """(H, W) -> a data URI."""
    span = (attention.max() - attention.min()).clamp(min=1e-12)
    gray = (255 * (attention - attention.min()) / span).round().to(torch.uint8)
    return png(F.interpolate(gray[None, None], (_SIDE, _SIDE))[0].expand(3, -1, -1))
