"""How likely a model finds the labelled answer: loss, probability, perplexity, entropy.

Definitions follow open-unlearning (locuslab, commit d3d7cf9).

Shapes: T labelled answer tokens with EOS.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class TokenStatistics(NamedTuple):
    """What the metrics need of each labelled token; four arrays of one length, on the host."""

    log_probability: NDArray[np.float64]  # l_t = log p(y_t | x, y_<t)
    is_argmax: NDArray[np.bool_]  # the model's first choice is y_t
    mean: NDArray[np.float64]  # mu_t = sum_v p log p
    variance: NDArray[np.float64]  # var_t = sum_v p log^2 p - mu_t^2

    def split(self, lengths: Sequence[int]) -> list["TokenStatistics"]:
        """Cut the statistics of a flattened batch into one per row, of these numbers of tokens."""
        total = len(self.log_probability)
        if sum(lengths) != total:
            raise ValueError(f"lengths: add up to {sum(lengths)}, but there are {total} tokens")
        rows: list[TokenStatistics] = []
        start = 0
        for length in lengths:
            rows.append(self._cut(slice(start, start + length)))
            start += length
        return rows

    def without_eos(self) -> "TokenStatistics":
        """Return the same without the last labelled token."""
        return self._cut(slice(None, -1))

    def without(self, places: Sequence[int]) -> "TokenStatistics":
        """Return the same without the tokens at these places."""
        is_kept_T = np.ones(len(self.mean), dtype=np.bool_)
        if len(is_kept_T):
            is_kept_T[list(places)] = False
        return self._cut(is_kept_T)

    def _cut(self, span: slice | NDArray[np.bool_]) -> "TokenStatistics":
        return TokenStatistics(
            self.log_probability[span], self.is_argmax[span], self.mean[span], self.variance[span]
        )


class Answer(NamedTuple):
    """What a metric of single answers is computed from: one answer under one model.

    A conversation's answers read as one. `ends` are the places of their EOS among the tokens.
    """

    tokens: TokenStatistics  # with EOS
    text: str
    ends: Sequence[int] = (-1,)

    @property
    def body(self) -> TokenStatistics:
        """The tokens without EOS; none for an answer of EOS alone."""
        return self.tokens.without(self.ends)


def loss(log_probability_T: NDArray[np.float64]) -> float:
    """Return L = -(1/T) sum l_t, over the answer with EOS."""
    if len(log_probability_T) == 0:
        raise ValueError("an answer has no labelled token: empty, or cut off by the length limit")
    return -float(np.mean(log_probability_T))


def entropy(answer: Answer) -> float:
    """Return the entropy of the next token's distribution in nats, mean over tokens with EOS.

    It is at most log V, where V is the size of the vocabulary.
    """
    return -float(np.mean(answer.tokens.mean))


def probability(losses: ArrayLike) -> float:
    """Return the mean of exp(-L), over samples or over the answers of one sample."""
    return float(np.mean(np.exp(-np.asarray(losses, dtype=np.float64))))


def perplexity(losses: ArrayLike, tokens: ArrayLike) -> float:
    """Return exp of the mean loss over tokens; infinite when exp overflows.

    A sample weighs as much as its T tokens.
    """
    mean = np.average(np.asarray(losses, dtype=np.float64), weights=np.asarray(tokens))
    with np.errstate(over="ignore"):
        return float(np.exp(mean))
