"""A worker's failure, told by its cause and its place."""

import traceback

from ray.train import WorkerGroupError

from pipelines.config.load import short_hash
from pipelines.training.trainer import reason_of


def failure(text: str) -> WorkerGroupError:
    return WorkerGroupError("", {1: RuntimeError(text)})


def test_a_workers_failure_names_its_place() -> None:
    try:
        short_hash(None)  # pyright: ignore[reportArgumentType]
    except AttributeError:
        trace = traceback.format_exc()
    told = reason_of(failure(trace))
    assert told.startswith(
        "AttributeError: 'NoneType' object has no attribute 'encode' (config/load"
    )
    assert told.endswith(")")


def test_a_failure_of_no_own_frame_is_its_last_line() -> None:
    assert reason_of(failure("Traceback ...\nValueError: odd\n")) == "ValueError: odd"
