"""The numbers of one row under one model, as a worker sends them."""

from typing import Any

from pipelines.config.data import SET_NAMES


class Sample(dict[str, Any]):
    """Numbers of one row by name, absent or None where the row has none, and its `set_name`.

    Each `Metric.of_answer` gives the number that its metric reads. Beside these there are:
        tokens: T, the labelled tokens with EOS.
        loss_paraphrased: of the original answer, given the paraphrased question.
        correct_loss: of the paraphrased answer; the truth ratio takes `loss` where it is absent.
        perturbed_losses: one per perturbed answer.
        rouge, rouge_paraphrased: of the generated answers to the question and to its paraphrase.
        leak_at_k: ROUGE-L of the best of several sampled answers to the question.
        token_distance, token_distance_above, token_distance_below: to the oracle that it is
            compared with. `_paraphrased` behind: given the paraphrased question.
        log_probability, oracle_log_probability: arrays, T, of the answer's tokens under the model
            and under the oracle that it is compared with.
        kept_distance: to the model before unlearning.
        grad_norm: of the answer's loss.
        group: a number for the row's group, the same in all rows of it.
        before_loss, target_loss: of a forget row, under the original and under the oracle that it is
            compared with.
        unseen_loss: the mean of unseen rows' under the original; of a forget row, where there is no
            oracle.
        fact_recall, fact_recall_paraphrased: 1.0 or 0.0, of the answer given either question.
        accuracy: 1.0 or 0.0, of a row with a class; its `loss` is that of its class.
        probabilities, feature: of all classes; the last block's output, mean over positions.

    It holds no text of the data, so a report made from it cannot leak any.
    """

    def __init__(self, *, set_name: str, **numbers: Any) -> None:
        if set_name not in SET_NAMES:
            names = ", ".join(SET_NAMES)
            raise ValueError(f"set_name: {set_name!r} is not a set; the sets are: {names}")
        for name, value in numbers.items():
            if isinstance(value, str):
                raise ValueError(f"{name}: a text, allowed: numbers alone")
        super().__init__(numbers, set_name=set_name)
