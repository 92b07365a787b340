"""Fine-tuning: make the target model that must forget, or the retrain oracle it is measured against; or unlearn with
SalUn, which is a fine-tuning too."""

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
    """Cross-entropy of the answers' tokens, or of classes; of forget rows, that of random ones."""

    total: Tensor


class AnswerTraining(nn.Module):
    """A model that learns answers or classes; logits are computed at the positions that predict them alone.

    A classifier trains as its architecture means it to, with dropout and batch statistics.
    """

    def __init__(self, model: PreTrainedModel, *, classifies: bool) -> None:
        super().__init__()
        self.model = model
        self.runner = BlockRunner(model)
        self.train(classifies)

    def forward(self, batch: UnlearnBatch, counts: TokenCounts) -> AnswerLoss:
        """The batch's share of the step's mean cross-entropy over answer tokens, and of that over forget rows'."""
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
    """Log-probabilities [N, V] where answers are predicted, the right ones [N], and the rows they belong to [N]."""
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
    """The model with all parameters trainable, but for those that masks hold: pruned ones, or SalUn's."""
    hold_weights_(base, masks)
    return AnswerTraining(base, classifies=cfg.task != "causal_lm")


def salient_weights(
    share: float, base: PreTrainedModel, batches: Iterable[UnlearnBatch], device: torch.device
) -> Masks:
    """SalUn (Fan et al. 2024, arXiv 2310.12508): the share of all weights at which the forget set's cross-entropy has
    its largest gradient, from all workers' batches. One backward over the forget set; for a moment, memory for three
    gradients of the model's size."""
    base.to(device).eval()  # pyright: ignore[reportArgumentType]
    runner = BlockRunner(base)
    for batch in batches:
        log_NV, label_N, _ = _predictions(runner, batch.to(device))
        nn.functional.nll_loss(log_NV, label_N, reduction="sum").backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in base.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.distributed.all_reduce(gradient)
        gradients[name], parameter.grad = gradient.abs(), None
    flat_N = torch.cat([gradient.flatten() for gradient in gradients.values()])
    kept = max(1, round(share * len(flat_N)))
    least = flat_N.kthvalue(len(flat_N) - kept + 1).values
    return {name: (gradient >= least) & (gradient > 0) for name, gradient in gradients.items()}
