"""Fixtures that several test modules share."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Tiny models gain nothing from a second thread, and two that wait for each other beside Ray's
# processes take minutes for what one does in seconds.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before Ray starts its workers: no test waits for a hub that is not there
)
# Scores are cached: for the tests of one session, and not for their user.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()

import pytest
import ray

STARTS_RAY = ("flow", "cluster")  # folders whose tests start commands or clusters of their own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a Ray cluster, so that `make test-fast` can leave it out."""
    tests = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(tests).parts[0]
        if folder in STARTS_RAY or "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


@pytest.fixture(scope="session", autouse=True)
def cache() -> Iterator[None]:
    """Remove the session's cache at its end."""
    folder = os.environ["XDG_CACHE_HOME"]
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of two CPUs, started once, as a command starts its own: idle workers are kept and used again."""
    from pipelines.cluster.resources import worker_environment
    from pipelines.config.schema import TrainConfig

    os.environ.setdefault("RAY_num_workers_soft_limit", "8")
    # "local": a cluster that somebody else left on this machine is not joined
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        runtime_env={"env_vars": worker_environment(TrainConfig())},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, tiny and random, and `data`, synthetic."""
    from pipelines.data.synthetic import write_problem
    from tests.tiny_model import write_tiny_model

    folder = tmp_path_factory.mktemp("problem")
    write_tiny_model(folder / "model")
    write_problem(folder / "data", authors=6, questions=3, seed=0, forget=2)
    return folder


@pytest.fixture(scope="session")
def overrides(problem: Path) -> list[str]:
    """What points the `quick` preset at the problem."""
    sets = ("forget", "retain", "utility", "holdout", "general")
    return [
        f"model.path={problem}/model",
        *(f"data.{name}.path={problem}/data/{name}.jsonl" for name in sets),
    ]
