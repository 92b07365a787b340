"""How soon a little fine-tuning on some forgotten rows brings back the others.

Knowledge that is hidden and not gone comes back fast; beside it stands the retrain oracle, which has to learn it anew.
"""

from collections.abc import Mapping, Sequence

from pipelines.evaluation.metrics.sample import Sample
from pipelines.evaluation.metrics.summary import summarise

STEPS = (
    0,
    1,
    2,
    5,
    10,
    20,
    50,
)  # after which the held-out half is scored (metrics.md, Robustness: relearn_curve)
CURVES = ("probability", "fact_recall")


def relearn_scores(
    curve: Mapping[int, Sequence[Sample]], original: Sequence[Sample] | None
) -> dict[str, float | None]:
    """`relearn.probability.N` and `relearn.fact_recall.N` after N steps, and `relearn.steps`.

    `curve` holds the samples of the forget set's held-out half by step, `original` those of the same rows under the
    model before unlearning; without it `relearn.steps` is absent.
    """
    by_step = {step: summarise(samples) for step, samples in curve.items()}
    scores: dict[str, float | None] = {
        f"relearn.{metric}.{step}": own[f"forget.{metric}"]
        for metric in CURVES
        for step, own in by_step.items()
        if f"forget.{metric}" in own
    }
    if original is not None:
        probabilities = {step: own.get("forget.probability") for step, own in by_step.items()}
        scores["relearn.steps"] = steps_to_relearn(
            probabilities, summarise(original).get("forget.probability")
        )
    return scores


def steps_to_relearn(curve: Mapping[int, float | None], original: float | None) -> int | None:
    """The first step at which a probability is at least halfway from its value at step 0 to the original model's.

    0 where nothing had been lost; None where it never gets there, or a number that this takes is missing.
    """
    start = curve.get(0)
    if start is None or original is None:
        return None
    halfway = (start + original) / 2
    return next(
        (step for step in sorted(curve) if (value := curve[step]) is not None and value >= halfway),
        None,
    )
