"""Weights that pruning must not take, or would pass over."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from rfa.adapters import ending, fused_weights


def refuse_fused(model: nn.Module, group: str, layers: Mapping[str, Any]) -> None:
    """Raise if a group would leave out the weights of experts, which are no layers."""
    fused = fused_weights(model)
    if fused:
        share = sum(weight.numel() for weight in fused.values()) / sum(
            p.numel() for p in model.parameters()
        )
        raise ValueError(
            f"prune.targets: '{group}' leaves out the fused weights of experts ({next(iter(fused))}"
            f", ...), {share:.0%} of the model; allowed: {', '.join(sorted({*map(ending, layers)}))}"
        )


def refuse_shared(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise if a layer shares its weight with another module."""
    # Pruning a tied output head would also zero the embeddings of the same tokens.
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    for name, layer in layers.items():
        if len(owners[id(layer.weight)]) > 1:
            others = owners[id(layer.weight)]
            kinds = ", ".join(type(other).__name__ for other in others if other is not layer)
            raise ValueError(
                f"prune.targets: '{name}' shares its weight with another module ({kinds}); "
                "leave it out"
            )
