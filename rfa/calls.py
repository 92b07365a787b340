"""How a model calls its adapted layers, learned from one pass, and which calls cannot be solved.

A solver selects tokens of what a layer sees and says. So a layer must see all rows and positions,
as [B, S, D], as a feature map [B, C, H, W], pooled [B, D] or flattened [B * T, D]. Experts that
each see the tokens routed to them do not, nor do layers that see the sequence first.

Shapes: B rows, T tokens, S positions, D features, C channels, H height, W width.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from rfa.adapters import lora_layers
from rfa.blocks import find_blocks, hook_scope

SHOWN = 3  # names in a message
Shape = tuple[int, ...]


class Calls(NamedTuple):
    """The shapes that adapted layers and the first block were last called with, by name.

    `fault` says why the pass came to no end. It is None where it did.
    """

    layers: dict[str, Shape]
    block: Shape | None
    fault: str | None


def check_calls(
    model: nn.Module,
    inputs: Sequence[Mapping[str, Any]],
    *,
    rows: int,
    tokens: int | None,
    features_are_read: bool = True,
) -> None:
    """Raise unless every adapted layer learns, and sees its tokens where a solver finds them.

    A parameter that gets no gradient from the logits would never learn. A known trap is
    `nn.MultiheadAttention`, which reads its output projection's weight and never calls the layer.
    The check costs one forward and one backward pass, and nothing on the meta device.

    A model may look at values, which the meta device has none of, for one form of its inputs and
    not for another: `inputs` are tried in turn. Where no pass comes to its end, layers are known by
    their like that was called in it.

    Args:
        model: with its adapters.
        inputs: keyword arguments of its forward, in forms that mean the same.
        rows: B of the inputs.
        tokens: T of a language model's inputs, None where a layer's positions need be no tokens.
        features_are_read: whether a solver or a term reads what single layers see. If not, any
            shape will do.

    Raises:
        ValueError: the message names the parameters or layers.
    """
    calls: list[Calls] = []
    for form in inputs:
        calls.append(_follow(model, form))
        if calls[-1].fault is None:
            break
    furthest = max(calls, key=lambda call: (call.fault is None, len(call.layers)))
    if furthest.fault is None:
        _refuse_silent(model)
    model.zero_grad(set_to_none=True)
    read = furthest.layers if features_are_read else {}
    for name, shape in read.items():
        if not _is_readable(shape, furthest.block, rows, tokens):
            allowed = f"[{rows}, {tokens or 'positions'}, features]"
            allowed += f" or [{rows * (tokens or 1)}, features]"
            raise ValueError(
                f"adapter.targets: {name} sees features of shape {list(shape)} where {rows} rows "
                f"of {tokens or 1} tokens were given, allowed: {allowed}; choose other layers"
            )
    if furthest.fault is not None and features_are_read:
        _refuse_unseen(model, furthest)


def _follow(model: nn.Module, inputs: Mapping[str, Any]) -> Calls:
    """Run a model forward and backward, and return its calls."""
    layers: dict[str, Shape] = {}
    blocks: list[Shape] = []
    fault = None
    with ExitStack() as stack:
        layer: Any
        for name, layer in lora_layers(model):
            record = partial(_record, layers, name)
            stack.enter_context(hook_scope(layer.register_forward_hook(record)))
        first: nn.Module = find_blocks(model)[1][0]
        stack.enter_context(hook_scope(first.register_forward_hook(partial(_output, blocks))))
        try:
            total = model(**inputs).logits.float().sum()
            # No adapter took part: then the parameters say so, by having no gradient.
            if total.requires_grad:
                total.backward()
        # Any code of any model runs here, and a failure of it is only a reason to know less.
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Calls(layers, blocks[0] if blocks else None, fault)


def _record(
    layers: dict[str, Shape],
    name: str,
    _module: nn.Module,
    args: tuple[Tensor, ...],
    _output: Any,
) -> None:
    layers[name] = tuple(args[0].shape)


def _output(blocks: list[Shape], _module: nn.Module, _args: Any, output: Any) -> None:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    blocks.append(tuple(hidden.shape))


def _is_readable(shape: Shape, block: Shape | None, rows: int, tokens: int | None) -> bool:
    """Return whether `UnlearnBatch.select` finds tokens in features of this shape."""
    if len(shape) == 2:
        if tokens is None:
            return shape[0] == rows
        # Rows and tokens are flattened in the order that the block has them in.
        return shape[0] == rows * tokens and (block is None or block[:2] == (rows, tokens))
    return shape[0] == rows and tokens in (None, shape[1])


def _refuse_silent(model: nn.Module) -> None:
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if silent:
        raise ValueError(
            f"adapter.targets: no gradient reaches {_named(silent)}; "
            "choose layers that the forward pass calls"
        )


def _refuse_unseen(model: nn.Module, calls: Calls) -> None:
    """Refuse layers of a kind that no call was seen of before the pass failed."""
    seen = {_kind(name) for name in calls.layers}
    unseen = [name for name, _ in lora_layers(model) if _kind(name) not in seen]
    if unseen:
        raise ValueError(
            f"adapter.targets: nothing is known of how {_named(unseen)} is called, as a pass "
            f"without weights does not reach it ({calls.fault}); choose other layers"
        )


def _kind(name: str) -> str:
    """Return a layer's name without its numbers: that of its like in all blocks."""
    return re.sub(r"\.\d+(?=\.)", ".#", name)


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
