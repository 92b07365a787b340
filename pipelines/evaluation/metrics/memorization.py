"""How much of an answer the model completes word for word, teacher forced.

Exact memorization and extraction strength leave EOS out and are None for an answer of EOS alone
(N = 0): there is nothing to memorise. Their definitions follow open-unlearning (locuslab, commit
d3d7cf9); extraction strength is from Carlini et al. 2021. Fact recall is this project's: the other
scores also count the words around a fact.

Shapes: N labelled answer tokens without EOS.
"""

import numpy as np
from numpy.typing import NDArray


def exact_memorization(is_argmax_N: NDArray[np.bool_]) -> float | None:
    """Return the share of tokens that are the model's first choice."""
    return float(np.mean(is_argmax_N)) if len(is_argmax_N) else None


def extraction_strength(is_argmax_N: NDArray[np.bool_]) -> float | None:
    """Return 1 - k/N, where first choices complete the answer from its first k tokens on.

    The floor is 1/N, as in open-unlearning: a wrong last token scores like a right last one alone.
    """
    num_tokens = len(is_argmax_N)
    if num_tokens == 0:
        return None
    misses = np.flatnonzero(~np.asarray(is_argmax_N, dtype=np.bool_))
    prefix = min(int(misses[-1]) + 1, num_tokens - 1) if len(misses) else 0
    return 1 - prefix / num_tokens


def fact_recall(is_argmax_N: NDArray[np.bool_], is_fact_N: NDArray[np.bool_]) -> float | None:
    """Return 1.0 when every token of the fact is the model's first choice, else 0.0.

    None where no token carries the fact. Other tokens do not count, so the arrays may hold EOS.
    """
    return float(np.all(is_argmax_N[is_fact_N])) if np.any(is_fact_N) else None
