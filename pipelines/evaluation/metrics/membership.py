"""Membership inference: can the forget set be told from text the model has never seen?

Every attack gives a sample a score s, larger = less likely a member. `auc` compares the scores of
forget and holdout: 0.5 cannot tell, near 1 still memorised, well under 0.5 over-unlearned, which is
a leak too. The `loss` attack's score is the loss itself. Definitions follow open-unlearning
(locuslab, commit d3d7cf9).

Shapes: N labelled answer tokens without EOS; a score over tokens is None when N = 0.
"""

import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

LOWEST_SHARE = 0.4  # the k of Min-K%, as open-unlearning sets it
VARIANCE_FLOOR = 1e-6
CHANCE = 0.5  # AUC of an attack that cannot tell


def zlib_score(loss: float, answer_text: str) -> float:
    """Return L over the answer's compressed size in bytes (Carlini et al. 2021, 2012.07805)."""
    return loss / len(zlib.compress(answer_text.encode("utf-8")))


def reference_score(loss: float, oracle_loss: float) -> float:
    """Return L_model - L_oracle: what the oracle finds hard, too, does not count."""
    return loss - oracle_loss


def min_k(log_probability_N: NDArray[np.float64]) -> float | None:
    """Return minus the mean l_t of the least likely 40 % of tokens (Shi et al. 2023, 2310.16789).

    These are max(1, int(0.4 N)) tokens.
    """
    return _minus_mean_of_lowest(log_probability_N)


def min_k_plus_plus(
    log_probability_N: NDArray[np.float64],
    mean_N: NDArray[np.float64],
    variance_N: NDArray[np.float64],
) -> float | None:
    """Return the same of z_t = (l_t - mu_t) / sqrt(max(var_t, 1e-6)) (arXiv:2404.02936)."""
    return _minus_mean_of_lowest((log_probability_N - mean_N) / spread(variance_N))


def spread(variance_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard deviations of predictions, which sure ones do not have as 0."""
    return np.sqrt(np.maximum(variance_N, VARIANCE_FLOOR))


def _minus_mean_of_lowest(values_N: NDArray[np.float64]) -> float | None:
    if len(values_N) == 0:
        return None
    num_lowest = max(1, int(LOWEST_SHARE * len(values_N)))
    return -float(np.mean(np.sort(values_N)[:num_lowest]))


def auc(forget_scores: ArrayLike, holdout_scores: ArrayLike) -> float | None:
    """Return the area under the ROC curve, with forget = 0 and holdout = 1.

    None when a side is empty or a score is not finite.
    """
    forget = np.asarray(forget_scores, dtype=np.float64)
    holdout = np.asarray(holdout_scores, dtype=np.float64)
    scores = np.concatenate([forget, holdout])
    if forget.size == 0 or holdout.size == 0 or not np.isfinite(scores).all():
        return None
    # Late: workers that only score rows need not wait for it.
    from scipy.stats import rankdata

    # The Mann-Whitney statistic: the share of pairs that the holdout row wins, a tie as a half.
    ranks = rankdata(scores)[forget.size :]
    wins = ranks.sum() - holdout.size * (holdout.size + 1) / 2
    return float(wins / (forget.size * holdout.size))


def chance_gap(forget: int, holdout: int) -> float:
    """Return an AUC's standard deviation by chance, for so many rows (Mann and Whitney 1947)."""
    return ((forget + holdout + 1) / (12 * forget * holdout)) ** 0.5


def privleak(min_k_auc: float | None, oracle_min_k_auc: float | None) -> float | None:
    """Return 100 ((1 - AUC_u) - (1 - AUC_o)) / ((1 - AUC_o) + 1e-10) (MUSE, arXiv:2407.06460).

    0: leaks as little as the oracle. Below 0: under-unlearned, above: over-unlearned. The AUCs are
    those of `min_k`; None when one is missing.
    """
    if min_k_auc is None or oracle_min_k_auc is None:
        return None
    return 100 * ((1 - min_k_auc) - (1 - oracle_min_k_auc)) / ((1 - oracle_min_k_auc) + 1e-10)
