"""Training on real Ray Train and DeepSpeed: what must not change the adapter does not change it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.config.schema import UnlearnConfig
from pipelines.data.sets import load_sets
from pipelines.training.trainer import Trainer
from tests.flow.conftest import CommandHere
from tests.processes import train_workers

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


def train(
    cfg: UnlearnConfig, listener: Callable[[dict[str, float]], None] = lambda _message: None
) -> dict[str, Tensor]:
    """The trained adapter, by parameter name."""
    sets = load_sets(cfg.data)
    streams = {
        "retain": (sets.union(("retain", "utility")), cfg.train.retain_batch_size),
        "forget": (sets.forget, cfg.train.forget_batch_size),
    }
    result = Trainer(cfg, "unlearn", streams).fit(
        steps=cfg.train.steps,
        learning_rate=cfg.train.learning_rate,
        final_rate=0.0,
        listener=listener,
    )
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        assert sorted(path.name for path in Path(folder).iterdir()) == [
            "progress.json",
            "trained.safetensors",
        ]
        return load_file(Path(folder) / "trained.safetensors")


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def reference(
    ray_session: None, quick: Quick, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """The adapter of two workers at ZeRO stage 0, unbroken."""
    folder = tmp_path_factory.mktemp("reference")
    adapter = train(quick(*LONGER, "train.deepspeed.stage=0", f"output_dir={folder}"))
    assert (
        max(float(value.abs().max()) for name, value in adapter.items() if "lora_B" in name) > 0.01
    )
    return adapter


@pytest.mark.parametrize(
    "changes",
    [
        ("train.deepspeed.stage=2",),
        ("train.deepspeed.stage=3", "train.activation_checkpointing=true"),
        ("train.num_workers=1", "train.accumulation=2"),
    ],
    ids=["ZeRO 2", "ZeRO 3 with activation checkpointing", "one worker with accumulation"],
)
def test_the_adapter_is_the_same(
    reference: dict[str, Tensor], quick: Quick, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    assert (
        largest_difference(train(quick(*LONGER, *changes, f"output_dir={tmp_path}")), reference)
        < TOLERANCE
    )


def test_a_run_whose_worker_is_killed_ends_with_the_same_adapter(
    reference: dict[str, Tensor], quick: Quick, tmp_path: Path
) -> None:
    cfg = quick(*LONGER, "train.deepspeed.stage=2", f"output_dir={tmp_path}")
    sets = load_sets(cfg.data)
    streams = {
        "retain": (sets.union(("retain", "utility")), cfg.train.retain_batch_size),
        "forget": (sets.forget, cfg.train.forget_batch_size),
    }
    steps: list[int] = []
    workers: set[psutil.Process] = set()

    def kill_once(message: dict[str, float]) -> None:
        steps.append(int(message["step"]))
        own = train_workers(psutil.Process())
        workers.update(own)
        if steps == list(range(30)):
            own[-1].kill()

    result = Trainer(cfg, "unlearn", streams).fit(
        steps=cfg.train.steps,
        learning_rate=cfg.train.learning_rate,
        final_rate=0.0,
        listener=kill_once,
    )
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        adapter = load_file(Path(folder) / "trained.safetensors")
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
    exported = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    expected = {
        name.removeprefix("model.").replace(".default", ""): value
        for name, value in reference.items()
    }
    assert largest_difference(exported, expected) < TOLERANCE


@pytest.mark.parametrize("method", ["rmu", "circuit_breakers", "idk_dpo"])
def test_bf16_trains_adapters_in_fp32(
    ray_session: None, quick: Quick, tmp_path: Path, method: str
) -> None:
    adapter = train(
        quick(
            "train.precision=bf16",
            "solve.mode=off",
            f"objective.method={method}",
            "train.deepspeed.stage=3",
            "train.steps=2",
            f"output_dir={tmp_path}",
        )
    )
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in adapter.values())


@pytest.mark.parametrize(
    "changes", [("train.deepspeed.stage=3",), ("train.num_workers=1", "train.accumulation=2")]
)
def test_steps_end_with_the_same_one_for_any_number_of_workers(
    ray_session: None, quick: Quick, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    rule = (
        "objective.method=masc",
        "objective.output_parameters.rho=0.06",
        "objective.stop_at=0.25",
    )
    ends: list[list[int]] = []
    for number, own in enumerate((("train.deepspeed.stage=0",), changes)):
        cfg = quick(*LONGER, *rule, *own, f"output_dir={tmp_path}/{number}")
        messages: list[dict[str, float]] = []
        train(cfg, messages.append)
        ends.append([int(message.get("stopped_after", -1)) for message in messages])
    assert ends[0] == ends[1]
    assert ends[0][:-1] == [-1] * ends[0][-1], "the last message follows those of the steps"
    assert 2 < ends[0][-1] < 40


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


def test_without_a_term_of_features_a_target_needs_no_labels(
    ray_session: None, quick: Quick, tmp_path: Path
) -> None:
    changes = [
        "objective.target=class_mean",
        "data.columns.label=none",
        "solve.mode=off",
        "train.num_workers=1",
        "train.steps=2",
        "train.max_failures=0",
        "objective.weights={retain: 0, forget: 0, task: 1}",
    ]
    assert train(quick(*changes, f"output_dir={tmp_path}"))


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
