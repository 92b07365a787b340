"""When gradient steps have forgotten enough: the rule of MASC (arXiv 2606.02920)."""

from collections.abc import Callable, Iterable, Mapping

import torch

from rfa.adapters import dropout_off
from rfa.answers import answer_positions, forget_answers
from rfa.batch import UnlearnBatch
from rfa.forget_losses import FORGET_LOSSES
from rfa.objective import ResidualAlignment


@torch.no_grad()
def unforgotten(alignment: ResidualAlignment, batch: UnlearnBatch) -> float:
    """Sum over forget rows the share of a row's answer tokens whose loss is above its bound.

    The loss is `objective.output`, which must have a bound.
    """
    objective = alignment.objective
    loss = FORGET_LOSSES[objective.output]
    assert loss.bound is not None
    at_BT = answer_positions(batch, retain=False, forget=True)
    with dropout_off(alignment.model):
        logits_NV = alignment.runner(batch, logits_at_BT=at_BT).logits_NV
    assert logits_NV is not None
    answers = forget_answers(batch, at_BT, logits_NV.float().log_softmax(-1))
    above_N = (loss(answers, objective.output_parameters) > loss.bound).float()
    share_R = answers.row_sums(above_N) / answers.row_sums(torch.ones_like(above_N))
    return float(share_R.sum())


def has_forgotten(
    alignment: ResidualAlignment,
    batches: Iterable[UnlearnBatch],
    total: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda sums: sums,
) -> bool:
    """Return whether the rows' mean share of `unforgotten` tokens is at most `objective.stop_at`.

    Args:
        alignment: the model and the objective.
        batches: this worker's rows, in as many batches as every other worker has.
        total: add sums up over all workers, so that all of them decide the same.
    """
    stop_at = alignment.objective.stop_at
    assert stop_at is not None
    share = rows = 0.0
    for batch in batches:
        answered = batch.counts("answer").forget_rows
        sums = total({"share": unforgotten(alignment, batch), "rows": answered})
        share, rows = share + sums["share"], rows + sums["rows"]
        # Mostly the first rows are enough to tell. The authors, too, look at all only then.
        if share > stop_at * rows:
            return False
    return True
