"""The search space: dotted configuration keys with distributions, checked before anything runs.

    adapter.rank: {choice: [8, 16, 32]}
    solve.strength: {loguniform: [1.0e-4, 1.0e-1]}
    objective.weights.kl: {uniform: [0, 1]}
    train.steps: {int: [20, 200]}
    objective.clusters: {choice: [8, 32, 128], when: {objective.target: cluster_mean}}

`when` makes a key part of a trial only where other keys of the space, named before it, have the value given.
"""

import json
import math
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipelines.config.load import describe, with_values
from pipelines.config.schema import ConfigError, UnlearnConfig

KINDS = ("choice", "uniform", "loguniform", "int")
SEARCHED = ("adapter.", "objective.", "solve.", "prune.")
SEARCHED_KEYS = tuple(
    f"train.{key}" for key in ("steps", "learning_rate", "warmup_steps", "clip_norm")
)


class Dimension(NamedTuple):
    """One key: `values` are the choices, or the lowest and the highest value."""

    key: str
    kind: str
    values: tuple[Any, ...]
    when: tuple[tuple[str, Any], ...] = ()

    def applies(self, chosen: Mapping[str, Any]) -> bool:
        """Whether the key is part of a trial with these values."""
        return all(key in chosen and chosen[key] == value for key, value in self.when)


class Space(NamedTuple):
    """All dimensions, each after those its condition names."""

    dimensions: tuple[Dimension, ...]

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Values for one trial, from an Optuna trial."""
        chosen: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.applies(chosen):
                chosen[dimension.key] = _suggest(trial, dimension)
        return chosen

    def tree(self) -> dict[str, Any]:
        """The space as a YAML tree."""
        return {
            own.key: {own.kind: list(own.values), **({"when": dict(own.when)} if own.when else {})}
            for own in self.dimensions
        }

    def points(self) -> list[dict[str, Any]]:
        """Every point of a space of choices and integers, as Optuna's parameters.

        Raises:
            ConfigError: a dimension is continuous.
        """
        axes = {dimension.key: _grid_values(dimension) for dimension in self.dimensions}
        found: dict[str, dict[str, Any]] = {}
        for values in product(*axes.values()):
            full = dict(zip(axes, values, strict=True))
            chosen: dict[str, Any] = {}
            for dimension in self.dimensions:
                if dimension.applies(chosen):
                    chosen[dimension.key] = full[dimension.key]
            found[json.dumps(chosen)] = {key: encoded(value) for key, value in chosen.items()}
        return list(found.values())

    def corners(self) -> Iterator[tuple[Dimension, Any]]:
        """Every choice, and both ends of every range."""
        for dimension in self.dimensions:
            for value in dimension.values:
                yield dimension, value


def encoded(value: Any) -> Any:
    """A choice as Optuna takes it: lists as JSON."""
    return json.dumps(value) if isinstance(value, list) else value


def _suggest(trial: Any, dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        by_code = {encoded(value): value for value in dimension.values}
        return by_code[trial.suggest_categorical(dimension.key, list(by_code))]
    low, high = dimension.values
    if dimension.kind == "int":
        return trial.suggest_int(dimension.key, low, high)
    return trial.suggest_float(dimension.key, low, high, log=dimension.kind == "loguniform")


def _grid_values(dimension: Dimension) -> list[Any]:
    if dimension.kind == "choice":
        return list(dimension.values)
    if dimension.kind == "int":
        return list(range(dimension.values[0], dimension.values[1] + 1))
    raise ConfigError(
        f"{dimension.key}: found {dimension.kind}, allowed with --method grid: choice or int"
    )


def load_space(path: Path, cfg: UnlearnConfig) -> Space:
    """Read a space file and check it against a configuration.

    Raises:
        ConfigError: the file is no such space, or a value is not allowed in the configuration.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({type(error).__name__}); allowed: a YAML file"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return read_space(tree, cfg, str(path))


def read_space(tree: Any, cfg: UnlearnConfig, source: str) -> Space:
    """A space from its YAML tree; `source` is what errors call it. Errors as `load_space`."""
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(
            f"{source}: found {type(tree).__name__}, allowed: configuration keys with distributions"
        )
    dimensions: list[Dimension] = []
    for key, entry in tree.items():
        dimensions.append(_dimension(str(key), entry, [own.key for own in dimensions], source))
    space = Space(tuple(dimensions))
    for dimension, value in space.corners():
        try:
            with_values(cfg, {**dict(dimension.when), dimension.key: value})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
    return space


def _dimension(key: str, entry: Any, before: list[str], source: str) -> Dimension:
    if key not in {known for known, _, _ in describe()}:
        raise ConfigError(
            f"{source}: {key}: unknown key, allowed: keys that `ray-unlearn run --help` lists"
        )
    if not key.startswith(SEARCHED) and key not in SEARCHED_KEYS:
        allowed = ", ".join([f"{prefix}*" for prefix in SEARCHED] + list(SEARCHED_KEYS))
        raise ConfigError(f"{source}: {key}: not a key to search over, allowed: {allowed}")
    kinds = [kind for kind in KINDS if isinstance(entry, dict) and kind in entry]
    if len(kinds) != 1 or set(entry) - {kinds[0], "when"} or not isinstance(entry[kinds[0]], list):
        raise ConfigError(
            f"{source}: {key}: found {json.dumps(entry)[:80]}, allowed: one of {', '.join(KINDS)} with a list, and when"
        )
    kind, values = kinds[0], entry[kinds[0]]
    _check_values(key, kind, values, source)
    when = entry.get("when", {})
    if not isinstance(when, dict) or set(when) - set(before):
        raise ConfigError(
            f"{source}: {key}.when: found {json.dumps(when)[:80]}, allowed: keys named before it: {', '.join(before)}"
        )
    return Dimension(key, kind, tuple(values), tuple(when.items()))


def _check_values(key: str, kind: str, values: list[Any], source: str) -> None:
    if kind == "choice":
        if not values:
            raise ConfigError(f"{source}: {key}: found no choice, allowed: at least one")
        return
    numbers = [
        value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    fits = (
        len(values) == len(numbers) == 2
        and all(map(math.isfinite, numbers))
        and numbers[0] < numbers[1]
    )
    if kind == "loguniform":
        fits = fits and numbers[0] > 0
    if kind == "int":
        fits = fits and all(isinstance(number, int) for number in numbers)
    if not fits:
        wanted = {
            "uniform": "two numbers",
            "loguniform": "two numbers above 0",
            "int": "two whole numbers",
        }[kind]
        raise ConfigError(
            f"{source}: {key}: found {json.dumps(values)[:80]}, allowed: {wanted}, the smaller first"
        )


def default_space(cfg: UnlearnConfig, depth: int) -> dict[str, Any]:
    """A sensible space for a configuration, as a YAML tree: the solver's, the gradient loop's, pruning's, as far as it
    uses them.

    Args:
        depth: blocks of a language model.
    """
    reads_text, tree = cfg.task == "causal_lm", dict[str, Any]()
    tree["adapter.rank"] = {"choice": [8, 16, 32, 64]}
    if reads_text:  # a classifier's head, outside the blocks, may be adapted, too
        last = depth - 1
        # The lowest blocks matter: without them nothing was forgotten at a price worth it (docs/one_pass.md).
        layers = [[0, last], [0, 3 * last // 4], [depth // 8, last]]
        tree["adapter.layers"] = {
            "choice": [own for place, own in enumerate(layers) if own not in layers[:place]]
        }
        tree["objective.tokens"] = {"choice": ["answer", "all"]}
    if cfg.solve.mode != "off" or cfg.objective.weights.forget > 0:
        tree |= {
            "objective.target": {
                "choice": list(dict.fromkeys([cfg.objective.target, "cluster_mean", "retain_mean"]))
            },
            "objective.clusters": {
                "choice": [8, 32, 128],
                "when": {"objective.target": "cluster_mean"},
            },
        }
    if cfg.prune.method != "none":
        whole = cfg.train.deepspeed.stage != 3  # which wanda has to see
        tree |= {
            "prune.method": {"choice": ["rows", "magnitude", *(["wanda"] if whole else [])]},
            "prune.sparsity": {"uniform": [0.1, 0.7]},
        }
    if cfg.solve.mode != "off":
        tree["solve.utility_weight"] = {"choice": [1.0, 2.0, 4.0]}
        # Where a holdout set finds each trial's strength, no draw does better: the right one depends on all other keys.
        if cfg.solve.strength != "auto":
            tree["solve.strength"] = {
                "loguniform": [cfg.solve.strength / 8, cfg.solve.strength * 8]
            }
        if reads_text:
            tree["solve.fact_weight"] = {"loguniform": [1.0, 16.0]}
    if cfg.train.steps > 0:
        tree |= _of_gradient_steps(cfg)
    return tree


def _of_gradient_steps(cfg: UnlearnConfig) -> dict[str, Any]:
    """What the gradient loop adds. Pruned models keep to the terms they have: the paper's has one."""
    targets = [list(cfg.adapter.targets), *([own] for own in cfg.adapter.targets)]
    weights = [
        name for name, value in cfg.objective.weights if value > 0 or cfg.prune.method == "none"
    ]
    return {
        **({"adapter.targets": {"choice": targets}} if len(targets) > 2 else {}),
        "adapter.alpha": {"choice": [8, 16, 32, 64]},
        "train.learning_rate": {"loguniform": [1e-4, 3e-2]},
        **(
            {f"objective.weights.{name}": {"loguniform": [0.1, 10.0]} for name in weights}
            if len(weights) > 1
            else {}
        ),
    }
