"""Adapters of the workers' loop on real Ray Train: one run, or several by one group of workers."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import ray.train
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from safetensors.torch import load_file
from torch import Tensor

from pipelines.cluster.resources import worker_environment
from pipelines.config.schema import UnlearnConfig
from pipelines.data.sets import load_sets
from pipelines.encoding.batches import whole_streams
from pipelines.training.trainer import Trainer, raised_interrupts
from pipelines.unlearn import streams_of

Listener = Callable[[dict[str, Any]], None]


class Trained(NamedTuple):
    """The end of a run: its trained parameters by name, what it reported, and its messages.

    `folder` has the last resume point.
    """

    parameters: dict[str, Tensor]
    metrics: dict[str, Any]
    messages: list[dict[str, Any]]
    folder: Path


class Lines:
    """Messages in a file, for the queue that a run has."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, message: dict[str, Any]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps(message) + "\n")


def exported(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by the names that PEFT's adapter file gives them."""
    names = {name: name.removeprefix("model.").replace(".default", "") for name in parameters}
    return {names[name]: value for name, value in parameters.items()}


def products_of(trained: Trained) -> dict[str, Tensor]:
    """Each module's B A."""
    found = trained.parameters
    return {
        name: found[name.replace("lora_A", "lora_B")] @ value
        for name, value in found.items()
        if "lora_A" in name
    }


def trainer_of(cfg: UnlearnConfig) -> Trainer:
    return Trainer(cfg, "unlearn", streams_of(cfg, load_sets(cfg.data)))


def fit(cfg: UnlearnConfig, listener: Listener = lambda _message: None) -> Trained:
    """Train as `ray-unlearn run` does; `listener` hears the messages while it goes on."""
    messages: list[dict[str, Any]] = []

    def hear(message: dict[str, Any]) -> None:
        messages.append(message)
        listener(message)

    train = cfg.train
    result = trainer_of(cfg).fit(
        steps=train.steps, learning_rate=train.learning_rate, final_rate=0.0, listener=hear
    )
    assert result.checkpoint is not None
    assert result.metrics is not None
    folder = Path(result.checkpoint.path)
    return Trained(parameters_in(folder, cfg), result.metrics, messages, folder)


def fit_all(folder: Path, *cfgs: UnlearnConfig) -> list[Trained]:
    """Train one configuration after another with one group of workers, as many as the first wants.

    A group takes half a minute to start, most of it imports. Here a run never resumes, and its
    reports go to `folder`, because Ray Train knows of one run a group.
    """
    jobs = []
    datasets = {}
    for number, cfg in enumerate(cfgs):
        (folder / str(number)).mkdir()
        run = trainer_of(cfg)
        lines = cast(Queue, Lines(folder / str(number) / "messages.jsonl"))
        jobs.append(run.job(cfg.train.steps, cfg.train.learning_rate, 0.0, lines))
        for name, stream in run.streams.items():
            datasets[f"{number}.{name}"] = stream.rows
    train = cfgs[0].train
    for cfg in cfgs:
        assert cfg.train.num_workers == train.num_workers
        assert cfg.train.resources == train.resources
        assert worker_environment(cfg.train) == worker_environment(train)
    trainer = TorchTrainer(
        run_all,
        train_loop_config={"jobs": jobs, "folder": folder},
        scaling_config=ScalingConfig(
            num_workers=train.num_workers, resources_per_worker=train.resources
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder),
            worker_runtime_env={"env_vars": worker_environment(train)},
        ),
        torch_config=TorchConfig(backend="gloo"),
        datasets=datasets,
        dataset_config=whole_streams(),
    )
    with raised_interrupts():  # a later test's Ctrl-C would be Ray Train's
        trainer.fit()
    return [trained_in(folder / str(number), cfg) for number, cfg in enumerate(cfgs)]


def run_all(settings: dict[str, Any]) -> None:
    """Run each job on a worker: the training function of Ray Train."""
    from pipelines.training.loop import run_worker

    shard_of = ray.train.get_dataset_shard
    for number, job in enumerate(settings["jobs"]):
        own = {
            "get_checkpoint": lambda: None,
            "get_dataset_shard": lambda name, number=number: shard_of(f"{number}.{name}"),
            "report": partial(keep_report, settings["folder"] / str(number)),
        }
        with patch.multiple(ray.train, **own):
            run_worker(job)


def keep_report(
    folder: Path, metrics: dict[str, Any], checkpoint: Checkpoint | None, **_options: Any
) -> None:
    """Keep the last report of a run in a folder."""
    if checkpoint is None:
        return
    (folder / "metrics.json").write_text(json.dumps(metrics))
    shutil.rmtree(folder / "point", ignore_errors=True)
    shutil.copytree(checkpoint.path, folder / "point")


def trained_in(folder: Path, cfg: UnlearnConfig) -> Trained:
    messages = folder / "messages.jsonl"
    lines = messages.read_text().splitlines() if messages.exists() else []
    return Trained(
        parameters_in(folder / "point", cfg),
        json.loads((folder / "metrics.json").read_text()),
        [json.loads(line) for line in lines],
        folder / "point",
    )


def parameters_in(folder: Path, cfg: UnlearnConfig) -> dict[str, Tensor]:
    """The parameters in a resume point at a run's end, which holds no moments."""
    expected = {"progress.json", "trained.safetensors"}
    if cfg.prune.method == "wanda":
        expected.add("norms.safetensors")
    assert {path.name for path in folder.iterdir()} == expected
    return load_file(folder / "trained.safetensors")
