"""Further removal from a trained candidate that has not used the allowed drop, in single steps and full searches."""

import json
import math
from dataclasses import replace

import pytest

from search_fakes import SPACE, FakeBench, FakeTime, baseline, run, searching
from tersor.core.errors import InputError
from tersor.recipe import Stage
from tersor.search import further_removal, halving
from tersor.search.candidate import Candidate, Removal
from tersor.search.compression_budget import Budget
from tersor.search.further_removal import Further, further_removals
from tersor.search.state import Rung
from tersor.search.study import Record

pytestmark = pytest.mark.usefixtures("fake_search")


def add(search, candidate, rung, validation, milliseconds, *, stages=(), **changed):
    point = baseline(f"{candidate.name}-{rung}", validation, milliseconds, "int8")
    point = point.model_copy(update={"free": False, "seconds": 30.0, **changed})
    made = Record(candidate=candidate.parameters, rung=rung, point=point, stages=list(stages))
    search.study.add(made)
    search.points.append(point)
    return made


def with_best(path, validation, milliseconds=0.6, candidate=None, budget=None, **changed):
    """A search with a reference of 90 % in which a trained candidate is the best network so far."""
    search = searching(path, budget=budget)
    best = add(search, candidate or Candidate(branches=1), 1, validation, milliseconds, **changed)
    search.best = best.point
    return search, best


@pytest.mark.parametrize(
    ("validation", "error", "removed"),
    [
        # 8 of 9 branches are left: a quarter of them is 2, if nothing of the allowed point is used
        (90.5, 0.0, 2),
        (90.0, 0.0, 2),
        (89.8, 0.2, 1),  # 0.25 * 0.6 * 8 = 1.2
        (89.2, 0.05, 1),  # at least one
        (89.2, 0.12, None),  # less than a tenth is left of the drop
        (88.0, 0.0, None),
    ],
)
def test_the_amount_of_removal_depends_on_the_unused_part_of_the_drop(tmp_path, validation, error, removed):
    search, best = with_best(tmp_path / "out", validation, drop_error=error)
    further = further_removals(search, [best], None, 100.0)
    if removed is None:
        assert further == []
    else:
        assert further == [Further(replace(best.of, later=(Removal(branches=removed),)), best)]


def test_channels_are_removed_if_no_branches_are_left(tmp_path):
    search, best = with_best(tmp_path / "out", 89.8, candidate=Candidate(branches=8, keep_macs=0.5))
    (further,) = further_removals(search, [best], None, 100.0)
    assert further.candidate.later == (Removal(keep_macs=0.8),), "0.25 * 0.8 in steps of 0.05; one branch always stays"


def test_several_workers_remove_different_amounts(tmp_path):
    search, best = with_best(tmp_path / "out", 90.0)
    later = [each.candidate.later[-1].branches for each in further_removals(search, [best], None, 100.0, 3)]
    assert later == [1, 2, 3], "0.125, 0.25 and 0.375 of 8"


def test_nothing_is_removed_from_students_or_baselines_or_without_time_or_drop(tmp_path):
    search, best = with_best(tmp_path / "out", 90.0, candidate=Candidate("wide"))
    assert further_removals(search, [best], None, 100.0) == []
    search, best = with_best(tmp_path / "other", 90.0)
    assert further_removals(search, [best], None, 14.9) == [], "5 s to remove, 5 s of other work, 5 s of training"
    assert further_removals(search, [best], None, 15.1)
    longer = best.model_copy(update={"point": best.point.model_copy(update={"seconds": 200.0})})
    assert further_removals(search, [longer], None, 0.14 * 200) == []
    assert further_removals(search, [longer], None, 0.16 * 200)
    search.best = search.points[0]
    assert further_removals(search, [best], None, 100.0) == []
    for number, budget in enumerate([Budget(latency_ms={1: 1.0}), Budget(max_drop=0.0)]):
        search, best = with_best(tmp_path / str(number), 90.0, budget=budget)
        assert further_removals(search, [best], None, 100.0) == []


def test_a_removal_is_tried_only_once(tmp_path):
    search, best = with_best(tmp_path / "out", 90.0)
    (further,) = further_removals(search, [best], None, 100.0)
    search.study.fail(further.candidate, 2, "diverged")
    assert further_removals(search, [best], None, 100.0) == []
    search.study.failed.clear()
    assert further_removals(search, [best], None, 100.0)
    search.folder.state.rungs = [Rung(members={further.candidate.name: 2}, until=0.0)]
    assert further_removals(search, [best], None, 100.0) == [], "even if its rung had no time to train it"


def test_training_another_candidate_is_preferred_if_its_expected_gain_is_larger(tmp_path, monkeypatch):
    search, best = with_best(tmp_path / "out", 90.0)
    gained = -math.log(1 - 2 / 8)  # two of eight branches, at a probability of one half
    other = add(search, Candidate(branches=3), 1, 88.9, 0.4)
    for promised, count in ((0.51 * gained, 0), (0.49 * gained, 1)):
        monkeypatch.setattr(further_removal, "gain", lambda *_, promised=promised: promised)
        assert len(further_removals(search, [best, other], other, 100.0)) == count


def test_a_rung_of_a_further_removal_matches_values_computed_by_hand(tmp_path):
    search, best = with_best(tmp_path / "out", 89.9)
    search.folder.state.rungs = [Rung(members={best.of.name: 1}, until=0.0)] * 2
    available = halving.seconds_to_train(search)
    rung = halving._rung(search, 3, 1)
    name = "original-branches1-then-branches2-8bit"
    assert rung.members == {name: 2}
    assert Candidate.of(rung.unsurveyed[name]) == Candidate(branches=1, later=(Removal(2),))
    assert rung.until == pytest.approx(search.clock.used + 0.3 * available)
    search.folder.state.extended = True
    search.folder.state.rungs[-1] = Rung(members={best.of.name: 1})
    assert halving._rung(search, 3, 1).until is None


def test_the_stages_before_a_further_removal_do_not_quantize():
    stages = [Stage(name=name).model_dump(mode="json") for name in ("train-1", "quantize")]
    point = baseline("a", 90.0, 1.0, "int8")
    made = Record(candidate=Candidate().parameters, rung=1, point=point, stages=stages)
    assert [stage.name for stage in further_removal.stages_before(made)] == ["train-1"]


def search_with_slack(path, time=None, bench=None):
    """A search in which training recovers the metric fast, so that more can be removed."""
    time = time or FakeTime()
    return searching(path, time=time, bench=bench or FakeBench(time), budget=Budget(max_drop=4.0))


def test_a_search_removes_more_from_a_trained_candidate(tmp_path):
    search = search_with_slack(tmp_path / "out")
    made = run(search)
    best = search.candidate_of(made.point(made.best))
    assert best.later
    assert made.point(made.best).validation >= 86.0
    assert 0.95 * search.clock.total <= search.clock.used <= 1.05 * search.clock.total
    record = next(each for each in search.study.records() if each.point.name == made.best)
    names = [stage["name"] for stage in record.stages]
    place = names.index("prune-2")
    assert names[0] == "train-1"
    assert names[place + 1].startswith("train-"), "it is trained again after the removal"
    (options,) = (each["channel_pruning"] for each in record.stages[place]["methods"])
    assert options.get("branches", 0) == best.later[0].branches
    assert f"{best.later[0].branches} more branch" in made.point(made.best).description


def test_an_interrupted_training_after_a_further_removal_is_resumed(tmp_path):
    time = FakeTime()
    whole = search_with_slack(tmp_path / "whole", time)
    run(whole)
    later = [number for number, what in enumerate(whole.bench.log) if what[0] == "train" and "then" in what[1]]
    for place in (later[0] - 1, later[0]):
        bench = FakeBench(FakeTime(), interrupt_at=place)
        search = search_with_slack(tmp_path / str(place), bench.time, bench)
        with pytest.raises(KeyboardInterrupt):
            run(search)
        assert json.loads((search.folder.path / "search.json").read_text())["rungs"]
        resumed = search_with_slack(tmp_path / str(place), bench.time, bench)
        run(resumed)
        trained = [what for what in bench.log if what[0] == "train"]
        assert len(trained) == len(set(trained)), "no finished training is repeated"
        assert any("then" in what[1] for what in trained)


def test_a_failing_removal_is_a_failed_trial(tmp_path):
    time = FakeTime()

    class Broken(FakeBench):
        def build(self, candidate, trained=()):
            if candidate.later:
                raise InputError("nothing can be removed")
            return super().build(candidate, trained)

    search = search_with_slack(tmp_path / "out", time, Broken(time))
    made = run(search)
    assert "nothing can be removed" in made.failed.values()
    assert not search.candidate_of(made.point(made.best)).later
    assert 0.95 * search.clock.total <= search.clock.used <= 1.05 * search.clock.total


def test_names_and_families_of_candidates_with_further_removals():
    candidate = Candidate(branches=3, later=(Removal(branches=1), Removal(keep_macs=0.8)))
    assert candidate.name == "original-branches3-then-branches1-then-macs80-8bit"
    assert str(candidate) == (
        "original, 3 branches removed, 1 more branch removed after training, "
        "at most 80 % of the remaining MACs after training, 8 bits"
    )
    assert candidate.family == "fewer branches and channels"
    assert candidate.parent == Candidate(branches=3, later=(Removal(branches=1),))
    assert Candidate.of(json.loads(json.dumps(candidate.parameters))) == candidate
    assert candidate.last_removal[0].name == "prune-3"
    assert SPACE.branches == 9
