"""Score rows under a language model: teacher-forced likelihoods and answers, batched.

Shapes: B rows, T tokens (of a batch, or of an answer with EOS), N answer tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.config.data import FORGOTTEN_SETS
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.data.conversations import answers_of, questions_of
from pipelines.encoding.text import TextEncoder
from pipelines.encoding.windows import positions_of, windows_of
from pipelines.evaluation.attacks import gradient_norm, learned_and_held_out, relearn_
from pipelines.evaluation.generation import Question, generate
from pipelines.evaluation.metrics import TokenStatistics, sample_scores
from pipelines.evaluation.metrics.distance import parts_of_divergence
from pipelines.evaluation.metrics.forward import (
    TokenDistances,
    token_distances,
    token_statistics,
)
from pipelines.evaluation.metrics.memorization import fact_recall
from pipelines.evaluation.metrics.sampling import SAMPLES, best_of_each
from pipelines.evaluation.metrics.text import rouge_f1, rouge_recall
from pipelines.evaluation.scored_model import Relearned, ScoredModel
from pipelines.evaluation.scorer import Samples, Scorer, samples_of
from pipelines.evaluation.texts import PARAPHRASED, Text, answer_text, texts_in_context, texts_of
from rfa.batch import Row, UnlearnBatch, collate
from rfa.blocks import BlockRunner

# Sets whose greedy answers are compared with the right one.
GENERATED = ("forget", "retain", "general")
# Sets whose answers are also drawn at random.
SAMPLED = ("forget",)
# Sets whose rows' gradients an attack compares.
WITH_GRADIENTS = ("forget", "holdout")
# The number that a text's fact gives, by the kind of text.
FACT_RECALL = {"answer": "fact_recall", "loss_paraphrased": "fact_recall_paraphrased"}
Tokens = TypeVar("Tokens", TokenStatistics, TokenDistances)


class TextScorer(Scorer):
    """Scores rows that have an answer."""

    def __init__(self, cfg: UnlearnConfig, models: Mapping[str, ModelConfig]) -> None:
        super().__init__(cfg, models)
        self._encoder = TextEncoder(cfg.model, cfg.data.system_prompt, cfg.data.max_tokens)

    def answers(self, name: str, prompts: Sequence[str]) -> list[str]:
        """Return the model's greedy answer to each prompt, as `TextEncoder.pair` takes it."""
        self.load(ScoredModel(name))
        questions = [Question(self._encoder.prompt(prompt)) for prompt in prompts]
        with torch.inference_mode():
            answers = self._continue(questions)
        # Without a chat template the space between prompt and answer is not the answer's.
        space = "" if self._encoder.tokenizer.chat_template else " "
        return [answer.removeprefix(space) for answer in answers]

    def relearn(self, model: ScoredModel, rows: pa.Table) -> dict[ScoredModel, Samples]:
        """Return the forget rows' teacher-forced numbers after each of STEPS on the other rows."""
        assert isinstance(model.change, Relearned)
        learned, held_out = learned_and_held_out(rows.to_pylist())
        if not held_out:
            self.on_step(model.change.steps)
            return {}
        self.load(model)
        encoded: list[Row] = []
        for row in learned:
            encoded += self._windows(row["prompt"], row["answer"])
        texts = [answer_text(index, row) for index, row in enumerate(held_out)]
        samples: dict[ScoredModel, Samples] = {}
        pad_token_id = self._encoder.pad_token_id
        network: Any = self.runner.model
        by, seed = model.change.by, self.cfg.seed
        for step in relearn_(network, encoded, pad_token_id, seed, by, self.on_step):
            with torch.no_grad():
                numbers = self._likelihoods(len(held_out), texts)
            relearned = model._replace(change=model.change._replace(steps=step))
            samples[relearned] = samples_of(held_out, numbers)
        self._loaded = None  # training has changed it
        return samples

    def _score(self, rows: pa.Table) -> Samples:
        records = rows.to_pylist()
        is_quick = self.cfg.evaluation.quick
        texts: list[Text] = []
        for index, row in enumerate(records):
            texts += texts_of(index, row, is_quick=is_quick)
        numbers = self._likelihoods(len(records), texts)
        asked: dict[int, list[Question]] = {}
        asked_in_other_words: dict[int, list[Question]] = {}
        asked_again: dict[int, list[Question]] = {}
        for index, row in enumerate(records):
            if not is_quick and row["set"] in GENERATED:
                asked[index] = self._questions(row, "prompt")
            if not is_quick and row["set"] in WITH_GRADIENTS:
                numbers[index]["grad_norm"] = self._gradient_norm(row)
            if not is_quick and row["set"] in PARAPHRASED and row["paraphrased_prompt"]:
                asked_in_other_words[index] = self._questions(row, "paraphrased_prompt")
            if row["set"] in SAMPLED and self._samples_answers:
                asked_again[index] = self._samples(row)
        for index, score in self._rouge(asked):
            numbers[index]["rouge"] = score
        for index, score in self._rouge(asked_in_other_words):
            numbers[index]["rouge_paraphrased"] = score
        for index, score in self._rouge(asked_again, SAMPLES):
            numbers[index]["leak_at_k"] = score
        return samples_of(records, numbers)

    def _score_in_context(self, rows: pa.Table) -> Samples:
        """Return the likelihoods of the forget set's lone questions, behind the other rows."""
        asked, texts = texts_in_context(rows.to_pylist())
        return samples_of(asked, self._likelihoods(len(asked), texts))

    @property
    def _samples_answers(self) -> bool:
        """Whether answers are drawn, of a model as it is: rounded ones would cost as much again."""
        assert self._loaded is not None
        return "leak_at_k" in self.cfg.evaluation.robustness and self._loaded[0].change is None

    def _compare(self, rows: pa.Table) -> Samples:
        """Return distances to the reference: to the oracle of what is or was forgotten, else as kept.

        The forget set's rows have them in both wordings, and with the tokens' log-probabilities.
        """
        records = rows.to_pylist()
        texts: list[Text] = []
        for index, row in enumerate(records):
            kind = "token_distance" if row["set"] in FORGOTTEN_SETS else "kept_distance"
            texts.append(Text(index, kind, row["prompt"], row["answer"]))
            if row["set"] in PARAPHRASED and row["paraphrased_prompt"]:
                prompt, kind = row["paraphrased_prompt"], "token_distance_paraphrased"
                texts.append(Text(index, kind, prompt, row["answer"]))
        numbers: list[dict[str, Any]] = [{} for _ in records]
        for text, distances in zip(texts, self._distances(texts), strict=True):
            parts = parts_of_divergence(distances.divergence, distances.surplus)
            numbers[text.row][text.kind] = parts["distance"]
            if text.kind == "token_distance":
                numbers[text.row]["token_distance_above"] = parts["distance_above"]
                numbers[text.row]["token_distance_below"] = parts["distance_below"]
            if text.kind == "token_distance" and records[text.row]["set"] == "forget":
                of_model_T = distances.reference + distances.surplus
                numbers[text.row]["log_probability"] = of_model_T.astype(np.float32)
                of_oracle_T = distances.reference.astype(np.float32)
                numbers[text.row]["oracle_log_probability"] = of_oracle_T
        return samples_of(records, numbers)

    def _gradient_norm(self, row: Mapping[str, Any]) -> float:
        """Return the norm of the gradient of a row's loss, mean over its windows."""
        norms: list[float] = []
        # Tensors made in inference mode cannot be kept for a backward pass.
        with torch.inference_mode(False), torch.enable_grad():
            for window in self._windows(row["prompt"], row["answer"]):
                batch = collate([window], [], self._encoder.pad_token_id).to(self.device)
                logits_NV = _answer_logits(self.runner, batch)
                labels_N = batch.expected(batch.answer_BT)
                loss = torch.nn.functional.cross_entropy(logits_NV.float(), labels_N)
                norms.append(gradient_norm(self.runner.model, loss))
        return float(np.mean(norms))

    def _windows(
        self, prompt: str, answer: str, examples: Sequence[tuple[str, str]] = ()
    ) -> list[Row]:
        """Return the windows that cover a row, as the model reads it behind the examples."""
        windows = self._encoder.windows(prompt, answer)
        if examples:
            ids, answer_start = self._encoder.pair_behind(examples, prompt, answer)
            # The context comes on top of what a row may have, as far as the model has positions.
            alone = self._encoder.pair(prompt, answer)[0]
            most = self.cfg.data.max_tokens + len(ids) - len(alone)
            positions = positions_of(self.runner.model.config)
            windows = windows_of(ids, answer_start, min(most, positions or most))
        return [Row(window.input_ids, window.answer_start) for window in windows]

    def _likelihoods(self, num_rows: int, texts: list[Text]) -> list[dict[str, Any]]:
        """Return the teacher-forced numbers of each row, from its texts."""
        numbers: list[dict[str, Any]] = [{} for _ in range(num_rows)]
        for text, statistics in zip(texts, self._statistics(texts), strict=True):
            row = numbers[text.row]
            said = answers_of(text.prompt, text.answer)
            ends = [-1]
            if len(said) > 1:
                ends = self._encoder.answer_ends(text.prompt, text.answer)
            scores = sample_scores(statistics, "\n".join(said), ends)
            if text.kind == "answer":
                row.update(scores)
            elif text.kind == "perturbed_losses":
                row.setdefault(text.kind, []).append(scores["loss"])
            else:
                row[text.kind] = scores["loss"]
            if text.fact:
                is_fact_T = self._encoder.fact_tokens(text.prompt, text.answer, text.fact)
                row[FACT_RECALL[text.kind]] = fact_recall(statistics.is_argmax, is_fact_T)
        return numbers

    def _statistics(self, texts: list[Text]) -> list[TokenStatistics]:
        """Return the token statistics of each text's answer."""

        def measure(batch: UnlearnBatch) -> TokenStatistics:
            logits_NV = _answer_logits(self.runner, batch)
            return token_statistics(logits_NV, batch.expected(batch.answer_BT))

        return self._by_text(texts, measure)

    def _distances(self, texts: list[Text]) -> list[TokenDistances]:
        """Return the distances of each text's answer, token by token, to the reference model."""

        def measure(batch: UnlearnBatch) -> TokenDistances:
            reference_NV = _answer_logits(self.reference, batch)
            logits_NV = _answer_logits(self.runner, batch)
            return token_distances(reference_NV, logits_NV, batch.expected(batch.answer_BT))

        return self._by_text(texts, measure)

    def _by_text(
        self, texts: Sequence[Text], measure: Callable[[UnlearnBatch], Tokens]
    ) -> list[Tokens]:
        """Return what is measured of the answer tokens of each text, over all of its windows."""
        windows: list[Row] = []
        text_of: list[int] = []
        for index, text in enumerate(texts):
            rows = self._windows(text.prompt, text.answer, text.examples)
            windows += rows
            text_of += [index] * len(rows)
        measured: dict[int, Tokens] = {}
        for indices in self._by_length(windows):
            rows = [windows[index] for index in indices]
            batch = collate(rows, [], self._encoder.pad_token_id).to(self.device)
            parts: list[Any] = measure(batch).split(batch.answer_BT.sum(1).tolist())
            measured.update(zip(indices, parts, strict=True))
        parts_of: list[list[Tokens]] = [[] for _ in texts]
        for index, text in enumerate(text_of):
            parts_of[text].append(measured[index])
        joined: list[Tokens] = []
        for parts in parts_of:
            # A text longer than a window is measured in several, and reads as one.
            columns = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
            joined.append(type(parts[0])(*columns))
        return joined

    def _questions(self, row: Mapping[str, Any], column: str) -> list[Question]:
        """Return what the model is asked, a question an answer; of plain text, to continue it."""
        if row["prompt"]:
            questions: list[Question] = []
            for prompt, answer in questions_of(row[column], row["answer"]):
                questions.append(Question(self._encoder.prompt(prompt), answer))
            return questions
        ids = self._encoder.windows("", row["answer"])[0].input_ids
        half = max(1, len(ids) // 2)
        return [Question(ids[:half], self._decode(ids[half:]), is_text=True)]

    def _samples(self, row: Mapping[str, Any]) -> list[Question]:
        """Return each of a row's questions SAMPLES times, each time with a seed of its own."""
        samples: list[Question] = []
        for number, question in enumerate(self._questions(row, "prompt")):
            for sample in range(SAMPLES):
                seed = (self.cfg.seed, int(row["row"]), number, sample)
                samples.append(question._replace(seed=seed))
        return samples

    def _rouge(
        self, questions: Mapping[int, list[Question]], samples: int = 1
    ) -> Iterator[tuple[int, float]]:
        """Yield ROUGE-L of answers by row: recall for questions, F1 for plain text.

        It is that of the best of each `samples` answers; of a conversation the mean over its turns.
        """
        answers = iter(self._continue(list(chain.from_iterable(questions.values()))))
        for index, of_row in questions.items():
            scores: list[float] = []
            for question in of_row:
                rouge = rouge_f1 if question.is_text else rouge_recall
                scores.append(rouge(next(answers), question.answer))
            yield index, best_of_each(scores, samples)

    def _continue(self, questions: list[Question]) -> list[str]:
        """Return the continuation of each question, greedy for all or sampled for all."""
        network: Any = self.runner.model
        longest = self.cfg.evaluation.max_new_tokens
        answers: dict[int, str] = {}
        for indices in self._by_length(questions):
            batch = [questions[index] for index in indices]
            continued = generate(network, self._encoder, batch, longest)
            answers.update(zip(indices, map(self._decode, continued), strict=True))
        return [answers[index] for index in range(len(questions))]

    def _decode(self, ids: list[int]) -> str:
        return str(self._encoder.tokenizer.decode(ids, skip_special_tokens=True))

    def _by_length(self, rows: Sequence[Row] | Sequence[Question]) -> Iterator[list[int]]:
        """Yield the indices of rows in batches of similar length, which need the least padding."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
        size = self.cfg.evaluation.batch_size
        for start in range(0, len(order), size):
            yield order[start : start + size]


def _answer_logits(runner: BlockRunner, batch: UnlearnBatch) -> Tensor:
    """Return the logits that predict the answers' tokens, [N, V]."""
    logits_NV = runner(batch, logits_at_BT=batch.answer_BT).logits_NV
    assert logits_NV is not None
    return logits_NV
