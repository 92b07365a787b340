"""LoRA on chosen linear layers of chosen blocks, through PEFT."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ADAPTER = "default"
_ADAPTABLE = (nn.Linear, Conv1D)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks and its name: the outermost `ModuleList` as long as the config says.

    Raises:
        ValueError: the model has no such list.
    """
    config = getattr(model, "config", None)
    depth = config.get_text_config().num_hidden_layers if config is not None else None
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(
            f"model: no list of {depth} blocks in {type(model).__name__}, allowed: a decoder of equal blocks"
        )
    return min(lists, key=lambda item: item[0].count("."))


def target_names(model: nn.Module, targets: Sequence[str], layers: tuple[int, int] | None) -> list[str]:
    """Full names of the linear layers that `targets` and `layers` choose, lowest first.

    Raises:
        ValueError: a target matches nothing, or the layers lie outside the model; the message lists the choices.
    """
    prefix, blocks = find_blocks(model)
    first, last = layers if layers is not None else (0, len(blocks) - 1)
    if not 0 <= first <= last < len(blocks):
        raise ValueError(f"adapter.layers: found [{first}, {last}], allowed: 0 to {len(blocks) - 1}")
    linear = [name for name, m in blocks.named_modules() if isinstance(m, _ADAPTABLE)]
    endings = sorted({name.split(".", 1)[1] for name in linear})
    for target in targets:
        if not any(f".{ending}".endswith(f".{target}") for ending in endings):
            choices = ", ".join(sorted({ending.rsplit(".", 1)[-1] for ending in endings}))
            raise ValueError(
                f"adapter.targets: no linear layer ends with '{target}'; this model's blocks have: {choices}"
            )
    chosen = [
        f"{prefix}.{name}"
        for name in linear
        if first <= int(name.split(".", 1)[0]) <= last and any(f".{name}".endswith(f".{t}") for t in targets)
    ]
    if not chosen:
        raise ValueError(
            f"adapter.layers: blocks {first} to {last} have no layer that ends with one of {list(targets)}"
        )
    return chosen


def attach(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    layers: tuple[int, int] | None = None,
    dropout: float = 0.0,
) -> PeftModel:
    """Freeze a model and put LoRA on the chosen layers; B starts at zero, so nothing changes yet.

    Raises:
        ValueError: as `target_names`.
    """
    names = target_names(model, targets, layers)
    prefix, blocks = find_blocks(model)
    first, last = layers if layers is not None else (0, len(blocks) - 1)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT only divides it by r
        lora_dropout=dropout,
        target_modules=list(targets),
        layers_to_transform=list(range(first, last + 1)),
        layers_pattern=prefix.rsplit(".", 1)[-1],
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    adapted = [name for name, _ in lora_layers(peft_model)]
    assert len(adapted) == len(names), (adapted, names)
    return peft_model


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The adapted modules with their names, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def check_gradients(model: nn.Module, input_ids_BT: Tensor) -> None:
    """Every trainable parameter must get a gradient from the logits, else it would never learn.

    A known trap is `nn.MultiheadAttention`, which reads its output projection's weight directly. Costs one forward and
    one backward pass; on the meta device, nothing.

    Raises:
        ValueError: names the parameters without one.
    """
    model(input_ids=input_ids_BT).logits.float().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    if silent:
        shown = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        raise ValueError(f"adapter.targets: no gradient reaches {shown}; choose layers that the forward pass calls")


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
