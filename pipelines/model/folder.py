"""What a model folder must be, before anything is loaded from it: readable, whole and unquantised."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.utils import logging as transformers_logging

from pipelines.config.schema import ConfigError, ModelConfig
from pipelines.config.text import reason_of
from pipelines.storage.hub import require_hub

AUTO_CLASSES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}
NAMES_IN_A_MESSAGE = 3


def load_model_config(
    model: ModelConfig, key: str = "model.path", *, wants_weights: bool = True
) -> PretrainedConfig:
    """Load a model's config.json, and check a local folder for its weights if `wants_weights`.

    Raises:
        ConfigError: a local folder is no model, its weights are quantised, or a hub name cannot be
            reached.
    """
    folder = Path(model.path)
    if is_local(model):
        check_folder(folder, key, wants_weights=wants_weights)
    try:
        if not folder.exists():
            require_hub(model.path, "model", model.revision)
        config = AutoConfig.from_pretrained(
            model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=folder.exists(),  # else a folder's path is looked up on the hub
        )
    except Exception as error:  # a broken configuration raises what it likes
        raise ConfigError(
            f"{key}: {model.path} cannot be loaded ({reason_of(error)}); "
            "allowed: a model folder or a hub name"
        ) from None
    quantised = getattr(config, "quantization_config", None)
    # To be scored a model may be quantised.
    if quantised and key == "model.path":
        method = dict(quantised).get("quant_method", "an unnamed method")
        raise ConfigError(
            f"{key}: the weights of {model.path} are quantised ({method}), and an adapter could "
            "not be merged into them; give the model in 16 or 32 bits, dequantised if need be"
        )
    attention = getattr(config, "_attn_implementation", None)
    # transformers would fetch such a kernel from the hub, on every worker and in the middle of a run.
    if isinstance(attention, str) and "/" in attention:
        raise ConfigError(
            f"{key}: the config.json of {model.path} asks for an attention kernel of the hub "
            f"(attn_implementation: '{attention}'), allowed: eager or sdpa, or without the entry"
        )
    return config


def is_local(model: ModelConfig) -> bool:
    """Return whether a model is a folder, or was meant to be one, and not a hub name."""
    folder = Path(model.path)
    return folder.exists() or folder.is_absolute() or model.path.startswith((".", "~"))


def check_folder(folder: Path, key: str, *, wants_weights: bool) -> None:
    """Require a folder with a configuration, with safetensors weights, and without an adapter.

    Raises:
        ConfigError: one line that names what is missing or in the way.
    """
    if not folder.exists():
        raise ConfigError(f"{key}: found no folder {folder}, allowed: a model folder or a hub name")
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{key}: {folder} holds an adapter (adapter_config.json), which would be loaded into "
            "the model unsaid; merge it and give the merged model, or take its files out"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}: {folder} is not a model folder: found no config.json in it")
    if wants_weights and not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{key}: {folder} holds no .safetensors weights; pickled weights are refused"
        )
    check_weight_index(folder, key)


def check_weight_index(folder: Path, key: str) -> None:
    """Require that an index of weights in several files names .safetensors files in its folder.

    Otherwise an index could name pickled weights, which run code when they are loaded.

    Raises:
        ConfigError: the index cannot be read, or names another file or one that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(
            f"{key}: {index} is no index of weights, allowed: what save_pretrained writes"
        ) from None
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(
                f"{key}: {index} names '{name}', allowed: .safetensors files of that folder"
            )
        if not (folder / name).is_file():
            raise ConfigError(f"{key}: {index} names {name}, which is not in {folder}")


def check_weights(model: ModelConfig, task: str, key: str, *, new_head: bool = False) -> None:
    """Require that a folder's weights are those of its architecture, each of them and no others.

    What is missing would be drawn at random, anew at every load. Names and shapes are read, and no
    values. A hub name is passed, as its weights are not here yet: they are checked when they are
    loaded. With `new_head` the head may be missing, as in `refuse_unmatched`.

    Raises:
        ConfigError: one line with the first names of what is missing or too much.
    """
    if not is_local(model):
        return
    try:
        with _without_load_report():
            network, found = AUTO_CLASSES[task].from_pretrained(
                model.path,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                device_map="meta",
                output_loading_info=True,
            )
    except Exception as error:  # broken files raise what they like
        raise ConfigError(
            f"{key}: the weights of {model.path} do not load ({reason_of(error)}); "
            "allowed: what save_pretrained writes for the model of its config.json"
        ) from None
    refuse_unmatched(model, network, found, key, new_head=new_head)


def refuse_unmatched(
    model: ModelConfig, network: Any, found: Mapping[str, Any], key: str, *, new_head: bool = False
) -> None:
    """Refuse weights of which `found`, transformers' account of the loading, names no match.

    With `new_head` all that the network has beside its body may be missing or another's, because a
    classifier's head is yet to be learned.

    Raises:
        ConfigError: one line with the first names of what is missing or too much.
    """
    missing, surplus = set(found["missing_keys"]), set(found["unexpected_keys"])
    if new_head:
        body = f"{network.base_model_prefix}."
        pooler = f"{body}pooler."  # some heads have one, others pool by themselves
        missing = {name for name in missing if name.startswith(body)}
        surplus = {name for name in surplus if name.startswith(body)}
        missing, surplus = (
            {name for name in names if not name.startswith(pooler)} for names in (missing, surplus)
        )
    faults: list[str] = []
    if missing:
        faults.append(f"lack {len(missing)} of the tensors of its config.json{_named(missing)}")
    if surplus:
        faults.append(f"hold {len(surplus)} that it does not have{_named(surplus)}")
    if faults:
        raise ConfigError(
            f"{key}: the weights of {model.path} {' and '.join(faults)}; "
            "allowed: what save_pretrained writes for that model, without a wrapper's prefix"
        )


def _named(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:NAMES_IN_A_MESSAGE])
    return f" ({shown}, ...)" if len(names) > NAMES_IN_A_MESSAGE else f" ({shown})"


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from printing a table of the keys that do not match."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
