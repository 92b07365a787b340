from math import exp, log, nan

import pytest

from pipelines.evaluation.metrics import Sample, relearn_scores
from pipelines.evaluation.metrics.relearning import RELEARNINGS, steps_to_relearn


def row(probability: float, **fields: float) -> Sample:
    return Sample(set_name="forget", loss=-log(probability), **fields)


@pytest.mark.parametrize(
    ("curve", "steps"),
    [
        ({0: 0.2, 1: 0.3, 2: 0.5, 5: 0.7}, 2),  # halfway from 0.2 to 0.8 is 0.5
        ({0: 0.2, 1: 0.3, 2: 0.49, 5: 0.5}, 5),
        ({5: 0.6, 0: 0.2, 1: 0.5}, 1),  # in whatever order they stand
        ({0: 0.2, 1: 0.49}, None),
        ({0: 0.2, 1: None, 2: 0.9}, 2),
        ({0: 0.8}, 0),  # nothing had been lost
        ({0: 0.9}, 0),
        ({0: None, 1: 0.9}, None),
        ({}, None),
    ],
)
def test_steps_to_relearn_is_the_first_step_at_least_halfway_back(
    curve: dict[int, float | None], steps: int | None
) -> None:
    assert steps_to_relearn(curve, original=0.8) == steps


def test_without_the_originals_probability_halfway_is_nowhere() -> None:
    assert steps_to_relearn({0: 0.2, 1: 0.9}, None) is None


def test_the_curve_is_the_mean_over_rows_at_each_step() -> None:
    curve = {0: [row(0.1), row(0.3)], 1: [row(0.5), row(0.7)]}
    scores = relearn_scores(curve, [row(0.8), row(0.6)])
    assert scores == {
        "relearn.probability.0": pytest.approx(0.2),
        "relearn.probability.1": pytest.approx(0.6),
        "relearn.steps": 1,  # halfway from 0.2 to 0.7 is 0.45
    }


def test_a_relearning_from_other_rows_has_scores_of_its_own_name() -> None:
    curve = {0: [row(0.2, fact_recall=0.0)], 2: [row(0.6, fact_recall=1.0)]}
    assert relearn_scores(curve, [row(0.8)], RELEARNINGS[1]) == {
        "relearn_retain.probability.0": pytest.approx(0.2),
        "relearn_retain.probability.2": pytest.approx(0.6),
        "relearn_retain.fact_recall.0": 0.0,
        "relearn_retain.fact_recall.2": 1.0,
        "relearn_retain.steps": 2,
    }


def test_facts_have_a_curve_where_rows_have_facts() -> None:
    scores = relearn_scores(
        {0: [row(0.5, fact_recall=0.0), row(0.5, fact_recall=1.0), row(0.5)]}, [row(0.5)]
    )
    assert scores["relearn.fact_recall.0"] == 0.5


def test_without_the_original_there_are_no_steps() -> None:
    assert relearn_scores({0: [row(0.5)]}, None) == {"relearn.probability.0": pytest.approx(0.5)}


def test_a_model_that_broke_on_the_way_has_none_and_not_nan() -> None:
    broken = Sample(set_name="forget", loss=nan)
    assert relearn_scores({0: [row(exp(-1))], 1: [broken]}, [row(0.9)]) == {
        "relearn.probability.0": pytest.approx(exp(-1)),
        "relearn.probability.1": None,
        "relearn.steps": None,
    }


def test_with_no_row_to_score_nothing_is_known() -> None:
    assert relearn_scores({0: [], 1: []}, []) == {"relearn.steps": None}


def test_what_differs_by_rounding_alone_was_not_lost() -> None:
    assert steps_to_relearn({0: 0.4, 1: 0.5}, 0.4 * (1 + 1e-6)) == 0
    assert steps_to_relearn({0: 0.4, 1: 0.5}, 0.4 * (1 + 1e-3)) == 1
