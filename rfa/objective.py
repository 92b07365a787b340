"""The objective of residual feature alignment.

It is after Qin et al. 2024 (arXiv 2411.08443). The reconstruction is this project's.

    L = w_retain * zero(r on D_r) + w_forget * shift(r on D_f)
        + w_kl * KL(base || adapted on D_r) + w_task * CE(D_r) + w_output * output(D_f)

Every term is a sum over tokens divided by the number of tokens in the step, over all workers. A
module's distances are in units of its E|h0|^2, so that weights carry over between layers and
models. Of classified rows each row counts as one, and its term is the mean over its positions. A
term of weight 0 is not computed.

Shapes: B rows, T tokens, S positions of a module, D features, N selected tokens or positions, V
vocabulary or classes, R rows of a kind.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from rfa.adapters import adapters_off, lora_layers
from rfa.answers import Predictions, answer_positions, forget_answers
from rfa.batch import TokenCounts, UnlearnBatch
from rfa.blocks import BlockRunner, BlocksOutput, set_recomputing
from rfa.distances import distance, likeness
from rfa.features import DriftFeatures, FeatureHooks, LocalFeatures
from rfa.forget_losses import FORGET_LOSSES, divergence
from rfa.settings import Objective, TokenKind
from rfa.targets import SAMPLE_TOKENS, FeatureSums, ModuleTarget, Targets, fit_target


class LossOutput(NamedTuple):
    """The objective and its unweighted terms, each a scalar. A term that is off is 0."""

    total: Tensor
    retain: Tensor
    forget: Tensor
    kl: Tensor
    task: Tensor
    output: Tensor


class _Teacher(NamedTuple):
    """One pass of the base model.

    `prefix_BTD` are the hidden states of all rows below the first adapted block. Features and
    predictions are of the `rows` (indices) that some term compares.
    """

    prefix_BTD: Tensor | None = None
    rows: Tensor | None = None
    features: Mapping[str, Tensor] = MappingProxyType({})
    predictions: Predictions | None = None


class ResidualAlignment(nn.Module):
    """A model with LoRA and the objective that trains it, in one forward for all rows of a batch.

    Only what a term reads is computed. Blocks above the last aligned one run only when a term needs
    logits. Logits are computed only at the positions that a term reads. Where the base model's
    features are needed as well (a teacher), the frozen prefix below the first adapted block is run
    once for both.

    Where features are aligned, call `feature_sums` over the retain set and `fit` before training.
    `progress` is the share of the steps that are taken with the next one, for weights that change.

    Args:
        learns_statistics: whether batch normalisation's statistics follow the rows that are trained
            on. They must where pruning has changed the features that they describe.
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
        self.hooks = FeatureHooks(model, objective.residual)
        self.runner = BlockRunner(model.get_base_model())
        self.targets: Targets | None = None
        self.progress = 0.0
        self.train()

    def train(self, mode: bool = True) -> "ResidualAlignment":
        """Set training mode for the adapters alone."""
        super().train(mode)
        # Dropout in the frozen model would make student and teacher differ.
        self.model.eval()
        for _, layer in lora_layers(self.model):
            layer.lora_dropout.train(mode)
        if self.learns_statistics:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train(mode)
        for block in self.runner.blocks:
            set_recomputing(block, mode)
        return self

    def feature_sums(
        self,
        batch: UnlearnBatch,
        sample_tokens: int = SAMPLE_TOKENS,
        tokens: TokenKind | None = None,
    ) -> dict[str, FeatureSums]:
        """Sum the base features of a batch's retain rows, by module.

        Args:
            batch: rows of any set. Only those of the retain set are summed.
            sample_tokens: number of tokens per row that `cluster_mean` samples. With 0 the batch is
                run and nothing is summed.
            tokens: the kind of tokens, by default the kind that the objective shifts.
        """
        with torch.no_grad(), adapters_off(self.model), self.hooks.recording() as base:
            self.run(batch, None, 0, self.hooks.last_block + 1)
        sums = {name: FeatureSums() for name in self.hooks.names}
        tokens_BT = batch.retain_tokens_BT(tokens or self.objective.tokens)
        tokens_BT = tokens_BT & batch.retain_B[:, None]
        if not sample_tokens or not tokens_BT.any():
            return sums
        if self.objective.target != "cluster_mean":
            sample_tokens = 0
        for name in self.hooks.names:
            selected = batch.select(base[name], tokens_BT)
            # Positions are selected row by row, so each row's are one stretch.
            index_R, lengths_R = selected.index_N.unique_consecutive(return_counts=True)
            by_row = selected.feature_ND.split(lengths_R.tolist())
            for index, feature_ND in zip(index_R.tolist(), by_row, strict=True):
                row, part = int(batch.row_B[index]), int(batch.part_B[index])
                label = int(batch.label_B[index])
                sums[name].add(feature_ND, row, label, sample_tokens, part=part)
        return sums

    def fit(self, sums: dict[str, FeatureSums]) -> None:
        """Fit the targets to the retain set's sums of all workers."""
        modules: dict[str, ModuleTarget] = {}
        for name in self.hooks.names:
            modules[name] = fit_target(self.objective, sums[name], seed=self.seed)
        self.targets = Targets(self.objective.target, modules, self.seed)

    def forward(self, batch: UnlearnBatch, counts: TokenCounts | None = None) -> LossOutput:
        """Return the loss of a batch. `counts` are those of the step, by default of this batch."""
        objective, weights = self.objective, self.objective.weights
        counts = counts or batch.counts(objective.tokens)
        teacher = self._teacher(batch) if objective.needs_teacher else _Teacher()
        logits_at_BT = None
        if objective.needs_logits:
            reads_retained = weights.kl > 0 or weights.task > 0
            logits_at_BT = answer_positions(batch, retain=reads_retained, forget=weights.output > 0)
        with self.hooks.recording() as recorded:
            out = self._run_above(batch, teacher.prefix_BTD, logits_at_BT)
        # This zero has a graph, so that a worker without rows of a kind has gradients to exchange.
        empty = out.hidden_BTD[:, :0] if out.logits_NV is None else out.logits_NV[:0]
        zero = empty.float().sum()
        terms = dict.fromkeys(("retain", "forget", "kl", "task", "output"), zero)
        if objective.aligns:
            if objective.residual == "local":
                features = LocalFeatures(batch, recorded, self.hooks.residuals())
            else:
                assert teacher.rows is not None
                features = DriftFeatures(batch, recorded, teacher.features, teacher.rows)
            # A step without tokens of a kind has a sum of 0 over none of them.
            if weights.retain:
                terms["retain"] = self._zero(batch, features) / max(counts.retain, 1)
            if weights.forget:
                terms["forget"] = self._shift(batch, features) / max(counts.forget, 1)
        if out.logits_NV is not None and logits_at_BT is not None:
            terms |= self._logit_terms(batch, out.logits_NV, logits_at_BT, teacher, counts)
        total = zero
        weights = objective.weights_at(self.progress)
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
        """Run blocks `start` to `stop`, and the head if `stop` is the depth and it is needed."""
        # An adapted head runs even when no term reads its logits, as its features are aligned.
        if logits_at_BT is None and self.hooks.reaches_head and stop == len(self.runner.blocks):
            logits_at_BT = batch.answer_BT
        return self.runner(
            batch, start=start, stop=stop, hidden_BTD=hidden_BTD, logits_at_BT=logits_at_BT
        )

    def _run_above(
        self, batch: UnlearnBatch, prefix_BTD: Tensor | None, logits_at_BT: Tensor | None
    ) -> BlocksOutput:
        """Run the blocks above the prefix, up to the last one that any term reads."""
        start = 0 if prefix_BTD is None else self.hooks.first_block
        stop = self.hooks.last_block + 1 if logits_at_BT is None else len(self.runner.blocks)
        return self.run(batch, prefix_BTD, start, stop, logits_at_BT)

    @torch.no_grad()
    def _teacher(self, batch: UnlearnBatch) -> _Teacher:
        """Run the frozen prefix and, on the rows that some term compares, the base model."""
        objective = self.objective
        # Forget rows are compared only where a target or a loss reads the base model's view of
        # them.
        all_rows = objective.compares_answers
        if objective.residual != "local" and objective.aligns:
            assert self.targets is not None
            all_rows |= self.targets.looks_at_sample
        rows_B = torch.ones_like(batch.forget_B) if all_rows else ~batch.forget_B
        if not rows_B.any():
            # A worker without retain rows runs one row, as the others wait for it. No term counts
            # it.
            rows_B[0] = True
        rows = rows_B.nonzero().flatten()
        compared = batch.rows(rows)
        prefix_BTD = above_BTD = None
        if self.hooks.first_block > 0:
            prefix_BTD = self.runner(batch, stop=self.hooks.first_block).hidden_BTD
            above_BTD = prefix_BTD[rows]
        logits_at_BT = None
        if objective.weights.kl > 0 or objective.compares_answers:
            logits_at_BT = answer_positions(
                compared, retain=objective.weights.kl > 0, forget=objective.compares_answers
            )
        with adapters_off(self.model), self.hooks.recording() as features:
            out = self._run_above(compared, above_BTD, logits_at_BT)
        predictions = None
        if out.logits_NV is not None and logits_at_BT is not None:
            forget_N = compared.forget_B[logits_at_BT.nonzero()[:, 0]]
            predictions = Predictions.of(out.logits_NV, forget_N)
        return _Teacher(prefix_BTD, rows, features, predictions)

    def _zero(self, batch: UnlearnBatch, features: LocalFeatures | DriftFeatures) -> Tensor:
        """Return zero(r on D_r): the mean over modules of the sum over retain tokens."""
        assert self.targets is not None
        tokens_BT = batch.retain_tokens_BT()
        sums: list[Tensor] = []
        for name in self.hooks.names:
            residual, reference_ND = features.residual(name, tokens_BT)
            energy = self.targets.energy(name)
            away_N = distance(self.objective.distance, residual.feature_ND, reference_ND, energy)
            sums.append((away_N * residual.weight_N).sum())
        return torch.stack(sums).mean()

    def _shift(self, batch: UnlearnBatch, features: LocalFeatures | DriftFeatures) -> Tensor:
        """Return shift(r on D_f): the mean over modules of the sum over forget tokens."""
        assert self.targets is not None
        tokens_BT = batch.forget_tokens_BT(self.objective.tokens)
        sums: list[Tensor] = []
        for name in self.hooks.names:
            adapted, sample_ND = features.adapted(name, tokens_BT)
            row_N, label_N = batch.row_B[adapted.index_N], batch.label_B[adapted.index_N]
            target_ND = self.targets(name, sample_ND, row_N, label_N)
            energy = self.targets.energy(name)
            if self.objective.target == "reroute":
                away_N = likeness(adapted.feature_ND, target_ND)
            else:
                difference_ND = adapted.feature_ND - target_ND
                away_N = distance(self.objective.distance, difference_ND, target_ND, energy)
            sums.append((away_N * adapted.weight_N).sum())
        return torch.stack(sums).mean()

    def _logit_terms(
        self,
        batch: UnlearnBatch,
        logits_NV: Tensor,
        logits_at_BT: Tensor,
        teacher: _Teacher,
        counts: TokenCounts,
    ) -> dict[str, Tensor]:
        """Return the terms of KL, cross-entropy and output, over answer tokens or classes."""
        weights = self.objective.weights
        index_N = logits_at_BT.nonzero()[:, 0]
        forget_N = batch.forget_B[index_N]
        predicted = Predictions.of(logits_NV, forget_N)
        terms: dict[str, Tensor] = {}
        if weights.kl:
            assert teacher.predictions is not None
            kl_N = divergence(teacher.predictions.retain_NV, predicted.retain_NV)
            terms["kl"] = kl_N.sum() / max(counts.retain_answer, 1)
        if weights.task:
            label_N = batch.expected(logits_at_BT)
            right_N1 = label_N[~forget_N, None].to(logits_NV.device)
            log_N1 = predicted.retain_NV.gather(1, right_N1)
            terms["task"] = -log_N1.sum() / max(counts.retain_answer, 1)
        if weights.output:
            answers = forget_answers(
                batch,
                logits_at_BT,
                predicted.forget_NV,
                teacher.predictions and teacher.predictions.forget_NV,
            )
            loss = FORGET_LOSSES[self.objective.output]
            number = counts.forget_answer if loss.per == "token" else counts.forget_rows
            value = loss(answers, self.objective.output_parameters).sum()
            terms["output"] = value / max(number, 1)
        return terms
