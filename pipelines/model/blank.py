"""What lets a model run on torch's meta device, where tensors have shapes and no values.

Shapes: B rows, T tokens, N tokens of all rows, K experts a token, D features.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# A mask's number of dimensions, 0 for none. transformers looks at the values of some forms in some
# models: of tokens where there is no mask (GPT-2), of a mask of two dimensions in most. Others do
# not take four (OPT, Bloom).
MASK_FORMS = (4, 2, 0)


def blank_mask(rows: int, tokens: int, form: int) -> dict[str, Tensor]:
    """Return the keyword arguments that say that no token is padding, in one of `MASK_FORMS`."""
    if form == 0:
        return {}
    shape = (rows, tokens) if form == 2 else (rows, 1, tokens, tokens)
    dtype = torch.long if form == 2 else torch.bool
    return {"attention_mask": torch.ones(shape, dtype=dtype, device="meta")}


def blank_inputs(rows: int, tokens: int, *, cached: bool) -> Iterator[dict[str, Any]]:
    """Yield the inputs of a language model without values, with each form of a mask.

    `cached` is whether the model knows the argument `use_cache`.
    """
    ids_BT = torch.ones((rows, tokens), dtype=torch.long, device="meta")
    for form in MASK_FORMS:
        inputs: dict[str, Any] = {"input_ids": ids_BT, **blank_mask(rows, tokens, form)}
        if cached:
            inputs["use_cache"] = False
        yield inputs


def use_first_expert(model: Any) -> None:
    """Let fused experts run without values: which expert a token goes to cannot be known."""
    # The kernel that transformers would use has a meta implementation for bf16 alone.
    ALL_EXPERTS_FUNCTIONS.register("first", first_expert)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("first")


def first_expert(module: Any, hidden_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Send every token to the first expert, K times: as many products as any routing has."""
    tokens, chosen = expert_NK.shape
    feature = hidden_ND.repeat_interleave(chosen, 0)
    feature = _through(module, "gate_up_proj" if module.has_gate else "up_proj", feature)
    feature = module._apply_gate(feature) if module.has_gate else module.act_fn(feature)
    feature = _through(module, "down_proj", feature)
    if module.has_post_expert_norm:
        feature = module.post_expert_norm(feature)
    feature = feature * weight_NK.reshape(-1, 1)
    return feature.view(tokens, chosen, -1).sum(1).to(hidden_ND.dtype)


def _through(module: Any, name: str, feature: Tensor) -> Tensor:
    """Apply the first expert's part of a fused weight, which is [experts, outputs, inputs]."""
    weight = getattr(module, name)[0]
    bias = getattr(module, f"{name}_bias")[0] if module.has_bias else None
    return nn.functional.linear(feature, weight.T if module.is_transposed else weight, bias)
