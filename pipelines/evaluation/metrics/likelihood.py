"""How likely a model finds the labelled answer: loss, probability, perplexity.

`token_statistics` reads the logits once per forward pass; everything else in this package works on its small result.
Definitions follow open-unlearning (locuslab, commit d3d7cf9).

Shapes: T labelled answer tokens with EOS, N any number of labelled tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

ROWS_PER_CHUNK = (
    256  # bounds the float32 copies: 256 rows of a 150k vocabulary are about 150 MB each
)
LOWEST_LOG_PROBABILITY = -1e3  # exp of it is 0 in float32: only keeps 0 * inf out of the moments


class TokenStatistics(NamedTuple):
    """What the metrics need of each labelled token; four NumPy arrays of one length, on the host."""

    log_probability: NDArray[np.float64]  # l_t = log p(y_t | x, y_<t)
    is_argmax: NDArray[np.bool_]  # the model's first choice is y_t
    mean: NDArray[np.float64]  # mu_t = sum_v p log p
    variance: NDArray[np.float64]  # var_t = sum_v p log^2 p - mu_t^2

    def split(self, lengths: Sequence[int]) -> list["TokenStatistics"]:
        """Cut the statistics of a flattened batch into one per row; `lengths` are the labelled tokens of each row."""
        if sum(lengths) != len(self.log_probability):
            raise ValueError(
                f"lengths: add up to {sum(lengths)}, but there are {len(self.log_probability)} tokens"
            )
        ends = np.cumsum(lengths)
        return [
            self._cut(slice(end - length, end)) for length, end in zip(lengths, ends, strict=True)
        ]

    def without_eos(self) -> "TokenStatistics":
        """The same without the last labelled token."""
        return self._cut(slice(None, -1))

    def _cut(self, span: slice) -> "TokenStatistics":
        return TokenStatistics(
            self.log_probability[span], self.is_argmax[span], self.mean[span], self.variance[span]
        )


@torch.no_grad()
def token_statistics(logits_NV: Tensor, labels_N: Tensor) -> TokenStatistics:
    """Log-probability, first choice and moments of labelled tokens, in float32 whatever the type of the logits.

    Row n of the logits predicts label n: the caller has shifted them and dropped the positions labelled -100.
    """
    assert logits_NV.ndim == 2 and labels_N.shape == logits_NV.shape[:1], (
        logits_NV.shape,
        labels_N.shape,
    )
    pairs = zip(logits_NV.split(ROWS_PER_CHUNK), labels_N.split(ROWS_PER_CHUNK), strict=True)
    statistics_4N = torch.cat(
        [_chunk_statistics(logits, labels) for logits, labels in pairs], dim=1
    )
    log_probability, is_argmax, mean, variance = statistics_4N.cpu().numpy().astype(np.float64)
    return TokenStatistics(log_probability, is_argmax.astype(np.bool_), mean, variance)


def _chunk_statistics(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """The four statistics as rows of one float32 tensor, so that they leave the device in one copy."""
    log_p_NV = logits_NV.float().log_softmax(dim=-1)
    log_probability = log_p_NV.gather(-1, labels_N[:, None]).squeeze(-1)
    log_p_NV.clamp_(min=LOWEST_LOG_PROBABILITY)
    p_NV = log_p_NV.exp()
    mean = (p_NV * log_p_NV).sum(-1)
    # The centred sum equals E[log^2 p] - mu^2, but does not cancel: that difference is noise above the 1e-6 floor
    # of Min-K%++ when the vocabulary is large and the prediction nearly uniform.
    variance = log_p_NV.sub_(mean[:, None]).square_().mul_(p_NV).sum(-1)
    is_argmax = logits_NV.argmax(-1) == labels_N
    return torch.stack([log_probability, is_argmax.float(), mean, variance])


def loss(log_probability_T: NDArray[np.float64]) -> float:
    """L = -(1/T) sum l_t, over the answer with EOS."""
    if len(log_probability_T) == 0:
        raise ValueError("an answer has no labelled token: empty, or cut off by the length limit")
    return -float(np.mean(log_probability_T))


def probability(losses: ArrayLike) -> float:
    """Mean of exp(-L), over samples, or over the answers of one sample that has several."""
    return float(np.mean(np.exp(-np.asarray(losses, dtype=np.float64))))


def probability_normalised(correct_loss: float, wrong_losses: ArrayLike) -> float:
    """P(c) / (P(c) + sum_j P(w_j) + 1e-10), each P = exp(-L): the share of the correct answer among the options."""
    correct = float(np.exp(-correct_loss))
    wrong = float(np.exp(-np.asarray(wrong_losses, dtype=np.float64)).sum())
    return correct / (correct + wrong + 1e-10)


def perplexity(losses: ArrayLike, tokens: ArrayLike) -> float:
    """exp of the mean loss over tokens: a sample weighs as much as its T tokens. Infinite when exp overflows."""
    with np.errstate(over="ignore"):
        return float(
            np.exp(np.average(np.asarray(losses, dtype=np.float64), weights=np.asarray(tokens)))
        )
