"""The search space: dotted configuration keys with distributions, checked before anything runs.

    adapter.rank: {choice: [8, 16, 32]}
    solve.strength: {loguniform: [1.0e-4, 1.0e-1]}
    objective.weights.kl: {uniform: [0, 1]}
    train.steps: {int: [20, 200]}
    objective.clusters: {choice: [8, 32, 128], when: {objective.target: cluster_mean}}

`when` makes a key part of a trial only where other keys of the space, named before it, have the
value given.
"""

import json
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipelines.config.load import describe, with_values
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.config.text import parse_yaml
from rfa.forget_losses import FORGET_LOSSES


class Range(NamedTuple):
    """The allowed types of a range's two ends, and the number that the lower end must exceed."""

    types: tuple[type, ...]
    lowest: float
    words: str


RANGES = {
    "uniform": Range((int, float), -math.inf, "two numbers"),
    "loguniform": Range((int, float), 0.0, "two numbers above 0"),
    "int": Range((int,), -math.inf, "two whole numbers"),
}
KINDS = ("choice", *RANGES)
SEARCHED = ("adapter.", "objective.", "solve.", "prune.")
LOSS_PARAMETERS = "objective.output_parameters."
SEARCHED_KEYS = ("train.steps", "train.learning_rate", "train.warmup_steps", "train.clip_norm")


class Dimension(NamedTuple):
    """A key to search over. `values` are the choices, or the lowest and the highest value."""

    key: str
    kind: str
    values: tuple[Any, ...]
    when: tuple[tuple[str, Any], ...] = ()

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Return whether the key is part of a trial with these values of the keys before it."""
        return all(key in values and values[key] == value for key, value in self.when)

    def suggest(self, trial: Any) -> Any:
        """Draw a value from an Optuna trial."""
        if self.kind == "choice":
            choices = {to_optuna(value): value for value in self.values}
            return choices[trial.suggest_categorical(self.key, list(choices))]
        low, high = self.values
        if self.kind == "int":
            return trial.suggest_int(self.key, low, high)
        return trial.suggest_float(self.key, low, high, log=self.kind == "loguniform")

    def grid(self) -> list[Any]:
        """Return all values of a choice or an integer.

        Raises:
            ConfigError: the dimension is continuous.
        """
        if self.kind == "choice":
            return list(self.values)
        if self.kind == "int":
            return list(range(self.values[0], self.values[1] + 1))
        raise ConfigError(
            f"{self.key}: found {self.kind}, allowed with --method grid: choice or int"
        )


class Space(NamedTuple):
    """All dimensions, each after those that its condition names."""

    dimensions: tuple[Dimension, ...]

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Draw the values of one trial from an Optuna trial."""
        values: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.applies(values):
                values[dimension.key] = dimension.suggest(trial)
        return values

    def tree(self) -> dict[str, Any]:
        """Return the space as a YAML tree."""
        tree: dict[str, Any] = {}
        for dimension in self.dimensions:
            tree[dimension.key] = {dimension.kind: list(dimension.values)}
            if dimension.when:
                tree[dimension.key]["when"] = dict(dimension.when)
        return tree

    def points(self) -> list[dict[str, Any]]:
        """Return every point of a space of choices and integers, as Optuna's parameters.

        Raises:
            ConfigError: a dimension is continuous.
        """
        points: dict[str, dict[str, Any]] = {}
        axes = [dimension.grid() for dimension in self.dimensions]
        for axis_values in product(*axes):
            values: dict[str, Any] = {}
            parameters: dict[str, Any] = {}
            for dimension, value in zip(self.dimensions, axis_values, strict=True):
                if dimension.applies(values):
                    values[dimension.key] = value
                    parameters[dimension.key] = to_optuna(value)
            # Combinations that differ only in keys whose condition does not hold are one point.
            points[json.dumps(values)] = parameters
        return list(points.values())

    def values(self, key: str) -> tuple[Any, ...]:
        """Return a key's choices or both ends of its range, and nothing if it is not searched."""
        for dimension in self.dimensions:
            if dimension.key == key:
                return dimension.values
        return ()


def to_optuna(value: Any) -> Any:
    """Return a choice in a form that Optuna can store, with a list as JSON."""
    if isinstance(value, list):
        return json.dumps(value)
    return value


def load_space(path: Path, cfg: UnlearnConfig) -> Space:
    """Read a space file and check it against a configuration.

    Raises:
        ConfigError: the file is no such space, or a value is not allowed in the configuration.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({type(error).__name__}); allowed: a YAML file"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return read_space(tree, cfg, str(path))


def read_space(tree: Any, cfg: UnlearnConfig, source: str) -> Space:
    """Check a space's YAML tree, as `load_space` does. Errors name `source`."""
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(
            f"{source}: found {type(tree).__name__}, allowed: configuration keys with distributions"
        )
    dimensions: dict[str, Dimension] = {}
    for key, entry in tree.items():
        dimensions[str(key)] = _dimension(str(key), entry, list(dimensions), source)
    # Every value is tried in the configuration, so that no trial fails for a value.
    for dimension in dimensions.values():
        for value in dimension.values:
            try:
                with_values(cfg, {**dict(dimension.when), dimension.key: value})
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from None
    return Space(tuple(dimensions.values()))


def _dimension(key: str, entry: Any, before: list[str], source: str) -> Dimension:
    """Check one key's entry. `before` are the keys that a condition may name."""
    is_known = any(key == known for known, _, _ in describe())
    # Which parameters a loss has, its configuration checks.
    if not is_known and not key.startswith(LOSS_PARAMETERS):
        raise ConfigError(
            f"{source}: {key}: unknown key, allowed: keys that `ray-unlearn run --help` lists"
        )
    # A configuration has all keys that its method would set, so another method would change none.
    is_method = key == "objective.method"
    is_prepared = key == "solve.prepared"  # statistics are the search's own
    if is_method or is_prepared or (not key.startswith(SEARCHED) and key not in SEARCHED_KEYS):
        patterns = [f"{prefix}*" for prefix in SEARCHED]
        allowed = ", ".join([*patterns, *SEARCHED_KEYS])
        raise ConfigError(f"{source}: {key}: not a key to search over, allowed: {allowed}")
    kinds = [kind for kind in KINDS if isinstance(entry, dict) and kind in entry]
    if len(kinds) != 1 or set(entry) - {kinds[0], "when"} or not isinstance(entry[kinds[0]], list):
        raise ConfigError(
            f"{source}: {key}: found {json.dumps(entry, default=str)[:80]}, "
            f"allowed: one of {', '.join(KINDS)} with a list, and when"
        )
    kind, values = kinds[0], entry[kinds[0]]
    _check_values(key, kind, values, source)
    when = entry.get("when", {})
    if not isinstance(when, dict) or set(when) - set(before):
        raise ConfigError(
            f"{source}: {key}.when: found {json.dumps(when, default=str)[:80]}, "
            f"allowed: keys named before it: {', '.join(before)}"
        )
    return Dimension(key, kind, tuple(values), tuple(when.items()))


def _check_values(key: str, kind: str, values: list[Any], source: str) -> None:
    """Raise ConfigError unless the values are choices, or the two ends of a range."""
    if kind == "choice":
        if not values:
            raise ConfigError(f"{source}: {key}: found no choice, allowed: at least one")
        return
    # The exact type, as a bool is an int for `isinstance`.
    numbers = [value for value in values if type(value) in RANGES[kind].types]
    is_range = len(values) == len(numbers) == 2 and all(map(math.isfinite, numbers))
    if not is_range or not RANGES[kind].lowest < numbers[0] < numbers[1]:
        raise ConfigError(
            f"{source}: {key}: found {json.dumps(values)[:80]}, "
            f"allowed: {RANGES[kind].words}, the smaller first"
        )


def default_space(cfg: UnlearnConfig, depth: int) -> dict[str, Any]:
    """Return a space for a configuration as a YAML tree.

    It has the keys of the solver, of gradient steps and of pruning, if the configuration uses them.

    Args:
        depth: number of blocks of a language model.
    """
    reads_text = cfg.task == "causal_lm"
    # Each token's aim stands for target, strength and fact weight in mode `per_token`.
    shifts_to_targets = cfg.solve.settings().reads_targets
    choices: dict[str, list[Any]] = {"adapter.rank": [8, 16, 32, 64]}
    # A range of blocks would leave out a classifier's head, which may be adapted.
    if reads_text:
        last = depth - 1
        # Each range has low blocks: without them forgetting cost too much utility
        # (docs/one_pass.md).
        choices["adapter.layers"] = _distinct([0, last], [0, 3 * last // 4], [depth // 8, last])
    trains_to_targets = cfg.train.steps > 0 and cfg.objective.weights.forget > 0
    if reads_text and (shifts_to_targets or cfg.train.steps > 0):
        choices["objective.tokens"] = ["answer", "all"]
    if cfg.objective.method is None and (shifts_to_targets or trains_to_targets):
        targets = _distinct(cfg.objective.target, "cluster_mean", "retain_mean")
        choices["objective.target"] = targets
    if cfg.solve.mode != "off":
        choices["solve.utility_weight"] = [1.0, 2.0, 4.0]
    tree: dict[str, Any] = {key: {"choice": values} for key, values in choices.items()}
    if "objective.target" in tree:
        when = {"objective.target": "cluster_mean"}
        tree["objective.clusters"] = {"choice": [8, 32, 128], "when": when}
    tree |= _of_pruning(cfg)
    # The best strength depends on all other keys. So where `auto` finds it for each trial, with the
    # holdout set, no draw does better.
    strength = cfg.solve.strength
    if shifts_to_targets and strength != "auto":
        tree["solve.strength"] = {"loguniform": [strength / 8, strength * 8]}
    if shifts_to_targets and reads_text:
        tree["solve.fact_weight"] = {"loguniform": [1.0, 16.0]}
    if cfg.train.steps > 0:
        tree |= _of_gradient_steps(cfg)
    return tree


def _of_pruning(cfg: UnlearnConfig) -> dict[str, Any]:
    """Return the part of the default space that is on pruning."""
    if cfg.prune.method == "none":
        return {}
    methods = ["rows", "magnitude", "wanda"]
    if cfg.train.deepspeed.stage == 3:
        # It reads unpartitioned weights.
        methods.remove("wanda")
    return {"prune.method": {"choice": methods}, "prune.sparsity": {"uniform": [0.1, 0.7]}}


def _of_gradient_steps(cfg: UnlearnConfig) -> dict[str, Any]:
    """Return the part of the default space that is on gradient steps."""
    tree: dict[str, Any] = {}
    targets = cfg.adapter.targets
    if len(targets) > 1:
        single = [[target] for target in targets]
        tree["adapter.targets"] = {"choice": [list(targets), *single]}
    tree["adapter.alpha"] = {"choice": [8, 16, 32, 64]}
    tree["train.learning_rate"] = {"loguniform": [1e-4, 3e-2]}
    objective = cfg.objective
    if objective.target == "steering" and objective.weights.forget > 0:
        tree["objective.steering"] = _around(objective.steering)
    if objective.negate > 0:
        # Where Ilharco et al. 2023 (arXiv 2212.04089) search it.
        tree["objective.negate"] = {"uniform": [0.05, 1.0]}
    if objective.weights.output > 0:
        for name, parameter in FORGET_LOSSES[objective.output].parameters.items():
            value = objective.output_parameters.get(name, parameter.default)
            if value > 0:
                tree[LOSS_PARAMETERS + name] = _around(value, parameter.low, parameter.high)
    # A method and PruneLoRA weigh their own terms alone.
    has_own_terms = objective.method is not None or cfg.prune.method != "none"
    weights = {name: value for name, value in objective.weights if value > 0 or not has_own_terms}
    if cfg.data.earlier is not None:
        weights.pop("task", None)  # it would teach the rows of earlier requests again
    if len(weights) > 1:
        for name, value in weights.items():
            tree[f"objective.weights.{name}"] = _around(value or 1.0)
    return tree


def _around(value: float, low: float = 0.0, high: float = math.inf) -> dict[str, list[float]]:
    """Return a range of a tenth to ten times a value, within bounds."""
    return {"loguniform": [max(value / 10, low), min(value * 10, high)]}


def _distinct(*values: Any) -> list[Any]:
    """Return the values without repetitions, in order."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct
