"""A configuration as text: files, presets and overrides in, `--help` and config.yaml out.

A configuration is a YAML file or a preset's name plus dotted overrides (`train.steps=50`). OmegaConf merges them,
pydantic validates the result. Wrong input raises `ConfigError`, one line that names the key, what was found and
what is allowed.
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

from pipelines.config.data import SetName, SourceConfig
from pipelines.config.schema import ConfigError, Section, UnlearnConfig


def describe(
    section: type[BaseModel] = UnlearnConfig, prefix: str = ""
) -> list[tuple[str, str, str]]:
    """Every key as (dotted key, default, meaning), in the order of the tree."""
    keys: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        types: tuple[Any, ...] = (field.annotation, *get_args(field.annotation))
        if SourceConfig in types:
            name = {"forget": "{" + ",".join(get_args(SetName)) + "}"}.get(name, "")
        nested = next((t for t in types if hasattr(t, "model_fields")), None)
        if nested is not None and name:
            keys += describe(nested, f"{prefix}{name}.")
        elif nested is None:
            default = "required" if field.is_required() else str(field.default)
            limits = ", ".join(_limit(limit) for limit in field.metadata if _limit(limit))
            choices = (
                f"one of {', '.join(map(str, get_args(field.annotation)))}"
                if _is_literal(field.annotation)
                else ""
            )
            allowed = f" ({choices or limits})" if choices or limits else ""
            keys.append((f"{prefix}{name}", default, f"{field.description}{allowed}"))
    return keys


def _is_literal(annotation: Any) -> bool:
    return get_origin(annotation) is Literal


def _limit(limit: Any) -> str:
    signs = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}
    sign = signs.get(type(limit).__name__)
    return "" if sign is None else f"{sign} {getattr(limit, type(limit).__name__.lower()):g}"


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(
        Path(str(p)).stem
        for p in resources.files("pipelines.config.presets").iterdir()
        if p.name.endswith(".yaml")
    )


def load_config(source: str, overrides: list[str] | None = None) -> UnlearnConfig:
    """`read_config`, with local folders by their absolute paths: workers run in another directory.

    Raises:
        ConfigError: as `read_config`.
    """
    return _with_absolute_paths(read_config(source, overrides))


def read_config(source: str, overrides: list[str] | None = None) -> UnlearnConfig:
    """Read a YAML file or a preset, apply dotted overrides, validate.

    Raises:
        ConfigError: the file is missing or unreadable, an override is not `key=value`, or a key or value is wrong.
    """
    overrides = overrides or []
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"override '{override}': found no '=', allowed: key=value, for example train.steps=50"
            )
    try:
        tree = OmegaConf.create(yaml.safe_load(_config_text(source)))
        if not OmegaConf.is_dict(tree):
            raise ConfigError(
                f"{source}: found {type(tree).__name__}, allowed: a YAML mapping of keys"
            )
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(overrides))
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{source}: not a configuration: {' '.join(str(error).split())}"
        ) from error
    try:
        return UnlearnConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def with_values(cfg: UnlearnConfig, values: dict[str, Any]) -> UnlearnConfig:
    """The configuration with some values changed, by dotted key.

    Raises:
        ConfigError: as `load_config`.
    """
    tree = cfg.model_dump(mode="json")
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    try:
        return UnlearnConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _with_absolute_paths(cfg: UnlearnConfig) -> UnlearnConfig:
    update: dict[str, Any] = {}
    if "://" not in cfg.output_dir:
        update["output_dir"] = os.path.abspath(Path(cfg.output_dir).expanduser())
    if Path(cfg.model.path).expanduser().exists():
        path = os.path.abspath(Path(cfg.model.path).expanduser())
        update["model"] = cfg.model.model_copy(update={"path": path})
    if cfg.evaluation.oracle is not None and Path(cfg.evaluation.oracle).expanduser().exists():
        path = os.path.abspath(Path(cfg.evaluation.oracle).expanduser())
        update["evaluation"] = cfg.evaluation.model_copy(update={"oracle": path})
    return cfg.model_copy(update=update)


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
            f"preset '{source}': not found, allowed: {', '.join(preset_names())}, or a path to a .yaml file"
        )
    return (
        resources.files("pipelines.config.presets")
        .joinpath(f"{source}.yaml")
        .read_text(encoding="utf-8")
    )


def _explain(error: ValidationError) -> str:
    """The first fault as one line: key, what was found, what is allowed."""
    faults = error.errors()
    fault, keys = faults[0], _keys_of(faults[0]["loc"])
    key = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key, allowed here: {', '.join(_keys_beside(keys))}"
    if fault["type"] == "missing":
        return f"{key}: missing, required"
    # A key that takes values of several kinds has a fault for each.
    wanted = [
        str(own["msg"]).removeprefix("Value error, ")
        for own in faults
        if _keys_of(own["loc"]) == keys
    ]
    found = fault["input"]
    shown = (
        f"found {found!r}, " if isinstance(found, (str, int, float, bool, type(None), list)) else ""
    )
    return f"{key}: {shown}" + " or ".join(
        f"{message[0].lower()}{message[1:]}" for message in wanted
    )


def _keys_of(location: tuple[int | str, ...]) -> list[str]:
    """A fault's place without pydantic's names for the kinds of a union."""
    return [
        str(part) for part in location if not str(part).startswith(("constrained-", "literal["))
    ]


def _keys_beside(keys: list[str]) -> list[str]:
    section: Any = UnlearnConfig
    for part in keys[:-1]:
        annotation = section.model_fields[part].annotation
        section = next(
            (
                t
                for t in (annotation, *getattr(annotation, "__args__", ()))
                if hasattr(t, "model_fields")
            ),
            section,
        )
    return list(section.model_fields)


def to_yaml(cfg: Section) -> str:
    """The fully resolved configuration as YAML."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two resolved configurations."""
    keys: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            keys += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            keys.append(f"{prefix}{key}")
    return keys


def short_hash(text: str) -> str:
    """First 12 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
