"""Predictions of networks: changed predictions, accuracy by class, soft targets, similar classes."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tersor.data import Batches, Images
from tersor.data.image_sets import class_numbers
from tersor.evaluation.session import Array
from tersor.graph.forward_call import run

TEMPERATURES = (1, 2, 4, 8, 16)

_EXAMPLES = 24
_LONGEST_SIDE = 96
_CLASSES_SHOWN = 12
_MATRIX_CLASSES = 20
_SIMILARITY_IMAGES = 2000


def compare_predictions(images: Images, before: Array, after: Array) -> dict[str, Any]:
    """Compare the predictions of two networks, as plain values.

    Args:
        images: N images with labels.
        before: (N,) predicted classes of the first network.
        after: (N,) predicted classes of the second.

    Returns:
        Number of `images` and prediction `agreement` (percent); `lost`, `gained` and `other`: how many predictions
        changed from right to wrong, from wrong to right, from wrong to another wrong class; `classes`: for each class
        its number of `images` and of right predictions `before` and `after`; `changes`: [from, to, count], the most
        frequent first; `examples`: up to 24 changed images, alternating between the three kinds, as PNG.
    """
    labels = images.targets.numpy()
    was_right, is_right = before == labels, after == labels
    kinds = {
        "lost": was_right & ~is_right,
        "gained": ~was_right & is_right,
        "other": ~was_right & ~is_right & (before != after),
    }
    examples = _examples([np.flatnonzero(changed).tolist() for changed in kinds.values()])
    changes = Counter((int(old), int(new)) for old, new in zip(before, after, strict=True) if old != new)
    return {
        "images": len(labels),
        "agreement": 100 * float((before == after).mean()),
        **{kind: int(changed.sum()) for kind, changed in kinds.items()},
        "classes": [
            {"class": number, "images": int(here.sum()), "before": int(was_right[here].sum()),
             "after": int(is_right[here].sum())}
            for number, here in ((number, labels == number) for number in np.unique(labels).tolist())
        ],
        "changes": [[*pair, changes[pair]] for pair in sorted(changes, key=lambda each: (-changes[each], each))],
        "examples": [
            {**image_entry(images, index), "before": int(before[index]), "after": int(after[index])}
            for index in examples
        ],
    }  # fmt: skip


def _examples(kinds: Sequence[Sequence[int]]) -> list[int]:
    """Indices of each kind, alternating; evenly over the test set, because image folders are sorted by class."""
    room, chosen = _EXAMPLES, dict[int, list[int]]()
    for which in sorted(range(len(kinds)), key=lambda each: len(kinds[each])):  # rare kinds leave room to the others
        kind = kinds[which]
        count = min(len(kind), room // (len(kinds) - len(chosen)))
        room -= count
        chosen[which] = [kind[order] for order in np.linspace(0, len(kind) - 1, count).round().astype(int)]
    alternating = zip_longest(*[chosen[which] for which in range(len(kinds))])
    return [index for row in alternating for index in row if index is not None]


@torch.no_grad()
def soft_targets(network: nn.Module, test: Batches, index: Tensor) -> list[dict[str, Any]]:
    """softmax(logits / T) of six images at each temperature T, and its entropy in bits.

    The six images are evenly spaced from the most to the least confident prediction.

    Args:
        network: a network in eval mode, on the CPU.
        test: images, normalized as the network expects them.
        index: (N,) indices of the images to choose from.

    Returns:
        Index, label, PNG, `classes` (all, or the 12 likeliest) and `rows` of each image; a row has the
        `temperature`, the `probabilities` of these classes, and the `entropy` over all classes.
    """
    logits = run(network, test.take(index).images).double()
    order = _entropy(logits.softmax(1)).argsort(stable=True)
    count = logits.shape[1]
    targets: list[dict[str, Any]] = []
    for row in order[evenly_spaced(len(order), 6)].tolist():
        classes = list(range(count)) if count <= _CLASSES_SHOWN else logits[row].topk(_CLASSES_SHOWN).indices.tolist()
        rows: list[dict[str, Any]] = []
        for temperature in TEMPERATURES:
            softened = (logits[row] / temperature).softmax(0)
            probabilities = [round(value, 6) for value in softened[classes].tolist()]
            entropy = round(_entropy(softened).item(), 6)
            rows.append({"temperature": temperature, "entropy": entropy, "probabilities": probabilities})
        targets.append({**image_entry(test.images, int(index[row])), "classes": classes, "rows": rows})
    return targets


@torch.no_grad()
def class_similarity(network: nn.Module, test: Batches, temperature: float = 4.0) -> dict[str, Any]:
    """Mean soft prediction for the images of each class, which shows the classes that `network` confuses.

    Args:
        network: a network in eval mode, on the CPU.
        test: images, normalized as the network expects them; up to 2,000, evenly spaced, are used.
        temperature: T of softmax(logits / T).

    Returns:
        `temperature`, number of `images`, and `rows`: [class, [probability of each class]]; no rows if there are more
        than 20 classes.
    """
    index = evenly_spaced(len(test.images), _SIMILARITY_IMAGES)
    batches = [test.take(part) for part in index.split(test.batch_size)]
    softened = torch.cat([(run(network, batch.images).double() / temperature).softmax(1) for batch in batches])
    labels = test.images.targets[index]
    classes = labels.unique().tolist() if softened.shape[1] <= _MATRIX_CLASSES else []
    rows = [[label, [round(value, 5) for value in softened[labels == label].mean(0).tolist()]] for label in classes]
    return {"temperature": temperature, "images": len(index), "rows": rows}


def _entropy(probabilities: Tensor) -> Tensor:
    """Bits, over the last dimension."""
    return torch.special.entr(probabilities).sum(-1) / np.log(2)


def evenly_spaced(count: int, most: int) -> Tensor:
    """Up to `most` indices below `count`, the first and the last among them."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def image_entry(images: Images, index: int) -> dict[str, Any]:
    """Index, label (None if it has no class) and PNG of an image."""
    labels = class_numbers(images)
    label = None if labels is None else int(labels[index])
    return {"index": index, "label": label, "png": png(rgb_of(images, index))}


def rgb_of(images: Images, index: int) -> Tensor:
    """An image as uint8 (3, H, W): the high byte of 16 bits, the first three channels, or a gray channel repeated."""
    pixels = images.take(torch.tensor([index]))[0]
    if pixels.dtype == torch.uint16:
        pixels = (pixels.int() // 256).byte()
    return pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)


def png(pixels: Tensor, side: int = _LONGEST_SIDE) -> str:
    """An image (3, H, W) uint8 as a data URI, downsized to at most `side` pixels a side."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
