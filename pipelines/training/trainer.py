"""A Ray Train run of the worker loop, for unlearning and for fine-tuning alike."""

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

from pyarrow import fs
from ray.data import Dataset
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from pipelines.cluster.resources import stage_of, worker_environment
from pipelines.cluster.tasks import this_node
from pipelines.config.schema import UnlearnConfig
from pipelines.encoding.batches import ShardByRank, plan_stream
from pipelines.encoding.encoder import build_encoder
from pipelines.storage.filesystem import open_filesystem
from pipelines.training.job import Job

Listener = Callable[[dict[str, Any]], None]
# How often Ray Train's controller looks what the workers report. Its own 2 s would hold up every resume point as long.
POLL_S = 0.25


class Trainer:
    """Trains a module over its streams of rows.

    Args:
        cfg: the run's configuration.
        kind: `unlearn` trains adapters on the objective, `finetune` all parameters on answers.
        streams: stream name (`retain`, `forget`) to its rows and rows a step.
    """

    def __init__(
        self,
        cfg: UnlearnConfig,
        kind: Literal["unlearn", "finetune"],
        streams: dict[str, tuple[Dataset, int]],
    ) -> None:
        self.cfg = cfg
        self.kind: Literal["unlearn", "finetune"] = kind
        encoder = build_encoder(cfg)
        self.streams = {
            name: plan_stream(rows, encoder, batch_size, cfg.seed)
            for name, (rows, batch_size) in streams.items()
        }
        self.batches = {name: stream.batches for name, stream in self.streams.items()}

    def fit(
        self, *, steps: int, learning_rate: float, final_rate: float, listener: Listener
    ) -> Result:
        """Train to the end, resuming from this output folder's last resume point; `listener` hears of every step.

        Raises:
            RuntimeError: a worker has failed too often; says what its last line was.
        """
        cfg, train = self.cfg, self.cfg.train
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
        filesystem, checkpoints = checkpoint_folder(cfg)
        stage = stage_of(cfg)
        messages = Queue(
            actor_options={"num_cpus": 0, "scheduling_strategy": this_node()}
        )  # outlives workers' nodes
        job = Job(
            cfg=cfg,
            kind=self.kind,
            steps=steps,
            learning_rate=learning_rate,
            final_rate=final_rate,
            batches=self.batches,
            stage=stage,
            messages=messages,
        )
        use_gpu = train.gpus_per_worker > 0
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=train.num_workers, use_gpu=use_gpu, resources_per_worker=train.resources
            ),
            run_config=RunConfig(
                name="train",
                storage_path=checkpoints,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=train.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                worker_runtime_env={"env_vars": worker_environment(train)},
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            datasets={name: stream.rows for name, stream in self.streams.items()},
            dataset_config=ShardByRank(),
        )
        try:
            with _listening(messages, listener), _interruptible():
                return trainer.fit()
        except WorkerGroupError as error:
            first = str(next(iter(error.worker_failures.values())))
            raise RuntimeError(first.strip().splitlines()[-1][:300]) from error


def train_worker(settings: dict[str, Job]) -> None:
    """The training function of Ray Train; `settings["job"]` says what to do."""
    from pipelines.training.loop import run_worker

    run_worker(settings["job"])


def checkpoint_folder(cfg: UnlearnConfig) -> tuple[fs.FileSystem, str]:
    """Where resume points are kept while a run is unfinished: beside the results, on an object store too."""
    filesystem, path = open_filesystem(cfg.output_dir, "output_dir")
    return filesystem, f"{path}/checkpoints"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C as a KeyboardInterrupt: Ray Train takes the signal, stops the workers and exits, and keeps its handler."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _listening(messages: Queue, listener: Listener) -> Iterator[None]:
    """Pass the workers' messages on while training runs, and those left over at its end."""
    stop = threading.Event()

    def drain(timeout_s: float) -> bool:
        try:
            listener(messages.get(timeout=timeout_s))
        except queue.Empty:
            return False
        return True

    def listen() -> None:
        while not stop.is_set():
            drain(0.5)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        while drain(0.05):
            pass
        messages.shutdown()


def forget_resume_points(cfg: UnlearnConfig) -> None:
    """Remove the resume points of a run that is complete."""
    filesystem, path = checkpoint_folder(cfg)
    with suppress(OSError):
        filesystem.delete_dir(path)
