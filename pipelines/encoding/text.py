"""How a row becomes tokens: prompt and answer through the tokenizer's chat template, or plain text."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.config.schema import ConfigError, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rfa.batch import Row


class Encoder:
    """Encodes rows for one model. Picklable: the tokenizer is loaded once in each process that uses it."""

    mixes = (
        False  # whether batches draw their rows from all over a source, or from where it has them
    )

    def __init__(self, model: ModelConfig, system_prompt: str | None, max_tokens: int) -> None:
        self.model = model
        self.system_prompt = system_prompt
        self.max_tokens = max_tokens

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer, with a padding token."""
        return load_tokenizer(self.model)

    def pair(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Token ids, and where the answer's begin. The answer ends with the end token, which is all of the answer '';
        '' as prompt is plain text."""
        tokenizer = self.tokenizer
        before, after = self._parts(prompt, answer)
        prompt_ids = self._prompt_ids(before)
        answer_ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
        if not answer_ids or answer_ids[-1] != tokenizer.eos_token_id:
            answer_ids.append(int(tokenizer.eos_token_id))  # pyright: ignore[reportArgumentType]
        ids = (prompt_ids + answer_ids)[: self.max_tokens]
        return ids, min(max(len(prompt_ids), 1), len(ids) - 1)

    def prompt(self, prompt: str) -> list[int]:
        """Token ids up to where the model's answer begins."""
        return self._prompt_ids(self._parts(prompt, "")[0])[-self.max_tokens :]

    def fact_tokens(self, prompt: str, answer: str, fact: str) -> NDArray[np.bool_]:
        """Which of the T answer tokens of `pair`, end token included, carry the fact (where it first stands).

        None does where the fact is '' or cannot be measured whole: cut off by `max_tokens`, or begun by a row's first
        token, which nothing predicts.
        """
        ids, answer_start = self.pair(prompt, answer)
        is_fact_T = np.zeros(len(ids) - answer_start, dtype=np.bool_)
        before, after = self._parts(prompt, answer)
        shift = len(self._prompt_ids(before)) - answer_start
        places = [place + shift for place in self._carriers(after, answer, fact)] if fact else []
        if places and places[0] >= 0 and places[-1] < len(is_fact_T):
            is_fact_T[places] = True
        return is_fact_T

    def fact_span(self, prompt: str, answer: str, fact: str) -> tuple[int, int]:
        """Where in `pair` the tokens that carry the fact begin and end; 0 and 0 where none does."""
        place_N = np.flatnonzero(self.fact_tokens(prompt, answer, fact))
        if not len(place_N):
            return 0, 0
        answer_start = self.pair(prompt, answer)[1]
        return answer_start + int(place_N[0]), answer_start + int(place_N[-1]) + 1

    def _carriers(self, after: str, answer: str, fact: str) -> Sequence[int]:
        """The tokens of the text `after` that overlap the fact; none where the template has rewritten it."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            start = after.find(fact, max(after.find(answer), 0))
            spans = tokenizer(after, add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
            overlap = [
                place
                for place, (left, right) in enumerate(spans)
                if left < start + len(fact) and start < right
            ]
            return overlap if start >= 0 else []
        # Without offsets: of the shortest beginning that says the fact, the shortest end that still does.
        ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
        end = next((end for end in range(1, len(ids) + 1) if fact in self._said(ids[:end])), 0)
        return range(
            max((first for first in range(end) if fact in self._said(ids[first:end])), default=0),
            end,
        )

    def _said(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _prompt_ids(self, before: str) -> list[int]:
        """Tokens of the text that the model is given; a chat template brings its own special tokens."""
        return self.tokenizer(before, add_special_tokens=not self.tokenizer.chat_template)[
            "input_ids"
        ]

    def _parts(self, prompt: str, answer: str) -> tuple[str, str]:
        """The text the model is given, and the text it should say."""
        if not prompt:
            return "", answer
        if not self.tokenizer.chat_template:
            return prompt, f" {answer}" if answer else ""
        system = (
            []
            if self.system_prompt is None
            else [{"role": "system", "content": self.system_prompt}]
        )
        asked = [*system, {"role": "user", "content": prompt}]
        before = str(
            self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        )
        said = [*asked, {"role": "assistant", "content": answer}]
        whole = str(self.tokenizer.apply_chat_template(said, tokenize=False))
        if not whole.startswith(
            before
        ):  # a template that rewrites earlier turns: keep the answer as it is
            return before, answer
        return before, whole[len(before) :].rstrip()

    @property
    def pad_token_id(self) -> int:
        """What rows are padded with."""
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    def rows(self, records: Sequence[Mapping[str, Any]]) -> "list[Row]":
        """Encoded rows, for a batch."""
        from rfa.batch import Row  # late: whoever only tokenises does without torch

        return [
            Row(
                list(record["input_ids"]),
                int(record["answer_start"]),
                int(record["row"]),
                int(record["label"]),
                utility=record["set"] == "utility",
                fact=(int(record["fact_start"]), int(record["fact_end"])),
            )
            for record in records
        ]

    def blank(self) -> "Row | None":
        """`collate` makes the row that no term counts."""
        return None

    def encode_batch(self, batch: Any) -> dict[str, Any]:
        """Ray Data map: the columns training needs, and no text."""
        pairs = [self.pair(p, a) for p, a in zip(batch["prompt"], batch["answer"], strict=True)]
        facts = np.zeros((len(pairs), 2), dtype=np.int32)
        for index in np.flatnonzero((batch["set"] == "forget") & (batch["fact"] != "")):
            facts[index] = self.fact_span(
                *(str(batch[key][index]) for key in ("prompt", "answer", "fact"))
            )
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
            "fact_start": facts[:, 0],
            "fact_end": facts[:, 1],
            "length": np.asarray([len(tokens) for tokens, _ in pairs], dtype=np.int32),
        }


def load_tokenizer(model: ModelConfig, *, ends: bool = True) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub name, loaded once a process.

    Raises:
        ConfigError: the folder has no tokenizer that loads, or one without the end token that answers need (`ends`).
    """
    return _cached_tokenizer(model.path, model.revision, model.trust_remote_code, ends)


def _load(
    path: str, revision: str | None, trust_remote_code: bool, ends: bool
) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # late: the driver never tokenises

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model.path: no tokenizer loads from {path} ({found}); allowed: a model with its tokenizer"
        ) from None
    if ends and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.path: the tokenizer of {path} has no end token (eos_token); it is needed to end answers"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


_cached_tokenizer: Callable[[str, str | None, bool, bool], "PreTrainedTokenizerBase"] = lru_cache(
    maxsize=2
)(_load)
