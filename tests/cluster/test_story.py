"""The whole story: three nodes, a job from outside, data and results in S3, an MLflow server, a node that dies."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import mlflow
import psutil
import pytest
from safetensors.torch import load
from torch.testing import assert_close

from tests.bucket import Bucket
from tests.cluster.conftest import Head, running_head
from tests.mlflow_server import Server
from tests.processes import kill_tree, train_workers
from tuning.record import read_trials

STEPS, KILL_AT, CHECKPOINT_EVERY = 100, 20, 10


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Head, list[psutil.Process]]]:
    """A head with one CPU, for the driver, and two nodes with room for one worker each."""
    with running_head(1) as head, ExitStack() as stack:
        nodes = []
        for name in "ab":  # each with a folder of its own, as on machines of their own
            options = [
                "--num-cpus",
                "2",
                "--address",
                f"127.0.0.1:{head.port}",
                "--temp-dir",
                str(head.folder / name),
            ]
            nodes.append(stack.enter_context(head.ray_start(*options)))
        while head.get("/api/v0/nodes").count('"ALIVE"') < 3:
            assert all(node.is_running() for node in nodes), (
                head.folder / "nodes.log"
            ).read_text()[-2000:]
            time.sleep(0.2)
        yield head, nodes


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server.uri
    server.kill()


def test_a_search_runs_on_nodes_that_its_driver_is_not_on(
    cluster: tuple[Head, list[psutil.Process]], overrides: list[str], tmp_path: Path
) -> None:
    head, _ = cluster
    changes = [
        *overrides,
        "train.steps=0",
        "train.cpus_per_worker=1.5",
        "train.wait_s=60",
    ]  # the head has one CPU
    command = ["tune", "quick", *changes, f"output_dir={tmp_path}/search", "--trials", "4"]
    done = head.ray_unlearn("submit", "--address", head.address, "--no-install", "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = read_trials(tmp_path / "search")
    assert [own.state for own in trials.values()] == ["finished"] * 4
    assert (tmp_path / "search" / "best.yaml").exists()


def job_options(head: Head, keys: Path, tracking: str, overrides: list[str]) -> list[str]:
    """Return what submits a run of one or two workers that reads its sets from the bucket."""
    model, *sets = overrides
    local = sets[0].split("=")[1].rsplit("/", 1)[0]
    changes = [
        model,
        *(override.replace(local, "s3://bucket/data") for override in sets),
        "solve.mode=off",
        f"train.steps={STEPS}",
        f"train.checkpoint_every={CHECKPOINT_EVERY}",
        f"tracking.uri={tracking}",
        "train.wait_s=60",
        "train.num_workers=[1,2]",
        "evaluation.quick=true",
        "train.cpus_per_worker=1.5",
    ]
    submit = ["submit", "--address", head.address, "--no-install", "--env-file", str(keys)]
    return [*submit, "--", "run", "quick", *changes]


def test_a_job_outlives_a_node(
    cluster: tuple[Head, list[psutil.Process]],
    bucket: Bucket,
    keys: Path,
    tracking: str,
    overrides: list[str],
    tmp_path: Path,
) -> None:
    head, nodes = cluster
    options = job_options(head, keys, tracking, overrides)
    whole = head.ray_unlearn(*options, "output_dir=s3://bucket/whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr

    command = [sys.executable, "-m", "pipelines", *options, "output_dir=s3://bucket/broken"]
    with (tmp_path / "told").open("w") as told:
        job = subprocess.Popen(command, env=head.environment, stdout=told, stderr=told)
    while bucket.resume_point("broken") < KILL_AT and job.poll() is None:
        time.sleep(0.05)
    assert [len(train_workers(node)) for node in nodes] == [1, 1], (tmp_path / "told").read_text()
    kill_tree(nodes[0])
    assert job.wait(timeout=600) == 0, (tmp_path / "told").read_text()
    steps = bucket.steps("broken")
    again = [
        step for before, step in pairwise(steps) if step <= before
    ]  # none, where the last step had a resume point
    assert len(again) <= 1 and set(again) <= set(range(KILL_AT, STEPS, CHECKPOINT_EVERY)), (
        "it went on once, and there"
    )
    assert steps.count(0) == 1 and set(steps) == set(range(STEPS))

    verified = head.ray_unlearn("verify", "s3://bucket/broken", **bucket.environment)
    assert verified.returncode == 0, verified.stderr
    adapters = [
        load(bucket.read(f"{name}/adapter/adapter_model.safetensors"))
        for name in ("whole", "broken")
    ]
    assert_close(adapters[1], adapters[0], rtol=1e-4, atol=1e-6)
    costs = [json.loads(bucket.read(f"{name}/scores.json"))["cost"] for name in ("whole", "broken")]
    assert [cost["num_workers"] for cost in costs] == [2, 1], (
        "the node that was left has room for one worker"
    )
    record = json.loads(bucket.read("broken/manifest.json"))["mlflow"]
    run = mlflow.MlflowClient(tracking).get_run(record["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["after.forget.probability"] > 0
