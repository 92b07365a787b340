"""LoRA on chosen linear layers and convolutions, through PEFT."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rfa.blocks import block_range, find_blocks

ADAPTER = "default"
_ADAPTABLE = (nn.Linear, Conv1D, nn.Conv2d)


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
    adaptable: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, _ADAPTABLE) and (everywhere or name.startswith(f"{prefix}.")):
            adaptable.append(name)
    matched: set[str] = set()
    for target in targets:
        ends = {name for name in adaptable if f".{name}".endswith(f".{target}")}
        if not ends:
            choices = ", ".join(sorted({ending(name) for name in adaptable}))
            whose = "this model has" if everywhere else "this model's blocks have"
            raise ValueError(
                f"adapter.targets: no linear layer ends with '{target}'; {whose}: {choices}"
            )
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

    B starts at zero, so that the model computes what it did before.

    Raises:
        ValueError: as `target_names`.
    """
    names = target_names(model, targets, layers, everywhere=everywhere)
    # Conv1D stores its weight transposed, and PEFT has one setting for all the layers.
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    config = LoraConfig(
        r=rank,
        # PEFT asks for an integer, but only divides it by r.
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=transposed,
        # PEFT's classes for classification would train and save the whole head beside the adapter.
        task_type=None if everywhere else "CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    # PEFT matches names by their ends, and could adapt more layers than were named.
    adapted = [name for name, _ in lora_layers(peft_model)]
    assert len(adapted) == len(names), (adapted, names)
    return peft_model


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Return the adapted modules with their names, in the model's order."""
    modules = model.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, LoraLayer)]


def check_gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Raise unless every trainable parameter gets a gradient from the logits.

    A parameter without one would never learn. A known trap is `nn.MultiheadAttention`, which reads
    its output projection's weight and never calls the layer. The check costs one forward and one
    backward pass on `inputs`, and nothing on the meta device.

    Raises:
        ValueError: the message names the parameters without a gradient.
    """
    model(**inputs).logits.float().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    if silent:
        shown = ", ".join(silent[:3])
        if len(silent) > 3:
            shown += f" and {len(silent) - 3} more"
        raise ValueError(
            f"adapter.targets: no gradient reaches {shown}; "
            "choose layers that the forward pass calls"
        )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Make the model compute as its base within the scope, by scaling the residuals with 0.

    Unlike PEFT's `disable_adapter` this changes neither `requires_grad` nor the order in which
    modules run, which DeepSpeed's ZeRO-3 prefetch depends on.
    """
    layers = [module for _, module in lora_layers(model)]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


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
