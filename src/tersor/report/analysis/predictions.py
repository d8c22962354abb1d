"""What a network answers, and what another answers instead: changed images, classes, softened targets."""

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
from tersor.evaluation.session import Array

TEMPERATURES = (1, 2, 4, 8, 16)

_SHOWN = 24
_LONGEST_SIDE = 96
_CLASSES_SHOWN = 12
_MATRIX_CLASSES = 20
_LOOKED_AT = 2000


def changed_answers(images: Images, before: Array, after: Array) -> dict[str, Any]:
    """How the answers `after` differ from those `before`, both (N,) class numbers, as plain values.

    Returns:
        `images` and `agreement` (percent); `lost`, `gained` and `other`: how many answers went from right to wrong,
        from wrong to right, from wrong to another wrong; `classes`: of each class number its `images` and how many
        were right `before` and `after`; `moves`: [from, to, how many] of the changed answers, the most first;
        `shown`: up to 24 of the changed images, the three kinds in turn, as PNG.
    """
    labels = images.labels.numpy()
    was_right, is_right = before == labels, after == labels
    kinds = {
        "lost": was_right & ~is_right,
        "gained": ~was_right & is_right,
        "other": ~was_right & ~is_right & (before != after),
    }
    shown = _spread([np.flatnonzero(changed).tolist() for changed in kinds.values()])
    moves = Counter((int(old), int(new)) for old, new in zip(before, after, strict=True) if old != new)
    return {
        "images": len(labels),
        "agreement": 100 * float((before == after).mean()),
        **{kind: int(changed.sum()) for kind, changed in kinds.items()},
        "classes": [
            {"class": number, "images": int(here.sum()), "before": int(was_right[here].sum()),
             "after": int(is_right[here].sum())}
            for number, here in ((number, labels == number) for number in np.unique(labels).tolist())
        ],
        "moves": [[*move, moves[move]] for move in sorted(moves, key=lambda each: (-moves[each], each))],
        "shown": [
            {"index": index, "label": int(labels[index]), "before": int(before[index]), "after": int(after[index]),
             "png": png(pixels)}
            for index, pixels in zip(shown, images.take(torch.tensor(shown, dtype=torch.int64)), strict=True)
        ],
    }  # fmt: skip


def _spread(kinds: Sequence[Sequence[int]]) -> list[int]:
    """Some of each kind, in turn; of each evenly over the test set, which is sorted by class where it is a folder."""
    room, chosen = _SHOWN, dict[int, list[int]]()
    for which in sorted(range(len(kinds)), key=lambda each: len(kinds[each])):  # what one lacks, the next may use
        kind = kinds[which]
        count = min(len(kind), room // (len(kinds) - len(chosen)))
        room -= count
        chosen[which] = [kind[place] for place in np.linspace(0, len(kind) - 1, count).round().astype(int)]
    in_turn = zip_longest(*[chosen[which] for which in range(len(kinds))])
    return [index for several in in_turn for index in several if index is not None]


@torch.no_grad()
def softened_targets(network: nn.Module, test: Batches, index: Tensor) -> list[dict[str, Any]]:
    """What `network` teaches of six of the images at each temperature T: softmax(logits / T), and its entropy in bits.

    The six are spread evenly from the image that the network is surest of to the one that it is least sure of.

    Args:
        network: in eval mode, on the CPU.
        test: images, normalised as the network wants them.
        index: (N,) places in it to choose from.

    Returns:
        Of each image its number, label, PNG, the `classes` that are told (all, or the likeliest of many) and a row for
        each temperature: `probabilities` of these classes, and the `entropy` over all classes.
    """
    batch = test.take(index)
    assert batch.labels is not None
    logits = network(batch.images).double()
    order = _entropy(logits.softmax(1)).argsort(stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(6, len(order))).round().long()].tolist()
    told: list[dict[str, Any]] = []
    for place in chosen:
        count = logits.shape[1]
        classes = list(range(count)) if count <= _CLASSES_SHOWN else logits[place].topk(_CLASSES_SHOWN).indices.tolist()
        softened = {T: (logits[place] / T).softmax(0) for T in TEMPERATURES}
        told.append(
            {
                "index": int(index[place]),
                "label": int(batch.labels[place]),
                "png": png(test.images.take(index[place : place + 1])[0]),
                "classes": classes,
                "rows": [
                    {
                        "temperature": T,
                        "entropy": round(_entropy(values).item(), 6),
                        "probabilities": [round(value, 6) for value in values[classes].tolist()],
                    }
                    for T, values in softened.items()
                ],
            }
        )
    return told


@torch.no_grad()
def similar_classes(network: nn.Module, test: Batches, temperature: float = 4.0) -> dict[str, Any]:
    """Which classes `network` holds for alike: its mean softened answer to the images of each class.

    Args:
        network: in eval mode, on the CPU.
        test: images, normalised as the network wants them; up to 2,000 of them, evenly, are looked at.
        temperature: T of softmax(logits / T).

    Returns:
        `temperature`, `images` looked at, and `rows`: [class, [probability of every class]]; no rows where there are
        more than 20 classes.
    """
    index = torch.linspace(0, len(test.images) - 1, min(_LOOKED_AT, len(test.images))).round().long()
    batches = [test.take(part) for part in index.split(test.batch_size)]
    softened = torch.cat([(network(batch.images).double() / temperature).softmax(1) for batch in batches])
    labels = test.images.labels[index]
    found = labels.unique().tolist() if softened.shape[1] <= _MATRIX_CLASSES else []
    rows = [[label, [round(value, 5) for value in softened[labels == label].mean(0).tolist()]] for label in found]
    return {"temperature": temperature, "images": len(index), "rows": rows}


def _entropy(probabilities: Tensor) -> Tensor:
    """Bits, over the last dimension."""
    return torch.special.entr(probabilities).sum(-1) / np.log(2)


def png(pixels: Tensor) -> str:
    """An image (3, H, W) uint8 as a data URI; larger ones are made smaller."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    written = io.BytesIO()
    image.save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
