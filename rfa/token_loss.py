"""How far forget tokens stand from their aims, in nats, and how that curves.

A token that the original model finds more likely than its aim (`rfa.aims`) by a margin was learned
from its row: it is *pushed*. All others, words that any model would say there, are *held*. The loss
is

    (sum over the pushed tokens of 1/2 (log-odds of the label - log-odds of its aim)^2
                                 + KL(neighbours || current), of all tokens but the label
     + HELD_WEIGHT * sum over the held tokens of KL(original || current)) / pushed tokens

where the square is linear beyond MOST_GAP.

Shapes: N answer tokens of a batch, P pushed ones, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rfa.aims import MARGIN, Prediction
from rfa.batch import UnlearnBatch

MOST_GAP = 4.0  # nats from its aim beyond which a token pushes no harder
HELD_WEIGHT = 3.0  # of a held token's divergence, beside a pushed token's


class Answers(NamedTuple):
    """One batch of the forget set: which answer tokens are pushed, to what, and what is held.

    `aim_N` has the label's log-probability of every token, `others` what should rise instead at the
    pushed ones, and `held` the original's prediction of all others.
    """

    batch: UnlearnBatch
    aim_N: Tensor
    pushed_N: Tensor
    others: Prediction
    held: Prediction

    @property
    def label_N(self) -> Tensor:
        return self.batch.expected(self.batch.answer_BT)


class Terms(NamedTuple):
    """The parts of the loss: of the pushed tokens gap and divergence, of the held ones the latter."""

    gap_P: Tensor
    others_P: Tensor
    held_N: Tensor

    def total(self) -> Tensor:
        """Return the loss of these tokens, before it is divided by the number of pushed ones."""
        zero_P = torch.zeros_like(self.gap_P)
        square = torch.nn.functional.huber_loss(self.gap_P, zero_P, reduction="sum", delta=MOST_GAP)
        return square + self.others_P.sum() + HELD_WEIGHT * self.held_N.sum()


class Standing(NamedTuple):
    """Where the forget set's answer tokens stand."""

    away: int  # pushed tokens more than the margin from their aim
    log_p: float  # of the pushed tokens' labels, mean
    aim: float  # of the pushed tokens' labels, mean
    divergence: float  # KL(original || current) of the held tokens, mean
    loss: float  # what a round lowers

    @classmethod
    def of(cls, sums: Tensor) -> "Standing":
        """Return it from the sums of all batches."""
        away, log_p, aim, pushed, divergence, held, loss = sums.tolist()
        num_pushed, num_held = max(pushed, 1), max(held, 1)
        return cls(
            int(away),
            log_p / num_pushed,
            aim / num_pushed,
            divergence / num_held,
            loss / num_pushed,
        )


def of_labels(log_p_NV: Tensor, label_N: Tensor) -> Tensor:
    """Return the log-probabilities of the answers' own tokens, [N]."""
    return log_p_NV.gather(-1, label_N[:, None])[:, 0]


def terms(answers: Answers, log_p_NV: Tensor) -> Terms:
    """Return the parts of the loss, of log-probabilities at the answers' tokens."""
    pushed_N = answers.pushed_N
    log_p_PV, aim_P = log_p_NV[pushed_N], answers.aim_N[pushed_N]
    label_P1 = answers.label_N[pushed_N][:, None]
    not_label_P = _not_label(log_p_PV, label_P1)
    odds_P = log_p_PV.gather(-1, label_P1)[:, 0] - not_label_P
    aim_odds_P = aim_P - torch.log(-torch.expm1(aim_P))
    others_P = answers.others.divergence(log_p_PV - not_label_P[:, None])
    return Terms(odds_P - aim_odds_P, others_P, answers.held.divergence(log_p_NV[~pushed_N]))


def curved(answers: Answers, log_p_NV: Tensor, change_NV: Tensor) -> Tensor:
    """Return the Gauss-Newton matrix of `Terms.total` times a change of the log-probabilities.

    The matrix is that of the log-odds' squares and of the divergences in the logits, which leaves
    out how the predictions themselves curve: so it is never negative. Beyond MOST_GAP a gap has the
    curvature of the square that is as high there (reweighted least squares). Each row sums to 0, as
    a gradient by logits does, so that it is one by log-probabilities, too.
    """
    curved_NV = torch.empty_like(log_p_NV)
    pushed_N = answers.pushed_N
    log_p_PV, change_PV = log_p_NV[pushed_N], change_NV[pushed_N]
    label_P1 = answers.label_N[pushed_N][:, None]
    others_PV = (log_p_PV - _not_label(log_p_PV, label_P1)[:, None]).exp()
    others_PV = others_PV.scatter(-1, label_P1, 0.0)
    slope_PV = torch.zeros_like(others_PV).scatter(-1, label_P1, 1.0) - others_PV
    gap_P = terms(answers, log_p_NV).gap_P.abs()
    weight_P = (MOST_GAP / gap_P.clamp(min=MOST_GAP)) * (slope_PV * change_PV).sum(-1)
    curved_NV[pushed_N] = weight_P[:, None] * slope_PV + _spread(others_PV, change_PV)
    held_PV = log_p_NV[~pushed_N].exp()
    curved_NV[~pushed_N] = HELD_WEIGHT * _spread(held_PV, change_NV[~pushed_N])
    return curved_NV


def sums_of(answers: Answers, log_p_NV: Tensor) -> Tensor:
    """Return the sums over a batch's tokens, in float64, that `Standing.of` is made of."""
    log_p_P = of_labels(log_p_NV, answers.label_N)[answers.pushed_N]
    aim_P = answers.aim_N[answers.pushed_N]
    parts = terms(answers, log_p_NV)
    sums = (
        ((log_p_P - aim_P).abs() > MARGIN).sum(),
        log_p_P.sum(),
        aim_P.sum(),
        answers.pushed_N.sum(),
        parts.held_N.sum(),
        (~answers.pushed_N).sum(),
        parts.total(),
    )
    return torch.tensor([float(value) for value in sums], dtype=torch.float64)


def _not_label(log_p_PV: Tensor, label_P1: Tensor) -> Tensor:
    """Return log(1 - p) of the labels.

    As a sum over the other tokens it keeps its digits, and its gradient, near p = 1.
    """
    return log_p_PV.scatter(-1, label_P1, -torch.inf).logsumexp(-1)


def _spread(p_NV: Tensor, change_NV: Tensor) -> Tensor:
    """Return (diag(p) - p p^T) times the change: the Fisher matrix of a prediction's logits."""
    return p_NV * (change_NV - (p_NV * change_NV).sum(-1, keepdim=True))
