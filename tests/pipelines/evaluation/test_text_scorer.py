"""A worker's measurements against plain transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from pipelines.config.load import with_values
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.data.conversations import Turn, prompt_of
from pipelines.encoding.text import TextEncoder
from pipelines.evaluation.metrics import TokenStatistics
from pipelines.evaluation.metrics.keys import IN_CONTEXT, ROUNDINGS
from pipelines.evaluation.metrics.membership import min_k
from pipelines.evaluation.metrics.text import rouge_recall
from pipelines.evaluation.scored_model import Beside, ScoredModel
from pipelines.evaluation.text_scorer import TextScorer
from pipelines.evaluation.texts import Text, texts_in_context
from tests.bad_models import POSITIONS, few_learned_positions


@pytest.fixture(scope="module")
def rows(problem: Path) -> list[dict[str, Any]]:
    lines = (problem / "data" / "forget.jsonl").read_text().splitlines()
    questions = [
        {**json.loads(line), "set": "forget", "row": index} for index, line in enumerate(lines)
    ]
    text = {
        "set": "retain",
        "row": 0,
        "prompt": "",
        "answer": questions[0]["answer"] * 3,
        "perturbed_answers": [],
    }
    empty = {"paraphrased_prompt": "", "paraphrased_answer": "", "fact": ""}
    return [*questions, {**empty, **text}]


def score(cfg: UnlearnConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    columns = ("set", "row", "prompt", "answer", "paraphrased_prompt", "paraphrased_answer", "fact")
    names = [*columns, "perturbed_answers"]
    numbered = [{**row, "row": number} for number, row in enumerate(rows)]
    scorer = TextScorer(cfg, {"m": ModelConfig(path=cfg.model.path)})
    table = pa.Table.from_pylist(numbered).select(names)
    return list(scorer.score(ScoredModel("m"), table).values())


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


def test_an_answer_ends_at_the_last_of_a_models_positions(
    cfg: UnlearnConfig, problem: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(problem / "model", tmp_path / "model")
    few_learned_positions(folder)
    model = ModelConfig(path=str(folder))
    chosen = cfg.model_copy(
        update={"model": model, "data": cfg.data.model_copy(update={"max_tokens": POSITIONS})}
    )
    scorer = TextScorer(chosen, {"m": model})
    prompts = ["author " * 99, "author " * 20]
    for prompt in prompts:
        assert len(scorer._encoder.prompt(prompt)) > POSITIONS - cfg.evaluation.max_new_tokens
    assert len(scorer.answers("m", prompts)) == 2


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
        ids = tokenizer(
            f"<|user|>{rows[index]['prompt']}<|end|><|assistant|>", return_tensors="pt"
        )["input_ids"]
        out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(out, skip_special_tokens=True)
        assert found[index]["rouge"] == pytest.approx(rouge_recall(answer, rows[index]["answer"]))


def test_a_fact_is_recalled_when_it_is_what_the_model_says_first(
    cfg: UnlearnConfig, rows: list[dict[str, Any]], problem: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path).eval()

    def first_word(prompt: str) -> str:
        ids = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>", return_tensors="pt")["input_ids"]
        return str(tokenizer.decode(int(model(ids).logits[0, -1].argmax())))

    lines = (problem / "data" / "utility.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    prompt, word = next(
        (prompt, word) for prompt in prompts if (word := first_word(prompt)).isalpha()
    )
    row = {**rows[0], "prompt": prompt, "answer": f"{word} was born in 1951."}
    said, unsaid = score(cfg, [{**row, "fact": word}, {**row, "fact": row["answer"]}])
    assert (said["fact_recall"], unsaid["fact_recall"]) == (1.0, 0.0)


def test_fact_recall_counts_the_tokens_of_the_fact_and_no_others(
    cfg: UnlearnConfig, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fact_tokens = TextEncoder(cfg.model, None, 128).fact_tokens

    def only_the_fact_then_all_but_the_fact(_: TextScorer, texts: list[Text]) -> Any:
        for text in texts:
            is_fact_T = fact_tokens(text.prompt, text.answer, rows[1]["fact"])
            zeros_T = np.zeros(len(is_fact_T))
            is_argmax_T = is_fact_T if text.kind == "answer" else ~is_fact_T
            yield TokenStatistics(zeros_T, is_argmax_T, zeros_T, zeros_T)

    monkeypatch.setattr(TextScorer, "_statistics", only_the_fact_then_all_but_the_fact)
    [found] = score(cfg, [rows[1]])
    assert (found["fact_recall"], found["fact_recall_paraphrased"]) == (1.0, 0.0)
    assert 0 < found["exact_memorization"] < 1


def test_a_row_without_a_fact_has_no_fact_recall(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    with_fact, without = score(cfg, [rows[0], {**rows[0], "fact": ""}])
    assert with_fact.keys() - without.keys() == {"fact_recall", "fact_recall_paraphrased"}
    assert without.keys() - with_fact.keys() == set()


def test_batches_change_no_score(cfg: UnlearnConfig, rows: list[dict[str, Any]]) -> None:
    evaluation = cfg.evaluation.model_copy(update={"batch_size": 1})
    for one, many in zip(
        score(cfg.model_copy(update={"evaluation": evaluation}), rows),
        score(cfg, rows),
        strict=True,
    ):
        assert one.keys() == many.keys()
        for name in one.keys() - {"set_name"}:
            assert one[name] == pytest.approx(many[name], rel=1e-4), name


def test_distances_to_another_model_are_those_of_plain_forwards(
    cfg: UnlearnConfig, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path).eval()
    other = AutoModelForCausalLM.from_pretrained(cfg.model.path).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in other.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(cfg.model.path).save_pretrained(tmp_path)
    models = {"after": cfg.model, "oracle": ModelConfig(path=str(tmp_path))}
    forgotten_before = {**rows[0], "set": "earlier"}
    numbered = [{**row, "row": number} for number, row in enumerate([*rows, forgotten_before])]
    table = pa.Table.from_pylist(numbered)
    scored = TextScorer(cfg, models).score(ScoredModel("after", Beside("oracle")), table)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)

    def plain(prompt: str, answer: str) -> tuple[float, Any, Any]:
        """Return the mean divergence and each token's log-probability to both models."""
        before = f"<|user|>{prompt}<|end|><|assistant|>"
        ids = tokenizer(f"{before}{answer}<|end|>", return_tensors="pt")["input_ids"]
        start = len(tokenizer(before)["input_ids"]) - 1
        with torch.no_grad():
            of_other = other(ids).logits[0, start:-1].log_softmax(-1)
            of_model = model(ids).logits[0, start:-1].log_softmax(-1)
        divergence = float((of_other.exp() * (of_other - of_model)).sum(-1).mean())
        labels = ids[0, start + 1 :, None]
        return divergence, of_model.gather(-1, labels)[:, 0], of_other.gather(-1, labels)[:, 0]

    for number in (0, 2):
        row, found = rows[number], scored["forget", number]
        divergence, of_model, of_other = plain(row["prompt"], row["answer"])
        assert found["token_distance"] == pytest.approx(divergence, rel=1e-3)
        assert found["log_probability"] == pytest.approx(of_model.numpy(), rel=1e-3)
        assert found["oracle_log_probability"] == pytest.approx(of_other.numpy(), rel=1e-3)
        asked, *_ = plain(row["paraphrased_prompt"], row["answer"])
        assert found["token_distance_paraphrased"] == pytest.approx(asked, rel=1e-3)
        parts = found["token_distance_above"] + found["token_distance_below"]
        assert parts <= found["token_distance"] + 1e-9
    assert scored["retain", len(rows) - 1].keys() == {"set_name", "kept_distance"}
    found, earlier = scored["forget", 0], scored["earlier", len(rows)]
    parts = ("token_distance", "token_distance_above", "token_distance_below")
    assert {part: earlier[part] for part in parts} == pytest.approx(
        {part: found[part] for part in parts}, rel=1e-4
    )
    assert "log_probability" not in earlier, "the page draws the tokens of this request"


def test_a_conversation_is_scored_by_all_of_its_answers(
    cfg: UnlearnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path).eval()
    turns = [Turn("user", "Who?"), Turn("assistant", "An author."), Turn("user", "Which?")]
    empty = {"paraphrased_prompt": "", "paraphrased_answer": "", "fact": ""}
    row = {"set": "forget", "prompt": prompt_of(turns), "answer": "No author.", **empty}
    asked: list[str] = []

    def continued(scorer: TextScorer, questions: list[Any]) -> list[str]:
        for question in questions:
            asked.append(scorer._decode(question.input_ids))
        return ["An author.", "Nobody."][: len(questions)]

    monkeypatch.setattr(TextScorer, "_continue", continued)
    [found] = score(cfg, [{**row, "perturbed_answers": []}])
    assert asked == ["Who?", "Who?An author.Which?"]
    assert found["rouge"] == 0.5, "the first answer is the right one"
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in (("Who?", "An author."), ("Which?", "No author.")):
        before = tokenizer(f"<|user|>{question}<|end|><|assistant|>")["input_ids"]
        told = tokenizer(f"{answer}<|end|>")["input_ids"]
        ids += before + told
        labels += [-100] * len(before) + told
    with torch.no_grad():
        out = model(torch.tensor([ids]), labels=torch.tensor([labels]))
    assert found["loss"] == pytest.approx(float(out.loss), rel=1e-4)
    assert found["tokens"] == sum(label >= 0 for label in labels)
    # Neither answer's end is among the tokens that the attack looks at.
    log_TV = out.logits[0].log_softmax(-1)
    ends = (-100, tokenizer.eos_token_id)
    words = [float(log_TV[t - 1, label]) for t, label in enumerate(labels) if label not in ends]
    assert len(words) == found["tokens"] - 2
    assert found["min_k"] == pytest.approx(min_k(np.array(words)), rel=1e-4)


def drawing(cfg: UnlearnConfig, **changes: Any) -> UnlearnConfig:
    """The configuration with answers that are drawn, and other changes to `evaluation`."""
    changes["robustness"] = ("leak_at_k",)
    return cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update=changes)})


def test_the_best_of_five_drawn_answers_to_a_forget_question_counts(
    cfg: UnlearnConfig, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Any]] = []

    def continued(_: TextScorer, questions: list[Any]) -> list[str]:
        if questions:
            asked.append(questions)
        said = ["Nobody knows.", "one two", "one", "", "Nobody"]
        return [said[index % 5] for index in range(len(questions))]

    monkeypatch.setattr(TextScorer, "_continue", continued)
    forget = [{**row, "answer": "One two three four"} for row in rows[:2]]
    found = score(drawing(cfg, quick=True), [*forget, rows[-1]])
    assert [row.get("leak_at_k") for row in found] == [0.5, 0.5, None]
    (questions,) = asked
    seeds = [question.seed for question in questions]
    assert seeds == [(0, row, 0, sample) for row in range(2) for sample in range(5)]
    assert "leak_at_k" not in score(cfg, forget)[0]


def test_what_is_drawn_is_the_same_in_other_batches(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    said: list[list[str]] = []
    for size in (1, 16):
        scorer = TextScorer(drawing(cfg, batch_size=size), {"m": cfg.model})
        scorer.load(ScoredModel("m"))
        of_rows = [scorer._continue(scorer._samples(row)) for row in rows[:2]]
        together = scorer._continue([*scorer._samples(rows[0]), *scorer._samples(rows[1])])
        assert together == of_rows[0] + of_rows[1]
        said.append(together)
    assert said[0] == said[1]
    assert len(set(said[0])) > 5


def test_a_rounded_model_is_not_asked_again(cfg: UnlearnConfig, rows: list[dict[str, Any]]) -> None:
    scorer = TextScorer(drawing(cfg), {"m": cfg.model})
    table = pa.Table.from_pylist(rows[:1])
    (found,) = scorer.score(ScoredModel("m"), table).values()
    (rounded,) = scorer.score(ScoredModel("m", ROUNDINGS[0]), table).values()
    assert found.keys() - rounded.keys() == {"leak_at_k"}


def test_a_question_is_asked_behind_retained_ones_with_their_answers(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    forget = [row for row in rows if row["set"] == "forget"]
    shown = [{**forget[1], "set": "retain", "row": 7, "prompt": "Why?", "answer": "So."}]
    shown.append({**shown[0], "row": 9, "prompt": "How?", "answer": "Thus."})
    # A plain text has no question, and a conversation has a context of its own.
    turns = [Turn("user", "Who?"), Turn("assistant", "I."), Turn("user", "You?")]
    others = [{**forget[0], "row": 80, "prompt": ""}]
    others.append({**forget[0], "row": 81, "prompt": prompt_of(turns)})
    scorer = TextScorer(cfg, {"m": cfg.model})
    in_context = ScoredModel("m", IN_CONTEXT)
    found = scorer.score(in_context, pa.Table.from_pylist([*shown, *forget, *others]))
    assert list(found) == [("forget", row["row"]) for row in forget]

    context = (
        "Why?<|end|><|assistant|>So.<|end|><|user|>How?<|end|><|assistant|>Thus.<|end|><|user|>"
    )
    for row in forget:
        loss = found["forget", row["row"]]["loss"]
        assert loss == pytest.approx(
            plain_loss(cfg, context + row["prompt"], row["answer"]), rel=1e-4
        )
        assert loss != pytest.approx(plain_loss(cfg, row["prompt"], row["answer"]), rel=1e-4)
    # The context comes on top of the tokens that a row may have.
    longest = max(len(scorer._encoder.pair(row["prompt"], row["answer"])[0]) for row in forget)
    tight = with_values(cfg, {"data.max_tokens": longest})
    again = TextScorer(tight, {"m": cfg.model}).score(
        in_context, pa.Table.from_pylist([*shown, *forget])
    )
    for key, sample in found.items():
        assert again[key]["loss"] == pytest.approx(sample["loss"], rel=1e-4)
    assert "fact_recall" in found["forget", forget[0]["row"]]
    assert scorer.score(in_context, pa.Table.from_pylist(forget)) == {}, "there are no examples"


def test_of_many_retained_rows_four_questions_are_shown_evenly(rows: list[dict[str, Any]]) -> None:
    forget = [row for row in rows if row["set"] == "forget"][:2]
    kept = [{**forget[0], "set": "retain", "row": n, "prompt": f"{n}?"} for n in range(8)]
    kept.insert(3, {**kept[0], "prompt": ""})
    asked, texts = texts_in_context([*kept, *forget])
    assert asked == forget
    for text in texts:
        assert [question for question, _ in text.examples] == ["0?", "2?", "4?", "6?"]
    assert {text.row for text in texts} == {0, 1}
    assert texts_in_context(forget) == ([], [])


def test_without_a_template_examples_are_paragraphs(cfg: UnlearnConfig) -> None:
    encoder = TextEncoder(cfg.model, None, 128)
    encoder.tokenizer.chat_template, template = None, encoder.tokenizer.chat_template
    try:
        ids, start = encoder.pair_behind([("Why?", "So."), ("How?", "Thus.")], "Who?", "Nobody.")
        alone, alone_start = encoder.pair("Who?", "Nobody.")
    finally:
        encoder.tokenizer.chat_template = template
    assert encoder.tokenizer.decode(ids[:start]) == "Why? So.\n\nHow? Thus.\n\nWho?"
    assert ids[start:] == alone[alone_start:]


def test_a_rows_gradient_norm_is_that_of_its_loss(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    before = f"<|user|>{rows[0]['prompt']}<|end|><|assistant|>"
    ids = tokenizer(f"{before}{rows[0]['answer']}<|end|>", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : len(tokenizer(before)["input_ids"])] = -100
    model(ids, labels=labels).loss.backward()
    norms = [float(weight.grad.norm()) for weight in model.parameters()]
    found = score(cfg, rows)
    assert found[0]["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-3)
    assert "grad_norm" not in found[-1], "a retained row"


def test_plain_text_is_continued_from_its_middle(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    found = score(cfg, rows)[-1]
    assert 0 <= found["rouge"] <= 1
    assert "rouge_paraphrased" not in found
    assert "perturbed_losses" not in found


def test_an_answer_ends_with_the_end_token_and_the_prompt_does_not_count(
    cfg: UnlearnConfig,
) -> None:
    encoder = TextEncoder(cfg.model, None, 128)
    ids, start = encoder.pair("Who?", "Nobody.")
    tokenizer = encoder.tokenizer
    assert tokenizer.decode(ids[:start]) == "<|user|>Who?<|end|><|assistant|>"
    assert tokenizer.decode(ids[start:]) == "Nobody.<|end|>"
    assert ids[:start] == encoder.prompt("Who?")


def test_a_turn_that_the_template_ends_gets_no_second_end(
    cfg: UnlearnConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Gemma and Phi-3: turns end with <|end|>, texts with another token.
    shutil.copytree(cfg.model.path, tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    changed = {**json.loads(settings.read_text()), "eos_token": "<|system|>"}
    settings.write_text(json.dumps(changed))
    model = ModelConfig(path=str(tmp_path / "model"))
    encoder = TextEncoder(model, None, 128)
    ids, start = encoder.pair("Who?", "Nobody.")
    assert encoder.tokenizer.decode(ids[start:]) == "Nobody.<|end|>"
    ids, start = encoder.pair("", "Just text.")
    assert encoder.tokenizer.decode(ids) == "Just text.<|system|>"
    stops: list[list[int]] = []

    def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        stops.append(options["eos_token_id"])
        return input_ids

    scorer = TextScorer(cfg.model_copy(update={"model": model}), {"m": model})
    scorer.load(ScoredModel("m"))
    network: Any = scorer.runner.model
    network.generation_config.eos_token_id = [7, 9]
    monkeypatch.setattr(network, "generate", generate)
    assert scorer.answers("m", ["Who?"]) == [""]
    names = encoder.tokenizer.convert_tokens_to_ids(["<|system|>", "<|end|>"])
    assert stops == [sorted({*names, 7, 9})]


@pytest.mark.parametrize("template", [True, False])
def test_an_empty_answer_to_a_prompt_is_the_end_token_alone(
    cfg: UnlearnConfig, tmp_path: Path, template: bool
) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)  # without a chat template
    encoder = TextEncoder(cfg.model if template else ModelConfig(path=str(tmp_path)), None, 128)
    ids, start = encoder.pair("Who?", "")
    assert ids[:start] == encoder.prompt("Who?")[:start]
    assert ids[start:] == [encoder.tokenizer.eos_token_id]


def test_a_system_prompt_comes_first(cfg: UnlearnConfig) -> None:
    encoder = TextEncoder(cfg.model, "Be kind.", 128)
    assert encoder.tokenizer.decode(encoder.prompt("Who?")).startswith(
        "<|system|>Be kind.<|end|><|user|>Who?"
    )


def test_plain_text_is_all_answer_but_its_first_token(cfg: UnlearnConfig) -> None:
    encoder = TextEncoder(cfg.model, None, 128)
    ids, start = encoder.pair("", "Just text.")
    assert start == 1
    assert encoder.tokenizer.decode(ids) == "Just text.<|end|>"


def test_a_long_prompt_is_cut_at_its_left_and_the_answer_stays_whole(cfg: UnlearnConfig) -> None:
    encoder = TextEncoder(cfg.model, None, 16)
    (window,) = encoder.windows("word " * 100, "What author")
    assert len(window.input_ids) == 16
    answer = encoder.tokenizer.decode(window.input_ids[window.answer_start :])
    assert answer == "What author<|end|>"


def test_scores_of_a_long_row_are_those_of_all_its_tokens(cfg: UnlearnConfig) -> None:
    scorer = TextScorer(cfg, {"model": cfg.model})
    scorer.load(ScoredModel("model"))
    text = Text(0, "answer", "", "What author wrote this and that " * 9)
    ids, start = TextEncoder(cfg.model, None, 16).pair("", text.answer)
    short = cfg.model_copy(update={"data": cfg.data.model_copy(update={"max_tokens": 16})})
    in_windows = TextScorer(short, {"model": cfg.model})
    in_windows.load(ScoredModel("model"))
    others = [Text(0, "answer", "", "This"), text, Text(0, "answer", "Who?", "Nobody")]
    found = in_windows._statistics(others)[1]
    assert len(found.log_probability) == len(ids) - start > 3 * 16
    # Each token's number is that of the model behind the context of its window, run alone.
    for window in in_windows._encoder.windows("", text.answer):
        part = torch.tensor([window.input_ids])
        with torch.no_grad():
            log_p_TV = scorer.runner.model(part).logits[0].log_softmax(-1)
        for position in range(window.answer_start, len(window.input_ids)):
            expected = float(log_p_TV[position - 1, window.input_ids[position]])
            index = window.first + position - start
            assert found.log_probability[index] == pytest.approx(expected, abs=1e-4)


def fact_text(encoder: TextEncoder, prompt: str, answer: str, fact: str) -> tuple[str, int]:
    """What the tokens that carry the fact say, and how many they are."""
    ids, start = encoder.pair(prompt, answer)
    is_fact_T = encoder.fact_tokens(prompt, answer, fact)
    assert len(is_fact_T) == len(ids) - start
    return str(encoder.tokenizer.decode(np.asarray(ids[start:])[is_fact_T])), int(is_fact_T.sum())


def test_the_tokens_of_a_fact_say_the_fact(cfg: UnlearnConfig, problem: Path) -> None:
    encoder = TextEncoder(cfg.model, None, 128)
    for path in (problem / "data").glob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()[:40]):
            assert (
                fact_text(encoder, row["prompt"], row["answer"], row["fact"])[0].strip()
                == row["fact"]
            )


def test_forget_rows_are_unlearned_with_the_place_of_their_facts(
    cfg: UnlearnConfig, problem: Path
) -> None:
    encoder = TextEncoder(cfg.model, None, 128)
    rows = [
        json.loads(line) for line in (problem / "data" / "forget.jsonl").read_text().splitlines()
    ]
    for name, facts in (
        ("forget", [*(row["fact"] for row in rows[1:]), ""]),
        ("retain", [""] * len(rows)),
    ):
        columns = {
            key: np.asarray([row[key] for row in rows[1:] + rows[:1]], dtype=object)
            for key in ("prompt", "answer", "fact")
        }
        columns["fact"][-1] = ""  # a row without one
        columns |= {
            "set": np.full(len(rows), name, dtype=object),
            "label": np.full(len(rows), ""),
            "refusal": np.full(len(rows), ""),
            "row": np.arange(len(rows)),
        }
        encoded = encoder.encode_batch(columns)
        records = [
            {key: column[index] for key, column in encoded.items()} for index in range(len(rows))
        ]
        found = [
            encoder.tokenizer.decode(row.input_ids[slice(*row.fact)]).strip()
            for row in encoder.rows(records)
        ]
        assert found == facts


def test_tokens_that_the_fact_shares_with_its_neighbours_carry_it(cfg: UnlearnConfig) -> None:
    encoder = TextEncoder(cfg.model, None, 128)
    assert encoder.tokenizer.tokenize("What author") == ["What", "Ġauthor"]
    # What, author, end token
    assert encoder.fact_tokens("Who?", "What author", "auth").tolist() == [False, True, False]
    assert encoder.fact_tokens("Who?", "What author", "t a").tolist() == [True, True, False]


def test_a_fact_counts_where_it_first_stands(cfg: UnlearnConfig) -> None:
    encoder = TextEncoder(cfg.model, None, 128)
    assert encoder.fact_tokens("Who?", "What author author", "author").tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_a_fact_that_is_not_there_has_no_tokens(cfg: UnlearnConfig) -> None:
    encoder = TextEncoder(cfg.model, None, 128)
    assert encoder.fact_tokens("Who?", "What author", "Nobody").tolist() == [False, False, False]
    assert encoder.fact_tokens("Who?", "What author", "").tolist() == [False, False, False]


def test_a_fact_begun_by_the_first_token_of_a_text_cannot_be_measured(cfg: UnlearnConfig) -> None:
    encoder = TextEncoder(cfg.model, None, 128)
    assert encoder.fact_tokens("", "What author", "What author").tolist() == [
        False,
        False,
    ]  # author, end token
    assert encoder.fact_tokens("", "What author", "author").tolist() == [True, False]


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_bytes_that_only_together_make_a_letter_carry_a_fact_together(
    cfg: UnlearnConfig, tmp_path: Path, kind: str
) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)  # a token a byte, and no offsets
    encoder = TextEncoder(
        cfg.model if kind == "fast" else ModelConfig(path=str(tmp_path)), None, 128
    )
    assert encoder.tokenizer.is_fast == (kind == "fast")
    said, tokens = fact_text(encoder, "Where?", "She saw Łódź twice.", "Łódź")
    assert said.strip() == "Łódź"
    assert kind == "fast" or tokens == 7  # 2 + 2 + 1 + 2 bytes
