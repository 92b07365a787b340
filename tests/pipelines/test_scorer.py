"""A worker's measurements against plain transformers."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.config import ModelConfig, UnlearnConfig, load_config
from pipelines.metrics.text import rouge_recall
from pipelines.prompts import Encoder
from pipelines.scorer import Scorer


@pytest.fixture(scope="module")
def cfg(overrides: list[str]) -> UnlearnConfig:
    return load_config("quick", overrides)


@pytest.fixture(scope="module")
def rows(problem: Path) -> list[dict[str, Any]]:
    lines = (problem / "data" / "forget.jsonl").read_text().splitlines()
    questions = [{**json.loads(line), "set": "forget", "row": index} for index, line in enumerate(lines)]
    text = {"set": "retain", "row": 0, "prompt": "", "answer": questions[0]["answer"] * 3, "perturbed_answers": []}
    empty = {"paraphrased_prompt": "", "paraphrased_answer": ""}
    return [*questions, {**empty, **text}]


def score(cfg: UnlearnConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    columns = ("set", "row", "prompt", "answer", "paraphrased_prompt", "paraphrased_answer", "perturbed_answers")
    table = pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows])
    return [fields for _, _, fields in Scorer(cfg, {"m": ModelConfig(path=cfg.model.path)}).score("m", table)]


def plain_loss(cfg: UnlearnConfig, prompt: str, answer: str) -> float:
    """By the model's own loss, one row at a time, from the template's text."""
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path).eval()
    before = f"<|user|>{prompt}<|end|><|assistant|>"
    ids = tokenizer(f"{before}{answer}<|end|>", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : len(tokenizer(before)["input_ids"])] = -100
    with torch.no_grad():
        return float(model(ids, labels=labels).loss)


def test_losses_are_the_models_own(cfg: UnlearnConfig, rows: list[dict[str, Any]]) -> None:
    row, found = rows[1], score(cfg, rows)[1]
    assert found["loss"] == pytest.approx(plain_loss(cfg, row["prompt"], row["answer"]), rel=1e-4)
    asked = plain_loss(cfg, row["paraphrased_prompt"], row["answer"])
    assert found["loss_paraphrased"] == pytest.approx(asked, rel=1e-4)
    told = plain_loss(cfg, row["prompt"], row["paraphrased_answer"])
    assert found["correct_loss"] == pytest.approx(told, rel=1e-4)
    wrong = [plain_loss(cfg, row["prompt"], answer) for answer in row["perturbed_answers"]]
    assert found["perturbed_losses"] == pytest.approx(wrong, rel=1e-4)


def test_rouge_is_that_of_the_greedy_answer(cfg: UnlearnConfig, rows: list[dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path).eval()
    found = score(cfg, rows)
    for index in (0, 3):
        ids = tokenizer(f"<|user|>{rows[index]['prompt']}<|end|><|assistant|>", return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(out, skip_special_tokens=True)
        assert found[index]["rouge"] == pytest.approx(rouge_recall(answer, rows[index]["answer"]))


def test_batches_change_no_score(cfg: UnlearnConfig, rows: list[dict[str, Any]]) -> None:
    evaluation = cfg.evaluation.model_copy(update={"batch_size": 1})
    for one, many in zip(score(cfg.model_copy(update={"evaluation": evaluation}), rows), score(cfg, rows), strict=True):
        assert one.keys() == many.keys()
        for name in one.keys() - {"set_name"}:
            assert one[name] == pytest.approx(many[name], rel=1e-4), name


def test_plain_text_is_continued_from_its_middle(cfg: UnlearnConfig, rows: list[dict[str, Any]]) -> None:
    found = score(cfg, rows)[-1]
    assert 0 <= found["rouge"] <= 1
    assert "rouge_paraphrased" not in found
    assert "perturbed_losses" not in found


def test_an_answer_ends_with_the_end_token_and_the_prompt_does_not_count(cfg: UnlearnConfig) -> None:
    encoder = Encoder(cfg.model, None, 128)
    ids, start = encoder.pair("Who?", "Nobody.")
    tokenizer = encoder.tokenizer
    assert tokenizer.decode(ids[:start]) == "<|user|>Who?<|end|><|assistant|>"
    assert tokenizer.decode(ids[start:]) == "Nobody.<|end|>"
    assert ids[:start] == encoder.prompt("Who?")


def test_a_system_prompt_comes_first(cfg: UnlearnConfig) -> None:
    encoder = Encoder(cfg.model, "Be kind.", 128)
    assert encoder.tokenizer.decode(encoder.prompt("Who?")).startswith("<|system|>Be kind.<|end|><|user|>Who?")


def test_plain_text_is_all_answer_but_its_first_token(cfg: UnlearnConfig) -> None:
    encoder = Encoder(cfg.model, None, 128)
    ids, start = encoder.pair("", "Just text.")
    assert start == 1
    assert encoder.tokenizer.decode(ids) == "Just text.<|end|>"


def test_long_rows_are_cut_and_keep_an_answer(cfg: UnlearnConfig) -> None:
    ids, start = Encoder(cfg.model, None, 16).pair("word " * 100, "answer")
    assert len(ids) == 16
    assert start == 15
