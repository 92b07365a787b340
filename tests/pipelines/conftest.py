"""The `quick` preset on the tiny problem."""

import pytest

from pipelines.config import UnlearnConfig
from pipelines.config_file import load_config


@pytest.fixture(scope="module")
def cfg(overrides: list[str]) -> UnlearnConfig:
    """As it is, unchanged."""
    return load_config("quick", overrides)
