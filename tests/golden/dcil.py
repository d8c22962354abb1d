"""Runs the authors' code of DCIL for two steps on a small network, and prints dcil.json.

git clone https://github.com/Jangho-Kim/DCIL-pytorch
python tests/golden/dcil.py DCIL-pytorch > tests/golden/dcil.json

Masked convolution, residual block, threshold, mask and KL loss are the authors'; the small network around them switches
the two paths as their ResNet does. Their code asks for a GPU and an older torch, which is met by stand-ins.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Variable

SPARSITIES = (0.6, 0.75)


def kl_loss(checkout: Path) -> nn.Module:
    """The authors' class, taken from a script that parses its command line."""
    tree = ast.parse((checkout / "run_dcil.py").read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "KLLoss"]
    names = {"torch": torch, "nn": nn, "F": F, "Variable": Variable}
    exec(compile(ast.Module([found], []), "run_dcil.py", "exec"), names)
    return names["KLLoss"]()


def network(block: type, conv: type) -> nn.Module:
    """Convolution, residual block, mean over the map, head: one path each for types 0 and 1."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = conv(3, 4, 3, padding=1, bias=False)
            self.bn1_part, self.bn1_full = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.block = block(4, 4)
            self.fc_part, self.fc_full = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, type_value: int) -> torch.Tensor:
            for module in self.modules():
                if isinstance(module, block | conv):
                    module.type_value = type_value
            x = self.conv1(x)
            x = F.relu(self.bn1_full(x) if type_value else self.bn1_part(x))
            x = self.block(x).mean((2, 3))
            return self.fc_full(x) if type_value else self.fc_part(x)

    return Small()


def state(model: nn.Module) -> dict:
    """All tensors as lists."""
    return {name: value.tolist() for name, value in model.state_dict().items()}


def main(checkout: Path) -> None:
    """The state `before`; masks, logits, loss and gradients of each step; the state `after` the last step."""
    sys.path.insert(0, str(checkout))
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    nn.Conv2d.conv2d_forward = lambda self, x, weight: self._conv_forward(x, weight, self.bias)
    sys.modules.update({name: ModuleType(name) for name in ("torchvision", "torchvision.transforms")})
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    from pruning.dcil import mnn
    from pruning.models import resnet_mask
    from pruning.utils import get_weight_threshold, weight_prune

    resnet_mask.mnn = mnn
    torch.manual_seed(0)
    model = network(resnet_mask.BasicBlock, mnn.MaskConv2d).train()
    criterion, kl = nn.CrossEntropyLoss(), kl_loss(checkout)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    images, labels = torch.randn(8, 3, 6, 6), torch.arange(8) % 3
    args, parallel = SimpleNamespace(prune_imp="L1"), nn.Module()
    parallel.module = model
    told = {"before": state(model), "images": images.tolist(), "labels": labels.tolist(), "optimizer": options}
    steps = []
    for sparsity in SPARSITIES:
        threshold = get_weight_threshold(parallel, sparsity, args)
        weight_prune(model, threshold, args)
        output, full = model(images, 0), model(images, 1)
        loss = criterion(output, labels) + criterion(full, labels) + kl(output, full) + kl(full, output)
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: each.grad.tolist() for name, each in model.named_parameters() if each.grad is not None}
        masks = {name: value.tolist() for name, value in model.state_dict().items() if "mask" in name}
        steps.append({"sparsity": sparsity, "masks": masks, "logits": output.tolist(), "dense_logits": full.tolist()})
        steps[-1] |= {"loss": loss.item(), "gradients": gradients}
        optimizer.step()
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    origin = {
        "repository": "https://github.com/Jangho-Kim/DCIL-pytorch",
        "commit": commit,
        "command": "python tests/golden/dcil.py DCIL-pytorch",
        "torch": torch.__version__,
    }
    sys.stdout.write(json.dumps({**origin, **told, "steps": steps, "after": state(model)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
