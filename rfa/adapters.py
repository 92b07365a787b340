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
    """Full names of the layers that `targets` and `layers` choose, lowest first; with `everywhere` and without
    `layers` also outside the blocks, as a classifier's head is.

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
    found = [name for name, m in model.named_modules() if isinstance(m, _ADAPTABLE)]
    found = [name for name in found if everywhere or name.startswith(f"{prefix}.")]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in found):
            choices = ", ".join(sorted({ending(name) for name in found}))
            whose = "this model has" if everywhere else "this model's blocks have"
            raise ValueError(
                f"adapter.targets: no linear layer ends with '{target}'; {whose}: {choices}"
            )
    own = [name for name in found if any(f".{name}".endswith(f".{target}") for target in targets)]
    chosen = [name for name in own if everywhere or first <= block_range(model, name)[0] <= last]
    if not chosen:
        raise ValueError(
            f"adapter.layers: blocks {first} to {last} have no layer that ends with one of {list(targets)}"
        )
    return chosen


def ending(name: str) -> str:
    """The last part of a name, with the part before it where the last is a number, as in `nn.Sequential`."""
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
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT only divides it by r
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
    """The adapted modules with their names, in the model's order."""
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]


def check_gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Every trainable parameter must get a gradient from the logits, else it would never learn.

    A known trap is `nn.MultiheadAttention`, which reads its output projection's weight directly. Costs one forward and
    one backward pass on `inputs`; on the meta device, nothing.

    Raises:
        ValueError: names the parameters without one.
    """
    model(**inputs).logits.float().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    if silent:
        shown = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        raise ValueError(
            f"adapter.targets: no gradient reaches {shown}; choose layers that the forward pass calls"
        )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model's own output, by scaling the residuals with 0.

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
