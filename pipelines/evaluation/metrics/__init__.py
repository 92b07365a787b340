"""What a model knows, in numbers: one metric family a file, pure functions of arrays and floats.

The evaluator needs four names: `token_statistics` once per forward pass, `sample_scores` per row, `Sample` for the
record of a row, `summarise` for a model's entry in scores.json. `VERSIONS` goes beside the scores: a version rises when
the value of its metric can change. A metric reported per set, such as `forget.loss`, has one version for all sets.
"""

from pipelines.evaluation.metrics.likelihood import TokenStatistics, token_statistics
from pipelines.evaluation.metrics.relearning import relearn_scores
from pipelines.evaluation.metrics.sample import SET_NAMES, Sample, SampleScores, sample_scores
from pipelines.evaluation.metrics.summary import summarise

__all__ = [
    "SET_NAMES",
    "VERSIONS",
    "Sample",
    "SampleScores",
    "TokenStatistics",
    "relearn_scores",
    "sample_scores",
    "summarise",
    "token_statistics",
]

VERSIONS: dict[str, int] = {
    "loss": 1,
    "accuracy": 1,
    "mia_efficacy": 1,
    "activation_distance": 1,
    "feature_distance": 1,
    "probability": 1,
    "probability_normalised": 1,
    "probability_paraphrased": 1,
    "perplexity": 1,
    "rouge": 1,
    "rouge_paraphrased": 1,
    "fact_recall": 1,
    "fact_recall_paraphrased": 1,
    "truth_ratio": 1,
    "forget_quality": 1,
    "model_utility": 1,
    "exact_memorization": 1,
    "extraction_strength": 1,
    "mia.loss": 1,
    "mia.zlib": 1,
    "mia.reference": 1,
    "mia.min_k": 1,
    "mia.min_k_plus_plus": 1,
    "privleak": 1,
    "quantised_8bit": 1,  # of the rounding; what is scored then has its own version
    "quantised_4bit": 1,
    "relearn.probability": 1,
    "relearn.fact_recall": 1,
    "relearn.steps": 1,
}
