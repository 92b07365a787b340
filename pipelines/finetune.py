"""Fine-tuning: make the target model that must forget, or the retrain oracle it is measured against."""

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.config import UnlearnConfig
from pipelines.pruning import Masks, hold_weights_
from rfa.batch import TokenCounts, UnlearnBatch
from rfa.residual import BlockRunner


class AnswerLoss(NamedTuple):
    """Cross-entropy of the answers' tokens, or of classes."""

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
        """The batch's share of the step's mean cross-entropy over answer tokens."""
        out = self.runner(batch, logits_at_BT=batch.answer_BT)
        assert out.logits_NV is not None
        label_N = batch.expected(batch.answer_BT)
        loss = nn.functional.cross_entropy(out.logits_NV.float(), label_N, reduction="sum")
        return AnswerLoss(loss / max(counts.retain_answer, 1))


def build_answer_training(cfg: UnlearnConfig, base: PreTrainedModel, masks: Masks) -> AnswerTraining:
    """The model with all parameters trainable, but for those that are pruned."""
    hold_weights_(base, masks)
    return AnswerTraining(base, classifies=cfg.task != "causal_lm")
