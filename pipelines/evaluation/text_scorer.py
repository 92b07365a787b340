"""What a worker measures of a row under a model: teacher-forced likelihoods and greedy answers, batched.

A model's name may carry what is done to it once it is loaded: `after:quantised_4bit`, `after:relearn`.

Shapes: B rows, T tokens (of a batch, or of an answer with EOS), N answer tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.encoding.text import Encoder
from pipelines.evaluation.attacks import BITS, halves, quantise_blocks_, relearn_
from pipelines.evaluation.metrics import TokenStatistics, sample_scores
from pipelines.evaluation.metrics.forward import token_statistics
from pipelines.evaluation.metrics.memorization import fact_recall
from pipelines.evaluation.metrics.text import rouge_f1, rouge_recall
from pipelines.model.load import load_base
from rfa.batch import Row, collate
from rfa.features import BlockRunner

PARAPHRASED = ("forget",)  # sets also asked in other words
TRUTH_RATIO = (
    "forget",
    "retain",
    "general",
)  # sets whose wrong answers are weighed against the right one
GENERATED = (
    "forget",
    "retain",
    "general",
)  # sets whose greedy answers are compared with the right one
FACT_RECALL = {
    "answer": "fact_recall",
    "loss_paraphrased": "fact_recall_paraphrased",
}  # by kind of text
QUICK = tuple(FACT_RECALL)  # kinds of text that `evaluation.quick` leaves
VERBATIM_TOKENS = 128  # tokens generated for plain text (open-unlearning, commit d3d7cf9)


class Text(NamedTuple):
    """A prompt with an answer whose likelihood is wanted, what of the row it is, and the answer's fact ('': none)."""

    row: int
    kind: str
    prompt: str
    answer: str
    fact: str = ""


class Scorer:
    """Scores rows under one model after another, holding one at a time."""

    def __init__(self, cfg: UnlearnConfig, models: dict[str, ModelConfig]) -> None:
        self.cfg, self.models = cfg, models
        self.device = "cuda" if cfg.train.gpus_per_worker else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(max(1, int(cfg.train.cpus_per_worker)))
        self._loaded: tuple[str, PreTrainedModel, BlockRunner] | None = None
        self._encoder = Encoder(cfg.model, cfg.data.system_prompt, cfg.data.max_tokens)

    def hold(self, name: str, model: PreTrainedModel) -> None:
        """Score a model that is in memory, under that name, as it stands whenever rows are scored."""
        self._loaded = name, model, BlockRunner(model)

    def score(self, name: str, rows: pa.Table) -> list[tuple[str, int, dict[str, Any]]]:
        """Set, row number and numbers of each row, under the model of that name."""
        self._load(name)
        records = rows.to_pylist()
        with torch.inference_mode():
            fields = self._score(records)
        return [(row["set"], row["row"], own) for row, own in zip(records, fields, strict=True)]

    def answers(self, name: str, prompts: Sequence[str]) -> list[str]:
        """The model's greedy answer to each prompt, as `Encoder.pair` takes it."""
        self._load(name)
        with torch.inference_mode():
            found = dict(
                self._continue(
                    [self._encoder.prompt(prompt) for prompt in prompts], [False] * len(prompts)
                )
            )
        # Without a chat template the space between prompt and answer is not the answer's.
        space = "" if self._encoder.tokenizer.chat_template else " "
        return [found[index].removeprefix(space) for index in range(len(prompts))]

    def relearn(
        self, name: str, rows: pa.Table
    ) -> dict[int, list[tuple[str, int, dict[str, Any]]]]:
        """Teacher-forced numbers of one half of the rows, as `score` gives them, by steps taken on the other half."""
        learned, held_out = halves(rows.to_pylist())
        if not held_out:
            return {}
        model = self._load(name)
        encoded = [
            Row(*self._encoder.pair(str(row["prompt"]), str(row["answer"]))) for row in learned
        ]
        answers = [_answer(index, row) for index, row in enumerate(held_out)]
        found: dict[int, list[tuple[str, int, dict[str, Any]]]] = {}
        for step in relearn_(model, encoded, self._pad, self.cfg.seed):
            with torch.no_grad():
                fields = self._likelihoods(held_out, answers)
            found[step] = [
                (row["set"], row["row"], own) for row, own in zip(held_out, fields, strict=True)
            ]
        self._loaded = None  # it is no longer the model of that name
        return found

    def _load(self, name: str) -> PreTrainedModel:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # the old model goes before the new one comes
            own_name, _, change = name.partition(":")
            # The small steps of relearning would be lost in bf16's 8 bits.
            precision = "fp32" if change == "relearn" else self.cfg.train.precision
            spread = self.device == "cuda" and torch.cuda.device_count() > 1
            model = load_base(self.models[own_name], precision, spread=spread).eval()
            if not spread:
                model.to(self.device)  # pyright: ignore[reportArgumentType]
            if change in BITS:
                quantise_blocks_(model, BITS[change])
            self._loaded = name, model, BlockRunner(model)
        return self._loaded[1]

    def _score(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        quick = self.cfg.evaluation.quick
        texts = [text for index, row in enumerate(rows) for text in _texts(index, row)]
        found = self._likelihoods(rows, [text for text in texts if not quick or text.kind in QUICK])
        if quick:
            return found
        asked = [index for index, row in enumerate(rows) if row["set"] in GENERATED]
        for index, value in self._rouge(rows, asked, "prompt"):
            found[index]["rouge"] = value
        asked = [
            i
            for i, row in enumerate(rows)
            if row["set"] in PARAPHRASED and row["paraphrased_prompt"]
        ]
        for index, value in self._rouge(rows, asked, "paraphrased_prompt"):
            found[index]["rouge_paraphrased"] = value
        return found

    def _likelihoods(
        self, rows: Sequence[dict[str, Any]], texts: list[Text]
    ) -> list[dict[str, Any]]:
        """The teacher-forced numbers of each row, from its texts."""
        found: list[dict[str, Any]] = [{"set_name": str(row["set"])} for row in rows]
        for text, statistics in self._statistics(texts):
            own = found[text.row]
            scores = sample_scores(statistics, text.answer)
            if text.kind == "answer":
                own.update(scores)
            elif text.kind == "perturbed":
                own.setdefault("perturbed_losses", []).append(scores["loss"])
            else:
                own[text.kind] = scores["loss"]
            if text.fact:
                is_fact_T = self._encoder.fact_tokens(text.prompt, text.answer, text.fact)
                own[FACT_RECALL[text.kind]] = fact_recall(statistics.is_argmax, is_fact_T)
        return found

    def _statistics(self, texts: list[Text]) -> Iterator[tuple[Text, TokenStatistics]]:
        """Token statistics of each text, in the order given; batches are of like length."""
        encoded = [self._encoder.pair(text.prompt, text.answer) for text in texts]
        results: dict[int, TokenStatistics] = {}
        for chosen in self._by_length([len(ids) for ids, _ in encoded]):
            batch = collate([Row(*encoded[index]) for index in chosen], [], self._pad).to(
                self.device
            )
            assert self._loaded is not None
            logits_NV = self._loaded[2](batch, logits_at_BT=batch.answer_BT).logits_NV
            assert logits_NV is not None
            label_N = batch.expected(batch.answer_BT)
            parts = token_statistics(logits_NV, label_N).split(batch.answer_BT.sum(1).tolist())
            results.update(zip(chosen, parts, strict=True))
        return ((text, results[index]) for index, text in enumerate(texts))

    def _rouge(
        self, rows: Sequence[dict[str, Any]], asked: list[int], column: str
    ) -> Iterator[tuple[int, float]]:
        """ROUGE-L of greedy answers: recall for questions, F1 of the second half for plain text."""
        questions = [self._question(rows[index], column) for index in asked]
        is_text = [rows[index]["prompt"] == "" for index in asked]
        for i, answer in self._continue([ids for ids, _ in questions], is_text):
            yield asked[i], (rouge_f1 if is_text[i] else rouge_recall)(answer, questions[i][1])

    def _continue(self, prompts: list[list[int]], is_text: list[bool]) -> Iterator[tuple[int, str]]:
        """Index and greedy continuation of each prompt; batches are of like length."""
        for chosen in self._by_length([len(ids) for ids in prompts]):
            found = self._generate([prompts[i] for i in chosen], [is_text[i] for i in chosen])
            yield from zip(chosen, found, strict=True)

    def _question(self, row: dict[str, Any], column: str) -> tuple[list[int], str]:
        """Tokens the model continues, and the right continuation."""
        if row["prompt"]:
            return self._encoder.prompt(str(row[column])), str(row["answer"])
        ids, _ = self._encoder.pair("", str(row["answer"]))
        half = max(1, len(ids) // 2)
        return ids[:half], self._decode(ids[half:])

    def _generate(self, prompts: list[list[int]], is_text: list[bool]) -> list[str]:
        assert self._loaded is not None
        width = max(len(ids) for ids in prompts)
        input_ids_BT = torch.full((len(prompts), width), self._pad)
        attention_BT = torch.zeros_like(input_ids_BT)
        for index, ids in enumerate(
            prompts
        ):  # padded on the left: all answers begin at the same place
            input_ids_BT[index, width - len(ids) :] = torch.tensor(ids)
            attention_BT[index, width - len(ids) :] = 1
        longest = self.cfg.evaluation.max_new_tokens
        out_BT = self._loaded[1].generate(  # pyright: ignore[reportCallIssue]
            input_ids=input_ids_BT.to(self.device),
            attention_mask=attention_BT.to(self.device),
            max_new_tokens=min(longest, VERBATIM_TOKENS) if all(is_text) else longest,
            do_sample=False,
            eos_token_id=self._encoder.tokenizer.eos_token_id,
            pad_token_id=self._pad,
        )
        return [self._decode(ids) for ids in out_BT[:, width:].tolist()]

    def _decode(self, ids: list[int]) -> str:
        return str(self._encoder.tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def _pad(self) -> int:
        return int(self._encoder.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    def _by_length(self, lengths: list[int]) -> Iterator[list[int]]:
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = self.cfg.evaluation.batch_size
        return (order[start : start + size] for start in range(0, len(order), size))


def _answer(index: int, row: dict[str, Any]) -> Text:
    return Text(index, "answer", str(row["prompt"]), str(row["answer"]), str(row["fact"]))


def _texts(index: int, row: dict[str, Any]) -> Iterator[Text]:
    """The texts of one row whose likelihoods are wanted."""
    prompt, answer, fact, name = (
        str(row["prompt"]),
        str(row["answer"]),
        str(row["fact"]),
        row["set"],
    )
    yield _answer(index, row)
    if name in PARAPHRASED and row["paraphrased_prompt"]:
        yield Text(index, "loss_paraphrased", str(row["paraphrased_prompt"]), answer, fact)
    if name in TRUTH_RATIO and len(row["perturbed_answers"]):
        if row["paraphrased_answer"]:
            yield Text(index, "correct_loss", prompt, str(row["paraphrased_answer"]))
        for wrong in row["perturbed_answers"]:
            yield Text(index, "perturbed", prompt, str(wrong))
