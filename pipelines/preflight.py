"""What is checked before a command trains or scores anything."""

from typing import Any, NamedTuple

from pipelines.cluster.resources import check_resources
from pipelines.cluster.tasks import on_this_node, result_of
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets, load_sets
from pipelines.encoding.labelled import check_labels
from pipelines.terminal import Terminal


class Checked(NamedTuple):
    """What is known before training: the sets, and the model's size."""

    sets: Sets
    size: Any


def load_checked(cfg: UnlearnConfig, terminal: Terminal, others: dict[str, ModelConfig]) -> Checked:
    """The sets, once the cluster is known to be large enough and the model to be what the configuration says.

    The model is checked in a task, without its weights, while the data is read: the driver imports none of what that
    takes. `others` are further models that will be needed, by their keys.
    """
    check_resources(cfg.train, terminal.say)
    size = on_this_node(_check_models).remote(cfg, others)
    sets = load_sets(cfg.data, cfg.task)
    checked = Checked(sets, result_of(size))
    check_labels(cfg, sets)
    terminal.say("Data: " + ", ".join(f"{name} {sets.counts[name]} rows" for name in sets.names()))
    return checked


def _check_models(cfg: UnlearnConfig, others: dict[str, ModelConfig]) -> Any:
    from pipelines.model.load import check_models

    return check_models(cfg, others)


def oracle_of(cfg: UnlearnConfig, name: str) -> dict[str, ModelConfig]:
    """The retrain oracle under a name, where one is configured."""
    return {} if cfg.evaluation.oracle is None else {name: ModelConfig(path=cfg.evaluation.oracle)}
