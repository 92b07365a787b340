"""A Ray Train run of the worker loop, for unlearning and for fine-tuning alike."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pyarrow import fs
from ray.data import Dataset
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from pipelines.cluster.messages import Listener, forwarded_messages
from pipelines.cluster.resources import stage_of, worker_environment
from pipelines.cluster.tasks import this_node
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.encoding.batches import Stream, plan_stream, whole_streams
from pipelines.encoding.encoder import build_encoder
from pipelines.places import place_in
from pipelines.storage.filesystem import open_filesystem
from pipelines.storage.prepared import STATISTICS
from pipelines.training.job import Job, Kind

# Ray Train's controller polls the workers at this interval. Its default of 2 s would delay every
# resume point by as much.
POLL_S = 0.25


class Trainer:
    """Train a module on its streams of rows.

    Args:
        cfg: the run's configuration.
        kind: `unlearn` trains adapters on the objective, `finetune` all parameters on answers,
            and `prepare` collects statistics alone.
        streams: stream name (`retain`, `forget`, `holdout`, `removed`) to its rows and rows a step.
    """

    def __init__(
        self,
        cfg: UnlearnConfig,
        kind: Kind,
        streams: dict[str, tuple[Dataset, int]],
    ) -> None:
        self.cfg = cfg
        self.kind: Kind = kind
        encoder = build_encoder(cfg)
        self.streams: dict[str, Stream] = {}
        self.batches: dict[str, int] = {}
        for name, (rows, batch_size) in streams.items():
            stream = plan_stream(rows, encoder, batch_size, cfg.seed)
            self.streams[name] = stream
            self.batches[name] = stream.batches

    def job(self, steps: int, learning_rate: float, final_rate: float, messages: Queue) -> Job:
        """Return what each worker is sent. For the numbers see `fit`."""
        return Job(
            cfg=self.cfg,
            kind=self.kind,
            steps=steps,
            learning_rate=learning_rate,
            final_rate=final_rate,
            batches=self.batches,
            stage=stage_of(self.cfg),
            messages=messages,
            prepared=prepared_statistics(self.cfg),
        )

    def fit(
        self, *, steps: int, learning_rate: float, final_rate: float, listener: Listener
    ) -> Result:
        """Train to the end, from the last resume point in the output folder on.

        The learning rate falls linearly to the share `final_rate` of it. `listener` receives the
        workers' messages (see `ProgressLog.on_message`), in a thread.

        Raises:
            RuntimeError: a worker has failed too often. Its message is the worker's last line.
            KeyboardInterrupt: Ctrl-C.
        """
        cfg = self.cfg
        train = cfg.train
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
        filesystem, checkpoints = checkpoint_folder(cfg)
        # On the driver's node, where the queue outlives the workers' nodes.
        messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node()})
        job = self.job(steps, learning_rate, final_rate, messages)
        # NCCL needs a GPU for each rank.
        use_gpu = train.gpus_per_worker > 0
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=train.num_workers, use_gpu=use_gpu, resources_per_worker=train.resources
            ),
            run_config=RunConfig(
                # By the same name in the same place Ray Train finds the last resume point.
                name="train",
                storage_path=checkpoints,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=train.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                # A cluster that was running before was started without our environment.
                worker_runtime_env={"env_vars": worker_environment(train)},
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            datasets={name: stream.rows for name, stream in self.streams.items()},
            dataset_config=whole_streams(),
        )
        try:
            with forwarded_messages(messages, listener), raised_interrupts():
                return trainer.fit()
        except WorkerGroupError as error:
            raise failure_of(error) from error


def failure_of(error: WorkerGroupError) -> Exception:
    """Return the first failure of a worker: what was refused there, or what was raised and where."""
    # Each failure is a full traceback, whose last line names the cause.
    trace = str(next(iter(error.worker_failures.values()))).strip()
    reason, place = trace.splitlines()[-1], place_in(trace)
    kind, _, words = reason.partition(": ")
    if kind.endswith(ConfigError.__name__):
        return ConfigError(words)
    reason = reason[:300]
    return RuntimeError(f"{reason} ({place})" if place else reason)


def train_worker(settings: dict[str, Job]) -> None:
    """Run `settings["job"]` on a worker: the training function of Ray Train."""
    # Here, because the driver and Ray Train's controller import this module, and must not import
    # transformers.
    from pipelines.training.loop import run_worker

    run_worker(settings["job"])


def checkpoint_folder(cfg: UnlearnConfig) -> tuple[fs.FileSystem, str]:
    """Return where the resume points of an unfinished run lie: beside its results."""
    filesystem, path = open_filesystem(cfg.output_dir, "output_dir")
    return filesystem, f"{path}/checkpoints"


def prepared_statistics(cfg: UnlearnConfig) -> Checkpoint | None:
    """Return the statistics that `solve.prepared` names, with the keys to their store."""
    if cfg.solve.prepared is None:
        return None
    filesystem, path = open_filesystem(cfg.solve.prepared, "solve.prepared")
    return Checkpoint(f"{path}/{STATISTICS}", filesystem)


def forget_resume_points(cfg: UnlearnConfig) -> None:
    """Remove the resume points of a run that is complete."""
    filesystem, path = checkpoint_folder(cfg)
    with suppress(OSError):
        filesystem.delete_dir(path)


@contextmanager
def raised_interrupts() -> Iterator[None]:
    """Raise Ctrl-C as a KeyboardInterrupt, and restore its handler.

    Ray Train installs a handler that stops the workers and exits, and leaves it behind.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
