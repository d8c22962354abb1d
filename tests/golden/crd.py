"""Runs the authors' code of CRD for three steps, and prints crd.json.

git clone https://github.com/HobbitLong/RepDistiller
python tests/golden/crd.py RepDistiller > tests/golden/crd.json

Embeddings, memories and loss are the authors'; features, the images they are of and the negatives are drawn here.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

BATCH, IMAGES, NEGATIVES, STUDENT, TEACHER, WIDTH, STEPS = 4, 24, 7, 6, 5, 8, 3


def main(checkout: Path) -> None:
    """The inputs (`embeddings`, `memories`), and for each step the random draws, the loss and the new state."""
    sys.path.insert(0, str(checkout))
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # the authors' code requires a GPU
    from crd.criterion import CRDLoss

    torch.manual_seed(0)
    names = ("s_dim", "t_dim", "feat_dim", "nce_k", "nce_t", "nce_m", "n_data")
    options = SimpleNamespace(**dict(zip(names, (STUDENT, TEACHER, WIDTH, NEGATIVES, 0.07, 0.5, IMAGES), strict=True)))
    loss = CRDLoss(options)
    embeddings = {name: parameter.tolist() for name, parameter in loss.named_parameters()}
    memories = {name: getattr(loss.contrast, name).tolist() for name in ("memory_v1", "memory_v2")}
    steps = []
    for _ in range(STEPS):
        student, teacher = torch.randn(BATCH, STUDENT, requires_grad=True), torch.randn(BATCH, TEACHER)
        index = torch.randperm(IMAGES)[:BATCH]
        drawn = torch.randint(IMAGES, (BATCH, NEGATIVES))
        loss.zero_grad()
        with contextlib.redirect_stdout(sys.stderr):
            found = loss(student, teacher, index, torch.cat([index[:, None], drawn], 1))
        found.sum().backward()
        steps.append(
            {
                "student": student.tolist(),
                "teacher": teacher.tolist(),
                "index": index.tolist(),
                "drawn": drawn.tolist(),
                "loss": found.item(),
                "gradient": student.grad.tolist(),
                "embedding_gradients": {name: each.grad.tolist() for name, each in loss.named_parameters()},
                "memories": {name: getattr(loss.contrast, name).tolist() for name in memories},
            }
        )
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    origin = {
        "repository": "https://github.com/HobbitLong/RepDistiller",
        "commit": subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip(),
        "command": "python tests/golden/crd.py RepDistiller",
        "torch": torch.__version__,
    }
    sys.stdout.write(json.dumps({**origin, "embeddings": embeddings, "memories": memories, "steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
