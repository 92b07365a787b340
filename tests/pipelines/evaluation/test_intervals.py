"""Intervals over rows, against what is known of them by other means."""

import numpy as np
import pytest

from pipelines.evaluation.entries import evaluation_of
from pipelines.evaluation.intervals import Chance
from pipelines.evaluation.metrics import Sample
from pipelines.evaluation.scored_model import ScoredModel

ROWS = 50
MODELS = {"before": 0.0, "after": 1.0, "oracle": 1.0}


def samples_of(noise: float) -> dict[ScoredModel, dict[tuple[str, int], Sample]]:
    """Samples whose losses differ by row, all models alike, and by `noise` between the models."""
    generator = np.random.default_rng(1)
    of_row = generator.normal(3, 1, ROWS)
    samples: dict[ScoredModel, dict[tuple[str, int], Sample]] = {}
    for name, shift in MODELS.items():
        own = of_row + shift + generator.normal(0, noise, ROWS)
        rows: dict[tuple[str, int], Sample] = {}
        for row, loss in enumerate(own):
            rows["forget", row] = Sample(set_name="forget", loss=float(loss), tokens=1)
            rows["holdout", row] = Sample(set_name="holdout", loss=float(loss), tokens=1)
        samples[ScoredModel(name)] = rows
    return samples


def test_a_means_interval_is_that_of_its_standard_error() -> None:
    samples = samples_of(noise=0.1)
    evaluation = evaluation_of(samples, {name: [] for name in MODELS})
    losses = [
        row["loss"] for key, row in samples[ScoredModel("after")].items() if key[0] == "forget"
    ]
    error = np.std(losses) / ROWS**0.5
    low, high = evaluation.intervals["after"]["forget.loss"]
    assert low == pytest.approx(np.mean(losses) - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(np.mean(losses) + 1.96 * error, abs=0.3 * error)
    assert evaluation.rows == {"forget": ROWS, "holdout": ROWS}
    # Both sets hold the same losses, but each is drawn from by itself.
    low, high = evaluation.intervals["after"]["mia.loss"]
    assert low < 0.45 and high > 0.55


def test_a_difference_knows_what_a_row_is_to_both_models() -> None:
    intervals = evaluation_of(samples_of(noise=0.01), {name: [] for name in MODELS}).intervals
    low, high = intervals["after"]["forget.loss"]
    of_difference = intervals["after - oracle"]["forget.loss"]
    assert high - low > 0.4
    assert of_difference[1] - of_difference[0] < 0.02
    low, high = intervals["before - oracle"]["forget.loss"]
    assert low < high < -0.9, "it remembers, and no row says otherwise"


def test_intervals_are_the_same_each_time_and_say_nothing_of_an_oracle_that_is_not_there() -> None:
    samples = samples_of(noise=0.1)
    backwards = {model: dict(reversed(rows.items())) for model, rows in samples.items()}
    one, two = (evaluation_of(own, {name: [] for name in MODELS}) for own in (samples, backwards))
    assert one.intervals == two.intervals, "also where the rows come in another order"
    alone = {model: rows for model, rows in samples.items() if model.name != "oracle"}
    intervals = evaluation_of(alone, {"before": [], "after": []}).intervals
    assert set(intervals) == {"before", "after"}


def test_a_score_of_few_of_its_rows_has_no_interval() -> None:
    samples = samples_of(noise=0.1)
    for rows in samples.values():
        rows["forget", 7]["rouge"] = 0.5  # most resamples of 50 rows lack a row in a third of cases
    intervals = evaluation_of(samples, {name: [] for name in MODELS}).intervals
    assert "forget.rouge" not in intervals["after"]


def test_rows_that_decide_are_those_that_make_an_interval_as_narrow_as_the_difference() -> None:
    content = {"intervals": {"after - oracle": {"mia.loss": [-0.4, 0.2]}}}
    chance = Chance.of(content)
    assert chance.explains("mia.loss") and not chance.explains("mia.zlib")
    # Half the width is 0.3: as narrow as 0.1 with nine times as many rows.
    assert chance.times_as_many("mia.loss", -0.1) == pytest.approx(9)
    assert not Chance.of({}).explains("mia.loss")
