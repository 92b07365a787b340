"""How a row becomes tokens: prompt and answer through the tokenizer's chat template, or plain text."""

import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """Encodes rows for one model. Picklable: the tokenizer is loaded once in each process that uses it."""

    def __init__(self, model: ModelConfig, system_prompt: str | None, max_tokens: int) -> None:
        self.model = model
        self.system_prompt = system_prompt
        self.max_tokens = max_tokens

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer, with a padding token."""
        return load_tokenizer(self.model)

    def pair(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Token ids, and where the answer's begin. The answer ends with the end token; '' as prompt is plain text."""
        tokenizer = self.tokenizer
        before, after = self._parts(prompt, answer)
        prompt_ids: list[int] = tokenizer(before, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        answer_ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
        if not answer_ids or answer_ids[-1] != tokenizer.eos_token_id:
            answer_ids.append(int(tokenizer.eos_token_id))  # pyright: ignore[reportArgumentType]
        ids = (prompt_ids + answer_ids)[: self.max_tokens]
        return ids, min(max(len(prompt_ids), 1), len(ids) - 1)

    def prompt(self, prompt: str) -> list[int]:
        """Token ids up to where the model's answer begins."""
        tokenizer = self.tokenizer
        ids: list[int] = tokenizer(self._parts(prompt, "")[0], add_special_tokens=not tokenizer.chat_template)[
            "input_ids"
        ]
        return ids[-self.max_tokens :]

    def _parts(self, prompt: str, answer: str) -> tuple[str, str]:
        """The text the model is given, and the text it should say."""
        if not prompt:
            return "", answer
        if not self.tokenizer.chat_template:
            return prompt, f" {answer}"
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        asked = [*system, {"role": "user", "content": prompt}]
        before = str(self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        said = [*asked, {"role": "assistant", "content": answer}]
        whole = str(self.tokenizer.apply_chat_template(said, tokenize=False))
        if not whole.startswith(before):  # a template that rewrites earlier turns: keep the answer as it is
            return before, answer
        return before, whole[len(before) :].rstrip()

    def encode_batch(self, batch: Any) -> dict[str, Any]:
        """Ray Data map: the columns training needs, and no text."""
        pairs = [self.pair(p, a) for p, a in zip(batch["prompt"], batch["answer"], strict=True)]
        labels = [zlib.crc32(label.encode()) if label else -1 for label in batch["label"]]
        ids = np.empty(len(pairs), dtype=object)
        for index, (tokens, _) in enumerate(pairs):
            ids[index] = np.asarray(tokens, dtype=np.int32)
        return {
            "set": batch["set"],
            "row": batch["row"],
            "label": np.asarray(labels, dtype=np.int64),
            "input_ids": ids,
            "answer_start": np.asarray([start for _, start in pairs], dtype=np.int32),
            "length": np.asarray([len(tokens) for tokens, _ in pairs], dtype=np.int32),
        }


def load_tokenizer(model: ModelConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub name, loaded once a process.

    Raises:
        ConfigError: the folder has no tokenizer that loads, or one without an end token.
    """
    return _cached_tokenizer(model.path, model.revision, model.trust_remote_code)


def _load(path: str, revision: str | None, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # late: the driver never tokenises

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model.path: no tokenizer loads from {path} ({found}); allowed: a model with its tokenizer"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.path: the tokenizer of {path} has no end token (eos_token); it is needed to end answers"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


_cached_tokenizer: Callable[[str, str | None, bool], "PreTrainedTokenizerBase"] = lru_cache(maxsize=2)(_load)
