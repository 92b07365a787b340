"""What a model predicts at the answers of a batch's rows.

Shapes: B rows, T tokens, N answer tokens or classified rows, V vocabulary or classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rfa.batch import UnlearnBatch
from rfa.forget_losses import Answers


class Predictions(NamedTuple):
    """Log-probabilities at the answers' positions of retained and of forget rows."""

    retain_NV: Tensor
    forget_NV: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, forget_N: Tensor) -> "Predictions":
        """Split the predictions of a batch. `forget_N` marks those of forget rows."""
        log_NV = logits_NV.float().log_softmax(-1)
        return cls(log_NV[~forget_N], log_NV[forget_N])


def answer_positions(batch: UnlearnBatch, *, retain: bool, forget: bool) -> Tensor:
    """Mark the positions that predict answers of retained or of forget rows, or of both: [B, T]."""
    wanted_B = (batch.forget_B & forget) | (~batch.forget_B & retain)
    return batch.answer_BT & wanted_B[:, None]


def forget_answers(
    batch: UnlearnBatch, at_BT: Tensor, log_NV: Tensor, teacher_NV: Tensor | None = None
) -> Answers:
    """Return the predictions of forget rows with what they should have been.

    `log_NV` and `teacher_NV` are log-probabilities at those of the positions `at_BT` that are of
    forget rows.
    """
    forget_BT = at_BT & batch.forget_B[:, None]
    index_N = forget_BT.nonzero()[:, 0]
    refusal_B = batch.refusal_B
    # A refusal has the number of the row that it stands for, as both come in the same order.
    number_B = torch.where(refusal_B, refusal_B.cumsum(0), batch.forgotten_B.cumsum(0))
    return Answers(
        log_NV,
        batch.expected(forget_BT).to(log_NV.device),
        number_B[index_N].unique(return_inverse=True)[1],
        batch.row_B[index_N].to(log_NV.device),
        teacher_NV,
        refusal_B[index_N].to(log_NV.device),
    )
