"""Pruning in a run: the base model is pruned wherever it is loaded, with the same masks.

Wanda weighs each weight by the norm of its input over the retain set. The norms are summed over
all workers before training, and saved beside the resume points, so that a restarted worker prunes
as before.
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
    """Prune as configured, in place, and return the masks; an empty dict without pruning.

    Raises:
        ValueError: a target is missing, or its layer cannot be pruned with this method.
    """
    if cfg.prune.method == "none":
        return {}
    names = prune_targets(base, cfg.prune.targets)
    return prune_(base, names, cfg.prune.method, cfg.prune.sparsity, norms, whole)


@torch.no_grad()
def input_norms(
    cfg: UnlearnConfig, base: PreTrainedModel, batches: Iterable[UnlearnBatch], device: torch.device
) -> Mapping[str, Tensor] | None:
    """Return Wanda's input norms of the layers to prune, over all workers' batches.

    Other methods need none: the result is None, and no batch is read.
    """
    if cfg.prune.method != "wanda":
        return None
    runner = BlockRunner(base)
    base.to(device)  # pyright: ignore[reportArgumentType]
    names = prune_targets(base, cfg.prune.targets)
    batch: UnlearnBatch | None = None

    def real_tokens() -> Tensor:
        assert batch is not None
        return batch.attention_BT

    reads_images = cfg.task == "image_classification"
    # An image's positions are all real: only text is padded.
    with collecting_norms(base, names, None if reads_images else real_tokens) as norms:
        for cpu_batch in batches:
            batch = cpu_batch.to(device)
            runner(batch, logits_at_BT=batch.answer_BT)
    for value in norms.values():
        torch.distributed.all_reduce(value)
    return {name: value.cpu() for name, value in norms.items()}


def hold_weights_(model: Any, masks: Masks) -> None:
    """Give weights outside the masks no gradient, so that training leaves them as they are."""
    for name, mask in masks.items():
        model.get_parameter(name).register_hook(
            lambda grad, mask=mask: grad.masked_fill(~mask.to(grad.device), 0)
        )


def held_rows(model: Any, masks: Masks) -> dict[str, Tensor]:
    """Return the unpruned outputs [O] of each weight whose mask prunes whole outputs."""
    unpruned: dict[str, Tensor] = {}
    for name, mask in masks.items():
        kept_O = kept_rows(mask, model.get_submodule(name.removesuffix(".weight")))
        if kept_O is not None:
            unpruned[name] = kept_O
    return unpruned


def keep_pruned_(cfg: UnlearnConfig, model: PreTrainedModel, masks: Masks) -> None:
    """Set pruned weights to zero again after merging, where `prune.keep_sparsity` is set."""
    if masks and cfg.prune.keep_sparsity:
        apply_masks_(model, masks)
