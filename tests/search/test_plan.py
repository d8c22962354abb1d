"""The time plan of a search, the candidates that are tried first, and the trials in the database."""

import re

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage

from search_fakes import FakeTime, baseline
from tersor.methods.mixed_precision import MixedPrecision
from tersor.methods.ptq import PTQ
from tersor.search.candidate import Candidate
from tersor.search.plan import Clock, Costs, latency_seconds, speedup_seconds, survey_seconds
from tersor.search.space import Space, candidate_of, family
from tersor.search.study import Record, Study

COSTS = Costs(survey=5.0, attach=4.0, export=6.0, step=0.1, test=2.0, finish=30.0, runs=0.05, open=1.5, layers=4.0)


def test_the_clock_includes_the_seconds_of_earlier_processes():
    time = FakeTime()
    clock = Clock(2.0, used=30.0, now=time)
    assert (clock.total, clock.used, clock.left) == (120.0, 30.0, 90.0)
    time.work(100.0)
    assert (clock.used, clock.left) == (130.0, -10.0)


def test_the_plan_is_computed_from_the_seconds_of_each_kind_of_work():
    assert [survey_seconds(left) for left in (100.0, 1000.0, 5000.0)] == [20.0, 120.0, 500.0]
    assert [speedup_seconds(total) for total in (50.0, 180.0, 2700.0)] == [1.5, 5.0, 5.0]
    assert [latency_seconds(total) for total in (75.0, 2700.0)] == [0.9, 2.0]
    assert COSTS.evidence(3) == pytest.approx(4 + 3 * (1.5 + 2 * 10 * 0.05))
    assert COSTS.reserve(10_000.0, 3, 2) == pytest.approx(0.005 * 10_000 + 2 * 30 + 3 * 2 + 11.5)
    assert COSTS.reserve(10_000.0, 3, 10) == pytest.approx(0.005 * 10_000 + 1.5 * 10 * 5 + 3 * 2 + 11.5)
    assert COSTS.reserve(100.0, 3, 2) == pytest.approx(30.0), "at most three tenths of the whole time"
    assert (COSTS.overhead, COSTS.least) == (10.0, 20.0)
    assert Costs(attach=4.0, export=6.0, latency=3.0).overhead == 13.0
    assert Costs(attach=4.0, export=6.0, survey=12.0).overhead == 12.0, "the survey of a candidate took longer"
    assert Costs(attach=4.0, export=6.0, survey=12.0, training=9.0).overhead == 9.0, "as measured in a training run"
    slow = Costs(attach=4.0, export=6.0, step=1.0)
    assert slow.least == 30.0, "twenty steps take longer than the overhead"
    assert [slow.entrants(seconds) for seconds in (-100.0, 0.0, 29.0, 61.0, 1e4)] == [0, 0, 0, 2, 6]
    assert Costs().entrants(1.0) == 6


def test_the_first_candidates_are_in_a_fixed_order():
    first = Space(9, prunable=True, students=["a", "b", "c"], bits=("8", "mixed", "4"), pixels=(24,)).first()
    single = [Candidate(branches=3), Candidate("a"), Candidate(branches=4), Candidate("b"), Candidate(branches=6)]
    single += [Candidate("c"), Candidate(keep_macs=0.5), Candidate(branches=5), Candidate(keep_macs=0.25)]
    products = [Candidate(branches=depth, keep_macs=keep) for depth in (3, 4, 6) for keep in (0.5, 0.25)]
    smaller = [Candidate(pixels=24), Candidate("a", pixels=24), Candidate("b", pixels=24)]
    assert first == [*single, *products, *smaller, Candidate(bits="mixed"), Candidate(bits="4")]
    assert Space(1, prunable=False, students=["a", "b"]).first() == [Candidate("a"), Candidate("b")]


def test_the_ranges_of_sampled_parameters_follow_from_the_space():
    ranges = Space(9, prunable=True, students=[], bits=("8", "4")).distributions()
    assert ranges == {
        "branches": IntDistribution(0, 9),
        "keep_macs": FloatDistribution(0.1, 1.0, step=0.05),
        "bits": CategoricalDistribution(("8", "4", "mixed")),
    }
    depth = Space(1, prunable=False, students=[])
    assert depth.distributions() == {"branches": IntDistribution(0, 1), "keep_macs": FloatDistribution(1.0, 1.0)}
    assert depth.samples
    assert Space(0, prunable=True, students=[]).samples
    assert candidate_of({"branches": 2, "keep_macs": 1.0}) == Candidate(branches=2)


def test_the_family_begins_with_common_widths():
    names = family(32)
    assert names[:3] == ["wide_plain_48", "wide_plain_32", "wide_plain_64"]
    assert len(set(names)) == len(names)
    assert family(64)[0] == "wide_plain_large_48"
    assert family(63)[0] == family(8)[0] == "wide_plain_48"
    assert not family(7)


def test_names_and_families_of_candidates_describe_their_changes():
    assert (
        Candidate(branches=3, keep_macs=0.25, bits="mixed", pixels=24).name == "original-branches3-macs25-24px-mixedbit"
    )
    assert re.fullmatch(r"timm_resnet18-[0-9a-f]{6}-8bit", Candidate("timm:resnet18").name)
    assert re.fullmatch(r"net_py_make-[0-9a-f]{6}-8bit", Candidate("folder/net.py:make").name)
    assert len(Candidate(100 * "a").name) == 40 + len("-123456-8bit")
    assert str(Candidate(branches=3, keep_macs=0.25, bits="mixed", pixels=24)) == (
        "original, 3 branches removed, pruned to at most 25 % of the MACs, 24 pixels, mixed bits"
    )
    assert str(Candidate(bits="4")) == "original, 4 bits"
    families = {
        "fewer bits": Candidate(bits="4"),
        "fewer branches": Candidate(branches=1),
        "fewer channels": Candidate(keep_macs=0.9),
        "fewer branches and channels": Candidate(branches=1, keep_macs=0.9),
        "fewer pixels": Candidate(pixels=8),
        "student networks": Candidate("a", pixels=8),
    }
    assert {name: each.family for name, each in families.items()} == {name: name for name in families}


def test_the_stages_of_a_candidate_remove_and_quantize():
    assert Candidate().removal == ()
    (both,) = Candidate(branches=3, keep_macs=0.5).removal
    (method,) = both.methods
    assert (method.keep_macs, method.branches, method.importance, method.scope) == (0.5, 3, "obs", "global")
    (depth,) = Candidate(branches=3).removal[0].methods
    assert (depth.keep_macs, depth.branches, depth.importance_images) == (1.0, 3, 128)
    assert Candidate(keep_macs=0.5).removal[0].methods[0].branches == 0
    rounding = {bits: Candidate(bits=bits).rounding.methods for bits in ("8", "4", "mixed")}
    assert rounding == {"8": (PTQ(bits=8),), "4": (PTQ(bits=4),), "mixed": (MixedPrecision(average_bits=5.0),)}
    names = [stage.name for stage in Candidate(branches=3).stages(())]
    assert names == ["prune", "quantize"]
    quantized = Candidate(branches=3).stages((Candidate().rounding,))
    assert [stage.name for stage in quantized] == ["prune", "quantize"], "not quantized twice"


def record(candidate, rung, validation=80.0):
    point = baseline(candidate.name, validation, 2.0, "int8").model_copy(update={"latency_ms": {1: 2.0, 128: 8.0}})
    return Record(candidate=candidate.parameters, rung=rung, point=point)


def test_a_study_is_restored_from_its_storage():
    storage = InMemoryStorage()
    study = Study(storage, "name", ["original", "wide"], 0)
    made = [record(Candidate(branches=3), 0), record(Candidate("wide", pixels=24), 2, 85.0)]
    for each in made:
        study.add(each)
    study.fail(Candidate(branches=4), 0, 600 * "x")
    study.fail(Candidate(branches=5), 1, "diverged")
    again = Study(storage, "name", ["original", "wide"], 0)
    for each in (study, again):
        assert each.records() == made
        assert each.find(Candidate(branches=3)) == made[0]
        assert each.find(Candidate("wide", pixels=24), 2) == made[1]
        assert each.find(Candidate("wide", pixels=24)) is None
        assert each.failed.keys() == {Candidate(branches=4).name, Candidate(branches=5).name}
    assert again.failed[Candidate(branches=4).name] == 500 * "x"
    assert not Study(storage, "other", ["original"], 0).records()
    trials = {
        kind: optuna.load_study(storage=storage, study_name=f"name/{kind}").trials for kind in ("survey", "training")
    }
    assert [trial.values for trial in trials["survey"]] == [[80.0, 4.0, 0.2], None]
    assert trials["survey"][0].params == {
        "network": "original", "bits": "8", "pixels": 0, "branches": 3, "keep_macs": 1.0, "rung": 0
    }  # fmt: skip
    assert trials["training"][0].params == {"network": "wide", "bits": "8", "pixels": 24, "rung": 2}


def test_a_proposal_is_stored_with_its_result_and_an_unfinished_one_counts_as_failed():
    storage = InMemoryStorage()
    study = Study(storage, "name", ["original"], 0)
    ranges = Space(9, prunable=True, students=[]).distributions()
    trial, parameters = study.suggest(ranges)
    made = record(candidate_of(parameters), 0)
    study.tell(trial, made)
    study.tell(study.suggest(ranges)[0], None)
    study.suggest(ranges)  # the process ends here
    again = Study(storage, "name", ["original"], 0)
    assert study.records() == again.records() == [made]
    assert again.find(candidate_of(parameters)) == made
    assert [trial.state.name for trial in optuna.load_study(storage=storage, study_name="name/survey").trials] == [
        "COMPLETE", "FAIL", "FAIL"
    ]  # fmt: skip
    assert optuna.load_study(storage=storage, study_name="name/survey").trials[0].values == [80.0, 4.0, 0.2]
