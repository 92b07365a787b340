"""From samples to a score file's entries, with one oracle and with several."""

import json
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from pipelines.evaluation.entries import TOKENS, evaluation_of
from pipelines.evaluation.metrics import Sample
from pipelines.evaluation.metrics.keys import ROUNDINGS
from pipelines.evaluation.metrics.relearning import RELEARNINGS, STEPS
from pipelines.evaluation.scored_model import (
    Beside,
    Relearned,
    ScoredModel,
    is_oracle,
    oracle_names,
)
from pipelines.evaluation.scorer import samples_of as scored

# The loss of each model's forget rows, and the distance of two models: how far these lie apart.
LOSSES = {"before": 0.1, "after": 1.0, "oracle 1": 2.0, "oracle 2": 2.5, "oracle 3": 4.0}
Samples = dict[ScoredModel, dict[tuple[str, int], Sample]]


def samples_of(losses: dict[str, float]) -> Samples:
    """Samples of two forget rows and two holdout rows of each model, and of each comparison."""
    samples: Samples = {}
    for name, loss in losses.items():
        own: dict[tuple[str, int], Sample] = {}
        for row in range(2):
            numbers: dict[str, Any] = {"loss": loss + row, "min_k": loss + row, "tokens": 1 + row}
            numbers["perturbed_losses"] = [3.0 + row]
            own["forget", row] = Sample(set_name="forget", **numbers)
            unseen = numbers | {"loss": 2.2 + row, "min_k": 2.2 + row}
            own["holdout", row] = Sample(set_name="holdout", **unseen)
        samples[ScoredModel(name)] = own
        for other in losses:
            if is_oracle(other) and other != name:
                distance = abs(loss - losses[other])
                compared: dict[tuple[str, int], Sample] = {}
                for row in range(2):
                    # As many tokens as the row has; those of row 1 are less likely to all models.
                    numbers = {
                        "log_probability": np.full(1 + row, -loss - row, np.float32),
                        "oracle_log_probability": np.full(
                            1 + row, -losses[other] - row, np.float32
                        ),
                        "token_distance": distance + row,
                    }
                    compared["forget", row] = Sample(set_name="forget", **numbers)
                samples[ScoredModel(name, Beside(other))] = compared
    return samples


def entries_of(losses: dict[str, float]) -> dict[str, dict[str, float | None]]:
    return evaluation_of(samples_of(losses), {name: [] for name in losses}).models


def beside_one(name: str, oracle: str) -> dict[str, float | None]:
    """The entry of a model that is compared with one oracle alone."""
    return entries_of({"model": LOSSES[name], "oracle": LOSSES[oracle]})["model"]


def test_one_oracle_has_the_name_that_several_are_numbered_by() -> None:
    assert oracle_names(0) == []
    assert oracle_names(1) == ["oracle"]
    assert oracle_names(3) == ["oracle 1", "oracle 2", "oracle 3"]
    assert all(map(is_oracle, [*oracle_names(1), *oracle_names(3)]))
    assert not any(map(is_oracle, ("before", "after", "model")))


def test_a_score_is_the_mean_over_the_oracles_that_it_compares_with() -> None:
    models = entries_of(LOSSES)
    assert list(models) == ["before", "after", "oracle"]
    for name in ("before", "after"):
        single = [beside_one(name, oracle) for oracle in oracle_names(3)]
        for key in ("forget.token_distance", "mia.reference", "privleak", "forget_quality"):
            assert models[name][key] == pytest.approx(fmean(entry[key] or 0 for entry in single))
        assert models[name]["forget.loss"] == single[0]["forget.loss"]
    # 1 + 1.5 + 3 nats to the oracles, and 2/3 from the rows, of which one has two tokens.
    assert models["after"]["forget.token_distance"] == pytest.approx(5.5 / 3 + 2 / 3)


def test_the_floor_is_the_oracles_mean_distance_to_each_other() -> None:
    oracle = entries_of(LOSSES)["oracle"]
    pairs = [(one, two) for one in oracle_names(3) for two in oracle_names(3) if one != two]
    for key in ("forget.token_distance", "privleak", "mia.reference"):
        assert oracle[key] == pytest.approx(fmean(beside_one(*pair)[key] or 0 for pair in pairs))
    # Between 2, 2.5 and 4 lie 0.5, 1.5 and 2.
    assert oracle["forget.token_distance"] == pytest.approx(4 / 3 + 2 / 3)
    assert oracle["forget.loss"] == pytest.approx((2 + 2.5 + 4) / 3 + 0.5)


def test_the_spread_is_the_highest_oracle_minus_the_lowest() -> None:
    evaluation = evaluation_of(samples_of(LOSSES), {name: [] for name in LOSSES})
    spread = evaluation.oracle_spread
    assert spread["forget.loss"] == pytest.approx(2.0)
    # The mean distances to the two others are 1.25, 1 and 1.75.
    assert spread["forget.token_distance"] == pytest.approx(0.75)
    assert "model_utility" not in spread, "no oracle has a number"
    content = evaluation.content()
    assert content["oracle_spread"] == spread
    json.dumps(content, allow_nan=False)


def test_one_oracle_has_no_floor_and_no_spread() -> None:
    losses = {"before": 0.1, "after": 1.0, "oracle": 2.0}
    evaluation = evaluation_of(samples_of(losses), {name: [] for name in losses})
    assert "forget.token_distance" not in evaluation.models["oracle"]
    assert evaluation.models["oracle"]["privleak"] is None
    assert set(evaluation.content()) == {"models", "versions", "tokens", "rows", "intervals"}


def test_tokens_are_those_of_each_model_and_the_mean_of_the_oracles() -> None:
    tokens = evaluation_of(samples_of(LOSSES), {name: [] for name in LOSSES}).tokens
    # Three tokens: one of row 0 and two of row 1, in order of the oracles' mean of 8.5 / 3.
    assert tokens == {
        "oracle": [-3.833, -3.833, -2.833],
        "before": [-1.1, -1.1, -0.1],
        "after": [-2.0, -2.0, -1.0],
    }


def test_tokens_are_few_finite_and_not_in_the_order_of_the_text() -> None:
    losses = {"after": 1.0, "oracle": 2.0}
    samples = samples_of(losses)
    compared = samples[ScoredModel("after", Beside("oracle"))]
    number = 3 * TOKENS
    of_model = -np.linspace(5, 6, number, dtype=np.float32)
    of_oracle = np.tile(np.array([-3, -1, -2], np.float32), TOKENS)
    compared["forget", 0] |= {"log_probability": of_model, "oracle_log_probability": of_oracle}
    compared["forget", 1] |= {
        "log_probability": np.array([np.nan, -1.0]), "oracle_log_probability": -np.ones(2)
    }  # fmt: skip
    tokens = evaluation_of(samples, {name: [] for name in losses}).tokens
    assert [len(column) for column in tokens.values()] == [TOKENS, TOKENS]
    # Evenly spread, from the first to one near the end.
    assert (max(tokens["after"]), min(tokens["after"])) == pytest.approx((-5.0, -6.0), abs=2e-3)
    assert np.diff(sorted(tokens["after"])).max() < 2e-3
    pairs = list(zip(tokens["oracle"], tokens["after"], strict=True))
    assert pairs == sorted(pairs)
    json.dumps(tokens, allow_nan=False)


def test_without_an_oracle_there_are_no_tokens() -> None:
    losses = {"before": 0.1, "after": 1.0}
    assert evaluation_of(samples_of(losses), {name: [] for name in losses}).tokens == {}


def test_attacks_are_averaged_over_the_oracles_and_one_that_never_relearns_leaves_none() -> None:
    losses = {"before": 0.1, "oracle 1": 2.0, "oracle 2": 3.0}
    samples = samples_of(losses)
    rounding = ROUNDINGS[0]
    # Halfway from exp(-3) at step 0 to the original's exp(-1.1) is passed at a loss of 1.
    for name, steps in (("oracle 1", 5), ("oracle 2", 10)):
        samples[ScoredModel(name, rounding)] = samples[ScoredModel(name)]
        for step in STEPS:
            loss = 1.0 if step >= steps else 3.0
            row = Sample(set_name="forget", loss=loss)
            samples[ScoredModel(name, Relearned(step))] = {("forget", 1): row}
    attacks = {"before": [], "oracle 1": [rounding, Relearned(50)]}
    attacks["oracle 2"] = attacks["oracle 1"]
    oracle = evaluation_of(samples, attacks).models["oracle"]
    assert oracle["quantised_8bit.forget.loss"] == pytest.approx(3.0)
    assert oracle["relearn.steps"] == pytest.approx(7.5)
    for step in STEPS:
        row = Sample(set_name="forget", loss=3.0)
        samples[ScoredModel("oracle 2", Relearned(step))] = {("forget", 1): row}
    assert evaluation_of(samples, attacks).models["oracle"]["relearn.steps"] is None


def test_relearnings_from_different_rows_are_told_apart() -> None:
    losses = {"before": 0.1, "after": 2.0}
    samples = samples_of(losses)
    # Back at the original's exp(-0.1) and exp(-1.1) after so many steps.
    for by, steps in zip(RELEARNINGS, (2, 10, 50, 1, 5, 20), strict=True):
        for step in STEPS:
            relearned = samples[ScoredModel("after", Relearned(step, by))] = {}
            for row in range(2):
                loss = row + (0.1 if step >= steps else 2.0)
                relearned["forget", row] = Sample(set_name="forget", loss=loss)
    attacks = {"before": [], "after": [Relearned(STEPS[-1], by) for by in RELEARNINGS]}
    after = evaluation_of(samples, attacks).models["after"]
    assert [after[by.key("steps")] for by in RELEARNINGS] == [2, 10, 50, 1, 5, 20]
    assert after["relearn_general.probability.20"] == after["relearn.probability.0"]
    assert after["relearn_general.probability.50"] == after["relearn.probability.2"]


def row(loss: float, group: int | None = None, name: str = "forget") -> Sample:
    return Sample(set_name=name, loss=loss, group=group)


def of_rows(losses: dict[str, list[float]], groups: list[int | None]) -> Samples:
    """Forget rows with these losses, by model, and one holdout row as likely as exp(-2)."""
    samples: Samples = {}
    for name, values in losses.items():
        own = {("holdout", 0): row(2.0, name="holdout")}
        for index, (loss, group) in enumerate(zip(values, groups, strict=True)):
            own["forget", index] = row(loss, group)
        samples[ScoredModel(name)] = own
    return samples


def test_rows_nearer_to_the_original_are_counted_one_by_one_and_by_group() -> None:
    # Of eight rows seven were learned, and of group 2 three were left alone; group 3 has too few rows.
    losses = {
        "before": [0.1] * 7 + [2.0],
        "after": [2.0, 2.0, 2.0, 0.2, 0.1, 0.1, 0.1, 2.0],
        "oracle": [2.0] * 8,
    }
    samples = of_rows(losses, [1, 1, 1, 2, 2, 2, 3, 3])
    models = evaluation_of(samples, {name: [] for name in losses}).models
    assert models["before"]["forget.remembered_rows"] == pytest.approx(7 / 8)
    assert models["after"]["forget.remembered_rows"] == pytest.approx(4 / 8)
    assert models["after"]["forget.remembered_rows_worst_group"] == 1
    assert "holdout.remembered_rows" not in models["after"]
    pairs = of_rows(losses, [1, 1, 2, 2, 3, 3, 4, 4])
    after = evaluation_of(pairs, {name: [] for name in losses}).models["after"]
    assert "forget.remembered_rows_worst_group" not in after


def test_a_row_as_likely_as_halfway_back_is_remembered_no_more() -> None:
    # Probabilities .9 before and .5 of the oracle: .7 lies in the middle.
    for after, expected in ((0.71, 1.0), (0.69, 0.0)):
        losses = {"before": [0.9], "after": [after], "oracle": [0.5]}
        samples = of_rows({name: [-np.log(p[0])] for name, p in losses.items()}, [None])
        entry = evaluation_of(samples, {name: [] for name in losses}).models["after"]
        assert entry["forget.remembered_rows"] == expected
        assert "forget.remembered_rows_worst_group" not in entry


def test_without_anything_to_compare_with_no_row_is_called_remembered() -> None:
    # Without an oracle: unseen rows are unlike, and one that is easy would count as remembered.
    samples = of_rows({"before": [0.1, 0.2], "after": [0.1, 0.2]}, [1, 2])
    entry = evaluation_of(samples, {"before": [], "after": []}).models["after"]
    assert not [key for key in entry if "remembered_rows" in key]


def untouched(losses: dict[str, list[float]], groups: list[int | None]) -> float | None:
    """The score of the model after unlearning, with unseen rows of a loss of 2."""
    samples = of_rows(losses, groups)
    models = evaluation_of(samples, {name: [] for name in losses}).models
    return models["after"].get("forget.untouched_groups")


def test_one_of_three_people_who_is_left_alone_is_seen_without_an_oracle() -> None:
    # From 0.1 to the 2 of unseen rows lie 1.9, of which a tenth is 0.19.
    before, groups = [0.1] * 9, [1, 1, 1, 2, 2, 2, 3, 3, 3]
    after = [1.5] * 6
    assert untouched({"before": before, "after": [*after, 0.1, 0.1, 0.1]}, groups) == 1 / 3
    assert untouched({"before": before, "after": [*after, 0.1, 0.1, 0.63]}, groups) == 1 / 3
    assert untouched({"before": before, "after": [*after, 0.1, 0.1, 0.70]}, groups) == 0
    assert untouched({"before": [*before[:6], 2, 2, 2], "after": [*after, 2, 2, 2]}, groups) == 0
    assert untouched({"before": before, "after": before}, [None] * 9) is None
    pair = untouched({"before": [0.1] * 2, "after": [0.1] * 2}, [1, 1])
    assert pair is None, "two rows may be easier than unseen ones are on average"


def test_a_person_of_one_row_is_seen_beside_an_oracle() -> None:
    rows, groups = 10, list(range(10))
    losses = {"before": [0.1] * rows, "after": [1.4] * 9 + [0.1], "oracle": [1.5] * rows}
    assert untouched(losses, groups) == 1 / 10
    losses["oracle"][9] = 0.35  # a probability of 0.70, the original's is 0.90
    assert untouched(losses, groups) == 0, "so small a difference may be chance in one row"
    three = {name: values[7:] for name, values in losses.items()}
    three |= {"after": [0.1] * 3, "oracle": [0.35] * 3}
    assert untouched(three, [1, 1, 1]) == 1


def test_rows_are_grouped_by_their_label_or_by_how_their_ids_begin() -> None:
    def group(label: str, row_id: str) -> int | None:
        record = {"set": "forget", "row": 0, "label": label, "id": row_id}
        return scored([record], [{}])["forget", 0].get("group")

    for one, other in (("anna-1", "anna-job"), ("a_b_1", "a_b_2"), ("f:1", "f:2"), ("u/1", "u/2")):
        assert group("", one) == group("", other) is not None
    assert group("", "anna-1") != group("", "bert-1")
    assert group("", "17") is group("", "-17") is None
    assert group("Anna", "a-1") == group("Anna", "b-2") != group("Bert", "a-1")
