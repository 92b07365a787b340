"""Training on answers or classes, which makes the target model and the retrain oracle.

SalUn, which unlearns by fine-tuning too, also trains so.

Shapes: B rows, T tokens, N answer tokens, V vocabulary or classes.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.config.schema import UnlearnConfig
from pipelines.model.pruning import Masks, hold_weights_
from rfa.batch import TokenCounts, UnlearnBatch
from rfa.blocks import BlockRunner
from rfa.forget_losses import Answers, random_label


class AnswerLoss(NamedTuple):
    """Cross-entropy of the answers' tokens or classes; for forget rows, that of random ones."""

    total: Tensor


class AnswerTraining(nn.Module):
    """A model that learns answers or classes.

    Logits are computed at the positions that predict answers alone, because those of all tokens
    would take the most memory of a step. A classifier trains as its architecture means it to, with
    dropout and batch statistics.
    """

    def __init__(self, model: PreTrainedModel, *, classifies: bool) -> None:
        super().__init__()
        self.model = model
        self.runner = BlockRunner(model)
        self.train(classifies)

    def forward(self, batch: UnlearnBatch, counts: TokenCounts) -> AnswerLoss:
        """Return the batch's share of the step's loss.

        The loss is the mean cross-entropy over answer tokens, plus the mean over forget rows'.
        """
        log_NV, label_N, index_N = _predictions(self.runner, batch)
        forget_N, right_N = batch.forget_B[index_N], log_NV.gather(1, label_N[:, None])[:, 0]
        total = -right_N[~forget_N].sum() / max(counts.retain_answer, 1)
        if counts.forget_answer:
            forgotten_N = index_N[forget_N]
            answers = Answers(
                log_NV[forget_N], label_N[forget_N], forgotten_N, batch.row_B[forgotten_N]
            )
            total = total + random_label(answers).sum() / counts.forget_answer
        return AnswerLoss(total)


def _predictions(runner: BlockRunner, batch: UnlearnBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities [N, V], the expected tokens [N] and their rows' indices [N]."""
    out = runner(batch, logits_at_BT=batch.answer_BT)
    assert out.logits_NV is not None
    return (
        out.logits_NV.float().log_softmax(1),
        batch.expected(batch.answer_BT),
        batch.answer_BT.nonzero()[:, 0],
    )


def build_answer_training(
    cfg: UnlearnConfig, base: PreTrainedModel, masks: Masks
) -> AnswerTraining:
    """Make all parameters trainable but those that a mask fixes: pruned ones, or SalUn's."""
    hold_weights_(base, masks)
    return AnswerTraining(base, classifies=cfg.task != "causal_lm")


def salient_weights(
    share: float, base: PreTrainedModel, batches: Iterable[UnlearnBatch], device: torch.device
) -> Masks:
    """Mark the share of weights at which the forget set's cross-entropy has its largest gradient.

    This is SalUn's saliency (Fan et al. 2024, arXiv 2310.12508), from all workers' batches. It
    takes one backward over the forget set, and memory for three gradients of the model's size.
    """
    base.to(device).eval()  # pyright: ignore[reportArgumentType]
    runner = BlockRunner(base)
    for batch in batches:
        log_NV, label_N, _ = _predictions(runner, batch.to(device))
        nn.functional.nll_loss(log_NV, label_N, reduction="sum").backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in base.named_parameters():
        gradient = parameter.grad
        if gradient is None:  # every worker must join the reduction
            gradient = torch.zeros_like(parameter)
        torch.distributed.all_reduce(gradient)
        gradients[name] = gradient.abs()
        parameter.grad = None
    flat_N = torch.cat([gradient.flatten() for gradient in gradients.values()])
    salient = max(1, round(share * len(flat_N)))
    threshold = flat_N.kthvalue(len(flat_N) - salient + 1).values
    return {name: (gradient >= threshold) & (gradient > 0) for name, gradient in gradients.items()}
