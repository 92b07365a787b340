"""Ray tasks beside the user's files, because the driver holds neither models nor text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config.schema import ConfigError
from pipelines.storage.output import OutputDir


def on_this_node(function: Any) -> Any:
    """Make a function a Ray task that runs on the node whose files the driver sees."""
    return ray.remote(num_cpus=1)(function).options(scheduling_strategy=this_node())


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that places a task or actor on the driver's node.

    Whatever dies with that node would be lost with the driver anyway.
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def result_of(task: Any) -> Any:
    """Fetch a task's result.

    Raises:
        ConfigError: the task raised it. Ray wraps it in an error of its own, which is removed.
    """
    try:
        return ray.get(task)
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        raise


def all_results(tasks: Sequence[Any], others: Sequence[Any] = ()) -> list[Any]:
    """Return the result of every task.

    Every task is awaited even after a failure, because Ray logs the message of a failure that
    nobody fetches, and it may quote a row. `others` are further results of the same tasks, which
    are left where they lie.
    """
    results: list[Any] = []
    failures: list[RayError] = []
    for task, other in zip_longest(tasks, others):
        try:
            results.append(ray.get(task))
        except RayError as error:
            failures.append(error)
            if other is not None:
                with suppress(RayError):
                    ray.get(other)
    if failures:
        raise failures[0]
    return results


@contextmanager
def on_every_node(output: OutputDir, name: str) -> Iterator[None]:
    """Copy a subfolder of the results to every node that lacks it, for the context's time.

    Scoring workers on any node then read the merged model from the path that this node has it at.
    """
    others: list[NodeAffinitySchedulingStrategy] = []
    if not output.is_shared:
        here = ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] != here:
                others.append(NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
    run = output.run_in_folder()

    # No CPU is claimed: a copy mostly waits for the network, and workers may hold all CPUs.
    @ray.remote(num_cpus=0)
    def copy(output: OutputDir) -> bool:
        return output.copy_to_node(name, run)

    @ray.remote(num_cpus=0)
    def clear(output: OutputDir) -> None:
        output.clear()

    tasks = [copy.options(scheduling_strategy=node).remote(output) for node in others]
    copied_to: list[NodeAffinitySchedulingStrategy] = []
    for node, task in zip(others, tasks, strict=True):
        if result_of(task):
            copied_to.append(node)
    try:
        yield
    finally:
        with suppress(RayError):  # a node may be gone
            ray.get([clear.options(scheduling_strategy=node).remote(output) for node in copied_to])
