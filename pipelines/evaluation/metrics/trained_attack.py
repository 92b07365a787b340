"""A trained membership attack: one that learns which numbers of a row give it away.

Every other attack looks at one number and knows beforehand which way it points. What unlearning
leaves behind may lie elsewhere: a linear classifier of several numbers of each row's predictions
learns to tell the forget set from never-seen rows (a classifier of a model's outputs: Shokri et al.
2017, arXiv 1610.05820; of forgotten against unseen rows, cross-validated: Kurmanji et al. 2023,
arXiv 2302.09880).

With few rows most of what a classifier learns is chance, so each pair of a forgotten and an unseen
row is told apart by one that has seen neither. Leaving out a pair, in place of a row or a fold, makes
the AUC of rows that are alike 0.5 on average (Airola et al. 2011, Computational Statistics & Data
Analysis 55).

Shapes: N labelled answer tokens without EOS, R rows of both sets, P forgotten and Q unseen ones,
D numbers a row.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.metrics.likelihood import TokenStatistics
from pipelines.evaluation.metrics.membership import spread

Floats = NDArray[np.float64]
PENALTY = 0.1  # of the ridge: rows weigh 1 in all, and each number has variance 1
MOST_ROWS = 500  # of a set: pairs are as many as their product


def outputs_of(tokens_N: TokenStatistics) -> list[float] | None:
    """Return the numbers of a row that the attack learns from; None of an answer of EOS alone.

    These are of the label's log-probability, of its expectation and spread under the prediction,
    and of how many spreads it lies from it: the mean, the lowest and the highest over the tokens.
    """
    if len(tokens_N.mean) == 0:
        return None
    spread_N = spread(tokens_N.variance)
    deviation_N = (tokens_N.log_probability - tokens_N.mean) / spread_N
    numbers: list[float] = [float(tokens_N.is_argmax.mean())]
    for value_N in (tokens_N.log_probability, tokens_N.mean, spread_N, deviation_N):
        numbers += [float(value_N.mean()), float(value_N.min()), float(value_N.max())]
    return numbers


def trained_auc(
    forget: Sequence[Sequence[float]], unseen: Sequence[Sequence[float]]
) -> float | None:
    """Return the share of pairs of rows that a classifier that saw neither puts in order.

    A ridge regression on the class, both classes of equal weight. It is solved once: what it would
    say of a pair that it has not seen follows from its hat matrix. Rows with the same numbers are
    one row that weighs as much, and are left out together: a resample has the same row twice.

    None where a side has fewer than two different rows, or a number is not finite.
    """
    sides: list[tuple[Floats, NDArray[np.int64]]] = []
    for rows in (forget, unseen):
        if not rows:
            return None
        values, counts = np.unique(_thinned(rows), axis=0, return_counts=True)
        if len(values) < 2 or not np.isfinite(values).all():
            return None
        sides.append((values, counts))
    (value_PD, count_P), (value_QD, count_Q) = sides
    value_RD = np.concatenate([value_PD, value_QD])
    weight_R = np.concatenate([count_P / count_P.sum(), count_Q / count_Q.sum()]) / 2
    wins_PQ = _wins(_standardised(value_RD, weight_R), weight_R, len(value_PD))
    # Of whole and half pairs, so that all of them are 1.0 and not a hair more.
    return float(count_P @ wins_PQ @ count_Q / (count_P.sum() * count_Q.sum()))


def _thinned(rows: Sequence[Sequence[float]]) -> Floats:
    """Return at most MOST_ROWS of the rows, evenly spread."""
    kept = min(len(rows), MOST_ROWS)
    return np.asarray([rows[index * len(rows) // kept] for index in range(kept)], dtype=np.float64)


def _standardised(value_RD: Floats, weight_R: Floats) -> Floats:
    """Return each number with mean 0 and variance 1, and a constant behind them."""
    centred_RD = value_RD - weight_R @ value_RD
    deviation_D = np.sqrt(weight_R @ centred_RD**2)
    # A number that is the same in all rows tells nothing.
    scaled_RD = centred_RD / np.where(deviation_D > 0, deviation_D, 1.0)
    return np.column_stack([scaled_RD, np.ones(len(value_RD))])


def _wins(input_RD: Floats, weight_R: Floats, forgotten: int) -> Floats:
    """Return 1 where the unseen row of a pair scores higher, 1/2 for a tie, else 0.

    Without the rows of a pair the residuals there are (I - H)^-1 times what they are with them,
    where H is the pair's block of the hat matrix.
    """
    of_p, of_q = slice(None, forgotten), slice(forgotten, None)
    label_R = np.where(np.arange(len(weight_R)) < forgotten, -1.0, 1.0)
    penalty_D = np.full(input_RD.shape[1], PENALTY)
    penalty_D[-1] = 0.0  # the constant has none
    weighted_DR = input_RD.T * weight_R
    hat_DR = np.linalg.solve(weighted_DR @ input_RD + np.diag(penalty_D), weighted_DR)
    residual_R = label_R - input_RD @ (hat_DR @ label_R)
    left_R = 1 - np.sum(input_RD * hat_DR.T, axis=1)
    residual_P1, residual_1Q = residual_R[of_p, None], residual_R[None, of_q]
    left_P1, left_1Q = left_R[of_p, None], left_R[None, of_q]
    across_PQ = input_RD[of_p] @ hat_DR[:, of_q]
    back_PQ = (input_RD[of_q] @ hat_DR[:, of_p]).T
    determinant_PQ = left_P1 * left_1Q - across_PQ * back_PQ
    unseen_PQ = 1 - (left_P1 * residual_1Q + back_PQ * residual_P1) / determinant_PQ
    forgotten_PQ = -1 - (left_1Q * residual_P1 + across_PQ * residual_1Q) / determinant_PQ
    return (np.sign(unseen_PQ - forgotten_PQ) + 1) / 2
