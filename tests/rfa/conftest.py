"""Tiny random models of some families, and batches for them."""

import warnings
from collections.abc import Callable

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rfa.adapters import attach
from rfa.batch import Row, UnlearnBatch, collate
from rfa.objective import ResidualAlignment
from rfa.settings import Objective

VOCABULARY = 97
FAMILIES = {
    "llama": ("o_proj", "down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gemma": ("o_proj", "down_proj"),
    "qwen2": ("o_proj", "down_proj"),
    "opt": ("out_proj", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}


def tiny_model(kind: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "gpt2":  # has dropout, Conv1D layers and learned positions
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, **shape)
        )
    shape |= {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
    }
    if kind == "gemma":  # sliding and full attention by turns: masks differ between blocks
        return Gemma3ForCausalLM(
            Gemma3TextConfig(head_dim=8, sliding_window=4, sliding_window_pattern=2, **shape)
        )
    if kind == "opt":  # flattens rows and tokens before `fc1`
        return OPTForCausalLM(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **shape))
    if kind == "phi3":  # declares o_proj before qkv_proj, which it calls first
        return Phi3ForCausalLM(Phi3Config(**shape))
    if kind == "qwen2":  # its queries, keys and values have biases
        return Qwen2ForCausalLM(Qwen2Config(**shape))
    return LlamaForCausalLM(LlamaConfig(**shape))


def tiny_rows(number: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(number):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Row(ids, 2, index, index % 3))
    return rows


@pytest.fixture
def batch() -> UnlearnBatch:
    return collate(tiny_rows(4, seed=1), tiny_rows(3, seed=2), pad_token_id=0)


@pytest.fixture
def build() -> Callable[..., ResidualAlignment]:
    """Makes an alignment with targets fitted on four retain rows; `warm` gives B random values."""

    def build_alignment(
        objective: Objective | None = None,
        *,
        kind: str = "llama",
        layers: tuple[int, int] | None = (1, 2),
        targets: tuple[str, ...] | None = None,
        warm: bool = False,
        dropout: float = 0.0,
    ) -> ResidualAlignment:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = attach(
                tiny_model(kind), rank=2, alpha=4, targets=targets or FAMILIES[kind], layers=layers,
                dropout=dropout,
            )  # fmt: skip
        alignment = ResidualAlignment(model, objective or Objective(clusters=3))
        alignment.fit(alignment.feature_sums(collate(tiny_rows(4, seed=1), [], 0)))
        if warm:
            generator = torch.Generator().manual_seed(3)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        return alignment

    return build_alignment
