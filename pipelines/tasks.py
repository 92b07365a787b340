"""Ray tasks where the user's files are: the driver holds neither models nor text."""

from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config import ConfigError


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
