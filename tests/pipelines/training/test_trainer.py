"""A worker's failure, told by its cause and its place."""

import traceback

import pytest
from ray.train import WorkerGroupError

from pipelines.config.load import read_config, short_hash
from pipelines.config.schema import ConfigError
from pipelines.training.trainer import failure_of


def failure(text: str) -> WorkerGroupError:
    return WorkerGroupError("", {1: RuntimeError(text)})


def test_a_workers_failure_names_its_place() -> None:
    with pytest.raises(AttributeError) as caught:
        short_hash(None)  # pyright: ignore[reportArgumentType]
    trace = "".join(traceback.format_exception(caught.value))
    told = str(failure_of(failure(trace)))
    assert told.startswith(
        "AttributeError: 'NoneType' object has no attribute 'encode' (config/load"
    )
    assert told.endswith(")")


def test_a_failure_of_no_own_frame_is_its_last_line() -> None:
    told = failure_of(failure("Traceback ...\nValueError: odd\n"))
    assert isinstance(told, RuntimeError)
    assert str(told) == "ValueError: odd"


def test_what_a_worker_refuses_is_wrong_input() -> None:
    """As the weights of a hub name, which are not here before a worker loads them."""
    with pytest.raises(ConfigError) as caught:
        read_config("nowhere.yaml")
    trace = "".join(traceback.format_exception(caught.value))
    told = failure_of(failure(trace))
    assert isinstance(told, ConfigError)
    assert str(told) == str(caught.value)
