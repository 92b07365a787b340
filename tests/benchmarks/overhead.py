"""What Ray costs: the steps of a run under Ray Train and Ray Data against the same steps under plain torchrun.

    python -m tests.benchmarks.overhead demo

Needs what `make demo` leaves. Both sides build the same model with the same engine and take the same steps on the same
rows with two workers of a thread each; the plain side has its rows in memory, reports to nobody and has no Ray in its
processes. Seconds a step are the mean between the first steps, left out, and the last. The sides take turns. Writes
docs/overhead_benchmark.md.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config.load import load_config
from pipelines.config.schema import UnlearnConfig
from pipelines.terminal import Terminal

DOCS = Path(__file__).parents[2] / "docs" / "overhead_benchmark.md"
WARM_UP, WORKERS = 5, 2
SETTINGS = [
    "solve.mode=off",
    "train.checkpoint_every=100000",
    f"train.num_workers={WORKERS}",
    "train.cpus_per_worker=1",
]


def under_ray(cfg: UnlearnConfig, rows: Path) -> float:
    """Seconds a step of a run's training; leaves each worker's rows as files for the other side."""
    from pipelines.cluster.session import session
    from pipelines.data.sets import load_sets
    from pipelines.encoding.batches import share_of
    from pipelines.training.trainer import Trainer

    told: list[float] = []
    with session(cfg.train, rows / "run.log", Terminal()):
        sets = load_sets(cfg.data, cfg.task)
        kept = sets.union(("retain", "utility"), present_only=True)
        streams = {
            "retain": (kept, cfg.train.retain_batch_size),
            "forget": (sets.forget, cfg.train.forget_batch_size),
        }
        trainer = Trainer(cfg, "unlearn", streams)
        for name, stream in trainer.streams.items():
            table = pa.concat_tables(block for block in _fetched(stream.rows))
            for rank in range(WORKERS):
                pq.write_table(share_of(table, rank, WORKERS), rows / f"{name}-{rank}.parquet")
        trainer.fit(
            steps=cfg.train.steps, learning_rate=cfg.train.learning_rate, final_rate=0.0,
            listener=lambda message: told.append(time.monotonic()) if "step" in message else None,
        )  # fmt: skip
    return (told[-1] - told[WARM_UP - 1]) / (len(told) - WARM_UP)


def _fetched(rows: Any) -> list[pa.Table]:
    import ray

    return ray.get(rows.to_arrow_refs())


def under_torchrun(cfg: UnlearnConfig, rows: Path) -> float:
    """Seconds a step of the same steps without Ray."""
    (rows / "config.json").write_text(cfg.model_dump_json())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={WORKERS}",
        "--master-port=29511",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command += ["-m", "tests.benchmarks.overhead", "--worker", str(rows)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float((rows / "seconds").read_text())


def plain_worker(rows: Path) -> None:
    """A worker of torchrun's: `pipelines.training.loop.run_worker` without Ray."""
    import torch

    from pipelines.encoding.text import TextEncoder
    from pipelines.model.engine import Engine, deepspeed_settings
    from pipelines.model.load import build_alignment
    from pipelines.training.build import Pruned
    from pipelines.training.job import Job
    from pipelines.training.loop import TrainingLoop
    from pipelines.training.worker import Worker
    from pipelines.training.worker_rows import StepRows, WorkerRows
    from rfa.batch import collate
    from rfa.solver import merged_features
    from rfa.targets import FeatureSums

    cfg = UnlearnConfig.model_validate_json((rows / "config.json").read_text())
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    rank = torch.distributed.get_rank()
    encoder = TextEncoder(cfg.model, cfg.data.system_prompt, cfg.data.max_tokens)
    tables = {
        name: pq.read_table(rows / f"{name}-{rank}.parquet").to_pylist()
        for name in ("retain", "forget")
    }
    batches = {name: _batches(records) for name, records in tables.items()}
    module = build_alignment(cfg)
    engine = Engine(module, deepspeed_settings(cfg.train, 0, full=False), WORKERS)
    features = {name: FeatureSums() for name in module.hooks.names}
    for records in batches["retain"]:
        batch = collate(encoder.rows(records), [], encoder.pad_token_id)
        for name, own in module.feature_sums(batch).items():
            features[name].merge(own)
    module.fit(merged_features(features))
    counts = {name: len(own) for name, own in batches.items()}
    job = Job(cfg, "unlearn", cfg.train.steps, cfg.train.learning_rate, 0.0, counts, 0, None)
    worker = Worker(job, engine, module, WorkerRows(job, encoder), Pruned(None, {}))
    loop = TrainingLoop(worker)
    started = 0.0
    for step, (retain, forget) in enumerate(
        islice(
            zip(cycle(batches["retain"]), cycle(batches["forget"]), strict=False), cfg.train.steps
        )
    ):
        loop.step(StepRows(encoder.rows(retain), encoder.rows(forget)), job.rate(step))
        if step == WARM_UP - 1:
            started = time.monotonic()
    if rank == 0:
        (rows / "seconds").write_text(
            str((time.monotonic() - started) / (cfg.train.steps - WARM_UP))
        )


def _batches(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = [
        [] for _ in range(1 + max(int(row["batch"]) for row in records))
    ]
    for row in records:
        found[int(row["batch"])].append(row)
    return found


def main() -> None:
    """Run both sides in turn, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    if options.worker:
        plain_worker(options.worker)
        return
    seconds: dict[str, list[float]] = {"Ray": [], "torchrun": []}
    for turn in range(options.turns):
        with TemporaryDirectory() as folder:
            rows = Path(folder)
            cfg = load_config(
                options.config,
                [*SETTINGS, f"train.steps={options.steps}", f"output_dir={rows / 'out'}"],
            )
            seconds["Ray"].append(under_ray(cfg, rows))
            seconds["torchrun"].append(under_torchrun(cfg, rows))
        print({name: f"{own[turn]:.4f}" for name, own in seconds.items()}, flush=True)
    ratio = statistics.median(seconds["Ray"]) / statistics.median(seconds["torchrun"])
    print(f"Ray / torchrun: {ratio:.3f}")
    packages = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "ray", "deepspeed")
    )
    lines = [
        "# What Ray costs at steady state", "",
        f"`python -m tests.benchmarks.overhead {options.config} --steps {options.steps} --turns {options.turns}`: "
        f"seconds a step, {WORKERS} workers of a thread each, the first {WARM_UP} steps left out.", "",
        f"| | {' | '.join(f'turn {turn + 1}' for turn in range(options.turns))} | median |",
        f"|---|{'---:|' * (options.turns + 1)}",
        *(f"| {name} | {' | '.join(f'{s:.3f}' for s in own)} | {statistics.median(own):.3f} |"
          for name, own in seconds.items()),
        "", f"Ray / torchrun: **{ratio:.3f}**. {platform.machine()}, {os.cpu_count()} cores, {packages}.",
    ]  # fmt: skip
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
