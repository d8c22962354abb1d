"""Runs the BRECQ authors' code, which includes the rounding of AdaRound, on a few weights, and prints brecq.json.

git clone https://github.com/yhhhli/BRECQ && python tests/golden/brecq.py BRECQ > tests/golden/brecq.json
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

ITERATIONS = 100
COUNTS = (1, 19, 20, 21, 50, 60, 99, 100)
"""The code counts from 1, and compares the count with a fraction of ITERATIONS."""


def layers() -> dict[str, tuple[nn.Conv2d | nn.Linear, dict, tuple[int, ...]]]:
    """Layers, the options of the code for rounding their weights, and the shape of their inputs."""
    torch.manual_seed(0)
    by_channel = {"channel_wise": True, "scale_method": "mse"}
    return {
        "2 bits": (nn.Conv2d(3, 4, 3, padding=1), {"n_bits": 2, **by_channel}, (2, 3, 4, 4)),
        "4 bits": (nn.Conv2d(3, 4, 3, stride=2, bias=False), {"n_bits": 4, **by_channel}, (2, 3, 5, 5)),
        "one scale": (nn.Conv2d(4, 4, 3, groups=4), {"n_bits": 3, "scale_method": "max"}, (2, 4, 4, 4)),
        "fully connected": (nn.Linear(7, 5), {"n_bits": 3, **by_channel}, (4, 7)),
    }


def run(layer: nn.Conv2d | nn.Linear, how: dict, shape: tuple[int, ...]) -> dict:
    """Initial weights, weights with soft and hard rounding by random logits, and the losses."""
    from quant.adaptive_rounding import AdaRoundQuantizer
    from quant.layer_recon import LossFunction
    from quant.quant_layer import QuantModule

    values = torch.randn(shape)
    target = layer(values).detach()
    module = QuantModule(layer, how)
    module.set_quant_state(True, False)
    module(values)  # sets the scales
    grid = module.weight_quantizer
    rounding = AdaRoundQuantizer(grid, layer.weight.data, round_mode="learned_hard_sigmoid")
    module.weight_quantizer = rounding
    rounding.soft_targets = True
    start = rounding.alpha.detach().clone()
    weight_at_start = rounding(layer.weight).detach().clone()
    with torch.no_grad():
        rounding.alpha.copy_(torch.randn(start.shape) * 2)
    soft, answers = rounding(layer.weight), module(values)
    loss = LossFunction(module, "relaxation", 0.01, "mse", max_count=ITERATIONS, b_range=(20, 2), warmup=0.2)
    losses, gradients = {}, {}
    for count in range(1, ITERATIONS + 1):
        rounding.alpha.grad = None
        total = loss(module(values), target)
        total.backward()
        if count in COUNTS:
            losses[count], gradients[count] = float(total.detach()), rounding.alpha.grad.tolist()
    rounding.soft_targets = False
    return {
        "bits": how["n_bits"],
        "convolution": {key: value for key, value in module.fwd_kwargs.items() if key != "dilation"},
        "weight": layer.weight.tolist(),
        "bias": None if layer.bias is None else layer.bias.tolist(),
        "scale": torch.as_tensor(grid.delta).flatten().tolist(),
        "zero_point": torch.as_tensor(grid.zero_point).flatten().tolist(),
        "alpha_at_start": start.tolist(),
        "weight_at_start": weight_at_start.tolist(),
        "alpha": rounding.alpha.tolist(),
        "soft": soft.tolist(),
        "hard": rounding(layer.weight).tolist(),
        "values": values.tolist(),
        "target": target.tolist(),
        "answers": answers.tolist(),
        "losses": losses,
        "gradients": {count: gradients[count] for count in (19, 60)},
    }


def main(checkout: Path) -> None:
    """Nothing is replaced: the output and the imported `linklink` are part of the code."""
    sys.path.insert(0, str(checkout))
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    with contextlib.redirect_stdout(sys.stderr):
        cases = {name: run(*case) for name, case in layers().items()}
    told = {
        "repository": "https://github.com/yhhhli/BRECQ",
        "commit": subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip(),
        "command": "python tests/golden/brecq.py BRECQ",
        "torch": torch.__version__,
        "iterations": ITERATIONS,
        "cases": cases,
    }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
