"""Search spaces: read, refused, drawn from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from pipelines.config.load import load_config, with_values
from pipelines.config.schema import ConfigError, UnlearnConfig
from tuning.space import Space, default_space, load_space, read_space

TREE: dict[str, Any] = {
    "adapter.rank": {"choice": [8, 32]},
    "adapter.layers": {"choice": [[0, 1], None]},
    "objective.target": {"choice": ["retain_mean", "cluster_mean"]},
    "objective.clusters": {"int": [2, 9], "when": {"objective.target": "cluster_mean"}},
    "solve.strength": {"loguniform": [1e-4, 1e-1]},
}


@pytest.fixture
def cfg(tmp_path: Path) -> UnlearnConfig:
    sets = [f"data.{name}.path={tmp_path}/{name}.jsonl" for name in ("forget", "retain")]
    return load_config("quick", [f"model.path={tmp_path}", *sets])


@pytest.fixture
def read(tmp_path: Path, cfg: UnlearnConfig) -> Callable[[Any], Space]:
    def from_file(tree: Any) -> Space:
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return load_space(path, cfg)

    return from_file


def drawn(space: Space, seed: int, number: int = 40) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [space.suggest(study.ask()) for _ in range(number)]


def test_every_draw_is_a_configuration(read: Callable[[Any], Space], cfg: UnlearnConfig) -> None:
    found = [with_values(cfg, values) for values in drawn(read(TREE), seed=0)]
    assert {own.adapter.rank for own in found} == {8, 32}
    assert {own.adapter.layers for own in found} == {(0, 1), None}
    assert all(
        isinstance(own.solve.strength, float) and 1e-4 <= own.solve.strength <= 1e-1
        for own in found
    )


def test_a_key_with_a_condition_is_drawn_only_where_it_holds(read: Callable[[Any], Space]) -> None:
    found = drawn(read(TREE), seed=1)
    for values in found:
        assert ("objective.clusters" in values) == (values["objective.target"] == "cluster_mean")
    assert any("objective.clusters" in values for values in found)


def test_the_same_seed_draws_the_same(read: Callable[[Any], Space]) -> None:
    space = read(TREE)
    assert drawn(space, seed=3) == drawn(space, seed=3) != drawn(space, seed=4)


def test_a_grid_has_every_point_once(read: Callable[[Any], Space]) -> None:
    tree = {key: entry for key, entry in TREE.items() if key != "solve.strength"}
    points = read(tree).points()
    assert len(points) == 2 * 2 * (1 + 8)
    with pytest.raises(
        ConfigError, match=r"solve\.strength: found loguniform, allowed with --method grid"
    ):
        read(TREE).points()


def test_a_space_survives_being_written(read: Callable[[Any], Space]) -> None:
    space = read(TREE)
    assert read(space.tree()) == space


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ([], "allowed: configuration keys"),
        ({"adapter.rnk": {"choice": [8]}}, "adapter.rnk: unknown key"),
        ({"model.path": {"choice": ["a"]}}, "model.path: not a key to search over"),
        ({"data.max_tokens": {"int": [8, 9]}}, "data.max_tokens: not a key to search over"),
        ({"objective.method": {"choice": ["npo"]}}, "objective.method: not a key to search over"),
        ({"solve.prepared": {"choice": ["a"]}}, "solve.prepared: not a key to search over"),
        ({"objective.output_parameters.beta": {"choice": [1]}}, "found beta, allowed with"),
        ({"adapter.rank": [8]}, "adapter.rank: found"),
        ({"adapter.rank": {"choice": [8], "int": [1, 2]}}, "allowed: one of choice, uniform"),
        ({"adapter.rank": {"choice": []}}, "found no choice"),
        ({"adapter.rank": {"int": [8, 4]}}, "two whole numbers, the smaller first"),
        ({"adapter.rank": {"int": [1.5, 4]}}, "two whole numbers"),
        ({"adapter.rank": {"int": [0, 4]}}, "adapter.rank: found 0, input should be greater"),
        ({"adapter.rank": {"choice": [8, "many"]}}, "adapter.rank: found 'many'"),
        ({"solve.strength": {"loguniform": [0, 1]}}, "two numbers above 0"),
        ({"solve.strength": {"uniform": [-1, 1]}}, "solve.strength: found -1"),
        ({"adapter.rank": {"choice": [8], "when": {"solve.mode": "off"}}}, "adapter.rank.when"),
    ],
)
def test_what_is_no_space_is_refused_in_one_line(
    read: Callable[[Any], Space], tree: Any, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tree)
    assert words in str(caught.value)
    assert "space.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [0, 50])
@pytest.mark.parametrize("depth", [1, 4, 30])
def test_the_default_space_fits_any_depth(cfg: UnlearnConfig, steps: int, depth: int) -> None:
    cfg = with_values(cfg, {"train.steps": steps})
    space = read_space(default_space(cfg, depth), cfg, "the default space")
    layers = {
        own.adapter.layers for own in (with_values(cfg, values) for values in drawn(space, 0))
    }
    assert all(own is not None and 0 <= own[0] <= own[1] < depth for own in layers)
    assert ("train.learning_rate" in space.tree()) == (steps > 0)


def test_the_default_space_searches_what_a_configuration_uses(cfg: UnlearnConfig) -> None:
    prunelora = load_config("prunelora_image", ["model.path=none"])
    assert set(default_space(prunelora, 0)) == {
        "adapter.rank", "adapter.targets", "adapter.alpha", "prune.method", "prune.sparsity", "train.learning_rate"
    }  # fmt: skip
    rfa = default_space(with_values(cfg, {"solve.mode": "off", "train.steps": 9}), 4)
    assert {
        f"objective.weights.{name}" for name in ("retain", "forget", "kl", "task", "output")
    } <= set(rfa)
    holding = {"solve.mode": "off", "train.steps": 9, "data.earlier": {"path": "rows.jsonl"}}
    assert "objective.weights.task" not in default_space(with_values(cfg, holding), 4)
    assert rfa["adapter.targets"]["choice"] == [["o_proj", "down_proj"], ["o_proj"], ["down_proj"]]
    simnpo = ["objective.method=simnpo", "solve.mode=off", "train.steps=9"]
    weighed = default_space(load_config("quick", simnpo), 4)
    assert weighed["objective.output_parameters.beta"] == {"loguniform": [0.25, 25.0]}
    assert weighed["objective.weights.output"] == {"loguniform": [0.0125, 1.25]}
    assert "objective.weights.kl" not in weighed, "a method has its own terms"
    rmu = load_config("quick", ["objective.method=rmu", "solve.mode=off", "train.steps=9"])
    steered = default_space(rmu, 4)
    assert steered["objective.steering"] == {"loguniform": [0.65, 65.0]}
    assert "objective.target" not in steered
    breakers = load_config("quick", ["objective.method=circuit_breakers", *simnpo[1:]])
    assert {key for key in default_space(breakers, 4) if key.startswith("objective.")} == {
        "objective.tokens", "objective.weights.retain", "objective.weights.forget"
    }  # fmt: skip
    vector = default_space(load_config("quick", ["objective.method=task_vector", *simnpo[1:]]), 4)
    assert vector["objective.negate"] == {"uniform": [0.05, 1.0]}
    read_space(weighed, load_config("quick", simnpo), "the default space")
    solved = load_config("rfa_image", ["model.path=none"])
    assert "adapter.layers" not in default_space(solved, 0), "a head lies outside the blocks"
    for own in (prunelora, solved):
        read_space(default_space(own, 0), own, "the default space")
    assert "solve.strength" in default_space(solved, 0)
    per_token = default_space(with_values(cfg, {"solve.mode": "per_token", "train.steps": 0}), 4)
    assert set(per_token) == {"adapter.rank", "adapter.layers", "solve.utility_weight"}
    assert "solve.strength" not in default_space(load_config("rfa_text", ["model.path=none"]), 0), (
        "each trial finds its own"
    )
