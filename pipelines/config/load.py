"""A configuration as text: files, presets and overrides in, `--help` and config.yaml out.

A configuration is a YAML file or a preset's name plus dotted overrides (`train.steps=50`).
OmegaConf merges them, and pydantic validates the result. Wrong input raises `ConfigError`, one
line with the key, the value that was found and the values that are allowed.
"""

import hashlib
import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pipelines.config.data import LARGEST, SetName, SourceConfig
from pipelines.config.schema import ConfigError, ModelConfig, Section, UnlearnConfig
from pipelines.config.text import parse_yaml


def describe(
    section: type[BaseModel] = UnlearnConfig, prefix: str = ""
) -> list[tuple[str, str, str]]:
    """Return every key as (dotted key, default, meaning), in the order of the tree."""
    keys: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        nested = _section_in(field.annotation)
        if nested is SourceConfig:
            # All sets have the same keys, which are listed once.
            if name != "forget":
                continue
            name = "{" + ",".join(get_args(SetName)) + "}"
        if nested is not None:
            keys += describe(nested, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else str(field.default)
        limits = list(filter(None, map(_limit, field.metadata)))
        # `Section` limits every number that has no limit of its own.
        if _is_number(field.annotation) and not any(limit.startswith("<") for limit in limits):
            limits.append(f"<= {LARGEST:g}")
        allowed = ", ".join(limits)
        if get_origin(field.annotation) is Literal:
            allowed = f"one of {', '.join(map(str, get_args(field.annotation)))}"
        meaning = f"{field.description} ({allowed})" if allowed else str(field.description)
        keys.append((f"{prefix}{name}", default, meaning))
    return keys


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key's type is or allows, None for a key with a value."""
    for kind in (annotation, *get_args(annotation)):
        if hasattr(kind, "model_fields"):
            return kind
    return None


def _is_number(annotation: Any) -> bool:
    """Return whether a key takes one number, or null."""
    return {annotation, *get_args(annotation)} <= {int, float, int | None, float | None, type(None)}


def _limit(limit: Any) -> str:
    signs = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}
    sign = signs.get(type(limit).__name__)
    return "" if sign is None else f"{sign} {getattr(limit, type(limit).__name__.lower()):g}"


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    files = resources.files("pipelines.config.presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_config(source: str, overrides: list[str] | None = None) -> UnlearnConfig:
    """Read a configuration like `read_config`, and make its local paths absolute.

    Ray's workers run in another directory, where a relative path would lead elsewhere.

    Raises:
        ConfigError: as `read_config`.
    """
    cfg = read_config(source, overrides)
    update: dict[str, Any] = {}
    if "://" not in cfg.output_dir:
        update["output_dir"] = os.path.abspath(Path(cfg.output_dir).expanduser())
    prepared = cfg.solve.prepared
    if prepared is not None and "://" not in prepared:
        absolute = os.path.abspath(Path(prepared).expanduser())
        update["solve"] = cfg.solve.model_copy(update={"prepared": absolute})
    update["model"] = cfg.model.model_copy(update={"path": _absolute(cfg.model.path)})
    oracle = cfg.evaluation.oracle
    if oracle is not None:
        absolute = _absolute(oracle) if isinstance(oracle, str) else tuple(map(_absolute, oracle))
        update["evaluation"] = cfg.evaluation.model_copy(update={"oracle": absolute})
    return cfg.model_copy(update=update)


def model_at(path: str, key: str) -> ModelConfig:
    """Return the configuration of a model that an option names.

    Raises:
        ConfigError: it can be no path. The message begins with `key`.
    """
    try:
        return ModelConfig(path=path)
    except ValidationError as error:
        raise ConfigError(_explain(error).replace("path", key, 1)) from None


def _absolute(path: str) -> str:
    """Return a model folder's absolute path. What does not exist here is a hub name, and stays."""
    folder = Path(path).expanduser()
    return os.path.abspath(folder) if folder.exists() else path


def read_config(source: str, overrides: list[str] | None = None) -> UnlearnConfig:
    """Read a YAML file or a preset, apply dotted overrides, validate.

    Raises:
        ConfigError: the file is missing or unreadable, an override is not `key=value`, or a key
            or value is wrong.
    """
    overrides = overrides or []
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"override '{override}': found no '=', "
                "allowed: key=value, for example train.steps=50"
            )
    try:
        tree = OmegaConf.create(parse_yaml(_config_text(source)))
        if not OmegaConf.is_dict(tree):
            raise ConfigError(
                f"{source}: found {type(tree).__name__}, allowed: a YAML mapping of keys"
            )
        for override in overrides:
            tree = _with_override(tree, override)
        values: Any = OmegaConf.to_container(tree, resolve=True)
    except RecursionError:
        raise ConfigError(f"{source}: found too many levels of nesting") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{source}: not a configuration: {' '.join(str(error).split())}"
        ) from error
    try:
        return UnlearnConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, f" in {source}")) from error


def _with_override(tree: Any, override: str) -> Any:
    """Return the tree with one `key=value` merged into it."""
    try:
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
    except TypeError:
        key = override.partition("=")[0]
        raise ConfigError(
            f"{key}: found a mapping, allowed: a list or a single value, as the configuration has"
        ) from None


def with_values(cfg: UnlearnConfig, values: dict[str, Any]) -> UnlearnConfig:
    """Return the configuration with other values of some dotted keys.

    Raises:
        ConfigError: as `load_config`.
    """
    tree = cfg.model_dump(mode="json")
    for key, value in values.items():
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[name] = value
    try:
        return UnlearnConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _config_text(source: str) -> str:
    path = Path(source)
    if path.suffix in {".yaml", ".yml"} or "/" in source:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{source}: cannot be read ({type(error).__name__}); allowed: a YAML file"
            ) from error
    if source not in preset_names():
        raise ConfigError(
            f"preset '{source}': not found, allowed: {', '.join(preset_names())}, "
            "or a path to a .yaml file"
        )
    preset = resources.files("pipelines.config.presets") / f"{source}.yaml"
    return preset.read_text(encoding="utf-8")


def _explain(error: ValidationError, where: str = "") -> str:
    """Return the first fault as one line: the key, the value found, the values allowed.

    `where` says in which file a key is missing.
    """
    faults = error.errors()
    fault, keys = faults[0], _keys_of(faults[0]["loc"])
    key = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        section: type[BaseModel] = UnlearnConfig
        for part in keys[:-1]:
            section = _section_in(section.model_fields[part].annotation) or section
        return f"{key}: unknown key, allowed here: {', '.join(section.model_fields)}"
    if fault["type"] == "missing":
        return f"{key}: missing{where}, required"
    # A key that takes values of several kinds has a fault for each.
    allowed: list[str] = []
    for other in faults:
        if _keys_of(other["loc"]) == keys:
            message = str(other["msg"]).removeprefix("Value error, ")
            allowed.append(f"{message[0].lower()}{message[1:]}")
    found = ""
    # Sections and mappings are not shown, since they may be long.
    if isinstance(fault["input"], str | int | float | None | list):
        found = f"found {fault['input']!r}, "
    # A fault of sections that do not agree has no key of its own: its message names one.
    if not keys:
        return allowed[0]
    return f"{key}: {found}{' or '.join(allowed)}"


def _keys_of(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that lead to a fault, without pydantic's names for a union's types."""
    return [
        str(part) for part in location if not str(part).startswith(("constrained-", "literal["))
    ]


def to_yaml(cfg: Section) -> str:
    """Return the fully resolved configuration as YAML."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ between two resolved configurations."""
    keys: list[str] = []
    for key in sorted(set(old) | set(new), key=str):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            keys += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            keys.append(f"{prefix}{key}")
    return keys


def short_hash(text: str) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
