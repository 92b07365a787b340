"""What the workers are asked, and what becomes of their answers."""

import pytest

from pipelines.config.load import load_config
from pipelines.config.schema import UnlearnConfig
from pipelines.data.sets import Sets, load_sets
from pipelines.evaluation.metrics.relearning import STEPS
from pipelines.evaluation.pool import evaluate, evaluation_work

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def cfg(overrides: list[str]) -> UnlearnConfig:
    changes = [
        "evaluation.robustness=[quantised_8bit,relearn]",
        "evaluation.max_rows=3",
        "evaluation.max_new_tokens=1",
    ]
    return load_config("quick", [*overrides, *changes])


@pytest.fixture(scope="module")
def sets(cfg: UnlearnConfig, ray_session: None) -> Sets:
    return load_sets(cfg.data)


def test_the_work_told_in_advance_is_the_work_done(cfg: UnlearnConfig, sets: Sets) -> None:
    done: list[int] = []
    models = {"model": cfg.model, "oracle": cfg.model}
    scores = evaluate(cfg, models, sets, done.append)
    # Two models, five sets of three rows; each rounded on two sets; each relearned.
    assert sum(done) == evaluation_work(cfg, models, sets) == 2 * 15 + 2 * 6 + 2 * STEPS[-1]
    for entry in scores.values():
        assert entry["quantised_8bit.forget.probability"] == pytest.approx(
            entry["forget.probability"], rel=0.01
        )
        assert "quantised_8bit.holdout.loss" not in entry
        assert "relearn.probability.50" in entry
        assert "relearn.steps" not in entry, "the original is not there"


def test_the_original_costs_no_more_for_robustness(cfg: UnlearnConfig, sets: Sets) -> None:
    assert evaluation_work(cfg, ["before"], sets) == 15
