"""Runs third-party code of DPF (the authors published none) for three steps on a small network; prints dpf.json.

git clone https://github.com/INCHEON-CHO/Dynamic_Model_Pruning_with_Feedback
python tests/golden/dpf.py Dynamic_Model_Pruning_with_Feedback > tests/golden/dpf.json

Masked convolution, threshold and mask are theirs. An older torch and an import of torchvision, which is not used, are
met by stand-ins.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

SPARSITIES = (0.5, 0.7, 0.9)


def state(model: nn.Module) -> dict:
    """All tensors as lists."""
    return {name: value.tolist() for name, value in model.state_dict().items()}


def main(checkout: Path) -> None:
    """The state `before`; masks and gradients of each step; the state `after` the last step."""
    sys.path.insert(0, str(checkout))
    forward = nn.Conv2d._conv_forward
    nn.Conv2d._conv_forward = lambda self, x, weight: forward(self, x, weight, self.bias)
    sys.modules.update({name: ModuleType(name) for name in ("torchvision", "torchvision.transforms")})
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    from pruning.dpf.mnn import MaskConv2d
    from pruning.utils import get_weight_threshold, weight_prune

    torch.manual_seed(0)
    layers = [MaskConv2d(3, 4, 3, bias=False), nn.ReLU(), MaskConv2d(4, 5, 3, bias=False)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 4, 3))
    options = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    images, labels = torch.randn(8, 3, 6, 6), torch.arange(8) % 3
    args, parallel = SimpleNamespace(prune_imp="L2"), nn.Module()
    parallel.module = model
    told = {"before": state(model), "images": images.tolist(), "labels": labels.tolist(), "optimizer": options}
    steps = []
    for sparsity in SPARSITIES:
        for parameter in model.parameters():  # used for the threshold
            parameter.grad = torch.zeros_like(parameter)
        weight_prune(model, get_weight_threshold(parallel, sparsity, args), args)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        gradients = {name: each.grad.tolist() for name, each in model.named_parameters() if each.grad is not None}
        masks = {name: value.tolist() for name, value in model.state_dict().items() if "mask" in name}
        steps.append({"sparsity": sparsity, "masks": masks, "gradients": gradients})
        optimizer.step()
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    origin = {
        "repository": "https://github.com/INCHEON-CHO/Dynamic_Model_Pruning_with_Feedback",
        "commit": subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip(),
        "command": "python tests/golden/dpf.py Dynamic_Model_Pruning_with_Feedback",
        "torch": torch.__version__,
    }
    sys.stdout.write(json.dumps({**origin, **told, "steps": steps, "after": state(model)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
