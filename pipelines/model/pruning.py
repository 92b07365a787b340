"""Pruning in a run: the base model is pruned where it is loaded, and its masks come out the same wherever that is.

`wanda` looks at the retain set's features: what it needs of them is summed over all workers before anything is trained,
and kept beside the resume points, so that a worker that starts again prunes as before.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipelines.config.schema import UnlearnConfig
from pipelines.model.engine import whole
from rfa.batch import UnlearnBatch
from rfa.blocks import BlockRunner
from rfa.pruning import apply_masks_, collecting_norms, kept_rows, prune_, prune_targets

Masks = dict[str, Tensor]


def prune_base(
    cfg: UnlearnConfig, base: PreTrainedModel, norms: Mapping[str, Tensor] | None
) -> Masks:
    """Prune as configured, in place; no masks where nothing is pruned.

    Raises:
        ValueError: a target or a layer that cannot be pruned so.
    """
    if cfg.prune.method == "none":
        return {}
    names = prune_targets(base, cfg.prune.targets)
    return prune_(base, names, cfg.prune.method, cfg.prune.sparsity, norms, whole)


@torch.no_grad()
def input_norms(
    cfg: UnlearnConfig, base: PreTrainedModel, batches: Iterable[UnlearnBatch], device: torch.device
) -> Mapping[str, Tensor] | None:
    """What `wanda` needs of the inputs of the layers to be pruned, of all workers' batches."""
    if cfg.prune.method != "wanda":
        return None
    runner = BlockRunner(base)
    base.to(device)  # pyright: ignore[reportArgumentType]
    names, running = prune_targets(base, cfg.prune.targets), None

    def real_tokens() -> Tensor:
        assert running is not None
        return running.attention_BT

    reads_images = cfg.task == "image_classification"
    with collecting_norms(base, names, None if reads_images else real_tokens) as norms:
        for batch in batches:
            running = batch.to(device)
            runner(running, logits_at_BT=running.answer_BT)
    for value in norms.values():
        torch.distributed.all_reduce(value)
    return {name: value.cpu() for name, value in norms.items()}


def hold_weights_(model: Any, masks: Masks) -> None:
    """Keep masked weights (pruned ones: at zero) as they are while all others are trained: they get no gradient."""
    for name, mask in masks.items():
        model.get_parameter(name).register_hook(
            lambda grad, mask=mask: grad.masked_fill(~mask.to(grad.device), 0)
        )


def held_rows(model: Any, masks: Masks) -> dict[str, Tensor]:
    """By the weight's name, which outputs of a layer are kept, where a mask prunes whole ones: [O]."""
    found = {
        name: kept_rows(mask, model.get_submodule(name.removesuffix(".weight")))
        for name, mask in masks.items()
    }
    return {name: keep_O for name, keep_O in found.items() if keep_O is not None}


def keep_pruned_(cfg: UnlearnConfig, model: PreTrainedModel, masks: Masks) -> None:
    """Zero again what merging has filled, where the sparsity is to be kept."""
    if masks and cfg.prune.keep_sparsity:
        apply_masks_(model, masks)
