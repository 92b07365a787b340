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
    # Two models, five sets of three rows; each rounded on two sets; each relearned; one set compared.
    assert sum(done) == evaluation_work(cfg, models, sets) == 2 * 15 + 2 * 6 + 2 * STEPS[-1] + 3
    for entry in scores.values():
        assert entry["quantised_8bit.forget.probability"] == pytest.approx(
            entry["forget.probability"], rel=0.01
        )
        assert "quantised_8bit.holdout.loss" not in entry
        assert "relearn.probability.50" in entry
        assert "relearn.steps" not in entry, "the original is not there"


def test_models_are_compared_token_by_token_with_the_oracle_and_the_original(
    cfg: UnlearnConfig, sets: Sets
) -> None:
    cfg = cfg.model_copy(
        update={"evaluation": cfg.evaluation.model_copy(update={"robustness": []})}
    )
    done: list[int] = []
    models = {"before": cfg.model, "after": cfg.model, "oracle": cfg.model}
    scores = evaluate(cfg, models, sets, done.append)
    # Three models on five sets; two beside the oracle on one set, one beside the original on three.
    assert sum(done) == evaluation_work(cfg, models, sets) == 3 * 15 + 2 * 3 + 3 * 3
    for name in ("before", "after"):
        assert scores[name]["forget.token_distance"] == pytest.approx(0, abs=1e-6)
        assert scores[name]["forget.token_distance_paraphrased"] == pytest.approx(0, abs=1e-6)
    assert scores["after"]["retain.kept_distance"] == pytest.approx(0, abs=1e-6)
    assert "forget.token_distance" not in scores["oracle"]
    assert "retain.kept_distance" not in scores["before"]


def test_the_original_costs_no_more_for_robustness(cfg: UnlearnConfig, sets: Sets) -> None:
    assert evaluation_work(cfg, ["before"], sets) == 15
