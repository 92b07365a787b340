"""LoRA on chosen linear layers and convolutions, through PEFT."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rfa.blocks import block_range, find_blocks

ADAPTER = "default"
_ADAPTABLE = (nn.Linear, Conv1D, nn.Conv2d)
# Layers of state-space models whose weights are read beside the layers' forward, by model type. An
# adapter on them would compute nothing, and PEFT refuses most.
_MAMBA = ("out_proj", "dt_proj")
_READ_BESIDE = {
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": ("out_proj",),
    "falcon_h1": ("out_proj",),
    "nemotron_h": ("out_proj",),
}


def target_names(
    model: nn.Module,
    targets: Sequence[str],
    layers: tuple[int, int] | None,
    *,
    everywhere: bool = False,
) -> list[str]:
    """Return the full names of the layers that `targets` and `layers` choose, lowest first.

    With `everywhere` and without `layers`, layers outside the blocks are matched too, such as a
    classifier's head.

    Raises:
        ValueError: a target matches nothing, or the layers lie outside the model. The message lists
            the choices.
    """
    prefix, blocks = find_blocks(model)
    first, last = layers if layers is not None else (0, len(blocks) - 1)
    if not 0 <= first <= last < len(blocks):
        raise ValueError(
            f"adapter.layers: found [{first}, {last}], allowed: 0 to {len(blocks) - 1}"
        )
    everywhere = everywhere and layers is None
    inside = "" if everywhere else f"{prefix}."
    adaptable, beside = _layers_within(model, inside)
    matched: set[str] = set()
    for target in targets:
        ends = _ending_with(target, adaptable)
        if not ends:
            fault = f"no linear layer ends with '{target}'"
            if _ending_with(target, beside):
                fault = f"found '{target}', whose weight this model reads beside the layer"
            elif _ending_with(target, fused_weights(model)):
                fault = f"found '{target}', the fused weights of all experts, which are no layer"
            choices = ", ".join(sorted({ending(name) for name in adaptable}))
            whose = "this model has" if everywhere else "this model's blocks have"
            raise ValueError(f"adapter.targets: {fault}; {whose}: {choices}")
        matched |= ends
    names: list[str] = []
    for name in adaptable:
        if name in matched and (everywhere or first <= block_range(model, name)[0] <= last):
            names.append(name)
    if not names:
        raise ValueError(
            f"adapter.layers: no layer of blocks {first} to {last} ends with one of {list(targets)}"
        )
    return names


def _layers_within(model: nn.Module, prefix: str) -> tuple[list[str], list[str]]:
    """Return the layers that can be adapted, and those whose weights are read beside them."""
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    unread = _READ_BESIDE.get(kind, ())
    adaptable: list[str] = []
    beside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, _ADAPTABLE) and name.startswith(prefix):
            (beside if ending(name) in unread else adaptable).append(name)
    return adaptable, beside


def _ending_with(target: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if f".{name}".endswith(f".{target}")}


def fused_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of many layers in one tensor, [layers, O, D] or [layers, D, O], by name.

    Experts are kept so. No module is called with what one of them sees.
    """
    fused: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        # A convolution's weight is one layer's, whatever its dimensions.
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for own, weight in module.named_parameters(name, recurse=False):
            if weight.ndim == 3 and min(weight.shape) > 1:
                fused[own] = weight
    return fused


def ending(name: str) -> str:
    """Return the last part of a name, or the last two if the last is a number.

    The children of an `nn.Sequential` are numbered, and a number alone names no kind of layer.
    """
    parts = name.rsplit(".", 2)
    if parts[-1].isdigit():
        return ".".join(parts[-2:])
    return parts[-1]


def attach(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    layers: tuple[int, int] | None = None,
    dropout: float = 0.0,
    everywhere: bool = False,
) -> PeftModel:
    """Freeze a model and put LoRA on the chosen layers.

    B starts at zero, so that the model computes what it did before. A layer that has fewer inputs
    or outputs than `rank` gets as many ranks as these, since more would change nothing, and the
    same alpha / rank as the others.

    Raises:
        ValueError: as `target_names`.
    """
    names = target_names(model, targets, layers, everywhere=everywhere)
    # Conv1D stores its weight transposed, and PEFT has one setting for all the layers.
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    ranks = _smaller_ranks(model, names, rank)
    config = LoraConfig(
        r=rank,
        # PEFT asks for an integer, but only divides it by r.
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        rank_pattern=ranks,
        alpha_pattern={name: alpha * own / rank for name, own in ranks.items()},
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=transposed,
        # PEFT's classes for classification would train and save the whole head beside the adapter.
        task_type=None if everywhere else "CAUSAL_LM",
    )
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"adapter.targets: PEFT refuses them ({reason}); choose others") from None
    # PEFT matches names by their ends, and takes old names of experts for their fused weights.
    adapted = {name.removeprefix("base_model.model.") for name, _ in lora_layers(peft_model)}
    if adapted != set(names):
        strange = ", ".join(sorted(adapted ^ set(names))[:3])
        raise ValueError(
            f"adapter.targets: PEFT takes their names for others' in this model ({strange}, ...); "
            "choose layers that no experts share a name with"
        )
    return peft_model


def attach_everywhere(model: nn.Module, rank: int) -> PeftModel:
    """Freeze a model and put LoRA on every layer but the head, experts' fused weights included."""
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="all-linear",
        exclude_modules=list(_READ_BESIDE.get(kind, ())) or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def _smaller_ranks(model: nn.Module, names: Iterable[str], rank: int) -> dict[str, int]:
    """Return the largest useful rank of each layer where it is below `rank`, by PEFT's pattern."""
    ranks: dict[str, int] = {}
    for name in names:
        module: Any = model.get_submodule(name)
        shape = full_shape(module.weight)
        own = min(shape[0], math.prod(shape[1:]))
        # PEFT gives each group of a convolution the same part of the rank.
        if own < rank and getattr(module, "groups", 1) == 1:
            ranks[f"^{re.escape(name)}$"] = own
    return ranks


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Return the adapted modules with their names, in the model's order."""
    modules = model.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, LoraLayer)]


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Make the model compute as its base within the scope, by scaling the residuals with 0.

    Unlike PEFT's `disable_adapter` this changes neither `requires_grad` nor the order in which
    modules run, which DeepSpeed's ZeRO-3 prefetch depends on.
    """
    return adapters_scaled(model, 0.0)


@contextmanager
def adapters_scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the residuals with a factor within the scope."""
    layers = [module for _, module in lora_layers(model)]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    for layer, scale in zip(layers, scales, strict=True):
        layer.scaling[ADAPTER] = scale * factor
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


@torch.no_grad()
def scale_adapters_(model: nn.Module, factor: float) -> None:
    """Multiply the residuals with a factor for good: what is saved or merged from then on, too."""
    for _, layer in lora_layers(model):
        up: Any = layer.lora_B[ADAPTER]
        up.weight.mul_(factor)


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapters' dropout off within the scope: a solver sees what the model computes."""
    dropouts = [module.lora_dropout for _, module in lora_layers(model)]
    modes = [dropout.training for dropout in dropouts]
    for dropout in dropouts:
        dropout.eval()
    try:
        yield
    finally:
        for dropout, mode in zip(dropouts, modes, strict=True):
            dropout.train(mode)


def input_width(layer: Any) -> int:
    """Return D of an adapted layer."""
    return math.prod(full_shape(layer.lora_A[ADAPTER].weight)[1:])


def output_width(layer: Any) -> int:
    """Return O of an adapted layer."""
    return full_shape(layer.lora_B[ADAPTER].weight)[0]


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's full shape, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
