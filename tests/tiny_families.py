"""A tiny random model of every family of language models that people use."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rfa.adapters import _ADAPTABLE, ending
from rfa.blocks import find_blocks


class Family(NamedTuple):
    """A model type of transformers, what its configuration changes, and the layers that its users would adapt."""

    kind: str
    settings: dict[str, Any]
    targets: tuple[str, ...]


# Sizes in the words of most configurations, and in those of the others.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
DOWN = ("o_proj", "down_proj")
FAMILIES = {
    "llama": Family("llama", {**GROUPED, "tie_word_embeddings": False}, DOWN),
    "llama, tied head": Family("llama", {**GROUPED, "tie_word_embeddings": True}, DOWN),
    "llama, biases": Family("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}, DOWN),
    "mistral": Family("mistral", {**GROUPED, "sliding_window": 64}, DOWN),
    "qwen2": Family("qwen2", GROUPED, DOWN),
    "qwen3": Family("qwen3", {**GROUPED, "head_dim": 8}, DOWN),
    "gemma3": Family(
        "gemma3_text",
        {**GROUPED, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
        DOWN,
    ),
    "olmo2": Family("olmo2", GROUPED, DOWN),
    "phi": Family("phi", SIZES, ("self_attn.dense", "fc2")),
    "phi3": Family("phi3", GROUPED, DOWN),
    "gpt2": Family(
        "gpt2",
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512},
        ("attn.c_proj", "mlp.c_proj"),
    ),
    "gpt_neox": Family("gpt_neox", SIZES, ("attention.dense", "dense_4h_to_h")),
    "opt": Family("opt", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, ("out_proj", "fc2")),
    "bloom": Family(
        "bloom",
        {"hidden_size": 32, "n_layer": 4, "n_head": 4},
        ("self_attention.dense", "dense_4h_to_h"),
    ),
    "falcon": Family("falcon", SIZES, ("self_attention.dense", "dense_4h_to_h")),
    "falcon, ALiBi and biases": Family(
        "falcon",
        {**SIZES, "alibi": True, "bias": True, "parallel_attn": False, "multi_query": False},
        ("self_attention.dense", "dense_4h_to_h"),
    ),
    "mixtral": Family("mixtral", EXPERTS, ("o_proj",)),
    "qwen3_moe": Family(
        "qwen3_moe", {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 16}, ("o_proj",)
    ),
    "gpt_oss": Family("gpt_oss", {**EXPERTS, "head_dim": 8, "sliding_window": 4}, ("o_proj",)),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        ("q_b_proj", "o_proj"),
    ),
    "falcon_h1": Family(
        "falcon_h1",
        {
            **GROUPED,
            "head_dim": 8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
        DOWN,
    ),
    "mamba": Family(
        "mamba", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}, ("in_proj",)
    ),
}


def tiny_family(name: str, vocabulary: int = 128, end: int = 2) -> PreTrainedModel:
    """Build it, seeded, with `end` as the token that ends and pads rows.

    Random weights of transformers are so small that a layer's change is lost in rounding: these are larger.
    """
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.kind,
        vocab_size=vocabulary,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        **family.settings,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            # Norms' weights and biases, which start at 1 and at 0.
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def write_family(name: str, folder: Path, tokenizer_of: Path) -> Path:
    """Write a family's model beside the tokenizer of another model folder."""
    shutil.copytree(tokenizer_of, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tiny_family(name, len(tokenizer), tokenizer.eos_token_id).save_pretrained(folder)
    return folder


def endings(name: str) -> list[str]:
    """The kinds of layers in the blocks of a family that could have an adapter."""
    model = tiny_family(name)
    prefix, _ = find_blocks(model)
    found: set[str] = set()
    for layer, module in model.named_modules():
        if isinstance(module, _ADAPTABLE) and layer.startswith(f"{prefix}."):
            found.add(ending(layer))
    return sorted(found)
