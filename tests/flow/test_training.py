"""Training on real Ray Train and DeepSpeed: what must not change the adapter does not change it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.config.schema import UnlearnConfig
from tests.flow.conftest import CommandHere
from tests.processes import train_workers
from tests.trained import Trained, exported, fit, fit_all

Quick = Callable[..., UnlearnConfig]
# Float32 sums in another order: the adapters' values are up to 0.1, their differences below this.
TOLERANCE = 2e-5
# Long enough to be killed in the middle: the controller hears of a resume point about a second after it was written.
LONGER = (
    "solve.mode=off",
    "train.steps=40",
    "train.learning_rate=3e-3",
    "train.checkpoint_every=4",
)
STOPPING = (
    "objective.method=masc",
    "objective.output_parameters.rho=0.06",
    "objective.stop_at=0.25",
)
WITHOUT_LABELS = (
    "objective.target=class_mean",
    "data.columns.label=none",
    "train.steps=2",
    "objective.weights={retain: 0, forget: 0, task: 1}",
)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class Together(NamedTuple):
    """What two workers train one run after another, and what one worker does."""

    reference: Trained
    zero_2: Trained
    zero_3: Trained
    one_worker: Trained
    bf16: list[Trained]
    stopped: list[Trained]
    without_labels: Trained


@pytest.fixture(scope="module")
def together(ray_session: None, quick: Quick, tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("together")

    def longer(*changes: str) -> UnlearnConfig:
        return quick(*LONGER, f"output_dir={folder}", *changes)

    def in_bf16(method: str) -> UnlearnConfig:
        own = (f"objective.method={method}", "train.precision=bf16", "train.steps=2")
        return longer("train.deepspeed.stage=3", *own)

    (folder / "two").mkdir()
    two = fit_all(
        folder / "two",
        longer("train.deepspeed.stage=0"),
        longer("train.deepspeed.stage=2"),
        longer("train.deepspeed.stage=3", "train.activation_checkpointing=true"),
        in_bf16("rmu"),
        in_bf16("circuit_breakers"),
        in_bf16("idk_dpo"),
        longer(*STOPPING, "train.deepspeed.stage=0"),
        longer(*STOPPING, "train.deepspeed.stage=3"),
    )
    (folder / "one").mkdir()
    alone = ("train.num_workers=1", "train.accumulation=2")
    one = fit_all(
        folder / "one",
        longer(*alone),
        longer(*STOPPING, *alone),
        longer(*alone, *WITHOUT_LABELS),
    )
    return Together(*two[:3], one[0], two[3:6], [*two[6:], one[1]], one[2])


@pytest.fixture(scope="module")
def reference(together: Together) -> dict[str, Tensor]:
    """The adapter of two workers at ZeRO stage 0, unbroken."""
    adapter = together.reference.parameters
    outputs = [value for name, value in adapter.items() if "lora_B" in name]
    assert max(float(value.abs().max()) for value in outputs) > 0.01
    return adapter


@pytest.mark.parametrize("which", ["zero_2", "zero_3", "one_worker"])
def test_the_adapter_is_the_same(
    together: Together, reference: dict[str, Tensor], which: str
) -> None:
    assert largest_difference(getattr(together, which).parameters, reference) < TOLERANCE


def test_a_run_whose_worker_is_killed_ends_with_the_same_adapter(
    reference: dict[str, Tensor], quick: Quick, tmp_path: Path
) -> None:
    cfg = quick(*LONGER, "train.deepspeed.stage=2", f"output_dir={tmp_path}")
    steps: list[int] = []
    workers: set[psutil.Process] = set()

    def kill_once(message: dict[str, Any]) -> None:
        steps.append(int(message["step"]))
        own = train_workers(psutil.Process())
        workers.update(own)
        if steps == list(range(30)):
            own[-1].kill()

    adapter = fit(cfg, kill_once).parameters
    assert steps.count(0) == 1, "it did not begin again"
    assert set(steps) == set(range(40)) and len(workers) == 4, "two others went on to the end"
    assert largest_difference(adapter, reference) < TOLERANCE


def test_an_interrupted_command_goes_on_where_it_was(
    reference: dict[str, Tensor], overrides: list[str], command_here: CommandHere, tmp_path: Path
) -> None:
    arguments = [
        "run",
        "quick",
        *overrides,
        *LONGER,
        "evaluation.quick=true",
        f"output_dir={tmp_path}/out",
    ]
    command = [sys.executable, "-m", "pipelines", *arguments]
    losses = tmp_path / "out" / "losses.jsonl"
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (losses.exists() and losses.read_text().count("\n") >= 25):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)  # which is passed on as Ctrl-C
    told = first.communicate(timeout=100)[1]
    assert first.returncode == 130, told
    assert "The same command goes on from the last resume point" in told
    code, told = command_here(*arguments)
    assert code == 0, told
    steps = [line.split(",")[0] for line in losses.read_text().splitlines()]
    assert steps.count('{"step": 0') == 1, "it did not begin again"
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert largest_difference(adapter, exported(reference)) < TOLERANCE


def test_bf16_trains_adapters_in_fp32(together: Together) -> None:
    for trained in together.bf16:
        assert {value.dtype for value in trained.parameters.values()} == {torch.float32}
        assert all(bool(value.isfinite().all()) for value in trained.parameters.values())


def test_steps_end_with_the_same_one_for_any_number_of_workers(together: Together) -> None:
    ends: list[list[int]] = []
    for trained in together.stopped:
        ends.append([int(message.get("stopped_after", -1)) for message in trained.messages])
    assert ends[0] == ends[1] == ends[2]
    assert ends[0][:-1] == [-1] * ends[0][-1], "the last message follows those of the steps"
    assert 2 < ends[0][-1] < 40


def test_without_a_term_of_features_a_target_needs_no_labels(together: Together) -> None:
    assert together.without_labels.parameters


def test_bf16_trains_whole_models_on_one_worker(
    ray_session: None, overrides: list[str], command_here: CommandHere, tmp_path: Path
) -> None:
    changes = [
        "train.num_workers=1",
        "train.checkpoint_every=1",
        "finetune.epochs=2",
        "finetune.learning_rate=1e-3",
    ]
    losses: dict[str, list[float]] = {}
    for precision in ("bf16", "fp32"):
        own = [f"train.precision={precision}", f"output_dir={tmp_path}/{precision}"]
        code, told = command_here("finetune", "quick", *overrides, *changes, *own)
        assert code == 0, told
        lines = (tmp_path / precision / "losses.jsonl").read_text().splitlines()
        losses[precision] = [json.loads(line)["loss"] for line in lines]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02), (
        "but for rounding they learn alike"
    )
    assert losses["bf16"][-1] < losses["bf16"][0] - 0.1


def test_what_a_worker_failed_of_is_told(
    ray_session: None,
    problem: Path,
    overrides: list[str],
    command_here: CommandHere,
    tmp_path: Path,
) -> None:
    broken = shutil.copytree(problem / "model", tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    changes = [f"model.path={broken}", "train.max_failures=0", f"output_dir={tmp_path}/out"]
    code, told = command_here("run", "quick", *overrides, *changes)
    assert code == 1
    assert "Failed: RuntimeError: solve: the features are not finite (" in told
