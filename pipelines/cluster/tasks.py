"""Ray tasks where the user's files are: the driver holds neither models nor text."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config.schema import ConfigError
from pipelines.storage.output import OutputDir


def on_this_node(function: Any) -> Any:
    """A Ray task for the node whose files the driver sees."""
    return ray.remote(num_cpus=1)(function).options(scheduling_strategy=this_node())


def this_node() -> NodeAffinitySchedulingStrategy:
    """The driver's node: what dies with it is lost with the driver anyway."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def result_of(task: Any) -> Any:
    """A task's result; an error of ours is raised as it was there."""
    try:
        return ray.get(task)
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        raise


@contextmanager
def on_every_node(output: OutputDir, name: str) -> Iterator[None]:
    """All nodes find a subfolder of the results where this one has it: where it is not shared, a copy."""
    here = ray.get_runtime_context().get_node_id()
    nodes = [] if output.is_shared else [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    where = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes if node != here]
    provide, clear = ray.remote(num_cpus=0)(_provide), ray.remote(num_cpus=0)(_clear)
    run = output.run_in_folder()
    tasks = [provide.options(scheduling_strategy=node).remote(output, name, run) for node in where]
    copied = [result_of(task) for task in tasks]
    try:
        yield
    finally:
        mine = [node for node, is_new in zip(where, copied, strict=True) if is_new]
        with suppress(RayError):  # a node may be gone
            ray.get([clear.options(scheduling_strategy=node).remote(output) for node in mine])


def _provide(output: OutputDir, name: str, run: str) -> bool:
    return output.copy_to_node(name, run)


def _clear(output: OutputDir) -> None:
    output.clear()
