"""Jobs in a real head node, submitted from outside, with the data in S3 and the keys in a file."""

from pathlib import Path

import pytest

from tests.bucket import SECRET
from tests.cluster.conftest import Head

PROBE = """
import hashlib, os, ray
from deploy.job import load_environment
load_environment()
ray.init()
@ray.remote
def seen():
    return hashlib.sha256(os.environ["AWS_SECRET_ACCESS_KEY"].encode()).hexdigest()
own = hashlib.sha256(os.environ["AWS_SECRET_ACCESS_KEY"].encode()).hexdigest()
print("same", own == ray.get(seen.options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}).remote()))
"""
SUBMIT_PROBE = f"""
import sys
from deploy.cluster import Cluster
from deploy.job import CODE
from deploy.submit import Plan
secrets = '{{"AWS_SECRET_ACCESS_KEY": "{SECRET}"}}'
files = {{"deploy": CODE / "deploy", "probe.py": {PROBE!r}, "environment.json": secrets}}
cluster = Cluster(sys.argv[1])
plan = Plan("python probe.py", {{"worker_process_setup_hook": "deploy.job.load_environment"}}, files)
cluster.follow(cluster.submit(plan), print)
"""


@pytest.fixture(scope="module")
def config(problem: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with the data in S3."""
    folder = tmp_path_factory.mktemp("job")
    sets = "\n".join(
        f"  {name}: {{path: s3://bucket/data/{name}.jsonl}}"
        for name in ("forget", "retain", "holdout")
    )
    text = f"model: {{path: {problem}/model}}\ndata:\n{sets}\noutput_dir: {folder}/out\n"
    (folder / "request.yaml").write_text(text)
    return folder / "request.yaml"


def test_a_job_reads_s3_with_keys_from_a_file_that_nobody_else_sees(
    head: Head, keys: Path, config: Path
) -> None:
    options = [
        "--address",
        head.address,
        "--env-file",
        str(keys),
    ]  # and the pinned packages, which are there
    done = head.ray_unlearn("submit", *options, "--", "check", str(config), "adapter.rank=8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data.forget" in done.stdout and "6 rows" in done.stdout
    job_id = done.stderr.split("Job: ")[1].split()[0]
    assert (
        head.ray_unlearn("job", "status", "--address", head.address, job_id).stdout == "SUCCEEDED\n"
    )
    log = head.ray_unlearn("job", "logs", "--address", head.address, job_id)
    assert (log.returncode, log.stdout) == (0, done.stdout)
    metadata = head.get("/api/jobs/")
    assert "deploy.job check request.yaml adapter.rank=8" in metadata
    shown = {"metadata": metadata, "log": done.stdout + done.stderr}
    files = [path for path in head.folder.rglob("logs/*") if path.is_file()]
    assert len(files) > 5
    shown |= {str(path): path.read_text(errors="replace") for path in files}
    assert [name for name, text in shown.items() if SECRET in text] == []


def test_the_workers_of_a_job_have_its_variables(head: Head) -> None:
    done = head.python("-c", SUBMIT_PROBE, head.address)
    assert "same True" in done.stdout, done.stdout + done.stderr


def test_the_exit_code_and_the_message_are_the_commands(
    head: Head, config: Path, problem: Path
) -> None:
    changes = [f"data.{name}.path={problem}/none.jsonl" for name in ("forget", "retain", "holdout")]
    options = ["--address", head.address, "--no-install"]
    done = head.ray_unlearn("submit", *options, "--", "check", str(config), *changes)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"data.forget.path: {problem}/none.jsonl not found" in done.stdout


def test_a_job_nobody_waits_for_can_be_watched_and_stopped(head: Head, config: Path) -> None:
    server = ["--address", head.address]
    command = [
        "check",
        str(config),
    ]  # without keys and an endpoint it asks AWS, which takes long enough
    started = head.ray_unlearn("submit", *server, "--no-wait", "--no-install", "--", *command)
    assert started.returncode == 0, started.stderr
    job_id = started.stdout.strip()
    assert head.ray_unlearn("job", "status", *server, job_id).stdout.strip() in {
        "PENDING",
        "RUNNING",
    }
    stopped = head.ray_unlearn("job", "stop", *server, job_id)
    assert (stopped.returncode, stopped.stderr) == (0, f"{job_id}: stopped\n")
    assert head.ray_unlearn("job", "status", *server, job_id).stdout == "STOPPED\n"
    assert head.ray_unlearn("job", "logs", *server, "--follow", job_id).returncode == 130
    again = head.ray_unlearn("job", "stop", *server, job_id)
    assert (again.returncode, again.stderr) == (0, f"{job_id}: had ended before\n")


@pytest.mark.parametrize(
    "address, environment, message",
    [
        (
            "{head}",
            {"RAY_AUTH_TOKEN": "0" * 64},
            "refuses the token, allowed: RAY_AUTH_MODE=token and the cluster's",
        ),
        (
            "{head}",
            {"RAY_AUTH_MODE": "disabled"},
            "wants a token, allowed: RAY_AUTH_MODE=token and the cluster's",
        ),
        (
            "http://127.0.0.1:9",
            {},
            "--address: nothing answers at http://127.0.0.1:9, allowed: the URL",
        ),
        (
            "127.0.0.1:8265",
            {},
            "--address: found '127.0.0.1:8265', allowed: the URL of a cluster's job server",
        ),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_one_line(
    head: Head, address: str, environment: dict[str, str], message: str
) -> None:
    done = head.ray_unlearn(
        "job",
        "status",
        "--address",
        address.format(head=head.address),
        "raysubmit_1",
        **environment,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert message in done.stderr


def test_an_unknown_job_is_one_line_with_the_known_ones(head: Head) -> None:
    done = head.ray_unlearn("job", "logs", "--address", head.address, "raysubmit_1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "JOB_ID: found 'raysubmit_1', allowed: " in done.stderr
