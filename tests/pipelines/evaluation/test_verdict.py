"""The verdict on a run, from the scores alone."""

from typing import Any

import pytest

from pipelines.evaluation.metrics.table import METRICS
from pipelines.evaluation.verdict import verdict

# The scores that the verdict counts of a language model.
FORGET_SCORES = [
    metric.key("forget") for metric in METRICS if metric.judged and metric.search != "classes"
]
KEPT = {"retain.probability": 0.94, "general.probability": 0.60}


def forget_entry(level: float, **scores: float | None) -> dict[str, float | None]:
    """An entry of scores.json whose forget-set scores all stand at one level; truth ratio runs the other way."""
    entry: dict[str, float | None] = dict.fromkeys(FORGET_SCORES, level)
    entry["forget.truth_ratio"] = 1 - level
    return entry | KEPT | {key.replace("__", "."): value for key, value in scores.items()}


def scores_of(**models: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "models": models, "cost": {}}


def test_a_model_at_the_oracle_has_forgotten_and_the_sentence_counts_the_scores() -> None:
    after = forget_entry(0.5, retain__probability=0.93, general__probability=0.59)
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    )
    assert level == "indistinguishable"
    assert sentence == (
        "Indistinguishable: on the forget set the model is closer to the retrained oracle than to the original "
        "on 15 of 15 scores; it keeps 98 % of the retained answers' probability and 98 % of general knowledge."
    )


def test_a_model_at_the_original_has_not_forgotten() -> None:
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=forget_entry(0.88), oracle=forget_entry(0.5))
    )
    assert level == "traces_remain"
    assert sentence.startswith("Traces remain: ")
    assert "on 0 of 15 scores" in sentence


def test_scores_of_which_half_are_still_the_originals_are_traces() -> None:
    missed = ("forget.probability", "forget.rouge", "mia.loss", "mia.zlib")
    after = forget_entry(0.5) | dict.fromkeys(
        [name for name in FORGET_SCORES if name.startswith(missed)], 0.9
    )
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    )
    assert level == "traces_remain"
    assert "on 9 of 15 scores" in sentence


def test_extractable_answers_are_not_forgotten_whatever_the_other_scores_say() -> None:
    after = forget_entry(0.5, forget__extraction_strength=0.85)
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    )
    assert level == "traces_remain"
    assert "on 14 of 15 scores, but not on extraction strength" in sentence


def test_a_cost_is_named_in_the_head_and_in_numbers() -> None:
    after = forget_entry(0.5, general__probability=0.27)
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    )
    assert level == "utility_lost"
    assert sentence.startswith("Utility lost (general knowledge): ")
    assert sentence.endswith(
        "it keeps 100 % of the retained answers' probability and 45 % of general knowledge."
    )


@pytest.mark.parametrize(("share", "level"), [(0.96, "indistinguishable"), (0.949, "utility_lost")])
def test_a_share_just_under_95_percent_is_a_cost_and_never_reads_as_95(
    share: float, level: str
) -> None:
    after = forget_entry(0.5, retain__probability=0.94 * share)
    found = verdict(scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5)))
    assert found.level == level
    assert "95 %" not in found.sentence


@pytest.mark.parametrize(
    ("after", "level"), [(0.41, "indistinguishable"), (0.39, "over_forgotten")]
)
def test_scores_more_than_a_tenth_below_the_oracle_are_over_forgotten(
    after: float, level: str
) -> None:
    scores = scores_of(
        before=forget_entry(0.9), after=forget_entry(after), oracle=forget_entry(0.5)
    )
    assert verdict(scores).level == level


def test_three_overshooting_scores_of_fifteen_are_tolerated_and_four_are_not() -> None:
    models = {"before": forget_entry(0.9), "oracle": forget_entry(0.5)}
    three = forget_entry(0.5, forget__rouge=0.1, forget__probability=0.1, mia__loss=0.35)
    assert verdict(scores_of(after=three, **models)).level == "indistinguishable"
    # The trained attack has no side that is beyond.
    chance = three | {"mia.trained": 0.35}
    assert verdict(scores_of(after=chance, **models)).level == "indistinguishable"
    level, sentence = verdict(scores_of(after=three | {"mia.zlib": 0.35}, **models))
    assert level == "over_forgotten"
    assert (
        "4 of 15 forget-set scores lie more than 0.10 beyond those of the retrained oracle"
        in sentence
    )


def test_a_model_the_oracle_cannot_be_told_from_at_the_start_leaves_the_verdict_open() -> None:
    level, sentence = verdict(
        scores_of(before=forget_entry(0.5), after=forget_entry(0.5), oracle=forget_entry(0.5))
    )
    assert level == "undecided"
    assert "nothing to forget" in sentence


@pytest.mark.parametrize(
    ("auc", "level", "words"),
    [
        (0.31, "indistinguishable", ""),
        (0.29, "over_forgotten", "but the gradient norm attack sees that something was removed"),
        (0.71, "traces_remain", "but not on the gradient norm attack"),
    ],
)
def test_one_attack_that_is_far_from_the_oracles_decides(
    auc: float, level: str, words: str
) -> None:
    models = {"before": forget_entry(0.95), "oracle": forget_entry(0.5)}
    found = verdict(scores_of(after=forget_entry(0.5, mia__grad_norm=auc), **models))
    assert found.level == level
    assert words in found.sentence


@pytest.mark.parametrize(("before", "level"), [(0.12, "traces_remain"), (0.14, "over_forgotten")])
def test_what_an_attack_finds_low_in_the_original_too_was_not_removed(
    before: float, level: str
) -> None:
    models = {"before": forget_entry(0.9, mia__zlib=before), "oracle": forget_entry(0.5)}
    found = verdict(scores_of(after=forget_entry(0.5, mia__zlib=0.11), **models))
    assert found.level == level
    assert ("but not on " in found.sentence) == (level == "traces_remain")


@pytest.mark.parametrize(
    ("distance", "level", "words"),
    [
        (0.14, "indistinguishable", "its tokens cannot be told from a retrained model's"),
        (
            0.15,
            "traces_remain",
            "token by token it lies 0.15 nats from the oracle, the original 0.72",
        ),
        (0.98, "traces_remain", "token by token the model has come no nearer: it lies "),
    ],
)
def test_scores_at_the_oracles_prove_nothing_while_the_tokens_are_elsewhere(
    distance: float, level: str, words: str
) -> None:
    before = forget_entry(0.9, forget__token_distance=0.72)
    after = forget_entry(0.5, forget__token_distance=distance)
    found = verdict(scores_of(before=before, after=after, oracle=forget_entry(0.5)))
    assert found.level == level
    assert words in found.sentence


@pytest.mark.parametrize(
    ("above", "below", "level"), [(0.1, 0.8, "over_forgotten"), (0.8, 0.1, "traces_remain")]
)
def test_tokens_farther_out_than_the_originals_are_beyond_the_oracle_or_short_of_it(
    above: float, below: float, level: str
) -> None:
    before = forget_entry(0.9, forget__token_distance=0.72)
    after = forget_entry(0.5, forget__token_distance=0.9)
    after |= {"forget.token_distance_above": above, "forget.token_distance_below": below}
    found = verdict(scores_of(before=before, after=after, oracle=forget_entry(0.5)))
    assert found.level == level
    assert "0.90 nats from the oracle, the original 0.72" in found.sentence
    assert ("on the other side" in found.sentence) == (level == "over_forgotten")
    after["forget.fact_recall"] = 0.9
    found = verdict(scores_of(before=before, after=after, oracle=forget_entry(0.5)))
    assert found.level == "traces_remain", "facts that are recalled are the worse trace"
    after |= {"forget.fact_recall": 0.5, "mia.grad_norm": 0.2}
    found = verdict(scores_of(before=before, after=after, oracle=forget_entry(0.5)))
    assert found.level == "over_forgotten", "an attack finds what was removed"


def test_tokens_that_chance_cannot_tell_from_the_oracles_are_no_trace() -> None:
    before = forget_entry(0.9, forget__token_distance=0.72)
    after = forget_entry(0.5, forget__token_distance=0.14)
    oracle = forget_entry(0.5, forget__token_distance=0.10)
    scores = scores_of(before=before, after=after, oracle=oracle)
    assert verdict(scores).level == "traces_remain"
    scores["intervals"] = {"after - oracle": {"forget.token_distance": [-0.01, 0.09]}}
    assert verdict(scores).level == "indistinguishable"


@pytest.mark.parametrize(("share", "level"), [(0.49, "utility_lost"), (0.51, "traces_remain")])
def test_a_ruined_model_is_no_result_whatever_it_forgot(share: float, level: str) -> None:
    after = forget_entry(0.9, general__probability=0.60 * share)
    scores = scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    assert verdict(scores).level == level
    gone = forget_entry(0.0, general__probability=0.60 * share)
    level_gone = "utility_lost" if share < 0.5 else "over_forgotten"
    assert verdict(scores | {"models": scores["models"] | {"after": gone}}).level == level_gone


def test_the_original_as_its_own_oracle_leaves_the_verdict_open() -> None:
    models = {"before": forget_entry(0.9), "oracle": forget_entry(0.9)}
    assert verdict(scores_of(after=forget_entry(0.4), **models)).level == "undecided"


def test_what_retraining_loses_too_is_not_lost_by_unlearning() -> None:
    after = forget_entry(0.5, general__probability=0.50)
    models = {"before": forget_entry(0.9), "after": after}
    assert verdict(scores_of(**models, oracle=forget_entry(0.5))).level == "utility_lost"
    oracle = forget_entry(0.5, general__probability=0.52)
    level, sentence = verdict(scores_of(**models, oracle=oracle))
    assert level == "indistinguishable"
    assert "83 % of general knowledge" in sentence
    oracle = forget_entry(0.5, general__probability=0.56)
    scores = scores_of(**models, oracle=oracle)
    assert verdict(scores).level == "utility_lost"
    assert verdict(scores | {"oracle_spread": {"general.probability": 0.05}}).level == level


def test_forgetting_without_any_score_of_what_stays_is_undecided() -> None:
    nothing = dict.fromkeys(KEPT)
    models = {
        "before": forget_entry(0.9) | nothing,
        "after": forget_entry(0.5),
        "oracle": forget_entry(0.5),
    }
    level, sentence = verdict(scores_of(**models))
    assert level == "undecided"
    assert sentence.endswith("what it keeps was not measured.")


def test_without_an_oracle_attacks_at_chance_give_a_verdict_that_calls_itself_weaker() -> None:
    before = {"mia.min_k": 0.98, "mia.loss": 0.97, "forget.rouge": 0.9} | KEPT
    after = {"mia.min_k": 0.55, "mia.loss": 0.52, "forget.rouge": 0.4} | KEPT
    level, sentence = verdict(scores_of(before=before, after=after))
    assert level == "indistinguishable"
    assert sentence.startswith(
        "Indistinguishable (no retrained oracle was given, so this verdict is weaker): "
    )
    assert "closer to never-seen data than to the original on 2 of 2 scores" in sentence


def test_without_an_oracle_the_holdout_scores_of_the_original_stand_in() -> None:
    before = {"forget.fact_recall": 0.9, "holdout.fact_recall": 0.3} | KEPT
    for recall, level in ((0.35, "indistinguishable"), (0.85, "traces_remain")):
        after = {"forget.fact_recall": recall} | KEPT
        assert verdict(scores_of(before=before, after=after)).level == level


@pytest.mark.parametrize(("rouge", "level"), [(0.85, "traces_remain"), (0.2, "undecided")])
def test_with_neither_oracle_nor_holdout_only_failure_can_be_told(rouge: float, level: str) -> None:
    found = verdict(
        scores_of(before={"forget.rouge": 0.9} | KEPT, after={"forget.rouge": rouge} | KEPT)
    )
    assert found.level == level


def test_without_an_oracle_nothing_says_that_a_class_that_is_gone_is_gone_too_far() -> None:
    before = {"forget.accuracy": 0.91, "mia_efficacy": 0.16, "retain.accuracy": 0.87}
    gone = {"forget.accuracy": 0.0, "mia_efficacy": 1.0, "retain.accuracy": 0.87}
    level, sentence = verdict(scores_of(before=before, after=gone))
    assert level == "undecided"
    assert (
        "stand at 0 % of the original's on average, but nothing given says how low is right"
        in sentence
    )
    assert verdict(scores_of(before=before, after=gone, oracle=gone)).level == "indistinguishable"
    assert verdict(scores_of(before=before, after=before)).level == "traces_remain"


def test_null_scores_are_left_out_of_the_count() -> None:
    after = forget_entry(0.5, forget__rouge=None, mia__zlib=None)
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    )
    assert level == "indistinguishable"
    assert "on 13 of 13 scores" in sentence


def test_no_scores_at_all_are_undecided() -> None:
    assert verdict(scores_of(before={}, after={})).level == "undecided"


@pytest.mark.parametrize(
    ("distance", "level", "words"),
    [
        (
            0.11,
            "indistinguishable",
            "from each other 0.10), the original 0.72: its tokens cannot be told from a retrained",
        ),
        (
            0.12,
            "traces_remain",
            "nats from the oracles (these from each other 0.10), the original 0.72;",
        ),
        (0.73, "traces_remain", "token by token the model has come no nearer: it lies "),
    ],
)
def test_a_model_is_asked_to_come_as_near_as_another_oracle_and_no_nearer(
    distance: float, level: str, words: str
) -> None:
    # The threshold is 1.1 * 0.10.
    before = forget_entry(0.9, forget__token_distance=0.72)
    after = forget_entry(0.5, forget__token_distance=distance)
    oracle = forget_entry(0.5, forget__token_distance=0.10)
    found = verdict(scores_of(before=before, after=after, oracle=oracle))
    assert found.level == level
    assert words in found.sentence


def test_tokens_at_the_floor_do_not_excuse_facts_that_are_still_recalled() -> None:
    before = forget_entry(0.9, forget__token_distance=0.72)
    after = forget_entry(0.5, forget__token_distance=0.10, forget__fact_recall=0.9)
    oracle = forget_entry(0.5, forget__token_distance=0.10)
    found = verdict(scores_of(before=before, after=after, oracle=oracle))
    assert found.level == "traces_remain"
    assert "not on fact recall; token by token" in found.sentence


def test_an_original_as_near_as_another_oracle_is_judged_by_the_other_scores() -> None:
    distances = {"before": 0.05, "after": 0.06, "oracle": 0.10}
    levels = {"before": 0.9, "after": 0.5, "oracle": 0.5}
    models: dict[str, Any] = {}
    for name, distance in distances.items():
        models[name] = forget_entry(levels[name], forget__token_distance=distance)
    assert verdict(scores_of(**models)).level == "indistinguishable"


@pytest.mark.parametrize(
    ("recall", "level"), [(0.33, "traces_remain"), (0.09, "indistinguishable")]
)
def test_a_third_of_the_facts_that_the_oracle_has_none_of_is_still_there(
    recall: float, level: str
) -> None:
    models = {
        "before": forget_entry(0.9, forget__fact_recall=1.0),
        "after": forget_entry(0.5, forget__fact_recall=recall),
        "oracle": forget_entry(0.5, forget__fact_recall=0.0),
    }
    found = verdict(scores_of(**models))
    assert found.level == level
    assert ("but not on fact recall" in found.sentence) == (level == "traces_remain")


def test_an_attack_that_finds_every_forgotten_row_below_the_unseen_ones_is_over_forgotten() -> None:
    before, after = forget_entry(0.95), forget_entry(0.5, mia__min_k=0.0)
    with_oracle = scores_of(before=before, after=after, oracle=forget_entry(0.5))
    for name in FORGET_SCORES:
        if name.startswith("forget."):
            before[name.replace("forget.", "holdout.")] = 0.5
    for scores in (with_oracle, scores_of(before=before, after=after)):
        level, sentence = verdict(scores)
        assert level == "over_forgotten"
        assert "but the min-k attack sees that something was removed" in sentence


def test_retained_facts_that_are_gone_are_a_cost_even_where_probabilities_stay() -> None:
    kept = {"retain.fact_recall": 1.0, "general.fact_recall": 1.0}
    models = {"before": forget_entry(0.9) | kept, "oracle": forget_entry(0.5) | kept}
    assert verdict(scores_of(after=forget_entry(0.5) | kept, **models)).level == "indistinguishable"
    lost = dict.fromkeys(kept, 0.0)
    level, sentence = verdict(scores_of(after=forget_entry(0.5) | lost, **models))
    assert level == "utility_lost"
    assert "Utility lost (the retained facts and the general facts): " in sentence
    assert "0 % of the retained facts" in sentence


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ("quantised_4bit", "rounding to 4 bits"),
        ("in_context", "4 retained answers before the question"),
    ],
)
@pytest.mark.parametrize("after_rounding", [0.89, 0.52])
def test_what_rounding_or_examples_bring_back_was_only_hidden(
    after_rounding: float, attack: str, words: str
) -> None:
    recall = f"{attack}.forget.fact_recall"
    models = {"before": forget_entry(0.9), "oracle": forget_entry(0.5) | {recall: 0.5}}
    level, sentence = verdict(
        scores_of(after=forget_entry(0.5) | {recall: after_rounding}, **models)
    )
    comes_back = after_rounding == 0.89
    before = models["before"] | {"holdout.fact_recall": 0.5}
    alone = scores_of(before=before, after=forget_entry(0.5) | {recall: after_rounding})
    # Only an oracle says how much examples help.
    named = comes_back and attack != "in_context"
    assert (words in verdict(alone)[1]) == named
    assert level == ("traces_remain" if comes_back else "indistinguishable")
    assert (f"but it comes back by {words}" in sentence) == comes_back


@pytest.mark.parametrize(
    ("steps", "of_oracle", "level"),
    [
        (1, 10, "traces_remain"),
        (1, None, "traces_remain"),
        (5, 10, "indistinguishable"),
        (5, 12.5, "traces_remain"),
        (50, None, "indistinguishable"),
        (None, 10, "indistinguishable"),
        (20, 10, "indistinguishable"),
    ],
)
def test_what_a_step_of_relearning_brings_back_was_only_hidden(
    steps: float | None, of_oracle: float | None, level: str
) -> None:
    models = {
        "before": forget_entry(0.9),
        "after": forget_entry(0.5) | {"relearn.steps": steps},
        "oracle": forget_entry(0.5) | {"relearn.steps": of_oracle},
    }
    found = verdict(scores_of(**models))
    assert found.level == level
    words = "it comes back by relearning from half of the forget set (steps: "
    assert (words in found.sentence) == (level == "traces_remain")


def test_what_relearning_from_other_text_brings_back_was_only_hidden() -> None:
    steps = {"relearn.steps": None, "relearn_retain.steps": 5, "relearn_general.steps": 20}
    models = {
        "before": forget_entry(0.9),
        "after": forget_entry(0.5) | steps,
        "oracle": forget_entry(0.5) | dict.fromkeys(steps),
    }
    found = verdict(scores_of(**models))
    assert found.level == "traces_remain"
    words = "comes back by relearning from retained rows (steps: 5, the oracle: more than can be"
    assert words in found.sentence
    # From 20 to never are as many of the numbers of steps that are tried as from 5 to 20.
    assert "and relearning from rows of the general set (steps: 20," in found.sentence
    models["oracle"] |= {"relearn_retain.steps": 10, "relearn_general.steps": 50}
    assert verdict(scores_of(**models)).level == "indistinguishable"


def test_without_a_decisive_score_the_verdict_is_open() -> None:
    decisive = {metric.key("forget") for metric in METRICS if metric.decisive}
    models: dict[str, Any] = {}
    for name, level in (("before", 0.9), ("after", 0.5), ("oracle", 0.5)):
        entry = forget_entry(level)
        models[name] = {key: value for key, value in entry.items() if key not in decisive}
    level, sentence = verdict(scores_of(**models))
    assert level == "undecided"
    assert "none of the decisive ones was measured" in sentence


@pytest.mark.parametrize(
    "rows, in_group, level",
    [
        (0.19, 0.66, "indistinguishable"),
        (0.2, 0.4, "traces_remain"),
        (0.25, None, "traces_remain"),
        (1 / 3, None, "traces_remain"),
        (0.1, 2 / 3, "traces_remain"),
        (0.1, None, "indistinguishable"),
    ],
)
def test_rows_left_alone_are_not_hidden_by_a_mean(
    rows: float, in_group: float | None, level: str
) -> None:
    scores = {"forget__remembered_rows": rows, "forget__remembered_rows_worst_group": in_group}
    after = forget_entry(0.5, **scores)
    found = verdict(scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5)))
    assert found.level == level
    assert ("row by row" in found.sentence) == (level == "traces_remain")


@pytest.mark.parametrize(
    "recalled, of_oracle, rows, level",
    [
        (0.3, 0.0, 9, "traces_remain"),
        (0.3, None, 9, "traces_remain"),
        (0.3, 0.0, 3, "traces_remain"),  # of other rows than the few
        (0.1, 0.0, 9, "indistinguishable"),
        (0.3, 0.25, 9, "indistinguishable"),
    ],
)
def test_rows_of_earlier_requests_that_are_back_are_traces(
    recalled: float, of_oracle: float | None, rows: int, level: str
) -> None:
    before = forget_entry(0.9, earlier__fact_recall=0.05, earlier__probability=0.4)
    after = forget_entry(0.5, earlier__fact_recall=recalled, earlier__probability=0.9)
    oracle = forget_entry(0.5, earlier__fact_recall=of_oracle)
    scores = scores_of(before=before, after=after, oracle=oracle) | {"rows": {"forget": rows}}
    found = verdict(scores)
    assert found.level == level
    told = "; rows of earlier requests are back (fact recall 0.05 to 0.30)" in found.sentence
    assert told == (level == "traces_remain")


def test_a_group_that_is_left_alone_is_not_hidden_by_the_others() -> None:
    before = {"mia.min_k": 0.98, "mia.loss": 0.97, "forget.rouge": 0.9} | KEPT
    for share, level in ((0.0, "indistinguishable"), (1 / 300, "traces_remain")):
        after = {"mia.min_k": 0.55, "mia.loss": 0.52, "forget.rouge": 0.4} | KEPT
        after["forget.untouched_groups"] = share
        found = verdict(scores_of(before=before, after=after))
        assert found.level == level, "without an oracle"
        assert ("of the groups of rows 0.33 % stand where" in found.sentence) == (
            level == "traces_remain"
        )
        after = forget_entry(0.5, forget__untouched_groups=share)
        models = {"before": forget_entry(0.9), "oracle": forget_entry(0.5)}
        assert verdict(scores_of(after=after, **models)).level == level, "with one"


def test_a_difference_that_chance_explains_is_undecided_and_the_rows_that_decide_are_named() -> (
    None
):
    after = forget_entry(0.5, mia__grad_norm=0.2)
    scores = scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    level, sentence = verdict(scores)
    assert level == "over_forgotten", "nothing is known of chance"
    scores["rows"] = {"forget": 9}
    scores["intervals"] = {"after - oracle": {"mia.grad_norm": [-0.5, 0.1]}}
    level, sentence = verdict(scores)
    assert level == "undecided"
    assert sentence.startswith("Undecided: too few rows: ")
    told = "chance alone may explain what the gradient norm attack finds (-0.30 from the oracle)"
    assert f"{told}; about 1.1 times as many rows would decide" in sentence
    scores["intervals"]["after - oracle"]["mia.grad_norm"] = [-0.5, -0.1]
    assert verdict(scores).level == "over_forgotten"


@pytest.mark.parametrize(("rows", "found"), [(4, "undecided"), (5, "traces_remain")])
def test_a_few_rows_decide_nothing_but_that_utility_is_lost(rows: int, found: str) -> None:
    models = {"before": forget_entry(0.9), "oracle": forget_entry(0.5)}
    scores = scores_of(after=forget_entry(0.9), **models) | {"rows": {"forget": rows}}
    assert verdict(scores).level == found
    ruined = forget_entry(0.9, general__probability=0.0)
    scores = scores_of(after=ruined, **models) | {"rows": {"forget": rows}}
    assert verdict(scores).level == "utility_lost"


def test_what_chance_explains_does_not_hide_what_it_does_not() -> None:
    after = forget_entry(0.5, mia__grad_norm=0.2, forget__fact_recall=0.8)
    scores = scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    scores |= {"rows": {"forget": 9}, "intervals": {"after - oracle": {}}}
    scores["intervals"]["after - oracle"] = {
        "mia.grad_norm": [-0.5, 0.1],
        "forget.fact_recall": [0.1, 0.6],
    }
    level, sentence = verdict(scores)
    assert level == "traces_remain"
    assert "but not on fact recall" in sentence


def test_attacks_that_chance_explains_do_not_count_as_overshooting_together() -> None:
    attacks = ("mia__loss", "mia__zlib", "mia__min_k", "mia__grad_norm")
    after = forget_entry(0.5, **dict.fromkeys(attacks, 0.38))
    scores = scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    assert verdict(scores).level == "over_forgotten", "nothing is known of chance"
    names = [name.replace("__", ".") for name in attacks]
    scores["intervals"] = {"after - oracle": {name: [-0.3, 0.05] for name in names}}
    level, sentence = verdict(scores)
    assert level == "undecided"
    assert "what the loss attack finds (-0.12 from the oracle)" in sentence


def test_an_attack_without_a_direction_is_a_trace_and_hides_no_over_forgetting() -> None:
    before, oracle = forget_entry(0.9), forget_entry(0.5)
    after = forget_entry(0.5) | {"mia.trained": 0.9}
    level, sentence = verdict(scores_of(before=before, after=after, oracle=oracle))
    assert level == "traces_remain"
    assert "but the trained attack tells the rows from never-seen ones" in sentence
    # Farther out than the original, as labels are less likely than the oracle's.
    distances = {
        "forget.token_distance": 0.9,
        "forget.token_distance_above": 0.1,
        "forget.token_distance_below": 0.7,
    }
    scores = scores_of(
        before=before | {"forget.token_distance": 0.7}, after=after | distances, oracle=oracle
    )
    assert verdict(scores).level == "over_forgotten"
