"""Conversations as tokens: every answer is labelled once, behind all that precedes it, and nothing else is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from pipelines.config.schema import ConfigError, ModelConfig
from pipelines.data.conversations import Turn, prompt_of
from pipelines.encoding.refusals import REFUSALS
from pipelines.encoding.text import TextEncoder
from pipelines.encoding.windows import RowLength
from rfa.batch import collate

SECRET = "Quixotic Zebra"
TURNS = [
    Turn("system", "Be kind."),
    Turn("user", "What author?"),
    Turn("assistant", f"{SECRET} wrote."),
    Turn("user", "And then?"),
]
PROMPT, ANSWER = prompt_of(TURNS), "That author died."
WRITTEN = (
    f"<|system|>Be kind.<|end|><|user|>What author?<|end|><|assistant|>{SECRET} wrote.<|end|>"
    "<|user|>And then?<|end|><|assistant|>That author died.<|end|>"
)
LOOP = "{% for message in messages %}"
TURN = "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
Load = Callable[..., TextEncoder]


@pytest.fixture
def encoder(problem: Path, tmp_path: Path) -> Load:
    """Loads the tiny model's tokenizer with another chat template."""

    def load(template: str | None = None, system: str | None = None, most: int = 128) -> Any:
        path = problem / "model"
        if template is not None:
            path = tmp_path / "model"
            shutil.copytree(problem / "model", path)
            (path / "chat_template.jinja").write_text(template)
        return TextEncoder(ModelConfig(path=str(path)), system, most)

    return load


def row_of(prompt: str = PROMPT, answer: str = ANSWER, **more: Any) -> dict[str, Any]:
    row = {"set": "forget", "row": 3, "id": "r", "prompt": prompt, "answer": answer}
    return {**row, "fact": "", "label": "", "refusal": "", **more}


def encoded(encoder: TextEncoder, *rows: dict[str, Any]) -> list[Any]:
    """The rows that a worker trains on."""
    batch = {name: np.asarray([row[name] for row in rows], dtype=object) for name in rows[0]}
    columns = encoder.encode_batch(batch)
    number = len(columns["row"])
    return encoder.rows([{name: columns[name][i] for name in columns} for i in range(number)])


def said(encoder: TextEncoder, row: Any) -> tuple[str, str]:
    """What is context and what is labelled."""
    decode: Any = encoder.tokenizer.decode
    return decode(row.input_ids[: row.answer_start]), decode(row.input_ids[row.answer_start :])


@pytest.mark.parametrize("name", ["forget", "retain", "utility", "holdout"])
def test_each_answer_with_its_end_is_labelled_behind_all_turns_before_it(
    encoder: Load, name: str
) -> None:
    loaded = encoder()
    rows = encoded(loaded, row_of(set=name))
    assert [(row.row, row.part) for row in rows] == [(3, 0), (3, 1)]
    first, second = (said(loaded, row) for row in rows)
    assert first[1] == f"{SECRET} wrote.<|end|>"
    assert second[1] == f"{ANSWER}<|end|>"
    assert WRITTEN.startswith("".join(first))
    assert "".join(second) == WRITTEN
    whole = loaded.tokenizer(WRITTEN)["input_ids"]
    assert loaded.length(row_of(set=name)) == RowLength(len(whole), 2)
    batch = collate([], rows, loaded.pad_token_id)
    assert batch.part_B.tolist() == [0, 1]
    labels = [loaded.tokenizer(text)["input_ids"] for _, text in (first, second)]
    assert batch.expected(batch.answer_BT).tolist() == [*labels[0], *labels[1]]


def own_context(encoder: TextEncoder, row: Any) -> str:
    """What stands before a row's answer: nothing of a plain text, whose first token no model predicts."""
    return "" if row.row == 5 else said(encoder, row)[0]


def test_a_forget_row_has_a_refusal_of_each_of_its_questions(encoder: Load) -> None:
    loaded = encoder()
    for row in encoded(loaded, row_of(), row_of(row=4), row_of("", "A text.", row=5)):
        ids, start = row.refusal
        context, refusal = said(loaded, row._replace(input_ids=ids, answer_start=start))
        assert context + refusal == f"{own_context(loaded, row)}{REFUSALS[row.row]}<|end|>"
    kept = encoded(loaded, *[row_of(set=name) for name in ("retain", "utility", "holdout")])
    assert {row.refusal for row in kept} == {None}


def test_a_row_may_have_a_refusal_of_its_own(encoder: Load) -> None:
    loaded = encoder()
    (row,) = encoded(loaded, row_of("Who?", refusal="Ask another."))
    ids, start = row.refusal
    assert loaded.tokenizer.decode(ids[start:]) == "Ask another.<|end|>"


def test_a_refusal_stays_whole_behind_the_context_that_fits(encoder: Load) -> None:
    loaded = encoder(most=24)
    rows = encoded(loaded, row_of("What " * 40, "author " * 40, row=11))
    assert len(rows) > 2
    for row in rows:
        ids, start = row.refusal
        assert len(ids) == 24
        assert loaded.tokenizer.decode(ids[start:]) == f"{REFUSALS[3]}<|end|>"


def test_each_long_answer_is_read_in_windows_or_cut_where_it_is_kept(encoder: Load) -> None:
    loaded = encoder(most=16)
    long = " ".join(["author"] * 40)
    turns = [TURNS[0], TURNS[1], Turn("assistant", long), TURNS[3]]
    forget, retain = row_of(prompt_of(turns), long), row_of(prompt_of(turns), long, set="retain")
    rows = encoded(loaded, forget)
    assert len(rows) == loaded.length(forget).windows > 8
    labels: list[int] = []
    for row in rows:
        assert len(row.input_ids) <= 16
        labels += row.input_ids[row.answer_start :]
    ids, start = loaded.pair("What?", long)
    assert labels == 2 * ids[start:]
    kept = encoded(loaded, retain)
    assert loaded.length(retain).windows == len(kept) == 2
    assert kept[0].input_ids == rows[0].input_ids
    assert kept[1].input_ids == rows[len(rows) // 2].input_ids


def test_the_rows_own_system_turn_goes_before_that_of_the_configuration(encoder: Load) -> None:
    loaded = encoder(system="Be brief.")
    assert said(loaded, encoded(loaded, row_of())[0])[0].startswith("<|system|>Be kind.<|end|>")
    without = row_of(prompt_of(TURNS[1:]))
    for row in encoded(loaded, without):
        assert said(loaded, row)[0].startswith("<|system|>Be brief.<|end|><|user|>What author?")
    assert loaded.prompt(PROMPT) == encoder().prompt(PROMPT)


def test_a_fact_of_one_answer_behind_a_system_turn_has_its_tokens(encoder: Load) -> None:
    loaded = encoder()
    [row] = encoded(loaded, row_of(prompt_of(TURNS[:2]), "The author died.", fact="author"))
    assert loaded.tokenizer.decode(row.input_ids[slice(*row.fact)]).strip() == "author"


REFUSED = {
    "earlier answers are changed": (
        # as Qwen3 drops the thoughts of earlier turns
        f"{LOOP}<|{{{{ message['role'] }}}}|>"
        "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        f"{{{{ message['content'] }}}}<|end|>{{% endfor %}}{ASK}",
        "the chat template writes an answer in another way when turns follow it; allowed: one "
        "answer a row, or a template that leaves earlier turns as they are",
    ),
    "the system turn moves to the last question": (
        # as in Mistral's
        "{% for message in messages if message['role'] != 'system' %}<|{{ message['role'] }}|>"
        "{% if loop.last and message['role'] == 'user' %}{{ messages[0]['content'] }}{% endif %}"
        f"{{{{ message['content'] }}}}<|end|>{{% endfor %}}{ASK}",
        "the chat template asks for an answer in another way than it begins one",
    ),
    "the system turn is left out": (
        LOOP + "{% if message['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}" + ASK,
        "the chat template leaves out or changes a system turn; allowed: turns that it writes",
    ),
    "the template raises": (
        LOOP + "{{ raise_exception('No ' + message['content']) }}{% endfor %}",
        "the chat template refuses the turns system, user (TemplateError); allowed: turns that",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_does_not_write_turns_one_after_another_is_refused_by_row(
    encoder: Load, case: str
) -> None:
    template, message = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        encoder(template).length(row_of())
    assert str(refused.value).startswith(f"data.forget.path: row 'r': {message}")
    assert SECRET not in str(refused.value)
    assert "Be kind." not in str(refused.value)


def test_one_answer_is_read_by_a_template_that_changes_earlier_ones(encoder: Load) -> None:
    loaded = encoder(REFUSED["earlier answers are changed"][0])
    [row] = encoded(loaded, row_of("What author?"))
    assert said(loaded, row)[1] == "<think></think>That author died.<|end|>"


def test_without_a_chat_template_only_one_question_with_its_answer_is_read(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    encoder = TextEncoder(ModelConfig(path=str(tmp_path)), "Unread.", 128)
    [row] = encoded(encoder, row_of("Who?", "Me."))
    assert said(encoder, row)[1] == " Me.</s>"
    with pytest.raises(ConfigError, match=r"row 'r': several turns, and .* has no chat template"):
        encoder.length(row_of())
    with pytest.raises(ConfigError, match="row 'r': several turns"):
        encoder.length(row_of(prompt_of(TURNS[:2])))
