"""Keys that a configuration would not read are refused, and no preset has one."""

import pytest

from pipelines.config.load import load_config, preset_names
from pipelines.config.schema import ConfigError
from pipelines.config.unread import first_unread
from pipelines.preflight import check_read

TOKENS = "solve.mode=per_token"
STEPS = ("solve.mode=off", "train.steps=5")
SOLVERS = "solve.mode=one_pass or blockwise"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_reads_what_it_sets(name: str) -> None:
    assert first_unread(load_config(name, ["model.path=none"])) is None


@pytest.mark.parametrize("change", ["solve.mode=blockwise", "solve.mode=one_pass", *STEPS[1:]])
def test_the_demo_may_be_run_by_the_other_methods(change: str) -> None:
    assert first_unread(load_config("demo", [change])) is None


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ([TOKENS, "solve.strength=0.5"], "solve.strength", SOLVERS),
        ([*STEPS, "solve.strength=0.5"], "solve.strength", SOLVERS),
        ([TOKENS, "solve.fact_weight=2"], "solve.fact_weight", SOLVERS),
        (
            [TOKENS, "objective.target=cluster_mean"],
            "objective.target",
            f"{SOLVERS}, or train.steps",
        ),
        ([TOKENS, "objective.clusters=8"], "objective.clusters", f"{SOLVERS}, or train.steps"),
        (["prune.sparsity=0.2"], "prune.sparsity", "a prune.method"),
        (["prune.targets=[o_proj]"], "prune.targets", "a prune.method"),
        (["objective.output=npo"], "objective.output", "train.steps above 0"),
        (["objective.schedule=crossfade"], "objective.schedule", "train.steps above 0"),
        (
            ["objective.stop_at=0.5", "objective.output=masc"],
            "objective.stop_at",
            "train.steps above 0",
        ),
        (["objective.method=npo"], "objective.method", "train.steps above 0"),
    ],
)
def test_a_setting_that_is_not_read_is_refused(changes: list[str], key: str, words: str) -> None:
    cfg = load_config("quick", ["train.steps=0", *changes])
    with pytest.raises(ConfigError) as caught:
        check_read(cfg)
    told = f"{key}: found another value than the default, which is read with {words}"
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    "changes",
    [
        ["solve.strength=0.5", "solve.fact_weight=2", "objective.clusters=8"],
        [TOKENS, "train.steps=5", "objective.target=cluster_mean", "objective.output=npo"],
        [*STEPS, "objective.target=cluster_mean", "objective.method=npo"],
        ["prune.method=rows", "prune.sparsity=0.2", "prune.keep_sparsity=false"],
        [TOKENS, "solve.fact_weight=4", "solve.strength=auto", "prune.sparsity=0.5"],
    ],
)
def test_a_setting_that_is_read_or_is_the_default_passes(changes: list[str]) -> None:
    check_read(load_config("quick", ["train.steps=0", *changes]))
