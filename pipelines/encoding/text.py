"""Rows as tokens: prompt and answer in the tokenizer's chat template, or plain text."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.config.schema import ConfigError, ModelConfig
from pipelines.config.text import reason_of
from pipelines.data.conversations import Turn, prompt_of, questions_of, turns_of
from pipelines.encoding import chat
from pipelines.encoding.records import columns_of, row_of
from pipelines.encoding.refusals import refusal_of
from pipelines.encoding.windows import COVERED_SETS, RowLength, Window, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rfa.batch import Row

P = ParamSpec("P")
T = TypeVar("T")


class TextEncoder:
    """Encodes rows for one language model. Each process that uses it loads the tokenizer once."""

    mixes = False  # batches draw neighbouring rows of a source

    def __init__(self, model: ModelConfig, system_prompt: str | None, max_tokens: int) -> None:
        self.model = model
        self.system_prompt = system_prompt
        self.max_tokens = max_tokens

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Return the model's tokenizer, with a padding token."""
        return load_tokenizer(self.model)

    def pair(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Return a row's token ids, however many, and the index of its answer's first token.

        The answer ends with the end token, which is all of the answer ''. A row without a prompt is
        plain text. Of a conversation this is the last answer, behind all the turns before it.
        """
        return self.pairs(prompt, answer)[-1]

    def pairs(self, prompt: str, answer: str) -> list[tuple[list[int], int]]:
        """Return what `pair` does for each answer of a row, a conversation's in their order."""
        return [self._pair(before, after) for before, after in self._answers(prompt, answer)]

    def _pair(self, before: str, after: str) -> tuple[list[int], int]:
        """Return the token ids of a prompt and an answer, and the index of the answer's first."""
        tokenizer = self.tokenizer
        prompt_ids = self._prompt_ids(before)
        answer_ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
        if not answer_ids or answer_ids[-1] not in self.end_ids:
            answer_ids.append(self.end_ids[0])
        # Nothing predicts the first token, and a text of one token has an answer all the same.
        ids = prompt_ids + answer_ids
        return ids, min(max(len(prompt_ids), 1), len(ids) - 1)

    def pair_behind(
        self, examples: Sequence[tuple[str, str]], prompt: str, answer: str
    ) -> tuple[list[int], int]:
        """Return what `pair` does of a question that stands behind others with their answers."""
        after = self._answers(prompt, answer)[-1].text
        if not self.tokenizer.chat_template:
            shown = "".join(f"{question} {said}\n\n" for question, said in examples)
            return self._pair(shown + prompt, after)
        turns: list[Turn] = []
        for question, said in examples:
            turns += [Turn("user", question), Turn("assistant", said)]
        asked = self._turns(prompt_of([*turns, Turn("user", prompt)]))
        return self._pair(chat.render(self.tokenizer, asked, asks=True), after)

    def answer_ends(self, prompt: str, answer: str) -> list[int]:
        """Return the places of the end tokens among the labelled tokens of all of a row's answers."""
        lengths = [len(ids) - start for ids, start in self.pairs(prompt, answer)]
        return (np.cumsum(lengths) - 1).tolist()

    @cached_property
    def end_ids(self) -> list[int]:
        """Return the tokens that end an answer: the tokenizer's, and the template's end of a turn.

        Some models end their turns with another token than the tokenizer's (Gemma, Phi-3).
        """
        tokenizer = self.tokenizer
        ends = [int(tokenizer.eos_token_id)]  # pyright: ignore[reportArgumentType]
        try:
            turn = self._answers("a", "b")[-1].text
        except ConfigError:
            return ends  # the template is refused where rows have prompts, and unread elsewhere
        last = tokenizer(turn, add_special_tokens=False)["input_ids"][-1]
        added = tokenizer.added_tokens_decoder
        if last in added and added[last].special and last not in ends:
            ends.append(last)
        return ends

    def windows(self, prompt: str, answer: str) -> list[Window]:
        """Return the windows that cover the answers of a row."""
        windows: list[Window] = []
        for ids, answer_start in self.pairs(prompt, answer):
            windows += windows_of(ids, answer_start, self.max_tokens)
        return windows

    def length(self, row: Mapping[str, Any]) -> RowLength:
        """Return how long a row is, and in how many windows the model reads it.

        Raises:
            ConfigError: the model's chat template does not write the row. The text has its id.
        """
        try:
            pairs = self.pairs(row["prompt"], row["answer"])
        except ConfigError as fault:
            raise ConfigError(f"data.{row['set']}.path: row '{row['id']}': {fault}") from None
        windows = len(pairs)
        if row["set"] in COVERED_SETS:
            windows = sum(len(windows_of(*pair, self.max_tokens)) for pair in pairs)
        return RowLength(len(pairs[-1][0]), windows)

    def longest(self, row: Mapping[str, Any]) -> int:
        """Return the tokens of the longest text of a row, among all that is read and scored."""
        texts = [(row["prompt"], row["answer"])]
        if row["paraphrased_prompt"]:
            texts.append((row["paraphrased_prompt"], row["answer"]))
        for answer in (row["paraphrased_answer"], *(row["perturbed_answers"] or ())):
            if answer:
                texts.append((row["prompt"], answer))
        return max(len(ids) for text in texts for ids, _ in self.pairs(*text))

    def prompt(self, prompt: str) -> list[int]:
        """Return the token ids up to where the model's answer begins."""
        before = prompt
        if prompt and self.tokenizer.chat_template:
            before = chat.render(self.tokenizer, self._turns(prompt), asks=True)
        return self._prompt_ids(before)[-self.max_tokens :]

    def fact_tokens(self, prompt: str, answer: str, fact: str) -> NDArray[np.bool_]:
        """Return which of the T answer tokens of `pair` carry the fact where it first stands.

        None does where the fact is '' or begins in a row's first token, which nothing predicts: a
        part of a fact is not measured.
        """
        ids, answer_start = self.pair(prompt, answer)
        is_fact_T = np.zeros(len(ids) - answer_start, dtype=np.bool_)
        if not fact:
            return is_fact_T
        before, after = self._answers(prompt, answer)[-1]
        carriers = np.asarray(self._carriers(after, answer, fact), dtype=np.int64)
        carriers += len(self._prompt_ids(before)) - answer_start
        if len(carriers) and carriers[0] >= 0:
            is_fact_T[carriers] = True
        return is_fact_T

    def fact_span(self, prompt: str, answer: str, fact: str) -> tuple[int, int]:
        """Return where in `pair` the tokens that carry the fact begin and end; 0, 0 without any."""
        index_N = np.flatnonzero(self.fact_tokens(prompt, answer, fact))
        if not len(index_N):
            return 0, 0
        answer_start = self.pair(prompt, answer)[1]
        return answer_start + int(index_N[0]), answer_start + int(index_N[-1]) + 1

    def _carriers(self, after: str, answer: str, fact: str) -> Sequence[int]:
        """Return the tokens of the text `after` that overlap the fact.

        There are none where the template has rewritten it.
        """
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            start = after.find(fact, max(after.find(answer), 0))
            if start < 0:
                return []
            encoded = tokenizer(after, add_special_tokens=False, return_offsets_mapping=True)
            left_T, right_T = np.reshape(encoded["offset_mapping"], (-1, 2)).T
            return np.flatnonzero((left_T < start + len(fact)) & (right_T > start)).tolist()
        # Without offsets: the shortest beginning with the fact, then its shortest end with it.
        ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
        end = 1
        while end <= len(ids) and fact not in self._decode(ids[:end]):
            end += 1
        if end > len(ids):
            return []
        first = end - 1
        while fact not in self._decode(ids[first:end]):
            first -= 1
        return range(first, end)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _prompt_ids(self, before: str) -> list[int]:
        """Tokenise the text before the answer."""
        # A chat template contains its special tokens, which must not be added a second time.
        adds_special = not self.tokenizer.chat_template
        return self.tokenizer(before, add_special_tokens=adds_special)["input_ids"]

    def _answers(self, prompt: str, answer: str) -> list[chat.Answer]:
        """Return the text of each answer of a row with its end, and the text before it."""
        if not prompt:
            return [chat.Answer("", answer)]
        turns = self._turns(prompt)
        if self.tokenizer.chat_template:
            return chat.answers(self.tokenizer, [*turns, Turn("assistant", answer)])
        if len(turns) > 1:
            raise ConfigError(
                f"several turns, and {self.model.path} has no chat template to write them in; "
                "allowed: a question and an answer a row, or a model with a chat template"
            )
        return [chat.Answer(turns[0].content, f" {answer}" if answer else "")]

    def _turns(self, prompt: str) -> list[Turn]:
        """Return the turns of a prompt, behind the system prompt where they have no system turn."""
        turns = turns_of(prompt)
        is_without = "system" not in [turn.role for turn in turns]
        if self.system_prompt is not None and is_without and self.tokenizer.chat_template:
            turns.insert(0, Turn("system", self.system_prompt))
        return turns

    def frame_tokens(self) -> list[int]:
        """Return the tokens that stand around any row's words."""
        try:
            question = self.pair("a", "b")[0]
        except ConfigError:
            question = []  # as in `end_ids`
        return [*self.pair("", "b")[0], *question, *self.end_ids, self.pad_token_id]

    @property
    def pad_token_id(self) -> int:
        """Return the token that rows are padded with."""
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    def rows(self, records: Sequence[Mapping[str, Any]]) -> "list[Row]":
        """Return encoded rows, for a batch."""
        return [row_of(record) for record in records]

    def blank(self) -> "Row | None":
        """Return None, because `collate` makes a row that no term counts."""
        return None

    def encode_batch(self, batch: Any) -> dict[str, Any]:
        """Return the columns that training needs of a batch of Ray Data, a record a window."""
        records: list[dict[str, Any]] = []
        for index in range(len(batch["row"])):
            row = {name: values[index] for name, values in batch.items()}
            records += self._records(row)
        return columns_of(records)

    def _records(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return a row's windows; where it is learned or kept, the first of each answer.

        The tokens of a window of the forget set have those of a refusal behind them, which `length`
        leaves out.
        """
        prompt, answer, fact = str(row["prompt"]), str(row["answer"]), str(row["fact"] or "")
        # `hash` of a text differs between processes, and a CRC does not.
        label = zlib.crc32(row["label"].encode()) if row["label"] else -1
        span = (0, 0)
        if fact and row["set"] == "forget":
            span = self.fact_span(prompt, answer, fact)
        records: list[dict[str, Any]] = []
        asked = [question for question, _ in questions_of(prompt, answer)]
        for pair, question in zip(self.pairs(prompt, answer), asked, strict=True):
            refusal = Window([], 0, 0)
            if row["set"] == "forget":
                said = str(row["refusal"] or "") or refusal_of(int(row["row"]))
                refused = self.pair(question, said)
                refusal = windows_of(*refused, self.max_tokens)[0]
            windows = windows_of(*pair, self.max_tokens)
            if row["set"] not in COVERED_SETS:
                windows = windows[:1]
            for window in windows:
                fact_start, fact_end = window.part_of(*span)
                record = {
                    "set": row["set"],
                    "row": row["row"],
                    "part": len(records),
                    "label": label,
                    "input_ids": window.input_ids + refusal.input_ids,
                    "answer_start": window.answer_start,
                    "refusal_start": refusal.answer_start,
                    "fact_start": fact_start,
                    "fact_end": fact_end,
                    "length": len(window.input_ids),
                }
                records.append(record)
        return records


def loaded_once(load: Callable[P, T]) -> Callable[P, T]:
    """Cache the last two results of a function that loads something of a model, per process."""
    remembered: Any = lru_cache(maxsize=2)(load)
    return remembered


def largest_token(tokenizer: "PreTrainedTokenizerBase", read: Sequence[int]) -> int:
    """Return the largest token of a tokenizer's vocabulary and of those that rows are `read` with.

    Other added tokens do not count: some models come with ones that they have no embedding for.
    """
    added = tokenizer.added_tokens_decoder
    own = [number for number in tokenizer.get_vocab().values() if number not in added]
    return max([*own, *read])


@loaded_once
def load_tokenizer(model: ModelConfig, *, ends: bool = True) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder or hub name, once a process.

    Raises:
        ConfigError: no tokenizer loads, or it lacks the end token that answers need (`ends`).
    """
    from transformers import AutoTokenizer  # imported here: the driver never tokenises

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # broken files raise what they like
        raise ConfigError(
            f"model.path: no tokenizer loads from {model.path} ({reason_of(error)}); "
            "allowed: a model with its tokenizer"
        ) from None
    if ends and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.path: the tokenizer of {model.path} has no end token (eos_token); "
            "it is needed to end answers"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.date is not None:
        chat.write_day(tokenizer, datetime.fromisoformat(model.date))
    return tokenizer
