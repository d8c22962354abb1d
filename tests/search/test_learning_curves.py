"""What is expected of more training."""

import pytest

from search_fakes import searching
from tersor.search.candidate import Candidate
from tersor.search.learning_curves import FRESH, INHERITED, expected
from tersor.search.promotion import promoted
from tersor.search.study import Record


def record(search, candidate, rung, validation, seconds, milliseconds=1.0):
    point = search.original.model_copy(
        update={
            "name": f"{candidate.name}-{rung}",
            "validation": validation,
            "seconds": seconds,
            "steps": 1,
            "free": False,
            "latency_ms": {1: milliseconds, 128: milliseconds},
        }
    )
    made = Record(candidate=candidate.parameters, rung=rung, point=point)
    search.study.add(made)
    return made


def test_the_error_of_a_fresh_student_and_the_drop_of_an_inherited_network_fall_as_powers_of_time(tmp_path):
    search = searching(tmp_path / "out")
    assert search.reference == 90
    student = record(search, Candidate("wide"), 1, 60.0, 10.0)
    assert expected(search, student, 80.0) == pytest.approx(100 - 40 * 8**-FRESH)
    pruned = record(search, Candidate(branches=3), 1, 80.0, 10.0)
    assert expected(search, pruned, 80.0) == pytest.approx(90 - 10 * 8**-INHERITED)
    assert expected(search, pruned, 5.0) == 80.0, "less time than was spent changes nothing"


def test_two_rungs_give_the_exponent(tmp_path):
    search = searching(tmp_path / "out")
    record(search, Candidate(branches=3), 1, 80.0, 10.0)
    second = record(search, Candidate(branches=3), 2, 85.0, 40.0)  # half of the drop after four times the time
    assert expected(search, second, 160.0) == pytest.approx(87.5)


def test_a_network_better_than_the_original_stays_as_it_is(tmp_path):
    search = searching(tmp_path / "out")
    assert expected(search, record(search, Candidate(branches=3), 1, 91.0, 10.0), 100.0) == 91.0


def test_a_fast_student_that_still_learns_is_kept(tmp_path):
    search = searching(tmp_path / "out")
    student = record(search, Candidate("wide"), 1, 60.0, 10.0, milliseconds=0.3)
    pruned = [record(search, Candidate(branches=count), 1, 89.5 - count / 10, 10.0) for count in (1, 2, 3)]
    kept = promoted(search, [*pruned, student], 2, 300.0)
    assert student in kept
    assert pruned[0] in kept
    later = record(search, Candidate("wide"), 2, 85.0, 40.0, milliseconds=0.3)
    pruned = record(search, Candidate(branches=1), 2, 89.5, 40.0)
    assert promoted(search, [pruned, later], 1, 300.0) == [later]
