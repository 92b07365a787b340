"""Broken model folders, generated: broken files, configurations that make no model, and sizes that do not fit."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

POSITIONS, MAX_TOKENS = 32, 64
WORDS = "word " * 99  # more than MAX_TOKENS tokens
TOO_FEW = f"allowed: {POSITIONS} at most"
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}


class BadModel(NamedTuple):
    """What is wrong with a folder, how a good one becomes it, and what a message about it must say."""

    name: str
    spoil: Callable[[Path], object]
    named: str
    of_tokenizer: bool = False  # which only `model.path` has


def bad_models() -> Iterator[BadModel]:
    """Yield all of them, in an order that does not change."""
    for values, named in (
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads (5)"),
        ({"rope_parameters": 7}, "Field 'rope_parameters' with value 7"),
        ({"vocab_size": 0}, "IndexError"),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"attn_implementation": 7}, "'int' object has no attribute"),
        ({"attn_implementation": "nonsense"}, 'Specified `attn_implementation="nonsense"` is not'),
    ):
        yield BadModel(f"config.json: {values}", _with("config.json", **values), named)
    yield BadModel("config.json: an unknown activation", unknown_activation, "KeyError: 'nope'")
    for name in ("config.json", "generation_config.json"):
        yield BadModel(f"{name}: a list", _as("[]", name), "")
    for content in ("[]", "{}", '{"version": "9.0", "model": {}}', "{"):
        name = f"tokenizer.json: {content}"
        yield BadModel(name, _as(content, "tokenizer.json"), "no tokenizer loads", True)
    versioned = _with("tokenizer.json", version="9.0")
    yield BadModel("tokenizer.json of another version", versioned, "no tokenizer loads", True)
    yield BadModel("tokenizer_config.json: a list", _as("[]", "tokenizer_config.json"), "", True)
    yield BadModel("a small vocabulary", small_vocabulary, "has a vocabulary of 300 tokens")
    yield BadModel("few rotary positions", few_rotary_positions, TOO_FEW)
    yield BadModel("few learned positions", few_learned_positions, TOO_FEW)


def _with(name: str, **values: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def _as(content: str, name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def small_vocabulary(folder: Path, size: int = 300) -> None:
    """Put a model of another vocabulary beside the tokenizer of 512 tokens."""
    config = LlamaConfig(vocab_size=size, num_attention_heads=4, num_key_value_heads=2, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)


unknown_activation = _with("config.json", hidden_act="nope")
few_rotary_positions = _with("config.json", max_position_embeddings=POSITIONS)


def few_learned_positions(folder: Path) -> None:
    """Put a GPT-2 beside the tokenizer."""
    size = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=size, n_embd=64, n_layer=4, n_head=4, n_positions=POSITIONS,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)


def spoiled(bad: BadModel, good: Path, folder: Path) -> Path:
    """Write the broken copy of a good folder."""
    shutil.copytree(good, folder)
    bad.spoil(folder)
    return folder
