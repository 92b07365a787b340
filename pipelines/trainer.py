"""A Ray Train run of the worker loop, for unlearning and for fine-tuning alike."""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import ray
from pyarrow import fs
from ray.autoscaler.sdk import request_resources
from ray.data import Dataset
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from pipelines.artifact import weight_bytes
from pipelines.classes import encoder_of
from pipelines.config import ConfigError, TrainConfig, UnlearnConfig
from pipelines.shards import ShardByRank, plan_stream
from pipelines.storage import open_filesystem
from pipelines.tasks import this_node
from pipelines.worker import Job, train_worker

Listener = Callable[[dict[str, Any]], None]
# How often Ray Train's controller looks what the workers report. Its own 2 s would hold up every resume point as long.
POLL_S = 0.25


def check_resources(train: TrainConfig, say: Callable[[str], None]) -> None:
    """Refuse more workers than the cluster can hold; an autoscaling one is asked for nodes, and has `train.wait_s`.

    Of a range the fewest must fit; nodes are asked for the most.

    Raises:
        ConfigError: names what is asked for and what the cluster has.
    """
    here = ray.get_runtime_context().get_node_id()
    own = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    if own.get("CPU", 0) < 1:
        raise ConfigError("RAY_ADDRESS: this node of the cluster has no CPU for tasks, allowed: to start on one with 1")
    refusal = _lack(train)
    if refusal and train.wait_s:
        say(f"Waiting up to {train.wait_s:g} s for nodes: {refusal}")
        request_resources(bundles=[train.resources] * train.max_workers)
        deadline_s = time.monotonic() + train.wait_s
        try:
            while refusal and time.monotonic() < deadline_s:
                time.sleep(1)
                refusal = _lack(train)
        finally:
            request_resources(bundles=[])  # else the nodes would stay for ever
    if refusal:
        raise ConfigError(refusal)


def _lack(train: TrainConfig) -> str:
    """What the cluster lacks for the workers, each of which is on one node; empty where it lacks nothing."""
    if _room(train) >= train.min_workers:
        return ""
    found = train.num_workers if isinstance(train.num_workers, int) else f"at least {train.min_workers}"
    have = ray.cluster_resources()
    for kind, each in train.resources.items():
        needed = train.min_workers * each
        if needed > have.get(kind, 0):
            return (
                f"train.num_workers: found {found} with {each:g} {kind} each, "
                f"allowed: {needed:g} {kind} or fewer in all, this cluster has {have.get(kind, 0):g}"
            )
    worker = " and ".join(f"{n:g} {kind}" for kind, n in train.resources.items())
    return f"train.num_workers: found {found} with {worker} each, allowed: {_room(train)}, as many as the nodes hold"


def _room(train: TrainConfig) -> int:
    """How many workers the cluster's nodes hold."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(kind, 0) // n) for kind, n in train.resources.items()) for node in nodes)


def workers_now(train: TrainConfig) -> int:
    """How many of the workers the cluster's nodes have room for; never fewer than the fewest that will do."""
    return min(max(_room(train), train.min_workers), train.max_workers)


def groups_at_once(train: TrainConfig) -> int:
    """How many times all workers fit the cluster side by side; at least once."""
    return max(1, _room(train) // train.max_workers)


def zero_stage(train: TrainConfig, weights: int, gpu_bytes: int) -> int:
    """The ZeRO stage: as configured, or for `auto` the lowest that fits (0 on CPUs and one GPU; 2 when the weights take
    up to 60 % of a GPU's memory; else 3)."""
    if train.deepspeed.stage != "auto":
        return train.deepspeed.stage
    if train.gpus_per_worker == 0 or (train.max_workers == 1 and not gpu_bytes):
        return 0
    fits = weights <= 0.6 * gpu_bytes
    if not fits:
        return 3
    return 0 if train.max_workers == 1 else 2


def stage_of(cfg: UnlearnConfig) -> int:
    """The ZeRO stage of a configuration on this cluster's GPUs."""
    return zero_stage(cfg.train, weight_bytes(cfg.model.path), gpu_memory_bytes(cfg.train))


def gpu_memory_bytes(train: TrainConfig) -> int:
    """Memory of one of the cluster's GPUs; 0 when training on CPUs."""
    if train.gpus_per_worker == 0:
        return 0

    def measure() -> int:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)

    return ray.get(ray.remote(num_gpus=min(1, train.gpus_per_worker))(measure).remote())


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
        encoder = encoder_of(cfg)
        self.streams = {
            name: plan_stream(rows, encoder, batch_size, cfg.seed) for name, (rows, batch_size) in streams.items()
        }
        self.batches = {name: stream.batches for name, stream in self.streams.items()}

    def fit(self, *, steps: int, learning_rate: float, final_rate: float, listener: Listener) -> Result:
        """Train to the end, resuming from this output folder's last resume point; `listener` hears of every step.

        Raises:
            RuntimeError: a worker has failed too often; says what its last line was.
        """
        cfg, train = self.cfg, self.cfg.train
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
        filesystem, checkpoints = checkpoint_folder(cfg)
        stage = stage_of(cfg)
        if stage == 3 and (cfg.prune.method == "wanda" or (self.kind == "finetune" and cfg.finetune.salient)):
            key = "prune.method" if cfg.prune.method == "wanda" else "finetune.salient"
            raise ConfigError(
                f"{key}: needs whole weights, but the model needs train.deepspeed.stage=3, allowed: without"
            )
        messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node()})  # outlives workers' nodes
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


def checkpoint_folder(cfg: UnlearnConfig) -> tuple[fs.FileSystem, str]:
    """Where resume points are kept while a run is unfinished: beside the results, on an object store too."""
    filesystem, path = open_filesystem(cfg.output_dir, "output_dir")
    return filesystem, f"{path}/checkpoints"


def worker_environment(train: TrainConfig) -> dict[str, str]:
    """Environment of workers: as many threads as cores, and DeepSpeed on the right device."""
    threads = str(max(1, int(train.cpus_per_worker)))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if train.gpus_per_worker == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


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
