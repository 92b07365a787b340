"""Models: checked on the meta device without their weights, and loaded on workers."""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from pipelines.config.schema import ConfigError, ModelConfig, UnlearnConfig
from pipelines.config.text import reason_of
from pipelines.encoding.text import TextEncoder, largest_token, load_tokenizer
from pipelines.model.blank import blank_inputs, use_first_expert
from pipelines.model.engine import whole
from pipelines.model.folder import (
    AUTO_CLASSES,
    check_weights,
    is_local,
    load_model_config,
    refuse_unmatched,
)
from pipelines.model.pruning import Masks
from rfa.adapters import attach
from rfa.calls import check_calls
from rfa.objective import ResidualAlignment
from rfa.pruning import hold_rows_, prune_targets

# Of the inputs that layers are checked with. They differ, so that rows are not taken for tokens.
ROWS, TOKENS = 2, 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_models(
    cfg: UnlearnConfig,
    others: Iterable[tuple[str, ModelConfig]] = (),
    *,
    new_head: bool = False,
) -> "ModelSize":
    """Check the model to train, and that the others can be loaded.

    Each of `others` comes with the configuration key that names it. With `new_head` the model to
    train may lack a classifier's head.

    Raises:
        ConfigError: as `load_model_config`, `check_model` and `check_weights`.
    """
    for key, model in others:
        load_model_config(model, key)
        check_weights(model, cfg.task, key)
    size = check_model(cfg)
    check_weights(cfg.model, cfg.task, "model.path", new_head=new_head)
    return size


def check_vocabulary(cfg: UnlearnConfig, others: Iterable[tuple[str, ModelConfig]] = ()) -> None:
    """Check the tokenizer, and that each model has an embedding for its tokens.

    An oracle is compared token by token: its vocabulary has the size of the scored model's.

    Raises:
        ConfigError: as `load_tokenizer`, or a vocabulary is too small or of another size.
    """
    is_language = cfg.task == "causal_lm"
    tokenizer = load_tokenizer(cfg.model, ends=is_language)
    if is_language:
        read = TextEncoder(cfg.model, None, cfg.data.max_tokens).frame_tokens()
    else:
        read = tokenizer("a")["input_ids"]
    largest = largest_token(tokenizer, read)
    scored = None
    for key, model in (("model.path", cfg.model), *others):
        size = getattr(load_model_config(model, key).get_text_config(), "vocab_size", None)
        if size is None:
            continue
        if largest >= size:
            raise ConfigError(
                f"{key}: {model.path} has a vocabulary of {size} tokens, and the tokenizer of "
                f"{cfg.model.path} gives tokens up to {largest}; allowed: a model of that tokenizer"
            )
        if key != "evaluation.oracle":
            scored = size
        elif is_language and scored not in (None, size):
            raise ConfigError(
                f"{key}: {model.path} has a vocabulary of {size} tokens, and the model that it is "
                f"compared with one of {scored}; allowed: the same number"
            )


class ModelSize(NamedTuple):
    """Numbers of parameters."""

    parameters: int
    adapter: int


def check_model(cfg: UnlearnConfig) -> ModelSize:
    """Check adapter targets, layers, how they are called, and gradients on a model without weights.

    Raises:
        ConfigError: one line that names the key, what was found and what is allowed.
    """
    adapted = blank_model(cfg)
    if cfg.task == "image_classification":
        shape = (ROWS, *image_shape(adapted.config))
        dtype = DTYPES[cfg.train.precision]
        inputs = [{"pixel_values": torch.ones(shape, device="meta", dtype=dtype)}]
    else:
        inputs = list(blank_inputs(ROWS, TOKENS, cached=cfg.task == "causal_lm"))
    tokens = TOKENS if cfg.task == "causal_lm" else None
    try:
        objective = cfg.objective.settings()
        is_read = cfg.solve.mode != "off" or (objective.aligns and objective.residual == "local")
        check_calls(adapted, inputs, rows=ROWS, tokens=tokens, features_are_read=is_read)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    sizes = {True: 0, False: 0}
    for parameter in adapted.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    return ModelSize(sizes[False], sizes[True])


def blank_model(cfg: UnlearnConfig, model_config: PretrainedConfig | None = None) -> PeftModel:
    """Build a model and its adapters on the meta device, with shapes and no weights.

    `model_config` defaults to that of `cfg.model`.

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
        except Exception as error:  # a broken configuration raises what it likes
            if "Unrecognized configuration class" in str(error):
                kind = model_config.model_type
                raise ConfigError(
                    f"task: found {cfg.task}, which models of type {kind} are not made for"
                ) from None
            raise ConfigError(
                f"model.path: no model can be made by the config.json of {cfg.model.path} "
                f"({reason_of(error)}); allowed: what save_pretrained writes"
            ) from None
    use_first_expert(base)
    try:
        if cfg.prune.method != "none":
            prune_targets(base, cfg.prune.targets)
        return attach_adapter(base, cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def image_shape(model_config: PretrainedConfig) -> tuple[int, int, int]:
    """Return channels, height and width of a model's images; 64 x 64 if it takes any size."""
    side = getattr(model_config, "image_size", 64)
    if isinstance(side, int):
        side = (side, side)
    height, width = side
    return getattr(model_config, "num_channels", 3), height, width


def load_base(
    model: ModelConfig,
    precision: str = "fp32",
    *,
    task: str = "causal_lm",
    spread: bool = False,
    key: str = "model.path",
    new_head: bool = False,
) -> PreTrainedModel:
    """Load a model with its weights on the CPU, or `spread` over all GPUs of this process.

    Inside `zero3_loading` DeepSpeed partitions the weights instead.

    Raises:
        ConfigError: the weights of a hub name are not those of its architecture. A folder's were
            checked before (`check_weights`).
    """
    network, found = AUTO_CLASSES[task].from_pretrained(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=DTYPES[precision],
        use_safetensors=True,  # pickled weights can run code
        device_map="auto" if spread else None,
        output_loading_info=True,
    )
    if not is_local(model):
        refuse_unmatched(model, network, found, key, new_head=new_head)
    return network


def stop_tokens(network: PreTrainedModel, ends: Iterable[int]) -> list[int]:
    """Return the tokens that generation stops at: these, and those that the model itself names."""
    own: Any = network.generation_config
    named = own.eos_token_id
    if named is None:
        named = []
    elif isinstance(named, int):
        named = [named]
    return sorted({*ends, *named})


def attach_adapter(base: PreTrainedModel, cfg: UnlearnConfig) -> PeftModel:
    """Attach LoRA to a model as configured.

    Raises:
        ValueError: no layer matches the targets, or a layer does not exist.
    """
    adapter = cfg.adapter
    with warnings.catch_warnings():
        # PEFT uses a name that transformers has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
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
    """Put LoRA and the objective on a base model, ready to train.

    `base` is loaded unless it is given. Adapters leave outputs at zero that `masks` prune.
    """
    if base is None:
        base = load_base(cfg.model, cfg.train.precision, task=cfg.task)
    model = attach_adapter(base, cfg)
    if masks and cfg.prune.keep_sparsity:
        hold_rows_(model, masks, whole)
    objective = cfg.objective.settings()
    learns_statistics = bool(masks) and not objective.reads_forget_set
    return ResidualAlignment(model, objective, seed=cfg.seed, learns_statistics=learns_statistics)
