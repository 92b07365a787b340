"""Scores under open-unlearning's names."""

from pipelines.evaluation.metrics.table import METRICS
from pipelines.report.open_unlearning import NAMES, summary


def test_every_name_is_that_of_a_score() -> None:
    keys = {metric.key(name) for metric in METRICS for name in ("forget", "retain")}
    assert set(NAMES.values()) <= keys
    assert len(set(NAMES.values())) == len(NAMES)


def test_what_was_not_measured_is_left_out() -> None:
    entry = {"forget.probability": 0.4, "mia.loss": None, "forget.perplexity": 3.0}
    assert summary(entry) == {"forget_Q_A_Prob": 0.4}
