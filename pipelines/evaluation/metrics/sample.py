"""The numbers of one row under one model, as a worker sends them."""

from typing import Any

from pipelines.config.data import SET_NAMES


class Sample(dict[str, Any]):
    """Numbers of one row by name, absent or None where the row has none, and `set_name`, the set it is of.

    Each `Metric.of_answer` gives the number that its metric reads. Beside these there are:
        tokens: T, the labelled tokens with EOS.
        loss_paraphrased: of the original answer, given the paraphrased question.
        correct_loss: of the paraphrased answer; without it, `loss` stands in for it in the truth ratio.
        perturbed_losses: one per perturbed answer.
        rouge, rouge_paraphrased: of the answer generated to the question and to the paraphrased one.
        fact_recall, fact_recall_paraphrased: 1.0 or 0.0, of the original answer given either question.
        accuracy: 1.0 or 0.0, of a row with a class; its `loss` is that of its class.
        probabilities, feature: of all classes, and the last block's output, mean over the row's positions.

    It holds no text of the data, so a report made from it cannot leak any.
    """

    def __init__(self, *, set_name: str, **numbers: Any) -> None:
        if set_name not in SET_NAMES:
            raise ValueError(
                f"set_name: {set_name!r} is not a set; the sets are: {', '.join(SET_NAMES)}"
            )
        for name, value in numbers.items():
            if isinstance(value, str):
                raise ValueError(f"{name}: a text, allowed: numbers alone")
        super().__init__(numbers, set_name=set_name)
