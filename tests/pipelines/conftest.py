"""The `quick` preset on the tiny problem, and a bucket."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.config.load import load_config
from pipelines.config.schema import UnlearnConfig
from tests.bucket import Bucket, running_bucket


@pytest.fixture(scope="module")
def cfg(overrides: list[str]) -> UnlearnConfig:
    """As it is, unchanged."""
    return load_config("quick", overrides)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Bucket]:
    """An S3 server, started once."""
    with running_bucket() as bucket:
        yield bucket


@pytest.fixture
def bucket(s3_server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket that this process can reach, with a cache of this test's."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield s3_server
    s3_server.heal()
    s3_server.s3.delete_dir_contents("bucket")
