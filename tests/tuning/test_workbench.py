"""The shared workbench: trials on it find what a run finds, and leave no trace for the next one."""

from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.config.load import load_config, with_values
from pipelines.config.schema import UnlearnConfig
from pipelines.data.sets import load_sets
from pipelines.terminal import Terminal
from rfa.adapters import lora_layers
from tests.trained import fit_all, products_of
from tuning.contracts import RUNGS, Measured, Shared
from tuning.prepare import share_work
from tuning.record import TrialRecord
from tuning.space import read_space
from tuning.trial import shared_model
from tuning.workbench import Workbench

SPACE = {
    "adapter.layers": {"choice": [[1, 2], [0, 3]]},
    "objective.tokens": {"choice": ["answer", "all"]},
}
TRIALS: dict[str, dict[str, Any]] = {
    "solver": {
        "adapter.layers": [0, 3],
        "objective.tokens": "answer",
        "objective.target": "cluster_mean",
    },
    "gradient": {
        "solve.mode": "off",
        "train.steps": 5,
        "objective.weights.kl": 0.5,
        "objective.weights.output": 0.5,
        "objective.schedule": "crossfade",
        "objective.output": "dpo",
    },
}
SOLVED = {"train.steps": 0, "solve.strength": 0.1, "train.num_workers": 1}


@pytest.fixture(scope="module")
def cfg(overrides: list[str]) -> UnlearnConfig:
    return with_values(load_config("quick", overrides), {**SOLVED, "train.retain_batch_size": 16})


@pytest.fixture(scope="module")
def shared(
    ray_session: None, cfg: UnlearnConfig, tmp_path_factory: pytest.TempPathFactory
) -> Shared:
    """The work of two collectors."""
    two = with_values(cfg, {"train.num_workers": 2})
    terminal = Terminal()
    with terminal.chatter_to(tmp_path_factory.mktemp("log") / "run.log"):
        return share_work(two, read_space(SPACE, cfg, "here"), load_sets(cfg.data), terminal)


@pytest.fixture(scope="module")
def bench(shared: Shared) -> Workbench:
    return Workbench(shared)


def products(bench: Workbench, cfg: UnlearnConfig) -> dict[str, Tensor]:
    """Each module's B A once a trial's work is done."""
    with bench.adapted(cfg) as alignment:
        for _ in bench.work(cfg, alignment):
            pass
        return {
            name: layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
            for name, layer in lora_layers(alignment.model)
        }


def numbers(measured: Measured) -> dict[str, float]:
    return {name: value for name, value in measured.scores.items() if value is not None}


@pytest.fixture(scope="module")
def runs(
    cfg: UnlearnConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    """Each module's B A of Ray Train's workers, for each of `TRIALS`."""
    folder = tmp_path_factory.mktemp("runs")
    trials = (with_values(cfg, {**values, "output_dir": str(folder)}) for values in TRIALS.values())
    found = {}
    for which, trained in zip(TRIALS, fit_all(folder, *trials), strict=True):
        found[which] = {
            name.removeprefix("model.").removesuffix(".lora_A.default.weight"): product
            for name, product in products_of(trained).items()
        }
    return found


def assert_same(
    ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-3
) -> None:
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert float(value.abs().max()) > 1e-4
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=tolerance * float(value.abs().max())
        )


@pytest.mark.parametrize("which, tolerance", [("solver", 1e-3), ("gradient", 1e-2)])
def test_a_trial_finds_the_adapter_of_a_run(
    bench: Workbench,
    cfg: UnlearnConfig,
    runs: dict[str, dict[str, Tensor]],
    which: str,
    tolerance: float,
) -> None:
    trial = with_values(cfg, TRIALS[which])
    assert_same(products(bench, trial), runs[which], tolerance)


def test_trials_leave_no_trace(bench: Workbench, cfg: UnlearnConfig) -> None:
    untouched = bench._scores()
    first = [measured for measured, _ in bench.trial(cfg)]
    assert len(first) == 1
    for values in (
        {"adapter.rank": 2, "adapter.layers": [0, 3], "solve.utility_weight": 3.0},
        {"solve.mode": "off", "train.steps": 8, "adapter.alpha": 64, "objective.residual": "drift"},
    ):
        for measured, _ in bench.trial(with_values(cfg, values)):
            assert measured.scores != first[0].scores
    stopped = bench.trial(with_values(cfg, {"train.steps": 8}))
    assert next(stopped)[0].scores != first[0].scores
    stopped.close()  # as a scheduler does
    assert bench._scores() == untouched
    assert not [
        module
        for module in bench.base.modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    again = [measured for measured, _ in bench.trial(cfg)]
    assert numbers(again[0]) == pytest.approx(numbers(first[0]), rel=1e-5)


def test_gradient_trials_are_scored_at_every_rung(bench: Workbench, cfg: UnlearnConfig) -> None:
    rungs = list(bench.trial(with_values(cfg, {"train.steps": 6})))
    assert len(rungs) == RUNGS
    assert [is_last for _, is_last in rungs] == [False] * (RUNGS - 1) + [True]
    found = [measured for measured, _ in rungs]
    assert [own.cost_s for own in found] == sorted(own.cost_s for own in found)
    rungs = list(bench.trial(with_values(cfg, {"train.steps": 2})))
    assert [is_last for _, is_last in rungs] == [False, True], "it has fewer steps than rungs"


def test_a_trial_is_scored_as_it_is_saved(
    bench: Workbench, cfg: UnlearnConfig, tmp_path: Path
) -> None:
    """A task vector learns the forget set, and what is scored and saved has it taken away."""
    by_gradient = {"solve.mode": "off", "train.steps": 6, "train.learning_rate": 1e-2}
    weights = {"objective.weights.retain": 0, "objective.weights.forget": 0}
    vector = {"objective.output": "descent", "objective.weights.output": 1, "objective.negate": 0.5}
    taken = with_values(cfg, {**by_gradient, **weights, **vector})
    learned = with_values(taken, {"objective.negate": 0})
    untouched = bench._scores()["forget.probability"]
    assert untouched is not None
    probability: dict[str, float] = {}
    for name, trial in {"taken": taken, "learned": learned}.items():
        measured = [own for own, _ in bench.trial(trial)]
        probability[name] = numbers(measured[-1])["forget.probability"]
        bench.save_adapter(trial, tmp_path / name)
    assert probability["taken"] < untouched < probability["learned"]
    saved = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in probability}
    for name, value in saved["learned"].items():
        factor = -0.5 if "lora_B" in name else 1.0
        torch.testing.assert_close(saved["taken"][name], factor * value)


def test_the_strength_is_searched_from_that_of_the_most_similar_trial(
    bench: Workbench, cfg: UnlearnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, wide = (
        with_values(cfg, {"adapter.rank": rank, "objective.tokens": "all"}) for rank in (2, 8)
    )
    other = with_values(cfg, {"adapter.layers": [0, 3], "objective.target": "retain_mean"})
    monkeypatch.setattr(bench, "_strengths", [(narrow, 0.1), (wide, 0.2), (other, 0.3)])
    assert bench._first_strength(with_values(wide, {"solve.utility_weight": 3.0})) == 0.2
    assert bench._first_strength(with_values(other, {"adapter.rank": 5})) == 0.3
    assert bench._first_strength(with_values(wide, {"adapter.rank": 5})) == 0.2, (
        "the last of equals"
    )


def test_a_trial_after_the_first_tries_two_strengths_at_most(
    bench: Workbench, cfg: UnlearnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_strengths", [])
    auto = with_values(cfg, {"solve.strength": "auto"})
    first, second = (next(iter(bench.trial(auto)))[0].strengths for _ in range(2))
    assert len(first) > 2 >= len(second)
    assert first[-1]["strength"] in [own["strength"] for own in second], (
        "it begins where the first one ended"
    )


def test_the_picks_adapter_is_solved_at_the_strength_it_was_scored_with(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved: list[tuple[UnlearnConfig, Path]] = []
    monkeypatch.setattr(
        "tuning.trial.save_adapter", lambda _shared, cfg, folder: saved.append((cfg, folder))
    )
    backend = shared_model(shared, {"before": {}})
    trial = TrialRecord(
        1,
        "finished",
        {"adapter.rank": 3},
        None,
        {},
        [{"strength": 0.5}, {"strength": 0.07}],
        1.0,
        1.0,
    )
    backend.save_adapter(trial, tmp_path)
    backend.save_adapter(trial._replace(strengths=[]), tmp_path)
    assert [cfg.solve.strength for cfg, _ in saved] == [0.07, 0.1]
    assert {(cfg.adapter.rank, folder) for cfg, folder in saved} == {(3, tmp_path / "adapter")}


def test_statistics_do_not_depend_on_who_collects_them(shared: Shared, bench: Workbench) -> None:
    whole: Any = ray.get(shared.statistics)
    alone = bench.collect(0, 1)
    for kind, modules in alone.moments.items():
        for name, own in modules.items():
            other = whole.moments[kind][name]
            assert own.count == other.count > 0
            torch.testing.assert_close(own.sum_DL, other.sum_DL, rtol=1e-4, atol=1e-4)
    assert {kind: set(own) for kind, own in alone.features.items()} == {
        kind: set(own) for kind, own in whole.features.items()
    }
    assert set(whole.features) == {"answer", "all"}
