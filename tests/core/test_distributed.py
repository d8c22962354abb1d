"""If one of two processes dies, the other ends at once with one message."""

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from tersor.core import distributed
from tersor.core.errors import ProcessLost

CHILD = textwrap.dedent("""
    import os, signal, sys
    import torch
    from torch import nn
    from tersor import cli
    from tersor.core import distributed
    from tersor.training.attachment import Attachment
    from tersor.training.objective import Batch
    from tersor.training.options import Training
    from tersor.training.loop import fit

    class Batches(list):
        def set_epoch(self, epoch):
            pass

    class Dying(Attachment):
        def before_step(self, step, optimizer):
            if step == 5:
                die()

    def die():
        if distributed.rank() == int(os.environ["DIES"]):
            os.kill(os.getpid(), signal.SIGKILL)

    def train():
        distributed.init_process_group()
        batch = Batch(torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.long), torch.arange(4))
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        if os.environ["WHERE"] == "training":
            fit(Dying(model), Batches([batch] * 10), Training(batch_size=4), steps=1000)
        distributed.barrier()
        die()
        distributed.barrier()

    cli.app = train
    cli.main()
""")


def pair(where, dies):
    """Start two processes, one of which kills itself; return exit code and error stream of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    raised = {"WHERE": where, "DIES": str(dies), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env={**os.environ, **shared, **raised, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [child.communicate(timeout=240)[1] for child in both]  # the timeout is two days
    finally:
        for child in both:
            child.kill()
    return [(child.returncode, error) for child, error in zip(both, errors, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["training", "waiting"])
@pytest.mark.parametrize("dies", [0, 1])
def test_the_remaining_process_ends_with_one_message(where, dies):
    found = pair(where, dies)
    assert found[dies][0] == -signal.SIGKILL
    code, errors = found[1 - dies]
    mine = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2, errors[-3000:]
    assert len(mine) == 1, errors
    assert f"so process {1 - dies} ends" in mine[0]
    assert "--resume" in mine[0]
    assert "Traceback" not in errors


def test_a_single_process_propagates_the_error():
    with pytest.raises(RuntimeError, match="gloo") as raised, distributed.others_alive():
        raise RuntimeError("gloo: connection closed by peer")
    assert not isinstance(raised.value, ProcessLost)


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4", True),
        ("Connection reset by peer", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_lost_connections_raise_process_lost(monkeypatch, words, lost):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with pytest.raises(ProcessLost if lost else RuntimeError) as raised, distributed.others_alive():
        raise RuntimeError(words)
    assert isinstance(raised.value, ProcessLost) == lost


@pytest.fixture
def second_of_two(monkeypatch):
    """Simulate the second of two processes; all tensors of the first one contain ones."""
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "_group", lambda: "group")

    def broadcast(tensor, src, group):
        assert (src, group) == (0, "group")
        tensor.fill_(1)

    def all_gather(tensors, tensor, group):
        assert group == "group"
        tensors[0].fill_(1)
        tensors[1].copy_(tensor)

    monkeypatch.setattr(distributed.dist, "broadcast", broadcast)
    monkeypatch.setattr(distributed.dist, "all_gather", all_gather)


@pytest.mark.usefixtures("second_of_two")
def test_tensors_are_broadcast_from_the_first_process_and_gathered_from_all():
    assert (distributed.count(), distributed.rank()) == (2, 1)
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    distributed.broadcast_from_rank0(network)
    assert all(bool((each == 1).all()) for each in network.state_dict().values())
    first, second = distributed.all_gather(torch.tensor([3.0, 4.0]))
    assert (first.tolist(), second.tolist()) == ([1, 1], [3, 4])


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(("here", "there"), [(False, False), (True, False), (False, True)])
def test_any_rank_is_true_if_the_condition_holds_in_any_process(monkeypatch, here, there):
    def all_reduce(flag, operation, group):
        assert (operation, group) == (distributed.dist.ReduceOp.MAX, "group")
        flag.fill_(max(int(flag), there))

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    assert distributed.any_rank(here) is (here or there)


def test_a_single_process_needs_no_communication():
    assert (distributed.count(), distributed.rank()) == (1, 0)
    assert [distributed.any_rank(each) for each in (True, False)] == [True, False]
    tensor = torch.ones(2)
    assert distributed.all_gather(tensor)[0] is tensor
