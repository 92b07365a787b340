"""The workers' messages to the driver, which come through a Ray queue."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.util.queue import Queue

Listener = Callable[[Any], None]


@contextmanager
def forwarded_messages(messages: Queue, listener: Listener) -> Iterator[None]:
    """Pass the workers' messages to `listener` in the context, and the remaining ones at its end.

    A thread reads the queue, because the driver waits for the workers meanwhile.
    """
    stop = threading.Event()
    failures: list[BaseException] = []

    def forward_one(timeout_s: float) -> bool:
        try:
            listener(messages.get(timeout=timeout_s))
        except queue.Empty:
            return False
        return True

    def forward_all() -> None:
        try:
            while not stop.is_set():
                forward_one(0.5)
        except BaseException as error:  # raised where the caller can see it
            failures.append(error)

    thread = threading.Thread(target=forward_all, daemon=True)
    thread.start()
    try:
        yield
        stop.set()
        thread.join()
        while not failures and forward_one(0.05):
            pass
        if failures:
            raise failures[0]
    finally:
        stop.set()
        thread.join()
        messages.shutdown()
