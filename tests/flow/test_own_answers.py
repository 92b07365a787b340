"""Utility prompts without an answer, answered by two workers with the tiny model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.config.schema import ConfigError, FinetuneConfig, UnlearnConfig
from pipelines.data.rows import SET_SCHEMA
from pipelines.data.sets import Sets, load_sets
from pipelines.evaluation import own_answers
from pipelines.evaluation.own_answers import (
    FILE_NAME,
    answered_only,
    holds_answers,
    with_own_answers,
)
from pipelines.preflight import check_answered
from pipelines.terminal import Terminal

ANSWERED = {0: "A first answer.", 3: "A second one."}
TOKENS = 8  # of evaluation.max_new_tokens in the preset


@pytest.fixture(scope="module")
def prompts(problem: Path) -> list[str]:
    lines = (problem / "data" / "utility.jsonl").read_text().splitlines()[:9]
    return [json.loads(line)["prompt"] for line in lines]


@pytest.fixture(scope="module")
def cfg(
    quick: Callable[..., UnlearnConfig],
    prompts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> UnlearnConfig:
    """Two workers, and seven of nine utility rows without an answer."""
    folder = tmp_path_factory.mktemp("own_answers")
    rows = [
        {"prompt": prompt, "answer": ANSWERED.get(number, "")}
        for number, prompt in enumerate(prompts)
    ]
    (folder / "utility.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "out").mkdir()
    settings = [
        f"data.utility.path={folder}/utility.jsonl",
        f"output_dir={folder}/out",
        "evaluation.batch_size=3",
    ]
    return quick(*settings)


@pytest.fixture(scope="module")
def sets(ray_session: None, cfg: UnlearnConfig) -> Sets:
    return load_sets(cfg.data)


def answer(cfg: UnlearnConfig, sets: Sets) -> Sets:
    folder, terminal = Path(cfg.output_dir), Terminal()
    with terminal.chatter_to(folder / "run.log"):
        return with_own_answers(cfg, sets, folder, terminal)


@pytest.fixture(scope="module")
def answered(cfg: UnlearnConfig, sets: Sets) -> Sets:
    return answer(cfg, sets)


def utility_rows(sets: Sets) -> list[dict[str, Any]]:
    assert sets.utility is not None
    return sets.utility.take_all()


def greedy_answer(cfg: UnlearnConfig, prompt: str) -> str:
    """By plain transformers, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path).eval()
    ids = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(out, skip_special_tokens=True))


def test_answers_are_the_models_own_and_given_ones_stay(
    cfg: UnlearnConfig, sets: Sets, answered: Sets, prompts: list[str]
) -> None:
    assert sets.unanswered == 7
    rows = utility_rows(answered)
    assert [row["row"] for row in rows] == list(range(9))
    assert [row["prompt"] for row in rows] == prompts
    expected = [
        ANSWERED.get(number) or greedy_answer(cfg, prompt) for number, prompt in enumerate(prompts)
    ]
    assert [row["answer"] for row in rows] == expected
    assert len(set(expected)) > 2, "the model does not say the same to all"


def test_only_the_answers_are_new(sets: Sets, answered: Sets) -> None:
    assert answered.utility is not None
    assert [{**row, "answer": ""} for row in utility_rows(answered)] == [
        {**row, "answer": ""} for row in utility_rows(sets)
    ]
    assert answered.utility.schema().base_schema == SET_SCHEMA
    assert answered.utility.context.execution_options.preserve_order
    assert not answered.utility.context.enable_progress_bars
    assert answered == replace(sets, utility=answered.utility, unanswered=0)


def test_answers_that_are_there_are_taken_and_none_is_generated(
    cfg: UnlearnConfig, sets: Sets, answered: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_answers, "scoring_pool", None)
    path = Path(cfg.output_dir) / FILE_NAME
    table = parquet.read_table(path)
    assert table.column_names == ["row", "answer"]
    assert table["row"].to_pylist() == [1, 2, 4, 5, 6, 7, 8]
    changed = ["changed by hand", *table["answer"].to_pylist()[1:]]
    parquet.write_table(table.set_column(1, "answer", pa.array(changed)), path)
    before = [row["answer"] for row in utility_rows(answered)]
    assert [row["answer"] for row in utility_rows(answer(cfg, sets))] == [
        before[0],
        "changed by hand",
        *before[2:],
    ]
    assert answer(cfg, answered) is answered


def test_answers_to_other_questions_are_not_taken(
    cfg: UnlearnConfig, answered: Sets, prompts: list[str]
) -> None:
    path = Path(cfg.output_dir) / FILE_NAME
    rows = [1, 2, 4, 5, 6, 7, 8]
    questions = pa.table({"row": rows, "prompt": [prompts[row] for row in rows]})
    assert holds_answers(path, pa.concat_tables([questions.slice(0, 3), questions.slice(3)]))
    in_another_order = pa.table({"row": rows, "prompt": [prompts[row] for row in rows[::-1]]})
    assert not holds_answers(path, in_another_order)
    assert not holds_answers(path.with_name("missing.parquet"), questions)


def test_finetuning_on_utility_rows_without_an_answer_is_refused(
    cfg: UnlearnConfig, sets: Sets, answered: Sets
) -> None:
    check_answered(cfg, sets, "finetune")  # it learns forget and retain
    learns_utility = cfg.model_copy(update={"finetune": FinetuneConfig(sets=("retain", "utility"))})
    check_answered(learns_utility, answered, "finetune")
    with pytest.raises(ConfigError) as caught:
        check_answered(learns_utility, sets, "finetune")
    message = str(caught.value)
    assert message.startswith("data.utility.path: ")
    assert "7 of 9 rows have no answer, allowed for `run` only" in message
    assert "\n" not in message


def test_what_has_no_answer_is_left_out_of_an_evaluation(sets: Sets, answered: Sets) -> None:
    left = answered_only(sets)
    rows = utility_rows(left)
    assert [(row["row"], row["answer"]) for row in rows] == list(enumerate(ANSWERED.values()))
    assert (left.counts["utility"], left.unanswered) == (2, 0)
    assert left.utility is not None and left.utility.schema().base_schema == SET_SCHEMA
    none_left = answered_only(replace(sets, unanswered=9))
    assert "utility" not in none_left.names()
    assert "utility" not in none_left.counts
    assert answered_only(answered) is answered
