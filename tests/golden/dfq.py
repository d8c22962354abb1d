"""Runs a third party's cross-layer equalization (the authors published no code) on a few layers; prints dfq.json.

git clone https://github.com/jakc4103/DFQ && python tests/golden/dfq.py DFQ > tests/golden/dfq.json
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn


def chains() -> dict[str, list[nn.Module]]:
    """Convolutions, each but the last with a BatchNorm behind, as the code wants it.

    It folds BatchNorm before it looks at ranges, so that the range of a weight that reads channels has that of its own
    BatchNorm in it, which ours has not: only the first BatchNorm does anything here, that of eps 0 is for the code.
    """
    torch.manual_seed(0)
    return {
        "two": [nn.Conv2d(3, 6, 3), scaling(6), nn.Conv2d(6, 4, 3)],
        "without bias": [nn.Conv2d(3, 6, 3, bias=False), scaling(6), nn.Conv2d(6, 4, 3, bias=False)],
        "depthwise": [
            nn.Conv2d(3, 6, 3),
            scaling(6),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.BatchNorm2d(6, eps=0),
            nn.Conv2d(6, 4, 1),
        ],
    }


def scaling(channels: int) -> nn.BatchNorm2d:
    """A BatchNorm with statistics that changes the sign of some channels."""
    norm = nn.BatchNorm2d(channels)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 4)
    return norm


def tensors(layer: nn.Module) -> dict[str, list]:
    """The tensors of a layer, by name."""
    names = {"weight", "bias", "running_mean", "running_var"}
    return {key: value.tolist() for key, value in layer.state_dict().items() if key in names}


def run(chain: list[nn.Module]) -> dict:
    """The layers before equalization, and the convolutions with folded BatchNorms after it."""
    from dfq import cross_layer_equalization
    from utils.layer_transform import merge_batchnorm
    from utils.relation import Relation

    places = range(len(chain))
    graph, bottoms = dict(zip(places, chain, strict=True)), {place: [place - 1] for place in places}
    bottoms[0] = None
    before = [
        {"groups": getattr(layer, "groups", None), "eps": getattr(layer, "eps", None), **tensors(layer)}
        for layer in chain
    ]
    merge_batchnorm(None, graph, bottoms, [nn.Conv2d])
    relations = [Relation(place, place + 2, place + 1) for place in places[:-2:2]]
    cross_layer_equalization(graph, relations, [nn.Conv2d], signed=True)
    return {"before": before, "after": [tensors(layer) for layer in chain[::2]]}


def main(checkout: Path) -> None:
    """`signed` is the range of the paper's symmetric grids, max|w|. Nothing is replaced."""
    sys.path.insert(0, str(checkout))
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    with contextlib.redirect_stdout(sys.stderr):
        cases = {name: run(chain) for name, chain in chains().items()}
    told = {
        "repository": "https://github.com/jakc4103/DFQ",
        "commit": subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip(),
        "command": "python tests/golden/dfq.py DFQ",
        "torch": torch.__version__,
        "cases": cases,
    }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
