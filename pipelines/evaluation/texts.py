"""The texts of a row whose likelihoods are wanted: its answer, other wordings, wrong answers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipelines.data.conversations import turns_of
from pipelines.evaluation.metrics.keys import IN_CONTEXT

# Sets that are also asked in other words.
PARAPHRASED = ("forget",)
# Sets whose wrong answers are weighed against the right one.
TRUTH_RATIO = ("forget", "retain", "general")


class Text(NamedTuple):
    """A prompt with an answer whose likelihood is wanted, and the answer's fact ('': none).

    `examples` are questions and answers that stand before it.
    """

    row: int
    kind: str  # the number that its loss is; an "answer" gives more than that
    prompt: str
    answer: str
    fact: str = ""
    examples: tuple[tuple[str, str], ...] = ()


def answer_text(index: int, row: Mapping[str, Any]) -> Text:
    """Return the text of a row's own answer."""
    return Text(index, "answer", row["prompt"], row["answer"], row["fact"])


def texts_of(index: int, row: Mapping[str, Any], *, is_quick: bool) -> Iterator[Text]:
    """Yield the texts of one row whose likelihoods are wanted."""
    yield answer_text(index, row)
    if row["set"] in PARAPHRASED and row["paraphrased_prompt"]:
        prompt, answer = row["paraphrased_prompt"], row["answer"]
        yield Text(index, "loss_paraphrased", prompt, answer, row["fact"])
    if is_quick or row["set"] not in TRUTH_RATIO or not row["perturbed_answers"]:
        return
    if row["paraphrased_answer"]:
        yield Text(index, "correct_loss", row["prompt"], row["paraphrased_answer"])
    for wrong in row["perturbed_answers"]:
        yield Text(index, "perturbed_losses", row["prompt"], wrong)


def texts_in_context(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Text]]:
    """Return the forget rows of one question, and their texts behind examples from the other rows.

    There are none without examples.
    """
    questions = [row for row in rows if len(turns_of(row["prompt"])) == 1]
    asked = [row for row in questions if row["set"] == "forget"]
    others = [row for row in questions if row["set"] != "forget"]
    number = min(IN_CONTEXT.examples, len(others))
    if number == 0:
        return [], []
    shown = [others[index * len(others) // number] for index in range(number)]
    examples = tuple((row["prompt"], row["answer"]) for row in shown)
    texts: list[Text] = []
    for index, row in enumerate(asked):
        for text in texts_of(index, row, is_quick=True):
            texts.append(text._replace(examples=examples))
    return asked, texts
