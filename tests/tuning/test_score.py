"""What a trial is worth, with numbers a reader can check."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config.load import load_config
from pipelines.config.schema import ConfigError
from pipelines.preflight import check_comparison
from tuning.page import best_so_far
from tuning.score import (
    NotANumberError,
    Score,
    pareto_front,
    parse_constraints,
    pick,
    score_trial,
)

BEFORE = {"retain.probability": 0.9, "general.probability": 0.5}
AFTER = {
    "forget.probability": 0.5,
    "forget.fact_recall": 0.25,
    "mia.min_k": 0.6,
    "forget.probability_paraphrased": 0.3,
    "forget.fact_recall_paraphrased": 0.0,
    "holdout.probability": 0.45,
    "holdout.fact_recall": 0.0,
    "retain.probability": 0.81,
    "general.probability": 0.5,
}
ORACLE = {
    "forget.probability": 0.4,
    "forget.fact_recall": 0.0,
    "mia.min_k": 0.65,
    "forget.probability_paraphrased": 0.35,
    "forget.fact_recall_paraphrased": 0.1,
}


def of(distance: float, utility: float, cost_s: float = 1.0) -> Score:
    return Score(distance, utility, distance, 0.0, cost_s)


def test_the_distance_is_the_mean_difference_to_the_oracle() -> None:
    score = score_trial(AFTER, BEFORE, ORACLE, cost_s=3.0)
    assert score.forgetting == pytest.approx((0.1 + 0.25 + 0.05) / 3)
    assert score.robustness == pytest.approx((0.05 + 0.1) / 2)
    assert score.distance == pytest.approx((0.1 + 0.25 + 0.05 + 0.05 + 0.1) / 5)
    assert score.utility == pytest.approx(0.9)  # the worse kept of the two sets
    assert score.cost_s == 3.0


def test_without_an_oracle_the_holdout_set_stands_in() -> None:
    score = score_trial(AFTER, BEFORE, None, cost_s=0.0)
    assert score.forgetting == pytest.approx((0.05 + 0.25 + 0.1) / 3)
    assert (
        score.robustness == 0.0
    )  # asked in other words, the forget set is less likely than the holdout set
    remembered = score_trial(
        {**AFTER, "forget.probability_paraphrased": 0.85}, BEFORE, None, cost_s=0.0
    )
    assert remembered.robustness == pytest.approx(0.4 / 2)


def test_a_classifier_is_scored_by_accuracy_and_the_attack() -> None:
    before = {
        "forget.accuracy": 1.0,
        "retain.accuracy": 0.9,
        "general.accuracy": 0.8,
        "retain.probability": 0.1,
    }
    after = {
        "forget.accuracy": 0.2,
        "mia_efficacy": 0.7,
        "retain.accuracy": 0.9,
        "general.accuracy": 0.6,
    }
    with_oracle = score_trial(
        after, before, {"forget.accuracy": 0.1, "mia_efficacy": 0.9}, cost_s=0.0
    )
    assert with_oracle.distance == with_oracle.forgetting == pytest.approx((0.1 + 0.2) / 2)
    assert with_oracle.utility == pytest.approx(0.6 / 0.8)
    assert score_trial(after, before, None, cost_s=0.0).distance == pytest.approx(
        (0.2 + 0.3) / 2
    ), "a class must go"
    of_rows = {**after, "holdout.accuracy": 0.5, "mia.loss": 0.8}
    assert score_trial(of_rows, before, None, cost_s=0.0).distance == pytest.approx((0.3 + 0.3) / 2)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.parametrize("name", ["forget.probability", "retain.probability", "mia.min_k"])
def test_what_has_diverged_has_no_score(name: str, value: float | None) -> None:
    with pytest.raises(NotANumberError, match=name):
        score_trial({**AFTER, name: value}, BEFORE, ORACLE, cost_s=0.0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_no_other_trial_beats(points: list[tuple[int, int]]) -> None:
    scores = {
        number: of(float(distance), float(utility))
        for number, (distance, utility) in enumerate(points)
    }
    front = pareto_front(scores)
    for number, own in scores.items():
        beaten = any(
            other.distance <= own.distance
            and other.utility >= own.utility
            and (other.distance, other.utility) != (own.distance, own.utility)
            for other in scores.values()
        )
        equal = [n for n, other in scores.items() if other[:2] == own[:2]]
        assert (number in front) == (not beaten and number == min(equal))


def test_the_pick_is_the_nearest_of_those_that_keep_the_constraints() -> None:
    scores = {
        0: of(0.1, 0.99),
        1: of(0.01, 0.9),
        2: of(0.05, 0.98, cost_s=9.0),
        3: of(0.05, 0.97, cost_s=2.0),
    }
    assert pick(scores, parse_constraints([])) == 3  # of two that are equally near the cheaper one
    assert pick(scores, parse_constraints(["utility >= 0.975"])) == 2
    assert pick(scores, parse_constraints(["utility>=0.5"])) == 1
    assert pick(scores, parse_constraints(["cost_s<=1"])) == 0
    assert pick(scores, parse_constraints(["utility>=1.5"])) is None
    assert pick({}, []) is None


@pytest.mark.parametrize(
    "text", ["utility", "utility>0.9", "wisdom>=1", "utility>=high", "utility>=nan", ">=1"]
)
def test_a_constraint_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--require"):
        parse_constraints([text])


def test_the_best_so_far_never_rises_and_ignores_what_costs_too_much() -> None:
    scores = {0: of(0.5, 1.0), 1: of(0.1, 0.5), 2: of(0.3, 0.97), 3: of(0.4, 1.0)}
    assert best_so_far(scores, parse_constraints([])) == [0.5, 0.5, 0.3, 0.3]
    assert best_so_far(scores, parse_constraints(["utility>=1"])) == [0.5, 0.5, 0.5, 0.4]


@pytest.mark.parametrize(
    ("preset", "changes", "missing"),
    [
        ("quick", [], None),
        ("quick", ["data.holdout=null"], "data.holdout"),
        ("quick", ["data.holdout=null", "evaluation.oracle=o"], None),
        ("rfa_image", [], None),
        ("rfa_image", ["data.general=null"], "data.general"),
        ("rfa_text", ["data.general=null"], None),
        ("rfa_text", ["data.general=null", "evaluation.oracle=o"], "data.general"),
    ],
)
def test_a_search_needs_what_its_trials_are_scored_by(
    preset: str, changes: list[str], missing: str | None
) -> None:
    cfg = load_config(preset, ["model.path=m", *changes])
    if missing is None:
        check_comparison(cfg)
    else:
        with pytest.raises(ConfigError, match=f"^{missing}: missing, required by a search"):
            check_comparison(cfg)
