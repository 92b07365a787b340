"""Attaching LoRA: choices, errors, and the gradient check."""

import pytest
import torch
from torch import nn

from rfa.adapters import adapters_off, attach, check_gradients, lora_layers, target_names
from tests.rfa.conftest import FAMILIES, tiny_model

IDS = torch.tensor([[5, 6, 7]])


def test_targets_and_layers_choose_modules() -> None:
    model = attach(
        tiny_model(), rank=2, alpha=4, targets=("o_proj", "mlp.down_proj"), layers=(1, 2)
    )
    names = [name.removeprefix("base_model.model.model.layers.") for name, _ in lora_layers(model)]
    assert names == [
        "1.self_attn.o_proj",
        "1.mlp.down_proj",
        "2.self_attn.o_proj",
        "2.mlp.down_proj",
    ]


def test_a_target_that_matches_nothing_lists_the_choices() -> None:
    expected = (
        "adapter.targets: no linear layer ends with 'up_prj'; "
        "this model's blocks have: down_proj, gate_proj, k_proj"
    )
    with pytest.raises(ValueError, match=expected):
        target_names(tiny_model(), ("up_prj",), None)


@pytest.mark.parametrize("layers", [(0, 4), (7, 9)])
def test_layers_out_of_bounds_name_the_bounds(layers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"adapter.layers: found \[\d, \d\], allowed: 0 to 3"):
        target_names(tiny_model(), ("o_proj",), layers)


@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_off_is_the_base_model(kind: str) -> None:
    base = tiny_model(kind).eval()
    expected = base(IDS).logits
    model = attach(tiny_model(kind), rank=2, alpha=4, targets=FAMILIES[kind]).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    with adapters_off(model):
        torch.testing.assert_close(model(IDS).logits, expected)
    assert not torch.allclose(model(IDS).logits, expected)


class AttentionThatReadsWeights(nn.Module):
    """As torch's `nn.MultiheadAttention` does: the projection's weight is read, its forward is never called."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)
        self.layer_idx = getattr(attention, "layer_idx", 0)

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return self.inner(hidden_states, hidden_states, hidden_states)[0], None


def test_lora_on_multihead_attentions_projection_is_refused() -> None:
    base = tiny_model()
    for block in base.model.layers:
        block.self_attn = AttentionThatReadsWeights(block.self_attn)
    model = attach(base, rank=2, alpha=4, targets=("out_proj", "down_proj"), layers=(1, 1))
    with pytest.raises(
        ValueError, match=r"no gradient reaches .*layers\.1\.self_attn\.inner\.out_proj\.lora_A"
    ):
        check_gradients(model, {"input_ids": IDS})


def test_the_gradient_check_works_without_weights() -> None:
    with torch.device("meta"):
        base = tiny_model()
    model = attach(base, rank=2, alpha=4, targets=("o_proj",))
    check_gradients(model, {"input_ids": IDS.to("meta")})
    assert all(p.grad is None for p in model.parameters())
