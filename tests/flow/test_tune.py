"""A search from the command line: killed, resumed, with trials that fail, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.config.load import load_config
from pipelines.evaluation.own_answers import FILE_NAME
from pipelines.terminal import Terminal
from tests.flow.conftest import CommandHere
from tuning.record import read_trials
from tuning.score import parse_constraints
from tuning.search import SearchOptions, search

# Two keys that are allowed each, and cannot be together: such a trial fails, and the search goes on.
SPACE = {
    "solve.mode": {"choice": ["blockwise", "one_pass", "off"]},
    "train.steps": {"choice": [0, 4]},
    "adapter.rank": {"choice": [2, 4]},
    "solve.strength": {"loguniform": [1e-3, 1.0], "when": {"solve.mode": "blockwise"}},
}
LEAST = 3  # trials before the search is killed
TRIALS = 12


def start(arguments: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "RAY_ADDRESS": "local"},
    )


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str]
) -> tuple[Path, list[str]]:
    """The folder of a search whose driver was killed, and its command."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))
    out = folder / "out"
    arguments = [
        "tune",
        "quick",
        *overrides,
        f"output_dir={out}",
        "--space",
        f"{folder}/space.yaml",
    ]
    arguments += ["--trials", str(TRIALS), "--require", "utility>=0.5"]
    driver = start(arguments)
    deadline = time.monotonic() + 200
    while len(read_trials(out)) < LEAST and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.1)
    assert driver.poll() is None, (out / "run.log").read_text()[-3000:]
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    with (out / "trials.jsonl").open("a") as stream:
        stream.write('{"number": 11, "sta')  # as if it had been killed while it wrote
    return out, arguments


@pytest.fixture(scope="module")
def resumed(killed: tuple[Path, list[str]], command_here: CommandHere) -> Path:
    out, arguments = killed
    code, told = command_here(*arguments)
    assert code == 2
    assert "holds a search, allowed: a new folder, or --resume" in told
    kept = {number: own for number, own in read_trials(out).items()}
    code, told = command_here(*arguments, "--resume")
    assert code == 0, told
    after = read_trials(out)
    assert {number: after[number] for number in kept} == kept
    return out


def test_a_killed_search_goes_on_to_the_end(resumed: Path) -> None:
    trials = read_trials(resumed)
    assert len(trials) == TRIALS
    assert sum(own.values == {} for own in trials.values()) == 1, "the configuration as it is"
    assert {own.state for own in trials.values()} >= {"finished", "failed"}
    assert not (resumed / "checkpoints").exists()


def test_failed_trials_say_why_and_never_win(resumed: Path) -> None:
    trials = read_trials(resumed)
    failed = [own for own in trials.values() if own.state == "failed"]
    for own in failed:
        if own.values.get("solve.mode") == "off" and own.values.get("train.steps") == 0:
            assert "train.steps: found 0 with solve.mode=off" in str(own.reason)
    pick = json.loads((resumed / "manifest.json").read_text())["pick"]
    assert trials[pick].score is not None
    scores = [
        own.score for own in trials.values() if own.score is not None and own.score.utility >= 0.5
    ]
    assert trials[pick].score.distance == min(score.distance for score in scores)


def test_best_yaml_is_the_picked_configuration(resumed: Path) -> None:
    best = load_config(str(resumed / "best.yaml"))
    trials, manifest = read_trials(resumed), json.loads((resumed / "manifest.json").read_text())
    values: dict[str, Any] = trials[manifest["pick"]].values
    for key, value in values.items():
        section, name = key.split(".")
        assert getattr(getattr(best, section), name) == value
    assert best.output_dir == f"{resumed}-best"
    assert not best.evaluation.quick
    base = AutoModelForCausalLM.from_pretrained(best.model.path)
    adapted = PeftModel.from_pretrained(base, str(resumed / "adapter"))
    assert adapted.peft_config["default"].r == best.adapter.rank
    assert any(
        float(p.abs().max()) > 0 for name, p in adapted.named_parameters() if "lora_B" in name
    )


def test_mlflow_holds_a_run_with_a_child_a_trial_and_the_champion(resumed: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{resumed}/mlflow.db")
    manifest = json.loads((resumed / "manifest.json").read_text())
    parent = manifest["mlflow"]["run_id"]
    experiment = client.get_experiment_by_name("ray-unlearn")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    assert {run.info.run_name for run in children} == {
        f"trial-{number:04d}" for number in read_trials(resumed)
    }
    assert len(runs) == TRIALS + 1
    for own in read_trials(resumed).values():
        run = next(run for run in children if run.info.run_name == f"trial-{own.number:04d}")
        assert run.info.status == ("FAILED" if own.state == "failed" else "FINISHED")
        assert ("trial.distance" in run.data.metrics) == (own.score is not None)
        assert set(run.data.params) == set(own.values)
    champion = client.get_model_version_by_alias("ray-unlearn-adapter", "champion")
    assert champion.run_id == parent
    assert str(champion.version) == str(manifest["mlflow"]["model_version"])


def test_no_text_of_the_forget_set_is_left_in_a_search(resumed: Path, problem: Path) -> None:
    rows = [
        json.loads(line) for line in (problem / "data" / "forget.jsonl").read_text().splitlines()
    ]
    needles = [row[key].encode() for row in rows for key in ("fact", "author", "answer")]
    files = [path for path in resumed.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "run.log",
        "mlflow.db",
        "trials.jsonl",
        "search.html",
        "optuna.log",
    }
    for path in files:
        content = path.read_bytes()
        assert not [needle for needle in needles if needle in content], f"{path} holds forget text"


def test_the_page_needs_no_other_host(resumed: Path) -> None:
    page = (resumed / "search.html").read_text(encoding="utf-8")
    assert "The trade-off" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<tr class=") >= TRIALS


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "guess"], "--method: found 'guess', allowed: tpe, random, grid"),
        (["--require", "wisdom>=1"], "--require: found 'wisdom>=1', allowed: NAME>=NUMBER"),
        (["--space", "{folder}/none.yaml"], "none.yaml: cannot be read (FileNotFoundError)"),
        (
            ["--space", "{folder}/space.yaml"],
            "space.yaml: adapter.rank: found 0, input should be greater",
        ),
        (
            ["--method", "grid"],
            "solve.fact_weight: found loguniform, allowed with --method grid: choice or int",
        ),
        (["data.holdout=null"], "data.holdout: missing, required by solve.strength=auto"),
    ],
)
def test_a_mistake_in_a_search_is_one_line_and_exit_code_2(
    ray_session: None, overrides: list[str], tmp_path: Path, options: list[str], words: str
) -> None:
    (tmp_path / "space.yaml").write_text("adapter.rank: {int: [0, 4]}")
    own = [option.format(folder=tmp_path) for option in options]
    result = CliRunner().invoke(
        app, ["tune", "quick", *overrides, f"output_dir={tmp_path}/out", *own]
    )
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
    assert words in result.stderr
    left = (
        {path.name for path in (tmp_path / "out").glob("*")}
        if (tmp_path / "out").exists()
        else set()
    )
    assert left <= {"run.log"}


def test_a_search_without_a_pick_gives_resources_back_and_drops_answers(
    ray_session: None, problem: Path, overrides: list[str], tmp_path: Path
) -> None:
    rows = [
        json.loads(line)
        for line in (problem / "data" / "utility.jsonl").read_text().splitlines()[:9]
    ]
    asked = "".join(json.dumps({"prompt": row["prompt"], "answer": ""}) + "\n" for row in rows)
    (tmp_path / "asked.jsonl").write_text(asked)
    changes = [
        f"data.utility.path={tmp_path}/asked.jsonl",
        f"output_dir={tmp_path}/out",
        "tracking.uri=null",
    ]
    (tmp_path / "space.yaml").write_text(
        yaml.safe_dump({"train.learning_rate": {"loguniform": [1e-6, 10.0]}})
    )
    wish = SearchOptions(
        9, tmp_path / "space.yaml", "random", tuple(parse_constraints(["utility>=9"]))
    )
    with pytest.raises(RuntimeError, match="none of 9 trials keeps utility >= 9"):
        search(load_config("quick", [*overrides, *changes]), wish, Terminal())
    trials = read_trials(tmp_path / "out")
    assert any(own.state == "stopped" for own in trials.values()), "the scheduler has stopped none"
    assert (tmp_path / "out" / "search.html").exists()
    assert not (tmp_path / "out" / FILE_NAME).exists(), "the model's own answers"
    deadline = time.monotonic() + 20
    everything = ray.cluster_resources()["CPU"]
    while ray.available_resources().get("CPU", 0) < everything and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == everything


def test_pruned_models_over_two_workers_are_runs_of_their_own(
    command_here: CommandHere, overrides: list[str], tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text("prune.targets: {choice: [[none_such]]}")
    changes = [
        "prune.method=magnitude",
        "prune.sparsity=0.3",
        "prune.targets=[o_proj,down_proj]",
        "solve.mode=off",
    ]
    changes += [
        "train.steps=4",
        "train.num_workers=2",
        "train.deepspeed.stage=3",
        f"output_dir={tmp_path}/out",
    ]
    options = [
        "--space",
        f"{tmp_path}/space.yaml",
        "--trials",
        "9",
        "--method",
        "grid",
        "--require",
        "utility>=0",
    ]
    code, told = command_here("tune", "quick", *overrides, *changes, *options)
    assert code == 0, told
    trials = read_trials(tmp_path / "out")
    assert [trials[number].state for number in sorted(trials)] == ["finished", "failed"]
    assert "prune.targets: no layer ends with 'none_such'" in str(trials[1].reason)
    masks = load_file(tmp_path / "out" / "masks.safetensors")
    assert len(masks) == 8
    assert float(
        torch.cat([mask.flatten() for mask in masks.values()]).float().mean()
    ) == pytest.approx(0.7, abs=0.01)
    assert {path.name for path in (tmp_path / "out" / "trials" / "0000").iterdir()} == {
        "adapter",
        "masks.safetensors",
    }
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in adapter.items() if "lora_B" in name)
    assert load_config(str(tmp_path / "out" / "best.yaml")).train.deepspeed.stage == 3
