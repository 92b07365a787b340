"""Models: found, checked without their weights, loaded on the worker, digested."""

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from pipelines.config.schema import ConfigError, ModelConfig, UnlearnConfig
from pipelines.model.engine import whole
from pipelines.model.pruning import Masks
from rfa.adapters import attach, check_gradients
from rfa.objective import ResidualAlignment
from rfa.pruning import hold_rows_, prune_targets

AUTO_CLASSES = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model_config(
    model: ModelConfig, key: str = "model.path", *, wants_weights: bool = True
) -> PretrainedConfig:
    """The model's own configuration; a local folder must hold its weights, too, unless they are not wanted.

    Raises:
        ConfigError: a local folder that is not a model, or a hub name that cannot be reached.
    """
    folder = Path(model.path)
    if folder.exists() or folder.is_absolute() or model.path.startswith((".", "~")):
        if not folder.exists():
            raise ConfigError(
                f"{key}: found no folder {model.path}, allowed: a model folder or a hub name"
            )
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{key}: {model.path} is not a model folder: found no config.json in it"
            )
        if wants_weights and not list(folder.glob("*.safetensors")):
            raise ConfigError(
                f"{key}: {model.path} holds no .safetensors weights; pickled weights are refused"
            )
        _refuse_weights_elsewhere(folder, key)
    try:
        return AutoConfig.from_pretrained(
            model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=folder.exists(),
        )
    except (OSError, ValueError) as error:
        found = str(error).splitlines()[0]
        raise ConfigError(
            f"{key}: {model.path} cannot be loaded ({found}); allowed: a model folder or a hub name"
        ) from None


def _refuse_weights_elsewhere(folder: Path, key: str) -> None:
    """Weights in several files have an index that names them: names in this folder, and safetensors alone."""
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


def check_models(cfg: UnlearnConfig, others: dict[str, ModelConfig]) -> "ModelSize":
    """Check the model to train, and that the `others`, by their keys, can be loaded.

    Raises:
        ConfigError: as `load_model_config` and `check_model`.
    """
    for key, model in others.items():
        load_model_config(model, key)
    return check_model(cfg)


class ModelSize(NamedTuple):
    """Numbers of parameters."""

    parameters: int
    adapter: int


def check_model(cfg: UnlearnConfig) -> ModelSize:
    """Check adapter targets, layers and gradients on a model without weights.

    Raises:
        ConfigError: one line that names the key, what was found and what is allowed.
    """
    adapted = blank_model(cfg)
    try:
        check_gradients(adapted, _example(cfg, adapted.config))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    sizes = {True: 0, False: 0}
    for parameter in adapted.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    return ModelSize(sizes[False], sizes[True])


def blank_model(cfg: UnlearnConfig, model_config: PretrainedConfig | None = None) -> PeftModel:
    """The model with its adapters on the meta device: shapes, and no weights. Without `model_config`, of `cfg.model`.

    Raises:
        ConfigError: as `check_model`.
    """
    model_config = model_config or load_model_config(cfg.model)
    with torch.device("meta"):
        auto, dtype = AUTO_CLASSES[cfg.task], DTYPES[cfg.train.precision]
        try:
            base = auto.from_config(
                model_config, trust_remote_code=cfg.model.trust_remote_code, dtype=dtype
            )
        except ValueError:
            kind = model_config.model_type
            raise ConfigError(
                f"task: found {cfg.task}, which models of type {kind} are not made for"
            ) from None
    try:
        if cfg.prune.method != "none":
            prune_targets(base, cfg.prune.targets)
        return attach_adapter(base, cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _example(cfg: UnlearnConfig, model_config: PretrainedConfig) -> dict[str, Tensor]:
    """Inputs of the model's forward, without content."""
    if cfg.task != "image_classification":
        return {"input_ids": torch.ones((1, 4), dtype=torch.long, device="meta")}
    return {
        "pixel_values": torch.ones(
            (1, *image_shape(model_config)), device="meta", dtype=DTYPES[cfg.train.precision]
        )
    }


def image_shape(model_config: PretrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model reads; 64 x 64 where it takes any size."""
    side = getattr(model_config, "image_size", 64)
    height, width = (side, side) if isinstance(side, int) else side
    return getattr(model_config, "num_channels", 3), height, width


def load_base(
    model: ModelConfig, precision: str = "fp32", *, task: str = "causal_lm", spread: bool = False
) -> PreTrainedModel:
    """The model with its weights: on the CPU, partitioned, where DeepSpeed's ZeRO-3 is configured, or `spread` over
    all GPUs of this process."""
    return AUTO_CLASSES[task].from_pretrained(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=DTYPES[precision],
        use_safetensors=True,
        device_map="auto" if spread else None,
    )


def attach_adapter(base: PreTrainedModel, cfg: UnlearnConfig) -> PeftModel:
    """LoRA as the configuration says."""
    adapter = cfg.adapter
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT asks transformers by a deprecated name
        return attach(
            base,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            targets=adapter.targets,
            layers=adapter.layers,
            everywhere=cfg.task != "causal_lm",
        )


def build_alignment(
    cfg: UnlearnConfig, base: PreTrainedModel | None = None, masks: Masks | None = None
) -> ResidualAlignment:
    """Put LoRA and the objective on a base model, which is loaded unless it is given, ready to train.

    Adapters hold still what the base model's masks prune.
    """
    if base is None:
        base = load_base(cfg.model, cfg.train.precision, task=cfg.task)
    model = attach_adapter(base, cfg)
    if masks and cfg.prune.keep_sparsity:
        hold_rows_(model, masks, whole)
    objective = cfg.objective.settings()
    learns_statistics = bool(masks) and not objective.reads_forget_set
    return ResidualAlignment(model, objective, seed=cfg.seed, learns_statistics=learns_statistics)
