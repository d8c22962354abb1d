"""Runs third-party code of LSQ (the authors published none) on a few values, and prints lsq.json.

git clone https://github.com/zhutmost/lsq-net && python tests/golden/lsq.py lsq-net > tests/golden/lsq.json
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

CASES = {  # shape of the values, and how the code rounds them
    "weight": ((4, 3, 3, 3), {"bit": 3, "symmetric": True, "per_channel": False}),
    "weight, all integers": ((4, 3, 3, 3), {"bit": 2, "per_channel": False}),
    "weight by channel": ((4, 3, 3, 3), {"bit": 2, "symmetric": True, "per_channel": True}),
    "weight by channel, 4 bits": ((5, 12), {"bit": 4, "symmetric": True, "per_channel": True}),
    "activation": ((3, 4, 4, 4), {"bit": 2, "all_positive": True, "per_channel": False}),
    "activation, 4 bits": ((3, 4, 4, 4), {"bit": 4, "all_positive": True, "per_channel": False}),
}


def run(shape: tuple[int, ...], how: dict, seed: int) -> dict:
    """Rounded values at the initial step of the code, and gradients; `counted` is N in its factor 1 / sqrt(N p)."""
    from quan.quantizer.lsq import LsqQuan

    draw = torch.Generator().manual_seed(seed)
    values, gradient = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    values.requires_grad_()
    quantizer = LsqQuan(**how)
    quantizer.init_from(values)
    shown = quantizer(values)
    shown.backward(gradient)
    return {
        "minimum": quantizer.thd_neg,
        "maximum": quantizer.thd_pos,
        "values": values.tolist(),
        "gradient": gradient.tolist(),
        "step": quantizer.s.flatten().tolist(),
        "shown": shown.tolist(),
        "of_values": values.grad.tolist(),
        "of_step": quantizer.s.grad.flatten().tolist(),
        "counted": values.numel(),
    }


def main(checkout: Path) -> None:
    """Nothing is replaced."""
    sys.path.insert(0, str(checkout))
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    told = {
        "repository": "https://github.com/zhutmost/lsq-net",
        "commit": subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip(),
        "command": "python tests/golden/lsq.py lsq-net",
        "torch": torch.__version__,
        "cases": {name: run(*case, seed) for seed, (name, case) in enumerate(CASES.items())},
    }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
