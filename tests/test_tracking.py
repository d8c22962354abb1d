"""Values of a run are logged to a tracker of accelerate."""

import importlib.util

import pytest

from tersor import tracking
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.tracking import TrackedProgress, tracked


class Tracker:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values, step):
        self.logged.append((values, step))

    def finish(self):
        self.finished = True


def test_every_new_value_is_logged_once(tmp_path):
    progress = TrackedProgress(NullProgress(), "tensorboard", tmp_path)
    progress._tracker = tracker = Tracker()
    progress.start("distil: training", 4)
    progress.advance(1, labels=2.0, learning_rate=0.1)
    progress.advance(1, labels=2.0, learning_rate=0.2)
    progress.advance(1, labels=1.5, learning_rate=0.3)
    progress.start("quantize", 4)
    progress.advance(1)
    progress.advance(1, labels=1.5)
    progress.finish()
    assert tracker.logged == [
        ({"distil training/labels": 2.0, "distil training/learning_rate": 0.1}, 1),
        ({"distil training/labels": 1.5, "distil training/learning_rate": 0.3}, 3),
        ({"quantize/labels": 1.5}, 2),
    ]
    assert tracker.finished


def test_without_a_tracker_progress_is_unchanged(tmp_path):
    plain = NullProgress()
    with tracked(plain, None, tmp_path) as progress:
        assert progress is plain


def test_a_missing_tracker_raises_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match="pip install mlflow"), tracked(NullProgress(), "mlflow", tmp_path):
        pass


@pytest.mark.slow
def test_tensorboard_writes_an_event_file(tmp_path):
    pytest.importorskip("tensorboard")
    with tracked(NullProgress(), "tensorboard", tmp_path / "run.tracking") as progress:
        progress.start("training", 2)
        progress.advance(1, labels=2.0)
    assert list(tmp_path.rglob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_contains_the_logged_values(tmp_path, monkeypatch):
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    with tracked(NullProgress(), "mlflow", tmp_path / "run.tracking") as progress:
        progress.start("training", 2)
        progress.advance(1, labels=2.0)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.metrics == {"training/labels": 2.0}
