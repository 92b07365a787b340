"""A run's scores under the names of open-unlearning's TOFU evaluation, to lay it beside its tables.

Definitions are those of docs/scores.md. They are open-unlearning's, with two differences: memorisation
and min-k leave the end of an answer out, and `model_utility` is the harmonic mean over the sets that
the run was given, where TOFU has three. Its scores of paraphrased answers are not here: ours ask the
question in other words.
"""

from collections.abc import Mapping

# Dorna et al. 2025 (arXiv 2506.12618), as in its TOFU_SUMMARY.json.
NAMES = {
    "forget_quality": "forget_quality",
    "model_utility": "model_utility",
    "privleak": "privleak",
    "extraction_strength": "forget.extraction_strength",
    "exact_memorization": "forget.exact_memorization",
    "forget_truth_ratio": "forget.truth_ratio",
    "forget_Q_A_Prob": "forget.probability",
    "forget_Q_A_ROUGE": "forget.rouge",
    "retain_Q_A_Prob": "retain.probability",
    "retain_Q_A_ROUGE": "retain.rouge",
    "retain_Truth_Ratio": "retain.truth_ratio",
    "mia_loss": "mia.loss",
    "mia_zlib": "mia.zlib",
    "mia_min_k": "mia.min_k",
    "mia_min_k_plus_plus": "mia.min_k_plus_plus",
    "mia_gradnorm": "mia.grad_norm",
    "mia_reference": "mia.reference",
}


def summary(entry: Mapping[str, float | None]) -> dict[str, float]:
    """Return a model's scores by open-unlearning's names, without those that were not measured."""
    found: dict[str, float] = {}
    for name, key in NAMES.items():
        value = entry.get(key)
        if value is not None:
            found[name] = value
    return found
