"""Runs the authors' code of PSGD on a few weights, and prints psgd.json.

git clone https://github.com/Jangho-Kim/PSG-pytorch && python tests/golden/psgd.py PSG-pytorch > tests/golden/psgd.json
"""

import json
import subprocess
import sys
from pathlib import Path

import torch


def main(checkout: Path) -> None:
    """`distance` is the factor of a gradient in the code, without lambda; its range is that of the first batch."""
    sys.path.insert(0, str(checkout))
    from quant_module import post_training_weight

    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    cases = []
    for bits in (2, 3, 4, 8):
        weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(bits)) * 0.1
        quantizer = post_training_weight(1.0, bits, use_fp=True, activation=False)
        ranges = []
        for step in range(3):  # the range is a moving average
            quantizer.update_range(weight * (1 + step))
            ranges.append(max(abs(quantizer.x_min), quantizer.x_max))
        found = quantizer.quantizer.return_scale_value(weight)
        cases.append({"bits": bits, "weight": weight.tolist(), "largest": ranges, "distance": found.tolist()})
    told = {
        "repository": "https://github.com/Jangho-Kim/PSG-pytorch",
        "commit": commit,
        "command": "python tests/golden/psgd.py PSG-pytorch",
        "torch": torch.__version__,
        "cases": cases,
    }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
