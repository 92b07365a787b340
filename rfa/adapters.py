"""LoRA on chosen linear layers and convolutions, through PEFT."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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
    """Return full names of the layers that `targets` and `layers` choose, lowest first.

    With `everywhere` and without `layers`, layers outside the blocks are taken too, as a classifier's head is.

    Raises:
        ValueError: a target matches nothing, or the layers lie outside the model; the message lists the choices.
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
    """Return the last part of a name, with the one before it where the last is a number, as in `nn.Sequential`."""
    parts = name.rsplit(".", 2)
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


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
    """Freeze a model and put LoRA on the chosen layers; B starts at zero, so nothing changes yet.

    Raises:
        ValueError: as `target_names`.
    """
    names = target_names(model, targets, layers, everywhere=everywhere)
    config = LoraConfig(
        r=rank,
        # PEFT only divides it by r.
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        task_type=None if everywhere else "CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    adapted = [name for name, _ in lora_layers(peft_model)]
    assert len(adapted) == len(names), (adapted, names)
    return peft_model


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Return the adapted modules with their names, in the model's order."""
    modules = model.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, LoraLayer)]


def check_gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Require that every trainable parameter gets a gradient from the logits, else it would never learn.

    A known trap is `nn.MultiheadAttention`, which reads its output projection's weight directly. Costs one forward and
    one backward pass on `inputs`; on the meta device, nothing.

    Raises:
        ValueError: names the parameters without one.
    """
    model(**inputs).logits.float().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    if silent:
        shown = ", ".join(silent[:3])
        if len(silent) > 3:
            shown += f" and {len(silent) - 3} more"
        raise ValueError(
            f"adapter.targets: no gradient reaches {shown}; choose layers that the forward pass calls"
        )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Turn the model into its base within the block, by scaling the residuals with 0.

    Unlike PEFT's `disable_adapter` this changes neither `requires_grad` nor the order in which modules run, which
    DeepSpeed's ZeRO-3 prefetch depends on.
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
