"""The configuration tree: presets, overrides, and what `--help` tells of it."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from pipelines.config.evaluation import RobustnessCheck
from pipelines.config.load import (
    changed_keys,
    describe,
    load_config,
    preset_names,
    to_yaml,
    with_values,
)
from pipelines.config.objective import ObjectiveConfig
from pipelines.config.schema import ConfigError, SolveConfig, UnlearnConfig
from pipelines.evaluation.scored_model import CHANGES
from pipelines.preflight import check_holdout, check_passwords, oracles_of
from rfa.methods import METHODS
from rfa.settings import Objective, SolveSettings, Weights


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    assert isinstance(load_config(name), UnlearnConfig)


def test_overrides_are_dotted_and_typed() -> None:
    cfg = load_config(
        "quick",
        ["train.steps=50", "objective.weights.kl=0.5", "adapter.targets=[q_proj]", "seed=3"],
    )
    assert (cfg.train.steps, cfg.objective.weights.kl, cfg.adapter.targets, cfg.seed) == (
        50,
        0.5,
        ("q_proj",),
        3,
    )
    assert cfg.train.learning_rate == load_config("quick").train.learning_rate


def test_the_resolved_configuration_loads_to_itself(tmp_path: Path) -> None:
    cfg = load_config("demo", ["train.steps=7"])
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_config(str(tmp_path / "config.yaml")) == cfg


def test_local_paths_become_absolute_and_hub_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    cfg = load_config("quick", ["model.path=model", "output_dir=out"])
    assert (cfg.model.path, cfg.output_dir) == (str(tmp_path / "model"), str(tmp_path / "out"))
    assert load_config("quick", ["model.path=owner/name"]).model.path == "owner/name"


def test_oracles_are_a_folder_or_a_list_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert load_config("quick").evaluation.oracles == ()
    single = load_config("quick", ["evaluation.oracle=one"])
    assert (single.evaluation.oracle, single.evaluation.oracles) == (one, (one,))
    assert list(oracles_of(single)) == ["oracle"]
    several = load_config("quick", ["evaluation.oracle=[one,two]"])
    assert several.evaluation.oracle == several.evaluation.oracles == (one, two)
    assert [model.path for model in oracles_of(several).values()] == [one, two]
    for cfg in (single, several):
        (tmp_path / "config.yaml").write_text(to_yaml(cfg))
        assert load_config(str(tmp_path / "config.yaml")) == cfg
        assert with_values(cfg, {"seed": 1}).evaluation == cfg.evaluation


@pytest.mark.parametrize("found", ["[]", "['one', 'one']", "['one', './one/']", "[3]", "''", "3"])
def test_other_oracles_are_refused_in_one_line(found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quick", [f"evaluation.oracle={found}"])
    allowed = "allowed: a model folder, or a list of different ones"
    assert str(caught.value) == f"evaluation.oracle: found {found}, {allowed}"


def test_all_is_every_check_of_robustness_and_reads_back_as_their_list(tmp_path: Path) -> None:
    cfg = load_config("quick", ["evaluation.robustness=all"])
    assert cfg.evaluation.robustness == get_args(RobustnessCheck)
    assert set(CHANGES) < set(cfg.evaluation.robustness), "no change is left out"
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_config(str(tmp_path / "config.yaml")) == cfg


@pytest.mark.parametrize("found", ["'every'", "''", "3", "None"])
def test_another_word_for_robustness_is_refused_with_what_is_allowed(found: str) -> None:
    given = "null" if found == "None" else found
    with pytest.raises(ConfigError) as caught:
        load_config("quick", [f"evaluation.robustness={given}"])
    allowed = (
        "allowed: all, or a list of quantised_8bit, quantised_4bit, quantised_nf4, in_context, "
    )
    assert str(caught.value).startswith(f"evaluation.robustness: found {found}, {allowed}")


def test_a_day_needs_no_quotes_and_is_one_of_the_calendar(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(load_config("quick", ["model.date=2025-04-10"])))
    assert "  date: '2025-04-10'\n" in path.read_text()
    path.write_text(path.read_text().replace("'2025-04-10'", "2025-04-10"))
    assert load_config(str(path)).model.date == "2025-04-10"
    for found in ("2025-02-30", "10 Apr 2025", "today"):
        with pytest.raises(ConfigError) as caught:
            load_config("quick", [f"model.date={found}"])
        assert str(caught.value) == (
            f"model.date: found '{found}', allowed: a day as YYYY-MM-DD, or null"
        )


def test_every_key_is_described() -> None:
    keys = {key: (default, meaning) for key, default, meaning in describe()}
    assert all(meaning and "None" not in meaning for _, meaning in keys.values())
    assert keys["seed"] == ("0", "Seed of everything random. (>= 0, < 4.29497e+09)")
    assert keys["objective.residual"][1].endswith("(one of local, drift, last_drift)")
    assert (
        keys["data.{forget,retain,utility,holdout,general,neighbours,earlier}.path"][0]
        == "required"
    )
    assert not [key for key in keys if key.startswith("data.retain.")]


def test_changed_keys_are_dotted() -> None:
    old = yaml.safe_load(to_yaml(load_config("quick")))
    new = yaml.safe_load(to_yaml(load_config("quick", ["train.deepspeed.stage=2", "seed=1"])))
    assert changed_keys(old, new) == ["seed", "train.deepspeed.stage"]
    assert changed_keys(old, old) == []


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {forget: {path: f}}\noutput_dir: o\n")
    with pytest.raises(ConfigError, match=r"^data.retain: missing in .*, required$"):
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["solve.mode=off", "train.steps=0"],
            "train.steps: found 0 with solve.mode=off, allowed: steps above 0",
        ),
        (
            ["objective.residual=drift"],
            "objective.residual: found drift, allowed with solve.mode=blockwise: local",
        ),
        (
            ["objective.method=masc", "objective.output=npo", "train.steps=5"],
            "objective.stop_at: found 0.475, allowed with objective.output=npo: null; a number with "
            "objective.output=masc",
        ),
        (
            ["objective.method=task_vector", "train.steps=5"],
            "objective.negate: found 1, allowed with solve.mode=blockwise: 0",
        ),
        (
            ["objective.target=reroute"],
            "objective.target: found reroute with solve.mode=blockwise, allowed: another target",
        ),
        (
            ["solve.strength=0"],
            "solve.strength: found 0, input should be greater than 0 or input should be 'auto'",
        ),
        (["solve.strength=much"], "or input should be 'auto'"),
        (
            ["train.cpus_per_worker=1e-9"],
            "train.cpus_per_worker: found 1e-09, input should be greater than or equal to 0.0001",
        ),
        (
            ["train.gpus_per_worker=1.5"],
            "train.gpus_per_worker: found 1.5, allowed: a share of one from 0.0001 on, or a whole",
        ),
        (["train.gpus_per_worker=1e-9"], "allowed: a share of one from 0.0001 on, or a whole"),
        (
            ["evaluation.gpus_per_worker=2.5"],
            "evaluation.gpus_per_worker: found 2.5, allowed: a share of one from 0.0001 on",
        ),
        (
            ["finetune.salient=0.5"],
            "finetune.sets: found forget with finetune.salient, allowed: sets without it",
        ),
        (
            ["finetune.salient=0.5", "finetune.sets=[retain]", "train.deepspeed.stage=3"],
            "finetune.salient: found with train.deepspeed.stage=3, allowed: null, or stage 0 to 2",
        ),
    ],
)
def test_nothing_is_asked_for_what_it_cannot_do(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quick", overrides)
    assert message in str(caught.value)
    assert re.match(r"[a-z_.]+: found ", str(caught.value)), "the line begins with the key"
    assert "\n" not in str(caught.value)


def test_workers_are_a_number_or_a_range(tmp_path: Path) -> None:
    cfg = load_config("quick", ["train.num_workers=[1,3]"])
    assert (cfg.train.num_workers, cfg.train.min_workers, cfg.train.max_workers) == ((1, 3), 1, 3)
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_config(str(tmp_path / "config.yaml")) == cfg
    fixed = load_config("quick", ["train.num_workers=3"]).train
    assert (fixed.num_workers, fixed.min_workers, fixed.max_workers) == (3, 3, 3)


@pytest.mark.parametrize(
    "found", ["0", "[2, 1]", "[0, 2]", "[1, 2, 3]", "[1]", "[]", "1.5", "'many'", "None", "True"]
)
def test_other_numbers_of_workers_are_refused_in_one_line(found: str) -> None:
    given = {"'many'": "many", "None": "null"}.get(found, found)
    with pytest.raises(ConfigError) as caught:
        load_config("quick", [f"train.num_workers={given}"])
    allowed = "allowed: a number >= 1, or [min, max] with 1 <= min <= max"
    assert str(caught.value) == f"train.num_workers: found {found}, {allowed}"


def test_a_strength_is_found_by_a_holdout_set_or_given() -> None:
    with pytest.raises(
        ConfigError, match=r"^data.holdout: missing, required by solve.strength=auto"
    ):
        check_holdout(load_config("quick", ["data.holdout=null"]))
    for override in ("solve.strength=0.1", "solve.mode=off"):
        check_holdout(load_config("quick", ["data.holdout=null", override]))
    overrides = ["data.holdout=null", "solve.strength=0.1", "solve.mode=per_token"]
    with pytest.raises(ConfigError, match=r"^data.holdout: missing, required by solve.mode=per_"):
        check_holdout(load_config("quick", overrides))


def test_a_classifier_cannot_prefer_a_refusal() -> None:
    dpo = ["objective.output=dpo", "objective.weights.output=1", "train.steps=5"]
    told = r"^objective.output: found dpo, which compares texts, allowed with task=image_classification"
    with pytest.raises(ConfigError, match=told):
        load_config("rfa_image", ["model.path=none", *dpo])
    assert load_config("quick", dpo).objective.output == "dpo"


def test_parameters_of_a_forget_loss_are_set_by_name() -> None:
    overrides = ["objective.output=npo", "objective.output_parameters.beta=0.5"]
    assert load_config("quick", overrides).objective.settings().output_parameters == {"beta": 0.5}


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["objective.output_parameters.beta=1"], "objective.output=unlikelihood: none"),
        (
            ["objective.output=npo", "objective.output_parameters.gamma=1"],
            "objective.output_parameters: found gamma, allowed with objective.output=npo: beta",
        ),
        (
            ["objective.output=npo", "objective.output_parameters.beta=0"],
            "objective.output_parameters: found beta=0, allowed: 0.001 to 100",
        ),
    ],
)
def test_wrong_parameters_of_a_forget_loss_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config("quick", overrides)


def test_a_method_sets_what_is_not_given(tmp_path: Path) -> None:
    by_gradient = ["solve.mode=off", "train.steps=5"]
    settings = load_config("quick", ["objective.method=simnpo", *by_gradient]).objective.settings()
    assert settings == Objective(output="simnpo", weights=Weights(0, 0, 0, 1, 0.125))
    changed = ["objective.method=simnpo", "objective.weights.task=2", "objective.output=ascent"]
    cfg = load_config("quick", [*changed, *by_gradient])
    assert cfg.objective.weights.model_dump() == Weights(0, 0, 0, 2, 0.125)._asdict()
    assert cfg.objective.output == "ascent"
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_config(str(tmp_path / "config.yaml")) == cfg


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_configuration(name: str) -> None:
    overrides = [f"objective.method={name}", "solve.mode=off", "train.steps=5"]
    settings = load_config("quick", overrides).objective.settings()
    assert settings.weights == METHODS[name].weights
    for key, value in METHODS[name].settings.items():
        assert getattr(settings, key) == value


def test_an_unknown_method_and_wrong_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^objective.method: found 'NPO', .*'npo'"):
        load_config("quick", ["objective.method=NPO"])
    with pytest.raises(ConfigError, match=r"^objective.weights: found 3, "):
        load_config("quick", ["objective.method=npo", "objective.weights=3"])


def test_the_methods_defaults_are_the_configurations() -> None:
    """The demo's presets set some of these keys; a section of its own has the defaults alone."""
    assert ObjectiveConfig().settings() == Objective()
    assert SolveConfig().settings() == SolveSettings()


@pytest.mark.parametrize("value", [1700000000000, "\u200fname", "", "a\tb"])
def test_what_the_data_holds_may_be_selected(value: object) -> None:
    values = {"data.forget.column": "name", "data.forget.values": [value]}
    assert with_values(load_config("quick"), values).data.forget.values == (value,)


@pytest.mark.parametrize(
    "uri, holds",
    [
        ("http://me:word@host:5000", True),
        ("postgresql://u:p@h/db", True),
        ("postgresql://u:@h/db", False),
        ("http://user@host", False),
        ("postgresql://h/db?user=a&password=word", True),
        ("mysql://h/db?PASSWD=word", True),
        ("https://h/x?token=word#end", True),
        ("postgresql://h/db?user=a&password=", False),
        ("postgresql://h/db?passwordless=yes", False),
        ("http://h:5000?u=a@b", False),
        ("https://h/x?e=a:b@c", False),
        ("/data//a:b@c", False),
    ],
)
def test_a_password_in_a_uri_is_refused_and_nothing_else(uri: str, holds: bool) -> None:
    cfg = load_config("quick", [f"tracking.uri={uri}"])
    if not holds:
        return check_passwords(cfg)
    with pytest.raises(ConfigError, match=r"^tracking\.uri: holds a password"):
        check_passwords(cfg)
