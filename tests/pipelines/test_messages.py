"""What workers tell the driver while it waits."""

import time
from typing import Any

import pytest
from ray.util.queue import Queue

from pipelines.cluster.messages import forwarded_messages

pytestmark = pytest.mark.usefixtures("ray_session")


def queue() -> Queue:
    return Queue(actor_options={"num_cpus": 0})


def test_every_message_arrives_also_those_that_are_late() -> None:
    heard: list[Any] = []
    messages = queue()
    with forwarded_messages(messages, heard.append):
        for number in range(20):
            messages.put(number)
    assert heard == list(range(20))


def test_a_listener_that_fails_fails_the_caller() -> None:
    def refuse(message: Any) -> None:
        raise KeyError(message)

    messages = queue()
    with pytest.raises(KeyError, match="first"), forwarded_messages(messages, refuse):
        messages.put("first")
        time.sleep(1)
        messages.put("second")


def test_the_callers_own_failure_is_the_one_that_is_raised() -> None:
    heard: list[Any] = []
    messages = queue()
    with pytest.raises(ValueError, match="own"), forwarded_messages(messages, heard.append):
        raise ValueError("own")
