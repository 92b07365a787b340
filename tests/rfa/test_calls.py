"""How layers are called: which calls a solver can read, and what is said of the others."""

import pytest
import torch
from torch import Tensor, nn

from rfa.adapters import attach
from rfa.calls import check_calls
from tests.rfa.conftest import tiny_model

ROWS, TOKENS = 2, 3
IDS = torch.tensor([[5, 6, 7], [8, 9, 5]])


def check(model: nn.Module, device: str = "cpu") -> None:
    check_calls(model, [{"input_ids": IDS.to(device)}], rows=ROWS, tokens=TOKENS)


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
        check(model)


def test_the_gradient_check_works_without_weights() -> None:
    with torch.device("meta"):
        base = tiny_model()
    model = attach(base, rank=2, alpha=4, targets=("o_proj",))
    check(model, "meta")
    assert all(p.grad is None for p in model.parameters())


class Feedforward(nn.Module):
    """Two layers that see their rows and tokens in another form."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def two(self, feature: Tensor) -> Tensor:
        return self.down(self.up(feature).relu())


class Flattened(Feedforward):
    def forward(self, feature_BTD: Tensor) -> Tensor:
        return self.two(feature_BTD.flatten(0, 1)).view(feature_BTD.shape)


class SequenceFirst(Feedforward):
    def forward(self, feature_BTD: Tensor) -> Tensor:
        return self.two(feature_BTD.transpose(0, 1)).transpose(0, 1)


class Routed(Feedforward):
    """Sees the tokens whose first feature is above 0, as an expert its own: which they are, values tell."""

    def forward(self, feature_BTD: Tensor) -> Tensor:
        chosen_BT = feature_BTD[..., 0] > 0
        output_BTD = torch.zeros_like(feature_BTD)
        output_BTD[chosen_BT] = self.two(feature_BTD[chosen_BT])
        return output_BTD


def adapted(feedforward: type[Feedforward], device: str = "cpu") -> nn.Module:
    with torch.device(device):
        base = tiny_model()
        for block in base.model.layers:
            block.mlp = feedforward()
    return attach(base, rank=2, alpha=4, targets=("o_proj", "up", "down"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flattened_rows_and_tokens_are_read(device: str) -> None:
    check(adapted(Flattened, device), device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_that_sees_the_sequence_first_is_refused_by_name(device: str) -> None:
    expected = (
        r"layers\.0\.mlp\.up sees features of shape \[3, 2, 32\] where 2 rows of 3 tokens were given, "
        r"allowed: \[2, 3, features\] or \[6, features\]; choose other layers"
    )
    with pytest.raises(ValueError, match=expected):
        check(adapted(SequenceFirst, device), device)
    inputs = {"input_ids": torch.ones((2, 3), dtype=torch.long, device=device)}
    check_calls(adapted(SequenceFirst, device), [inputs], rows=2, tokens=3, features_are_read=False)


def test_an_expert_that_sees_some_tokens_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"layers\.\d\.mlp\.up sees features of shape \[\d, 32\] where"
    ):
        check(adapted(Routed))


def test_what_a_pass_without_values_does_not_reach_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"nothing is known of how .*layers\.0\.mlp\.up, .* is called"
    ):
        check(adapted(Routed, "meta"), "meta")


def test_what_a_pass_without_values_reaches_is_known_from_the_first_block() -> None:
    with torch.device("meta"):
        base = tiny_model()
        for block in base.model.layers:
            block.mlp = Routed()
    check(attach(base, rank=2, alpha=4, targets=("o_proj",)), "meta")


def test_inputs_of_another_form_are_tried_where_one_fails() -> None:
    """GPT-2 looks for padding among the tokens, which have no values here, unless there is a mask."""
    with torch.device("meta"):
        model = attach(tiny_model("gpt2"), rank=2, alpha=4, targets=("attn.c_proj",))
    ids = IDS.to("meta")
    with pytest.raises(
        ValueError, match=r"does not reach it \(RuntimeError: Tensor.item\(\) cannot"
    ):
        check(model, "meta")
    mask = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")
    forms = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]
    check_calls(model, forms, rows=ROWS, tokens=TOKENS)
