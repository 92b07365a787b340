"""The objective of residual feature alignment, after Qin et al. 2024 (arXiv 2411.08443); its reconstruction is ours.

    L = w_retain * zero(r on D_r) + w_forget * shift(r on D_f)
        + w_kl * KL(base || adapted on D_r) + w_task * CE(D_r) + w_output * output(D_f)

Every term is a sum over tokens divided by the tokens of the whole step, over all workers; a place's distances are in
units of its E|h0|^2, so that weights carry over between layers and models. Classified rows count, not their tokens: a
row's term is the mean over its places. A term of weight 0 is not computed.

Shapes: B rows, T tokens, S places, D features, N chosen tokens or places, V vocabulary or classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from rfa.adapters import adapters_off, lora_layers
from rfa.batch import TokenCounts, UnlearnBatch
from rfa.features import BlockRunner, BlocksOutput, FeatureHooks
from rfa.forget_losses import divergence, output_term
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
    output: str = "unlikelihood"
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
    """Each token's distance between `desired + difference` and `desired`: [N].

    `squared` is |difference|^2 / energy; `smooth_l1` its robust form, equal to it while every component is under one
    standard unit sqrt(energy / D); `cosine` is 1 - cos. No square root is taken at a zero difference, where its
    gradient would be NaN.
    """
    difference_ND, desired_ND = difference_ND.float(), desired_ND.float()
    if kind == "squared":
        return difference_ND.square().sum(-1) / energy
    if kind == "smooth_l1":
        dimensions = difference_ND.shape[-1]
        scaled_ND = difference_ND / (energy / dimensions) ** 0.5
        return (
            2
            * F.smooth_l1_loss(scaled_ND, torch.zeros_like(scaled_ND), reduction="none").sum(-1)
            / dimensions
        )
    return 1 - F.cosine_similarity(desired_ND + difference_ND, desired_ND, dim=-1)


class ResidualAlignment(nn.Module):
    """A model with LoRA and the objective that trains it: one forward for forget and retain rows.

    Work is counted: blocks above the last aligned one run only when a term needs logits, logits are computed only at
    the positions a term reads, and where the base model's features are needed too (a teacher) the frozen prefix below
    the first adapted block is run once for both.

    Before training, where features are aligned, `feature_sums` is collected over the retain set and `fit` makes the
    targets of it.

    Args:
        learns_statistics: whether batch normalisation's statistics follow the rows that are trained on, as they must
            where pruning has changed what they describe.
    """

    def __init__(
        self,
        model: PeftModel,
        objective: Objective,
        seed: int = 0,
        *,
        learns_statistics: bool = False,
    ) -> None:
        super().__init__()
        self.learns_statistics = learns_statistics
        self.model = model
        self.objective = objective
        self.seed = seed
        self.taps = FeatureHooks(model, objective.residual)
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
        for module in self.model.modules() if self.learns_statistics else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        for block in self.runner.blocks:
            block.training = (
                mode  # this flag alone, not its children's: activation checkpointing asks for it
            )
        return self

    def feature_sums(
        self, batch: UnlearnBatch, keep_tokens: int = SAMPLE_TOKENS, tokens: str | None = None
    ) -> dict[str, FeatureSums]:
        """Base features of a batch's retain rows, summed by place, at tokens of the kind that is shifted.

        `keep_tokens` a row are kept for `cluster_mean`; with 0 the batch is run and nothing is summed. Rows of the
        utility set are passed over. `tokens` is the kind, the objective's own by default.
        """
        with torch.no_grad(), adapters_off(self.model), self.taps.recording() as base:
            self.run(batch, None, 0, self.taps.last_block + 1)
        sums = {name: FeatureSums() for name in self.taps.names}
        kind = tokens or self.objective.tokens
        tokens_BT = batch.retain_tokens_BT(kind) & ~batch.utility_B[:, None]
        if not keep_tokens or not tokens_BT.any():
            return sums
        for name in self.taps.names:
            places = batch.places(base[name], tokens_BT)
            index_R, lengths_R = places.index_N.unique_consecutive(return_counts=True)
            for index, feature_ND in zip(
                index_R.tolist(), places.feature_ND.split(lengths_R.tolist()), strict=True
            ):
                keep = keep_tokens if self.objective.target == "cluster_mean" else 0
                sums[name].add(feature_ND, int(batch.row_B[index]), int(batch.label_B[index]), keep)
        return sums

    def fit(self, sums: dict[str, FeatureSums]) -> None:
        """Make the targets from the retain set's sums (of all workers)."""
        objective = self.objective
        places = {
            name: fit_target(
                objective.target, sums[name], clusters=objective.clusters, seed=self.seed
            )
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
            out = self._run_above(batch, prefix_BTD, logits_at_BT)
        added = self.taps.residuals() if self.objective.residual == "local" else {}
        student = _Outputs(base, added, out.logits_NV)
        # Zero with a graph: a worker without rows of a kind still takes part in the gradient exchange.
        zero = (
            out.hidden_BTD.float()[:, :0].sum()
            if out.logits_NV is None
            else out.logits_NV.float()[:0].sum()
        )
        terms = {
            "retain": self._zero(batch, student, teacher) / max(counts.retain, 1)
            if weights.retain
            else zero,
            "forget": self._shift(batch, student, teacher) / max(counts.forget, 1)
            if weights.forget
            else zero,
            **self._logit_terms(batch, student, teacher, counts, zero),
        }
        total = zero
        for name, term in terms.items():
            total = total + getattr(weights, name) * term
        return LossOutput(total=total, **terms)

    def run(
        self,
        batch: UnlearnBatch,
        hidden_BTD: Tensor | None,
        start: int,
        stop: int,
        logits_at_BT: Tensor | None = None,
    ) -> BlocksOutput:
        """Blocks `start` to `stop`; after the last one also the head, where it is adapted or logits are wanted."""
        if logits_at_BT is None and self.taps.reaches_head and stop == len(self.runner.blocks):
            logits_at_BT = batch.answer_BT
        return self.runner(
            batch, start=start, stop=stop, hidden_BTD=hidden_BTD, logits_at_BT=logits_at_BT
        )

    def _run_above(
        self, batch: UnlearnBatch, prefix_BTD: Tensor | None, logits_at_BT: Tensor | None
    ) -> BlocksOutput:
        """The blocks above the prefix, up to the last one that any term reads."""
        start = 0 if prefix_BTD is None else self.taps.first_block
        stop = self.taps.last_block + 1 if logits_at_BT is None else len(self.runner.blocks)
        return self.run(batch, prefix_BTD, start, stop, logits_at_BT)

    @torch.no_grad()
    def _teacher(self, batch: UnlearnBatch) -> tuple[Tensor | None, _Outputs | None]:
        """The frozen prefix's output and, for `drift` and `kl`, the base model's features and logits above it.

        Forget rows take part in the teacher's pass only when a target looks at them.
        """
        weights = self.objective.weights
        drift = self.objective.residual == "drift" and self.aligns
        if not (drift or weights.kl > 0 or self._compares_outputs):
            return None, None
        prefix_BTD = None
        if self.taps.first_block > 0:
            prefix_BTD = self.runner(batch, stop=self.taps.first_block).hidden_BTD
        rows = self._teacher_rows(batch)
        chosen = batch.rows(rows)
        logits_at_BT = (
            self._teacher_positions(chosen) if weights.kl > 0 or self._compares_outputs else None
        )
        with adapters_off(self.model), self.taps.recording() as base:
            out = self._run_above(
                chosen, None if prefix_BTD is None else prefix_BTD[rows], logits_at_BT
            )
        return prefix_BTD, _Outputs(dict(base), {}, out.logits_NV)

    def _teacher_rows(self, batch: UnlearnBatch) -> Tensor:
        all_rows = self._compares_outputs
        if self.objective.residual == "drift" and self.aligns:
            assert self.targets is not None
            all_rows |= self.targets.looks_at_sample
        rows = torch.ones_like(batch.forget_B) if all_rows else ~batch.forget_B
        if not rows.any():  # a worker's share without retain rows: run one row, count none
            rows[0] = True
        return rows.nonzero().flatten()

    @property
    def _compares_outputs(self) -> bool:
        """Whether the output term looks at what the base model says of the forget set."""
        return self.objective.output == "scrub" and self.objective.weights.output > 0

    def _teacher_positions(self, batch: UnlearnBatch) -> Tensor:
        kept_B, forget_B = ~batch.forget_B, batch.forget_B
        wanted_B = (kept_B & (self.objective.weights.kl > 0)) | (forget_B & self._compares_outputs)
        return batch.answer_BT & wanted_B[:, None]

    def _logit_positions(self, batch: UnlearnBatch) -> Tensor:
        weights = self.objective.weights
        retain = weights.kl > 0 or weights.task > 0
        wanted_B = (batch.forget_B & (weights.output > 0)) | (~batch.forget_B & retain)
        return batch.answer_BT & wanted_B[:, None]

    def _zero(self, batch: UnlearnBatch, student: _Outputs, teacher: _Outputs | None) -> Tensor:
        """zero(r on D_r): mean over places, sum over retain tokens."""
        tokens_BT = batch.retain_tokens_BT()
        return self._mean_over_places(
            self._zero_distance(name, tokens_BT, batch, student, teacher)
            for name in self.taps.names
        )

    def _zero_distance(
        self,
        name: str,
        tokens_BT: Tensor,
        batch: UnlearnBatch,
        student: _Outputs,
        teacher: _Outputs | None,
    ) -> Tensor:
        assert self.targets is not None
        if self.objective.residual == "local":
            desired, difference_ND = (
                batch.places(own[name], tokens_BT) for own in (student.base, student.added)
            )
            difference_ND = difference_ND.feature_ND
        else:
            assert teacher is not None
            rows = self._teacher_rows(batch)
            desired = batch.rows(rows).places(teacher.base[name], tokens_BT[rows])
            difference_ND = (
                batch.places(student.base[name], tokens_BT).feature_ND - desired.feature_ND
            )
        apart_N = distance(
            self.objective.distance, difference_ND, desired.feature_ND, self.targets.energy(name)
        )
        return (apart_N * desired.weight_N).sum()

    def _shift(self, batch: UnlearnBatch, student: _Outputs, teacher: _Outputs | None) -> Tensor:
        """shift(r on D_f): mean over places, sum over forget tokens."""
        assert self.targets is not None
        targets, tokens_BT = self.targets, batch.forget_tokens_BT(self.objective.tokens)

        def of_place(name: str) -> Tensor:
            places = batch.places(student.base[name], tokens_BT)
            feature_ND = places.feature_ND.float()
            sample_ND = feature_ND
            if self.objective.residual == "local":
                feature_ND = (
                    feature_ND + batch.places(student.added[name], tokens_BT).feature_ND.float()
                )
            elif targets.looks_at_sample:
                assert teacher is not None
                sample_ND = batch.places(teacher.base[name], tokens_BT).feature_ND
            target_ND = targets(
                name, sample_ND, batch.row_B[places.index_N], batch.label_B[places.index_N]
            )
            energy = targets.energy(name)
            apart_N = distance(self.objective.distance, feature_ND - target_ND, target_ND, energy)
            return (apart_N * places.weight_N).sum()

        return self._mean_over_places(of_place(name) for name in self.taps.names)

    def _mean_over_places(self, values: Iterator[Tensor]) -> Tensor:
        return torch.stack(list(values)).mean()

    def _logit_terms(
        self,
        batch: UnlearnBatch,
        student: _Outputs,
        teacher: _Outputs | None,
        counts: TokenCounts,
        zero: Tensor,
    ) -> dict[str, Tensor]:
        """KL, cross-entropy and the output term, over answer tokens or classes."""
        terms = {"kl": zero, "task": zero, "output": zero}
        if student.logits_NV is None:
            return terms
        weights = self.objective.weights
        positions_BT = self._logit_positions(batch)
        forget_N = batch.forget_B[positions_BT.nonzero()[:, 0]]
        label_N = batch.expected(positions_BT)
        log_NV = student.logits_NV.float().log_softmax(-1)
        teacher_NV = (
            None
            if teacher is None or teacher.logits_NV is None
            else teacher.logits_NV.float().log_softmax(-1)
        )
        if weights.kl:
            assert teacher_NV is not None
            kept_NV = teacher_NV[: int((~forget_N).sum())]  # kept rows come first
            terms["kl"] = divergence(kept_NV, log_NV[~forget_N]).sum() / max(
                counts.retain_answer, 1
            )
        if weights.task:
            log_N = log_NV[~forget_N].gather(1, label_N[~forget_N, None])
            terms["task"] = -log_N.sum() / max(counts.retain_answer, 1)
        if weights.output:
            forgotten_NV = (
                None if teacher_NV is None else teacher_NV[len(teacher_NV) - int(forget_N.sum()) :]
            )
            row_N = batch.row_B[positions_BT.nonzero()[:, 0]][forget_N]
            output_N = output_term(
                self.objective.output, log_NV[forget_N], label_N[forget_N], row_N, forgotten_NV
            )
            terms["output"] = output_N.sum() / max(counts.forget_answer, 1)
        return terms
