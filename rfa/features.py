"""Read residual features off a running model.

There are two kinds of residual, and so two losses. `local` is what each adapted module's LoRA adds.
`drift` is how far a block's output has moved from the base model's, at all adapted blocks or, as
`last_drift`, at the last of them. They agree exactly at the lowest adapted module.

Shapes: B rows, T tokens, S positions of a module, D features, C channels, H height, W width, N
selected positions.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from rfa.adapters import ADAPTER, lora_layers
from rfa.batch import SelectedFeatures, UnlearnBatch
from rfa.blocks import block_range, find_blocks
from rfa.settings import ResidualKind


def as_positions(feature: Tensor) -> Tensor:
    """Reshape features [B, T, D], a feature map [B, C, H, W] or pooled features [B, D] to [B, S,
    D].
    """
    if feature.ndim == 4:
        return feature.flatten(2).transpose(1, 2)
    if feature.ndim == 2:
        return feature[:, None]
    return feature


class LocalFeatures(NamedTuple):
    """Features of one pass: each adapted module's base output and LoRA's part, [B, S, D]."""

    batch: UnlearnBatch
    base: Mapping[str, Tensor]
    added: Mapping[str, Tensor]

    def residual(self, name: str, tokens_BT: Tensor) -> tuple[SelectedFeatures, Tensor]:
        """Return the residual, and the base features it is added to, at the selected tokens."""
        reference_ND = self.batch.select(self.base[name], tokens_BT).feature_ND
        return self.batch.select(self.added[name], tokens_BT), reference_ND

    def adapted(self, name: str, tokens_BT: Tensor) -> tuple[SelectedFeatures, Tensor]:
        """Return the adapted features, and those that nearest targets compare, both in float32."""
        base = self.batch.select(self.base[name], tokens_BT)
        base_ND = base.feature_ND.float()
        added_ND = self.batch.select(self.added[name], tokens_BT).feature_ND.float()
        return base._replace(feature_ND=base_ND + added_ND), base_ND


class DriftFeatures(NamedTuple):
    """Features of two passes, one of the adapted model and one of the base model: [B, S, D].

    `reference` has the base model's block outputs of the batch's `rows` (indices) alone. It
    is empty where no term reads it.
    """

    batch: UnlearnBatch
    blocks: Mapping[str, Tensor]
    reference: Mapping[str, Tensor]
    rows: Tensor

    def residual(self, name: str, tokens_BT: Tensor) -> tuple[SelectedFeatures, Tensor]:
        """Return the drift, and the base features it started from, at the selected tokens."""
        adapted = self.batch.select(self.blocks[name], tokens_BT)
        reference_ND = self._reference(name, tokens_BT)
        return adapted._replace(feature_ND=adapted.feature_ND - reference_ND), reference_ND

    def adapted(self, name: str, tokens_BT: Tensor) -> tuple[SelectedFeatures, Tensor]:
        """Return the adapted features in float32, and those that nearest targets compare."""
        adapted = self.batch.select(self.blocks[name], tokens_BT)
        adapted = adapted._replace(feature_ND=adapted.feature_ND.float())
        # The base model has run without the forget rows, so no target compares features. The
        # adapted ones are returned for their shape.
        if len(self.rows) < len(self.batch.forget_B):
            return adapted, adapted.feature_ND
        return adapted, self._reference(name, tokens_BT)

    def _reference(self, name: str, tokens_BT: Tensor) -> Tensor:
        rows = self.batch.rows(self.rows)
        return rows.select(self.reference[name], tokens_BT[self.rows]).feature_ND


class FeatureHooks:
    """Record the outputs of the aligned modules.

    These are the adapted modules (`local`), their blocks (`drift`) or the last of these blocks
    (`last_drift`).

    The hooks change nothing, and outside of `recording` they do nothing either, as in a teacher
    pass or a recomputation by activation checkpointing. Call `close` to take them off a model that
    is used further.
    """

    def __init__(self, model: nn.Module, residual: ResidualKind) -> None:
        prefix, blocks = find_blocks(model)
        modules = lora_layers(model)
        ranges = [block_range(model, name) for name, _ in modules]
        self.first_block = min(first for first, _ in ranges)
        last_block = max(last for _, last in ranges)
        # Modules above all blocks run with the logits alone.
        self.reaches_head = last_block == len(blocks)
        self.last_block = min(last_block, len(blocks) - 1)
        self.residual = residual
        self._base: dict[str, Tensor] | None = None
        self._added: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._layers = dict(modules)
        if residual == "local":
            self.names = list(self._layers)
            for name, layer in modules:
                self._watch(layer.base_layer, name, is_residual=False)
                self._watch(layer.lora_B[ADAPTER], name, is_residual=True)
        else:
            lowest = self.first_block if residual == "drift" else self.last_block
            indices = range(lowest, self.last_block + 1)
            self.names = [f"{prefix}.{index}" for index in indices]
            for name, index in zip(self.names, indices, strict=True):
                self._watch(blocks[index], name, is_residual=False)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, name: str, *, is_residual: bool) -> None:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            # The hooks outlive a recording, and would hold the features of every other forward.
            if self._base is not None:
                # Some models' blocks return a tuple, with the hidden states first.
                feature = output[0] if isinstance(output, tuple) else output
                recorded = self._added if is_residual else self._base
                recorded[name] = as_positions(feature)

        self._hooks.append(module.register_forward_hook(record))

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Record the outputs of blocks (drift) or base layers (`local`) by name, [B, S, D]."""
        self._base, self._added = {}, {}
        try:
            yield self._base
        finally:
            # `_added` stays: `residuals` reads it once the forward is over.
            self._base = None

    def residuals(self) -> dict[str, Tensor]:
        """Return what LoRA added at each module in the last recording (`local` only), [B, S, D]."""
        assert self.residual == "local"
        # PEFT multiplies with the scaling behind lora_B, where the hook does not see it.
        scaled: dict[str, Tensor] = {}
        for name, added_BSD in self._added.items():
            scaled[name] = added_BSD * self._layers[name].scaling[ADAPTER]
        return scaled


def input_positions(module: nn.Module, feature: Tensor) -> Tensor:
    """Return a layer's inputs as [B, S, D].

    A convolution's are the patches that it sees, D = channels * kernel size.
    """
    if not isinstance(module, nn.Conv2d):
        return as_positions(feature)
    assert module.groups == 1 and not isinstance(module.padding, str)
    patches_BDS = F.unfold(
        feature, module.kernel_size, module.dilation, module.padding, module.stride
    )
    return patches_BDS.transpose(1, 2)
