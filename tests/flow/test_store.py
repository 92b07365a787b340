"""Runs whose results go to a real S3 server."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.bucket import SECRET, Bucket, running_bucket
from tests.flow.conftest import CommandHere
from tests.processes import kill_tree

TRAINING = (
    "train.num_workers=1",
    "solve.mode=off",
    "train.steps=40",
    "train.checkpoint_every=4",
    "evaluation.quick=true",
)


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with running_bucket() as server:
        yield server


@pytest.fixture
def bucket(server: Bucket) -> Iterator[Bucket]:
    yield server
    server.heal()


@pytest.fixture
def command_on(bucket: Bucket, command_here: CommandHere, tmp_path: Path) -> CommandHere:
    """Runs `ray-unlearn` with the bucket's keys, on the machine of that name: its cache is its own."""

    def run(machine: str, *arguments: str) -> tuple[int, str]:
        return command_here(
            *arguments, **bucket.environment, XDG_CACHE_HOME=str(tmp_path / machine)
        )

    return run


def kill_midway(command: list[str], bucket: Bucket, cache: Path) -> None:
    """Start a run to s3://bucket/out on a machine that is lost once there are resume points."""
    own = {"RAY_ADDRESS": "local", "XDG_CACHE_HOME": str(cache)}
    first = subprocess.Popen(
        [sys.executable, "-m", "pipelines", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **bucket.environment, **own},
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while bucket.resume_point("out") < 12:
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    kill_tree(psutil.Process(first.pid))
    first.communicate()


def test_a_run_ends_on_another_machine_and_after_a_failed_upload(
    command_on: CommandHere, bucket: Bucket, overrides: list[str], tmp_path: Path
) -> None:
    command = ["run", "quick", *overrides, *TRAINING, "output_dir=s3://bucket/out/"]
    kill_midway(command, bucket, tmp_path / "first")
    known = bucket.files("out")
    assert {"config.yaml", "manifest.json", "losses.jsonl"} <= set(known)
    assert "adapter/adapter_model.safetensors" not in known

    bucket.refuses = lambda method, path: method == "PUT" and path.endswith("report.html")
    code, told = command_on("second", *command)
    assert code == 1 and "report.html" in told, told
    steps = bucket.steps("out")
    went_on = min(set(steps) - {0})
    assert steps[0] == 0 and steps[-1] == 39 and len(steps) == len(set(steps)) < 40
    assert went_on > 1 and went_on % 4 == 0, "it went on from a resume point"
    files = bucket.files("out")
    assert "model/model.safetensors" in files
    assert [name for name in files if name.startswith("checkpoints")] == []
    code, told = command_on("any", "verify", "s3://bucket/out")
    assert code == 2 and "manifest.json: status: found 'running', allowed: 'complete'" in told, told

    bucket.heal()
    code, told = command_on("third", *command)
    assert code == 0 and "Report: s3://bucket/out/report.html" in told, told
    assert bucket.steps("out") == steps, "it was not trained again"
    assert command_on("any", "verify", "s3://bucket/out")[0] == 0

    before = {name: bucket.read(f"out/{name}") for name in bucket.files("out")}
    code, told = command_on("fourth", *command)
    assert code == 0 and "Report: s3://bucket/out/report.html" in told, told
    assert {name: bucket.read(f"out/{name}") for name in bucket.files("out")} == before
    assert before.keys() >= {
        "scores.json",
        "report.html",
        "run.log",
        "mlflow.db",
        "adapter/adapter_config.json",
    }
    assert [name for name, content in before.items() if SECRET.encode() in content] == []
    left = {
        path.name
        for name in ("third", "fourth")
        for path in (tmp_path / name / "ray-unlearn").rglob("*.*")
    }
    assert left == set()
    code, told = command_on("third", *command, "train.steps=41")
    assert (
        code == 2
        and "output_dir: s3://bucket/out holds a different run (it differs in: train.steps)" in told
    ), told


def test_a_resume_point_that_cannot_be_sent_is_no_resume_point(
    command_on: CommandHere, bucket: Bucket, overrides: list[str]
) -> None:
    points: list[str] = []

    def refuse_in_the_first_one(method: str, path: str) -> bool:
        if method != "PUT" or not path.endswith("optimizer.safetensors"):
            return False
        points.append(path)
        return path == points[0]

    bucket.refuses = refuse_in_the_first_one
    settings = [
        *TRAINING,
        "train.steps=8",
        "train.max_failures=1",
        "output_dir=s3://bucket/stumbled",
    ]
    code, told = command_on("one", "run", "quick", *overrides, *settings)
    assert code == 0, told
    assert len(set(points)) == 2
    assert bucket.steps("stumbled") == [0, 1, 2, 3, *range(8)], (
        "the worker failed, another began again"
    )


def test_a_fine_tuned_model_lies_in_the_bucket(
    command_on: CommandHere, bucket: Bucket, overrides: list[str]
) -> None:
    code, told = command_on(
        "one", "finetune", "quick", *overrides, "finetune.epochs=1", "output_dir=s3://bucket/tuned"
    )
    assert code == 0 and "Model: s3://bucket/tuned/model" in told, told
    files = bucket.files("tuned")
    assert {"model/model.safetensors", "losses.jsonl", "manifest.json"} <= set(files)
    assert [name for name in files if name.startswith("checkpoints")] == []
    assert command_on("two", "verify", "s3://bucket/tuned")[0] == 0


@pytest.mark.parametrize(
    "command, message",
    [
        (
            ("run", "output_dir=s3://none/out"),
            "output_dir: s3://none/out: bucket 'none' does not exist",
        ),
        (("run", "output_dir=s3://bucket/no"), "output_dir: s3://bucket/no cannot be written ("),
        (
            ("run", "output_dir=s3://bucket/other"),
            "s3://bucket/other holds other files (thesis.txt, ...), allowed: a new",
        ),
        (
            ("tune", "output_dir=s3://bucket/out"),
            "output_dir: found 's3://bucket/out', allowed in a search: a folder, on",
        ),
    ],
    ids=["no bucket", "no right to write", "other files", "a search"],
)
def test_a_mistake_is_one_line_before_anything_is_trained(
    command_on: CommandHere,
    bucket: Bucket,
    overrides: list[str],
    command: tuple[str, str],
    message: str,
) -> None:
    bucket.write("other/thesis.txt", b"years of work")
    bucket.refuses = lambda method, path: method == "PUT" and path.startswith("/bucket/no/")
    code, told = command_on("one", command[0], "quick", *overrides, command[1])
    assert code == 2, told
    assert message in told.splitlines()[-1], told
    assert bucket.files("no") == []
    assert bucket.files("other") == ["thesis.txt"]
