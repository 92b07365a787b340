"""What the workers are asked, and what becomes of their answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.config.data import SET_NAMES
from pipelines.config.load import load_config, with_values
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets, load_sets
from pipelines.evaluation import pool
from pipelines.evaluation.metrics import Sample
from pipelines.evaluation.metrics.relearning import STEPS
from pipelines.evaluation.pool import evaluate, evaluation_work, pieces_of
from pipelines.evaluation.score_cache import Piece, ScoreCache, Task
from pipelines.evaluation.scored_model import Beside, Relearned, ScoredModel
from pipelines.evaluation.text_scorer import TextScorer

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def cfg(overrides: list[str]) -> UnlearnConfig:
    changes = [
        "evaluation.robustness=[quantised_8bit,in_context,relearn,relearn_general,leak_at_k]",
        "evaluation.max_rows=3",
        "evaluation.max_new_tokens=1",
    ]
    return load_config("quick", [*overrides, *changes])


@pytest.fixture(scope="module")
def sets(cfg: UnlearnConfig, ray_session: None) -> Sets:
    return load_sets(cfg.data)


@pytest.fixture(scope="module")
def noisy_model(cfg: UnlearnConfig, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The configured model with noise on all weights."""
    folder: Path = tmp_path_factory.mktemp("noisy")
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(cfg.model.path).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def test_the_work_told_in_advance_is_the_work_done(cfg: UnlearnConfig, sets: Sets) -> None:
    done: list[int] = []
    models = {"model": cfg.model, "oracle": cfg.model}
    evaluation = evaluate(cfg, models, sets, done.append)
    # Two models, five sets of three rows; each rounded on two sets, and asked behind examples on
    # one; each relearned twice; one set compared.
    work = 2 * 15 + 2 * 6 + 2 * 3 + 2 * 2 * STEPS[-1] + 3
    assert sum(done) == evaluation_work(cfg, models, sets) == work
    assert done.count(1) == 2 * 2 * STEPS[-1], "the steps of relearning are told one by one"
    found = set(evaluation.content())
    assert found == {"models", "versions", "tokens", "rows", "intervals"}, "and no spread"
    assert set(evaluation.tokens) == {"model", "oracle"}
    assert evaluation.tokens["model"] == pytest.approx(evaluation.tokens["oracle"], abs=0.002)
    for entry in evaluation.models.values():
        assert entry["quantised_8bit.forget.probability"] == pytest.approx(
            entry["forget.probability"], rel=0.01
        )
        assert "quantised_8bit.holdout.loss" not in entry
        assert entry["in_context.forget.probability"] != entry["forget.probability"]
        assert "in_context.retain.probability" not in entry, "the examples are not scored"
        assert "in_context.forget.truth_ratio" not in entry, "likelihoods of right answers alone"
        assert entry["forget.leak_at_k"] is not None
        assert "retain.leak_at_k" not in entry
        assert "relearn.probability.50" in entry
        assert "relearn.steps" not in entry, "the original is not there"
        # Rows 0 and 2 of three are learned in the one, and in the other none.
        start, end = (entry[f"relearn_general.probability.{step}"] for step in (0, 50))
        assert start == pytest.approx(entry["forget.probability"])
        assert start != pytest.approx(end)
    assert "forget.token_distance" not in evaluation.models["oracle"]


def test_two_oracles_are_compared_with_every_model_and_with_each_other(
    cfg: UnlearnConfig, sets: Sets, noisy_model: ModelConfig
) -> None:
    robustness = {"robustness": ["quantised_8bit"]}
    cfg = cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update=robustness)})
    done: list[int] = []
    models = {
        "before": cfg.model, "after": noisy_model, "oracle 1": cfg.model, "oracle 2": noisy_model
    }  # fmt: skip
    scores, spread, tokens, intervals, rows_scored = evaluate(cfg, models, sets, done.append)
    # Four models on five sets; three rounded on two sets; two beside two oracles, and each oracle
    # beside the other, on one set; one beside the original on three.
    work = 4 * 15 + 3 * 6 + (2 * 2 + 2) * 3 + 3 * 3
    assert sum(done) == evaluation_work(cfg, models, sets) == work
    assert list(scores) == ["before", "after", "oracle"]

    # By hand, of one pair of models at a time.
    pieces = pieces_of(cfg, sets)["forget"]
    rows = pa.concat_tables(ray.get([piece.rows for piece in pieces]))
    pair = TextScorer(cfg, {"clean": cfg.model, "noisy": noisy_model})
    for key in ("token_distance", "token_distance_paraphrased"):
        distances: dict[str, float] = {}
        for name, other in (("clean", "noisy"), ("noisy", "clean")):
            compared = pair.score(ScoredModel(name, Beside(other)), rows).values()
            lengths = [sample["tokens"] for sample in pair.score(ScoredModel(name), rows).values()]
            values = [sample[key] for sample in compared]
            distances[name] = float(np.average(values, weights=lengths))
        assert distances["clean"] > 1e-3
        # Each model is one of the oracles, and has no distance to that one.
        assert scores["before"][f"forget.{key}"] == pytest.approx(distances["clean"] / 2, rel=1e-3)
        assert scores["after"][f"forget.{key}"] == pytest.approx(distances["noisy"] / 2, rel=1e-3)
        floor = (distances["clean"] + distances["noisy"]) / 2
        assert scores["oracle"][f"forget.{key}"] == pytest.approx(floor, rel=1e-3)
        apart = abs(distances["clean"] - distances["noisy"])
        assert spread[f"forget.{key}"] == pytest.approx(apart, abs=1e-5)
    low, high = intervals["after"]["forget.token_distance"]
    assert low <= scores["after"]["forget.token_distance"] <= high
    assert set(rows_scored.values()) == {3}
    assert len(tokens["oracle"]) == len(tokens["after"]) > 3
    mean_of_both = (np.array(tokens["before"]) + tokens["after"]) / 2
    assert tokens["oracle"] == pytest.approx(mean_of_both, abs=0.002)
    assert "quantised_8bit.forget.loss" in scores["oracle"]
    assert scores["after"]["retain.kept_distance"] > 1e-3
    assert "retain.kept_distance" not in scores["before"]


def test_other_rows_are_relearned_as_many_as_half_of_the_forget_set_evenly_spaced(
    cfg: UnlearnConfig, sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learned() -> list[int]:
        pieces = pool._learned_pieces(cfg, sets)
        assert list(pieces) == ["general"], "no relearning takes the other sets' rows"
        return sorted(
            pa.concat_tables(ray.get([p.rows for p in pieces["general"]]))["row"].to_pylist()
        )

    count = sets.counts["general"]
    assert count > 4
    # Of three forget rows, the larger half.
    assert learned() == [(count - 1) // 2, count - 1]
    monkeypatch.setattr(pool, "MOST_LEARNED", 1)
    assert learned() == [count - 1]


def test_the_original_costs_no_more_for_robustness(cfg: UnlearnConfig, sets: Sets) -> None:
    assert evaluation_work(cfg, ["before"], sets) == 15


def scores_of(cfg: UnlearnConfig, models: dict[str, ModelConfig], sets: Sets) -> Any:
    return evaluate(cfg, models, sets, lambda _: None).content()


def test_an_evaluation_that_is_killed_goes_on_where_it_was(
    cfg: UnlearnConfig,
    sets: Sets,
    noisy_model: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = {"before": cfg.model, "after": noisy_model, "oracle": cfg.model}
    unbroken = scores_of(cfg, models, sets)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    total = evaluation_work(cfg, models, sets)
    saved: list[Path] = []
    for share in (0.05, 0.2, 0.5, 0.7, 0.95):
        done: list[int] = []

        def stop_at(work: int, done: list[int] = done, limit: float = share * total) -> None:
            done.append(work)
            if sum(done) >= limit:
                raise KeyboardInterrupt

        before = set(saved)
        with pytest.raises(KeyboardInterrupt):
            evaluate(cfg, models, sets, stop_at)
        saved = sorted((tmp_path / "ray-unlearn" / "scores").iterdir())
        assert before <= set(saved), "nothing is scored again"
    resumed: list[int] = []
    found = evaluate(cfg, models, sets, resumed.append).content()
    assert found == unbroken
    assert sum(resumed) == total
    # Of the forget set nothing stays; of all else nothing is scored again, by another name neither.
    scored: list[set[str]] = []

    def count(
        cfg: UnlearnConfig, models: dict[str, ModelConfig], tasks: list[Task], advance: Any
    ) -> Any:
        scored.extend({piece.set_name for piece in task.pieces} for task in tasks)
        return score_tasks(cfg, models, tasks, advance)

    score_tasks = pool._scored
    monkeypatch.setattr(pool, "_scored", count)
    renamed = {"model": noisy_model, "oracle": cfg.model}
    found = evaluate(cfg, renamed, sets, lambda _: None)
    assert found.models["model"]["forget.loss"] == unbroken["models"]["after"]["forget.loss"]
    # A relearning from general rows is a task of both.
    assert scored and all("forget" in names for names in scored)


def test_another_model_row_or_setting_is_scored_anew(
    cfg: UnlearnConfig, noisy_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    piece = Piece("retain", None, 3, "rows")
    task = Task(ScoredModel("after"), [piece])
    forgotten = {
        name: Task(task.model, [piece, piece._replace(set_name=name)]).reads_forgotten
        for name in SET_NAMES
    }
    assert [name for name in forgotten if forgotten[name]] == ["forget", "earlier"]
    samples = {ScoredModel("after"): {("forget", 0): Sample(set_name="forget", loss=1.5)}}
    models = {"before": cfg.model, "after": noisy_model, "hub": ModelConfig(path="owner/name")}
    cache = ScoreCache(cfg, models)
    assert cache.load(task) is None
    cache.save(task, samples)
    assert cache.load(task) == samples
    # By another name it is the same model.
    renamed = ScoreCache(cfg, {"model": noisy_model}).load(Task(ScoredModel("model"), [piece]))
    assert renamed == {ScoredModel("model"): samples[ScoredModel("after")]}
    for other in (
        Task(ScoredModel("before"), [piece]),
        Task(ScoredModel("after", Beside("before")), [piece]),
        Task(ScoredModel("after", Relearned(50)), [piece]),
        Task(ScoredModel("after"), [piece._replace(digest="others")]),
    ):
        assert cache.load(other) is None
    # Beside another model the same model has other distances, whatever that one is called.
    beside = Task(ScoredModel("after", Beside("before")), [piece])
    cache.save(beside, {beside.model: samples[ScoredModel("after")]})
    assert cache.load(Task(ScoredModel("after", Beside("after")), [piece])) is None
    called = ScoreCache(cfg, {"after": noisy_model, "oracle": cfg.model})
    assert called.load(Task(ScoredModel("after", Beside("oracle")), [piece])) is not None
    for key, value in (
        ("seed", 1),
        ("data.max_tokens", 100),
        ("train.precision", "bf16"),
        ("evaluation.robustness", []),  # without leak_at_k
    ):
        assert ScoreCache(with_values(cfg, {key: value}), models).load(task) is None
    assert ScoreCache(with_values(cfg, {"evaluation.max_rows": 2}), models).load(task) is not None
    by_hub = load_config("quick", ["model.path=owner/name"])
    assert ScoreCache(by_hub, models).load(task) is None, "nor by a hub's tokenizer"
    of_hub = Task(ScoredModel("hub"), [piece])
    cache.save(of_hub, samples)
    assert cache.load(of_hub) is None, "a hub may change what a name means"
    assert (tmp_path / "ray-unlearn" / "scores").stat().st_mode & 0o777 == 0o700
