"""From the samples of one model to its entry in scores.json.

Absent: a metric of a set of which no row carries the number, and the attacks when forget or holdout has no row.
None: what needs an oracle that is not there (`mia.reference`, `privleak`, `forget_quality`), `model_utility` when one
of its six parts is missing, an attack without a score on one side, and any value that is not finite.
A row without a number is left out of the mean; a row whose number is NaN is not, and makes the metric None.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from pipelines.evaluation.metrics.classification import (
    activation_distance,
    feature_distance,
    mia_efficacy,
)
from pipelines.evaluation.metrics.likelihood import perplexity, probability
from pipelines.evaluation.metrics.membership import auc, privleak, reference_score
from pipelines.evaluation.metrics.sample import SET_NAMES, Sample
from pipelines.evaluation.metrics.truth_ratio import (
    forget_quality,
    forget_truth_ratio,
    retain_truth_ratio,
    truth_ratio,
)
from pipelines.evaluation.metrics.utility import model_utility

ATTACKS: dict[str, Callable[[Sample], float | None]] = {
    "loss": lambda sample: sample.loss,
    "zlib": lambda sample: sample.zlib_score,
    "min_k": lambda sample: sample.min_k,
    "min_k_plus_plus": lambda sample: sample.min_k_plus_plus,
}
UTILITY_PARTS = [
    f"{name}.{metric}"
    for name in ("retain", "general")
    for metric in ("probability", "rouge", "truth_ratio")
]


def summarise(
    samples: Sequence[Sample], oracle: Sequence[Sample] | None = None
) -> dict[str, float | None]:
    """`set.metric` and model-wide metrics to a finite number or None, ready for JSON.

    `oracle` holds the samples of the model retrained without the forget set. Its forget and holdout samples must be of
    the same rows in the same order; a ValueError says so where their numbers or token counts differ.
    """
    scores: dict[str, float | None] = {}
    for name in SET_NAMES:
        rows = _of_set(samples, name)
        scores |= {f"{name}.{metric}": value for metric, value in _set_scores(name, rows).items()}
    if any(sample.accuracy is not None for sample in samples):
        scores |= _classifier_scores(samples, oracle)
    else:
        scores |= _membership_scores(samples, oracle)
        scores["forget_quality"] = _forget_quality(samples, oracle)
        scores["model_utility"] = model_utility([scores.get(part) for part in UTILITY_PARTS])
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in scores.items()
    }


def _classifier_scores(
    samples: Sequence[Sample], oracle: Sequence[Sample] | None
) -> dict[str, float | None]:
    """The loss attack's AUC where there is a holdout set, the trained attack, and distances to the oracle."""
    scores: dict[str, float | None] = {}
    if _of_set(samples, "forget") and _of_set(samples, "holdout"):
        scores["mia.loss"] = _attack_auc(samples, ATTACKS["loss"])
    losses = {
        name: _known([row.loss for row in _of_set(samples, name)])
        for name in ("retain", "general", "forget")
    }
    scores["mia_efficacy"] = mia_efficacy(losses["retain"], losses["general"], losses["forget"])
    own = _of_set(samples, "forget")
    other = _of_set(oracle, "forget") if oracle is not None else []
    if own and len(own) == len(other):
        pairs = [row.probabilities for row in own], [row.probabilities for row in other]
        scores["activation_distance"] = activation_distance(*pairs)
        features = [row.feature for row in own], [row.feature for row in other]
        same_size = len(features[0][0]) == len(features[1][0])
        scores["feature_distance"] = feature_distance(*features) if same_size else None
    return scores


def _of_set(samples: Sequence[Sample], name: str) -> list[Sample]:
    return [sample for sample in samples if sample.set_name == name]


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _set_scores(name: str, rows: Sequence[Sample]) -> dict[str, float]:
    """Every metric of one set that some row carries a number for."""
    columns: dict[str, tuple[Callable[[list[float]], float], Sequence[float | None]]] = {
        "probability": (probability, [row.loss for row in rows]),
        "loss": (_mean, [row.loss for row in rows]),
        "accuracy": (_mean, [row.accuracy for row in rows]),
        "rouge": (_mean, [row.rouge for row in rows]),
        "probability_paraphrased": (probability, [row.loss_paraphrased for row in rows]),
        "rouge_paraphrased": (_mean, [row.rouge_paraphrased for row in rows]),
        "fact_recall": (_mean, [row.fact_recall for row in rows]),
        "fact_recall_paraphrased": (_mean, [row.fact_recall_paraphrased for row in rows]),
        "truth_ratio": (
            forget_truth_ratio if name == "forget" else retain_truth_ratio,
            _truth_ratios(rows),
        ),
        "exact_memorization": (_mean, [row.exact_memorization for row in rows]),
        "extraction_strength": (_mean, [row.extraction_strength for row in rows]),
    }
    scores = {
        metric: average(known)
        for metric, (average, column) in columns.items()
        if (known := _known(column))
    }
    weighted = [
        (row.loss, row.tokens) for row in rows if row.loss is not None and row.tokens is not None
    ]
    if weighted:
        scores["perplexity"] = perplexity(*zip(*weighted, strict=True))
    return scores


def _truth_ratios(rows: Sequence[Sample]) -> list[float]:
    """Raw ratios of the rows that have a perturbed answer and a correct one."""
    corrects = [row.loss if row.correct_loss is None else row.correct_loss for row in rows]
    return [
        truth_ratio(correct, row.perturbed_losses)
        for row, correct in zip(rows, corrects, strict=True)
        if correct is not None and row.perturbed_losses
    ]


def _forget_quality(samples: Sequence[Sample], oracle: Sequence[Sample] | None) -> float | None:
    ratios = _truth_ratios(_of_set(samples, "forget"))
    oracle_ratios = _truth_ratios(_of_set(oracle, "forget")) if oracle is not None else []
    return forget_quality(ratios, oracle_ratios) if ratios and oracle_ratios else None


def _membership_scores(
    samples: Sequence[Sample], oracle: Sequence[Sample] | None
) -> dict[str, float | None]:
    """AUC of every attack, and privleak."""
    scores: dict[str, float | None] = {}
    if _of_set(samples, "forget") and _of_set(samples, "holdout"):
        scores |= {f"mia.{name}": _attack_auc(samples, score) for name, score in ATTACKS.items()}
    if oracle is None:
        return scores | {"mia.reference": None, "privleak": None}
    scores["mia.reference"] = auc(
        _reference_scores(samples, oracle, "forget"), _reference_scores(samples, oracle, "holdout")
    )
    scores["privleak"] = privleak(scores.get("mia.min_k"), _attack_auc(oracle, ATTACKS["min_k"]))
    return scores


def _attack_auc(samples: Sequence[Sample], score: Callable[[Sample], float | None]) -> float | None:
    forget, holdout = (
        [score(row) for row in _of_set(samples, name)] for name in ("forget", "holdout")
    )
    return auc(_known(forget), _known(holdout))


def _reference_scores(
    samples: Sequence[Sample], oracle: Sequence[Sample], name: str
) -> list[float]:
    """L_model - L_oracle of every row of a set that both models scored."""
    rows, oracle_rows = _of_set(samples, name), _of_set(oracle, name)
    if len(rows) != len(oracle_rows):
        raise ValueError(
            f"{name}: {len(rows)} samples of the model, but {len(oracle_rows)} of the oracle"
        )
    for index, (row, oracle_row) in enumerate(zip(rows, oracle_rows, strict=True)):
        if row.tokens != oracle_row.tokens:
            raise ValueError(
                f"{name}: sample {index} has {row.tokens} tokens for the model and {oracle_row.tokens} for the oracle; "
                "both need the same rows in the same order and the same tokenizer"
            )
    return [
        reference_score(row.loss, oracle_row.loss)
        for row, oracle_row in zip(rows, oracle_rows, strict=True)
        if row.loss is not None and oracle_row.loss is not None
    ]
