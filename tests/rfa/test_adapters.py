"""Attaching LoRA: choices and errors."""

from typing import Any

import pytest
import torch
from torch import nn

from rfa.adapters import ADAPTER, adapters_off, attach, lora_layers, target_names
from tests.rfa.conftest import FAMILIES, tiny_model
from tests.tiny_families import tiny_family

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


def test_the_fused_weights_of_experts_are_no_layer() -> None:
    expected = (
        r"adapter.targets: found 'down_proj', the fused weights of all experts, which are no layer; "
        "this model's blocks have: k_proj, o_proj, q_proj, v_proj"
    )
    with pytest.raises(ValueError, match=expected):
        target_names(tiny_family("qwen3_moe"), ("o_proj", "down_proj"), None)


@pytest.mark.parametrize("target", ["out_proj", "dt_proj"])
def test_layers_that_mamba_reads_beside_their_forward_are_refused(target: str) -> None:
    expected = f"found '{target}', whose weight this model reads beside the layer; this model's "
    with pytest.raises(ValueError, match=f"{expected}blocks have: in_proj, x_proj"):
        target_names(tiny_family("mamba"), (target,), None)


def test_what_peft_refuses_is_one_line_of_ours() -> None:
    model = tiny_family("deepseek_v3")
    with pytest.raises(
        ValueError, match=r"adapter.targets: PEFT refuses them \(.*\); choose others"
    ):
        attach(model, rank=2, alpha=4, targets=("gate_proj",))
    with pytest.raises(
        ValueError, match=r"adapter\.targets: PEFT takes their names for others' in"
    ):
        attach(model, rank=2, alpha=4, targets=("down_proj",))


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


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_layer_has_more_ranks_than_inputs_or_outputs(kind: str) -> None:
    model = attach(tiny_model(kind), rank=4096, alpha=1024, targets=FAMILIES[kind])
    layers: list[tuple[str, Any]] = lora_layers(model)
    for name, layer in layers:
        weight = layer.get_base_layer().weight
        assert layer.r[ADAPTER] == min(weight.shape) < 4096, name
        assert layer.scaling[ADAPTER] == 1 / 4, "alpha / rank as configured"
        assert layer.lora_A[ADAPTER].weight.shape[0] == min(weight.shape)


def test_layers_that_have_the_rank_keep_it_beside_those_that_do_not() -> None:
    # A head of 3 classes, whose name ends another layer's, too.
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = tiny_model().config
            self.model = tiny_model().model
            self.classifier = nn.Linear(32, 3)
            self.inner = nn.ModuleDict({"classifier": nn.Linear(32, 32)})

    targets = ("classifier", "o_proj")
    model = attach(Classifier(), rank=8, alpha=4, targets=targets, everywhere=True)
    ranks = {name.split(".model.", 1)[1]: layer.r[ADAPTER] for name, layer in lora_layers(model)}
    assert ranks.pop("classifier") == 3
    assert len(ranks) == 5
    assert set(ranks.values()) == {8}
    assert {layer.scaling[ADAPTER] for _, layer in lora_layers(model)} == {0.5}
