"""Overlap of a generated text with the reference: ROUGE-L by the package rouge-score.

Its tokenizer keeps lower-cased ASCII letters and digits only: text in another script scores 0.
"""

from functools import cache

from rouge_score.rouge_scorer import RougeScorer


def rouge_recall(generated: str, reference: str) -> float:
    """Return rougeL recall, for questions: the share of the reference in the text, in order."""
    return float(_scorer().score(reference, generated)["rougeL"].recall)


def rouge_f1(generated: str, reference: str) -> float:
    """Return rougeL F1, for verbatim text: a longer generated text is not rewarded."""
    return float(_scorer().score(reference, generated)["rougeL"].fmeasure)


@cache
def _scorer() -> RougeScorer:
    # With the stemmer, as in open-unlearning.
    return RougeScorer(["rougeL"], use_stemmer=True)
