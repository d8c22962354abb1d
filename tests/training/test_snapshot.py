"""The state of a training run: Ctrl-C, the optimizer, the clock and the losses."""

import signal
import threading

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.training import history
from tersor.training.history import LossHistory
from tersor.training.objective import Objective
from tersor.training.optimizer import optimizer_for
from tersor.training.options import Training
from tersor.training.snapshot import defer_sigint, restore, snapshot, with_prefix


def press():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interruptible():
    """Set the usual handler: a process started in the background by a shell ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_first_ctrl_c_is_deferred_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with defer_sigint(True) as interrupted:
        assert not interrupted()
        press()
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is before
    with defer_sigint(True) as interrupted:
        pass
    assert signal.getsignal(signal.SIGINT) is before
    with defer_sigint(False) as interrupted:
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt):
            press()
        assert not interrupted()


def test_in_another_thread_ctrl_c_is_not_deferred():
    seen = []

    def work():
        with defer_sigint(True) as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def trained(name):
    torch.manual_seed(0)
    objective = Objective(nn.Linear(3, 2))
    optimizer = optimizer_for(objective, Training(optimizer={"name": name}))
    objective.model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return objective, optimizer


@pytest.mark.parametrize(("name", "other"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_the_state_of_another_optimizer_or_shape_raises(name, other):
    objective, optimizer = trained(name)
    state = snapshot(objective, optimizer, None)
    again, fresh = trained(name)
    nn.init.zeros_(again.model.weight)
    restore(state, again, fresh, None)
    assert torch.equal(again.model.weight, objective.model.weight)
    ours, theirs = (
        with_prefix(snapshot(each, of, None), "optimizer") for each, of in ((again, fresh), (objective, optimizer))
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        restore(state, *trained(other), None)
    shaped = {"sgd": "optimizer.0.momentum_buffer", "adamw": "optimizer.0.exp_avg"}[name]
    with pytest.raises(ValueError, match="of parameter 0 has a different shape"):
        restore(state | {shaped: torch.zeros(3)}, again, fresh, None)
    with pytest.raises(InputError, match="number of processes was 2 when the run was started, and is 1 now"):
        restore(state | {"random.cpu1": state["random.cpu0"]}, again, fresh, None)


def test_a_snapshot_is_a_copy_and_includes_the_random_state():
    objective, optimizer = trained("sgd")
    torch.manual_seed(5)
    state = snapshot(objective, optimizer, None)
    expected = torch.rand(3)
    with torch.no_grad():
        objective.model.weight.zero_()
    assert state["model.weight"].any()
    assert with_prefix(state, "model").keys() == {"weight", "bias"}
    restore(state, objective, optimizer, None)
    assert torch.equal(torch.rand(3), expected)


def test_the_clock_excludes_other_work_and_continues_in_the_next_process(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(history.time, "perf_counter", lambda: now[0])
    first = LossHistory({})
    assert first.seconds == 0
    now[0] = 104.0
    with first.paused():
        now[0] = 150.0
    now[0] = 151.0
    assert first.seconds == 5
    first.add({"labels": torch.tensor(9.0)}, first=True)
    first.add({"labels": torch.tensor(1.0)}, first=True)
    first.add({"labels": torch.tensor(3.0)}, first=False)
    assert first.means() == {"labels": 2.0}, "of the current epoch"
    state = first.state()
    now[0] = 500.0
    second = LossHistory(state)
    now[0] = 502.0
    assert (second.earlier_seconds, second.seconds) == (5.0, 7.0)
    second.add({"labels": torch.tensor(8.0)}, first=False)
    assert second.means() == {"labels": 4.0}
