"""crd compared with numbers from the authors' code (produced by tests/golden/crd.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tersor.data.batch import Batch
from tersor.methods.crd import CRD, ContrastTerm
from tersor.training.layer_pairs import LayerPair
from tersor.training.objective import Outputs

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "crd.json").read_text())


def features(values):
    """Pooled features, as maps of one pixel."""
    return torch.tensor(values)[:, :, None, None]


@pytest.fixture
def term():
    first = GOLDEN["steps"][0]
    images, width = torch.tensor(GOLDEN["memories"]["memory_v1"]).shape
    pair = LayerPair("s", "t", features(first["student"]).shape, features(first["teacher"]).shape)
    negatives = len(first["drawn"][0])
    made = ContrastTerm(CRD(negatives=negatives, width=width, loss_weight=1.0), pair, images)
    given = {
        "student_embedding.weight": GOLDEN["embeddings"]["embed_s.linear.weight"],
        "student_embedding.bias": GOLDEN["embeddings"]["embed_s.linear.bias"],
        "teacher_embedding.weight": GOLDEN["embeddings"]["embed_t.linear.weight"],
        "teacher_embedding.bias": GOLDEN["embeddings"]["embed_t.linear.bias"],
        "of_student": GOLDEN["memories"]["memory_v1"],
        "of_teacher": GOLDEN["memories"]["memory_v2"],
    }
    made.load_state_dict(
        {name: torch.tensor(value) for name, value in given.items()} | {"log_z": torch.full((2,), torch.nan)}
    )
    return made.train()


def test_losses_gradients_and_memories_equal_those_of_the_authors_code(term, monkeypatch):
    for step in GOLDEN["steps"]:
        monkeypatch.setattr(torch, "randint", lambda *_args, _drawn=step["drawn"], **_kwargs: torch.tensor(_drawn))
        student = features(step["student"]).requires_grad_()
        batch = Batch(torch.zeros(len(student), 3, 1, 1), index=torch.tensor(step["index"]))
        term.zero_grad()
        theirs = Outputs(torch.zeros(()), {"t": features(step["teacher"])})
        loss = term(batch, Outputs(torch.zeros(()), {"s": student}), theirs)
        loss.backward()
        assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
        torch.testing.assert_close(student.grad.flatten(1), torch.tensor(step["gradient"]), rtol=1e-4, atol=1e-6)
        for name, ours in (("embed_s", term.student_embedding), ("embed_t", term.teacher_embedding)):
            expected = torch.tensor(step["embedding_gradients"][f"{name}.linear.weight"])
            torch.testing.assert_close(ours.weight.grad, expected, rtol=1e-4, atol=1e-6)
        for name, memory in (("memory_v1", term.of_student), ("memory_v2", term.of_teacher)):
            torch.testing.assert_close(memory, torch.tensor(step["memories"][name]), rtol=1e-5, atol=1e-6)
