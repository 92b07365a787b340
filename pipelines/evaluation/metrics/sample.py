"""The numeric record of one row under one model. It holds no text, so reports made from it cannot leak any."""

from dataclasses import dataclass
from typing import TypedDict

from pipelines.evaluation.metrics.likelihood import TokenStatistics, loss
from pipelines.evaluation.metrics.membership import min_k, min_k_plus_plus, zlib_score
from pipelines.evaluation.metrics.memorization import exact_memorization, extraction_strength

SET_NAMES = ("forget", "retain", "utility", "general", "holdout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Scores of one row under one model; None (or no perturbed loss) where the row has none."""

    set_name: str  # one of SET_NAMES
    loss: float | None = None
    tokens: int | None = None  # T, with EOS
    loss_paraphrased: float | None = None  # the original answer, given the paraphrased question
    correct_loss: float | None = (
        None  # the paraphrased answer; when None, `loss` stands in for the truth ratio
    )
    perturbed_losses: tuple[float, ...] = ()  # one per perturbed answer
    rouge: float | None = None
    rouge_paraphrased: float | None = None  # the answer generated to the paraphrased question
    fact_recall: float | None = None  # 1.0 or 0.0
    fact_recall_paraphrased: float | None = (
        None  # the same of the original answer, given the paraphrased question
    )
    exact_memorization: float | None = None
    extraction_strength: float | None = None
    zlib_score: float | None = None
    min_k: float | None = None
    min_k_plus_plus: float | None = None
    accuracy: float | None = None  # 1.0 or 0.0, of a classified row; its loss is that of its class
    probabilities: tuple[float, ...] = ()  # of all classes
    feature: tuple[float, ...] = ()  # the last block's output, mean over the row's places

    def __post_init__(self) -> None:
        if self.set_name not in SET_NAMES:
            raise ValueError(
                f"set_name: {self.set_name!r} is not a set; the sets are: {', '.join(SET_NAMES)}"
            )


class SampleScores(TypedDict):
    """The fields of a `Sample` that one teacher-forced forward pass gives."""

    loss: float
    tokens: int
    exact_memorization: float | None
    extraction_strength: float | None
    zlib_score: float
    min_k: float | None
    min_k_plus_plus: float | None


def sample_scores(statistics: TokenStatistics, answer_text: str) -> SampleScores:
    """Scores of one row from the statistics of its T labelled tokens with EOS: `Sample(set_name=..., **scores)`.

    The four scores without EOS are None when EOS is the only token. Raises ValueError when there is no token at all.
    """
    answer_loss = loss(statistics.log_probability)
    body = statistics.without_eos()
    return SampleScores(
        loss=answer_loss,
        tokens=len(statistics.log_probability),
        exact_memorization=exact_memorization(body.is_argmax),
        extraction_strength=extraction_strength(body.is_argmax),
        zlib_score=zlib_score(answer_loss, answer_text),
        min_k=min_k(body.log_probability),
        min_k_plus_plus=min_k_plus_plus(body.log_probability, body.mean, body.variance),
    )
