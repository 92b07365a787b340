"""The objective of residual feature alignment, after Qin et al. 2024 (arXiv 2411.08443); its reconstruction is ours.

    L = w_retain * zero(r on D_r) + w_forget * shift(r on D_f)
        + w_kl * KL(base || adapted on D_r) + w_task * CE(D_r) + w_output * unlikelihood(D_f)

Every term is a sum over tokens divided by the tokens of the whole step, over all workers; a place's distances are in
units of its E|h0|^2, so that weights carry over between layers and models. A term of weight 0 is not computed.

Shapes: B rows, T tokens, D features, N chosen tokens, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from rfa.adapters import adapters_off, lora_layers
from rfa.batch import TokenCounts, UnlearnBatch
from rfa.residual import BlockRunner, BlocksOutput, Taps
from rfa.targets import SAMPLE_TOKENS, FeatureSums, Targets, fit_target


class Weights(NamedTuple):
    """Weights of the five terms."""

    retain: float = 1.0
    forget: float = 1.0
    kl: float = 0.0
    task: float = 0.0
    output: float = 0.0


class Objective(NamedTuple):
    """What is aligned, to what, and how; the fields are those of the configuration's `objective`."""

    residual: str = "local"
    target: str = "retain_mean"
    distance: str = "squared"
    tokens: str = "all"
    clusters: int = 32
    weights: Weights = Weights()


class LossOutput(NamedTuple):
    """The objective and its unweighted terms, each a scalar; terms that are off are 0."""

    total: Tensor
    retain: Tensor
    forget: Tensor
    kl: Tensor
    task: Tensor
    output: Tensor


class _Outputs(NamedTuple):
    """One recorded pass: features and residuals by place, and logits with the positions they belong to."""

    base: dict[str, Tensor]
    added: dict[str, Tensor]
    logits_NV: Tensor | None


def distance(kind: str, difference_ND: Tensor, desired_ND: Tensor, energy: float) -> Tensor:
    """Sum over tokens of the distance between `desired + difference` and `desired`.

    `squared` is |difference|^2 / energy; `smooth_l1` its robust form, equal to it while every component is under one
    standard unit sqrt(energy / D); `cosine` is 1 - cos. No square root is taken at a zero difference, where its
    gradient would be NaN.
    """
    difference_ND, desired_ND = difference_ND.float(), desired_ND.float()
    if kind == "squared":
        return difference_ND.square().sum() / energy
    if kind == "smooth_l1":
        dimensions = difference_ND.shape[-1]
        scaled_ND = difference_ND / (energy / dimensions) ** 0.5
        return 2 * F.smooth_l1_loss(scaled_ND, torch.zeros_like(scaled_ND), reduction="sum") / dimensions
    return (1 - F.cosine_similarity(desired_ND + difference_ND, desired_ND, dim=-1)).sum()


class ResidualAlignment(nn.Module):
    """A model with LoRA and the objective that trains it: one forward for forget and retain rows.

    Work is counted: blocks above the last aligned one run only when a term needs logits, logits are computed only at
    the positions a term reads, and where the base model's features are needed too (a teacher) the frozen prefix below
    the first adapted block is run once for both.

    Before training, `feature_sums` is collected over the retain set and `fit` makes the targets of it.
    """

    def __init__(self, model: PeftModel, objective: Objective, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.seed = seed
        self.taps = Taps(model, objective.residual)
        self.runner = BlockRunner(model.get_base_model())
        self.targets: Targets | None = None
        weights = objective.weights
        self.needs_logits = weights.kl > 0 or weights.task > 0 or weights.output > 0
        self.aligns = weights.retain > 0 or weights.forget > 0
        self.train()

    def train(self, mode: bool = True) -> "ResidualAlignment":
        """Training mode for the adapters alone: dropout in the frozen model would make student and teacher differ."""
        super().train(mode)
        self.model.eval()
        for _, layer in lora_layers(self.model):
            layer.lora_dropout.train(mode)
        for block in self.runner.blocks:
            block.training = mode  # this flag alone, not its children's: activation checkpointing asks for it
        return self

    def feature_sums(self, batch: UnlearnBatch, keep_tokens: int = SAMPLE_TOKENS) -> dict[str, FeatureSums]:
        """Base features of a batch's retain rows, summed by place, at tokens of the kind that is shifted.

        `keep_tokens` a row are kept for `cluster_mean`. Rows of the utility set are passed over.
        """
        keep_tokens = keep_tokens if self.objective.target == "cluster_mean" else 0
        with torch.no_grad(), adapters_off(self.model), self.taps.recording() as base:
            self.runner(batch.input_ids_BT, batch.attention_BT, stop=self.taps.last_block + 1)
        tokens_BT = batch.retain_tokens_BT(self.objective.tokens)
        sums = {name: FeatureSums() for name in self.taps.names}
        chosen_B = ~batch.forget_B & ~batch.utility_B & batch.attention_BT.any(1)
        for index in chosen_B.nonzero().flatten().tolist():
            for name in self.taps.names:
                feature_ND = base[name][index][tokens_BT[index]]
                sums[name].add(feature_ND, int(batch.row_B[index]), int(batch.label_B[index]), keep_tokens)
        return sums

    def fit(self, sums: dict[str, FeatureSums]) -> None:
        """Make the targets from the retain set's sums (of all workers)."""
        objective = self.objective
        places = {
            name: fit_target(objective.target, sums[name], clusters=objective.clusters, seed=self.seed)
            for name in self.taps.names
        }
        self.targets = Targets(objective.target, places, self.seed)

    def forward(self, batch: UnlearnBatch, counts: TokenCounts | None = None) -> LossOutput:
        """The loss of a batch; `counts` are the whole step's tokens (default: this batch's own)."""
        counts = counts or batch.counts(self.objective.tokens)
        weights = self.objective.weights
        prefix_BTD, teacher = self._teacher(batch)
        logits_at_BT = self._logit_positions(batch) if self.needs_logits else None
        with self.taps.recording() as base:
            out = self._run(batch, prefix_BTD, logits_at_BT)
        added = self.taps.residuals() if self.objective.residual == "local" else {}
        student = _Outputs(base, added, out.logits_NV)
        # Zero with a graph: a worker without rows of a kind still takes part in the gradient exchange.
        zero = out.hidden_BTD.float()[:, :0].sum() if out.logits_NV is None else out.logits_NV.float()[:0].sum()
        terms = {
            "retain": self._zero(batch, student, teacher) / max(counts.retain, 1) if weights.retain else zero,
            "forget": self._shift(batch, student, teacher) / max(counts.forget, 1) if weights.forget else zero,
            **self._logit_terms(batch, student, teacher, counts, zero),
        }
        total = zero
        for name, term in terms.items():
            total = total + getattr(weights, name) * term
        return LossOutput(total=total, **terms)

    def _run(self, batch: UnlearnBatch, prefix_BTD: Tensor | None, logits_at_BT: Tensor | None) -> BlocksOutput:
        """The blocks above the prefix, up to the last one that any term reads."""
        return self.runner(
            batch.input_ids_BT,
            batch.attention_BT,
            start=0 if prefix_BTD is None else self.taps.first_block,
            stop=None if logits_at_BT is not None else self.taps.last_block + 1,
            hidden_BTD=prefix_BTD,
            logits_at_BT=logits_at_BT,
        )

    @torch.no_grad()
    def _teacher(self, batch: UnlearnBatch) -> tuple[Tensor | None, _Outputs | None]:
        """The frozen prefix's output and, for `drift` and `kl`, the base model's features and logits above it.

        Forget rows take part in the teacher's pass only when a target looks at them.
        """
        weights = self.objective.weights
        drift = self.objective.residual == "drift" and self.aligns
        if not (drift or weights.kl > 0):
            return None, None
        prefix_BTD = None
        if self.taps.first_block > 0:
            prefix_BTD = self.runner(batch.input_ids_BT, batch.attention_BT, stop=self.taps.first_block).hidden_BTD
        rows = self._teacher_rows(batch)
        chosen = UnlearnBatch(*(tensor[rows] for tensor in batch))
        logits_at_BT = chosen.answer_BT & ~chosen.forget_B[:, None] if weights.kl > 0 else None
        with adapters_off(self.model), self.taps.recording() as base:
            out = self._run(chosen, None if prefix_BTD is None else prefix_BTD[rows], logits_at_BT)
        return prefix_BTD, _Outputs(dict(base), {}, out.logits_NV)

    def _teacher_rows(self, batch: UnlearnBatch) -> Tensor:
        assert self.targets is not None
        all_rows = self.objective.residual == "drift" and self.targets.looks_at_sample
        rows = torch.ones_like(batch.forget_B) if all_rows else ~batch.forget_B
        if not rows.any():  # a worker's share without retain rows: run one row, count none
            rows[0] = True
        return rows.nonzero().flatten()

    def _logit_positions(self, batch: UnlearnBatch) -> Tensor:
        weights = self.objective.weights
        retain = weights.kl > 0 or weights.task > 0
        wanted_B = (batch.forget_B & (weights.output > 0)) | (~batch.forget_B & retain)
        return batch.answer_BT & wanted_B[:, None]

    def _zero(self, batch: UnlearnBatch, student: _Outputs, teacher: _Outputs | None) -> Tensor:
        """zero(r on D_r): mean over places, sum over retain tokens."""
        tokens_BT = batch.retain_tokens_BT()
        return self._mean_over_places(
            self._zero_distance(name, tokens_BT, batch, student, teacher) for name in self.taps.names
        )

    def _zero_distance(
        self, name: str, tokens_BT: Tensor, batch: UnlearnBatch, student: _Outputs, teacher: _Outputs | None
    ) -> Tensor:
        assert self.targets is not None
        if self.objective.residual == "local":
            desired_ND, difference_ND = student.base[name][tokens_BT], student.added[name][tokens_BT]
        else:
            assert teacher is not None
            rows = self._teacher_rows(batch)
            desired_ND = teacher.base[name][tokens_BT[rows]]
            difference_ND = student.base[name][tokens_BT] - desired_ND
        return distance(self.objective.distance, difference_ND, desired_ND, self.targets.energy(name))

    def _shift(self, batch: UnlearnBatch, student: _Outputs, teacher: _Outputs | None) -> Tensor:
        """shift(r on D_f): mean over places, sum over forget tokens."""
        assert self.targets is not None
        targets, tokens_BT = self.targets, batch.forget_tokens_BT(self.objective.tokens)
        index_N = tokens_BT.nonzero()[:, 0]
        row_N, label_N = batch.row_B[index_N], batch.label_B[index_N]

        def of_place(name: str) -> Tensor:
            feature_ND = student.base[name][tokens_BT].float()
            sample_ND = feature_ND
            if self.objective.residual == "local":
                feature_ND = feature_ND + student.added[name][tokens_BT].float()
            elif targets.looks_at_sample:
                assert teacher is not None
                sample_ND = teacher.base[name][tokens_BT]
            target_ND = targets(name, sample_ND, row_N, label_N)
            return distance(self.objective.distance, feature_ND - target_ND, target_ND, targets.energy(name))

        return self._mean_over_places(of_place(name) for name in self.taps.names)

    def _mean_over_places(self, values: Iterator[Tensor]) -> Tensor:
        return torch.stack(list(values)).mean()

    def _logit_terms(
        self, batch: UnlearnBatch, student: _Outputs, teacher: _Outputs | None, counts: TokenCounts, zero: Tensor
    ) -> dict[str, Tensor]:
        """KL, cross-entropy and unlikelihood (Welleck et al. 2019, arXiv 1908.04319), over answer tokens."""
        terms = {"kl": zero, "task": zero, "output": zero}
        if student.logits_NV is None:
            return terms
        weights = self.objective.weights
        positions = self._logit_positions(batch).nonzero()
        label_N = batch.input_ids_BT[positions[:, 0], positions[:, 1] + 1]
        forget_N = batch.forget_B[positions[:, 0]]
        log_NV = student.logits_NV.float().log_softmax(-1)
        log_N = log_NV.gather(1, label_N[:, None])[:, 0]
        if weights.kl:
            assert teacher is not None
            assert teacher.logits_NV is not None
            teacher_NV = teacher.logits_NV.float().log_softmax(-1)
            divergence = F.kl_div(log_NV[~forget_N], teacher_NV, reduction="sum", log_target=True)
            terms["kl"] = divergence / max(counts.retain_answer, 1)
        if weights.task:
            terms["task"] = -log_N[~forget_N].sum() / max(counts.retain_answer, 1)
        if weights.output:
            unlikely_N = torch.log1p(-log_N[forget_N].exp().clamp_max(1 - 1e-6))
            terms["output"] = -unlikely_N.sum() / max(counts.forget_answer, 1)
        return terms
