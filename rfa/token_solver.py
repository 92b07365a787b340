"""The token solver: rounds of closed-form updates that bring each forget token to its own aim.

A token that the original model finds more likely than its aim (`rfa.aims`) by a margin was learned
from its row: it is *pushed*. All others, words that any model would say there, are *held*. A round
takes the gradient g of

    (sum over the pushed tokens of 1/2 (log-odds of the label - log-odds of its aim)^2
                                 + KL(neighbours || current), of all tokens but the label
     + HELD_WEIGHT * sum over the held tokens of KL(original || current)) / pushed tokens

at the output of every adapted module. The square is linear beyond MOST_GAP. It asks each module for
the shift T = -g at the forget rows' tokens, which is about 0 at held ones, at the least cost to the
retained sets' second moments R:

    M = T^T (K + lambda)^-1 X R^-1,    K = X R^-1 X^T,    lambda = CAUTION * number of tokens

That is `rfa.closed_form` with another shift. One factor for all modules makes the pushed labels
fall by about `FALL` nats on average, and the loss fall. The retained sets are read once, before. A
round costs a forward and a backward over the forget rows, and mostly one forward that tries the
factor. The sum of the rounds' updates stays within the adapter's rank. This combination is the
project's own. Its parts are common property: the normal equations are those of MEMIT (arXiv
2210.07229).

Shapes: B rows, T tokens, N answer tokens, D input features, O outputs, K rank, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rfa import exchange
from rfa.adapters import ADAPTER, adapters_off, dropout_off
from rfa.aims import MARGIN, Neighbours, Prediction, Unseen
from rfa.batch import UnlearnBatch
from rfa.blocks import hook_scope
from rfa.closed_form import LowRankUpdate, added
from rfa.features import as_positions, input_positions
from rfa.moments import ForgetRows
from rfa.solver import OnePassSolver

ROUNDS = 12
# The factor of the first round that is tried; each later round begins with the last one's. How large
# the right one is differs a thousandfold: a few rows with dear tokens need a small one.
FIRST_FACTOR = 1.0
TRIES = 12  # forwards at most that look for a round's factor
FALL = 1.0  # nats that pushed labels should fall in a round, on average
SLACK = 1.5  # a round may exceed the fall by this factor
MOST_GROWTH = 1.4  # a round's factor is at most this many times the last one's
MOST_GAP = 4.0  # nats from its aim beyond which a token pushes no harder
CAUTION = 10.0  # of the solve: the larger, the less a round asks where the kept sets are dear
HELD_WEIGHT = 3.0  # of a held token's divergence, beside a pushed token's
MOST_HELD = 0.03  # nats that held tokens may diverge from the original, on average

ProgressCallback = Callable[[int, int, str], None]  # done, of, what


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


class Standing(NamedTuple):
    """Where the forget set's answer tokens stand, over all workers."""

    away: int  # pushed tokens more than the margin from their aim
    log_p: float  # of the pushed tokens' labels, mean
    aim: float  # of the pushed tokens' labels, mean
    divergence: float  # KL(original || current) of the held tokens, mean
    loss: float  # what a round lowers


class TokenSolver:
    """Solves the adapters of one alignment from the moments that `one_pass` has collected."""

    def __init__(self, one_pass: OnePassSolver, on_progress: ProgressCallback) -> None:
        self.one_pass, self.on_progress = one_pass, on_progress
        self.alignment = one_pass.alignment
        self._updates: dict[str, LowRankUpdate] = {}  # of the modules that this worker owns

    def solve(
        self, forget: Sequence[UnlearnBatch], unseen: Sequence[UnlearnBatch]
    ) -> list[Standing]:
        """Write all adapters, from this worker's rows and the other workers'.

        Returns where the tokens stood before and after each round.
        """
        with dropout_off(self.alignment.model):
            return self._solve(self.aims(forget, unseen))

    def _solve(self, answers: list[Answers]) -> list[Standing]:
        standings = [self._standing(answers)]
        factor = FIRST_FACTOR
        for index in range(ROUNDS):
            if not standings[-1].away:
                break
            self.on_progress(index, ROUNDS, f"{standings[-1].away} tokens away from their aim")
            rows = self.one_pass.gathered(self._shifts(answers))
            step = {
                name: self.one_pass.solve_module(name, rows[name], 1 / CAUTION) for name in rows
            }
            factor, standing = self._take_step(rows, step, answers, factor, standings[-1])
            if standing is None:
                break
            standings.append(standing)
        return standings

    @torch.no_grad()
    def aims(self, forget: Sequence[UnlearnBatch], unseen: Sequence[UnlearnBatch]) -> list[Answers]:
        """Return each forget batch's aims, from all workers' never-seen rows."""
        with adapters_off(self.alignment.model):
            parts: list[tuple[Tensor, ...]] = []
            for batch in unseen:
                feature_ND, log_p_NV = self._predictions(batch)
                part = feature_ND, _of_labels(log_p_NV, batch), *Prediction.of(log_p_NV)
                parts.append(tuple(column.cpu() for column in part))
            own = tuple(torch.cat(column) for column in zip(*parts, strict=True))
            columns = map(torch.cat, zip(*exchange.gather_all(own), strict=True))
            device = next(self.alignment.parameters()).device
            feature_MD, log_p_M, *prediction = (column.to(device) for column in columns)
            never_seen = Unseen(feature_MD, log_p_M, Prediction(*prediction))
            return [self._answers(batch, never_seen) for batch in forget]

    def _answers(self, batch: UnlearnBatch, unseen: Unseen) -> Answers:
        feature_ND, log_p_NV = self._predictions(batch)
        neighbours = Neighbours.of(feature_ND, unseen.feature_MD)
        aim_N = neighbours.log_p(unseen)
        pushed_N = _of_labels(log_p_NV, batch) > aim_N + MARGIN
        of_pushed = Neighbours(*(column[pushed_N] for column in neighbours))
        label_P = batch.expected(batch.answer_BT)[pushed_N]
        others = of_pushed.others(unseen, label_P, log_p_NV.shape[1])
        return Answers(batch, aim_N, pushed_N, others, Prediction.of(log_p_NV[~pushed_N]))

    def _predictions(self, batch: UnlearnBatch) -> tuple[Tensor, Tensor]:
        """Return the features [N, D] from which the answers are predicted, and the predictions."""
        seen: list[Tensor] = []
        model: Any = self.alignment.runner.model

        def record(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
            seen.append(args[0][0].float())

        with hook_scope(model.get_output_embeddings().register_forward_hook(record)):
            log_p_NV = self._log_p(batch)
        return seen[-1], log_p_NV

    def _log_p(self, batch: UnlearnBatch) -> Tensor:
        """Return log-probabilities [N, V] at the answers' tokens."""
        logits_NV = self.alignment.runner(batch, logits_at_BT=batch.answer_BT).logits_NV
        assert logits_NV is not None
        return logits_NV.float().log_softmax(-1)

    @torch.no_grad()
    def _standing(self, answers: Sequence[Answers]) -> Standing:
        sums = torch.zeros(7, dtype=torch.float64)
        for one in answers:
            log_p_NV = self._log_p(one.batch)
            log_p_P = _of_labels(log_p_NV, one.batch)[one.pushed_N]
            aim_P = one.aim_N[one.pushed_N]
            terms = _terms(one, log_p_NV)
            part = [
                ((log_p_P - aim_P).abs() > MARGIN).sum(),
                log_p_P.sum(),
                aim_P.sum(),
                one.pushed_N.sum(),
                terms.held_N.sum(),
                (~one.pushed_N).sum(),
                _huber(terms.gap_N).sum() + terms.others_N.sum(),
            ]
            sums += torch.tensor([float(value) for value in part], dtype=torch.float64)
        away, log_p, aim, pushed, held, num_held, misfit = (
            torch.stack(exchange.gather_all(sums)).sum(0).tolist()
        )
        num_pushed = max(pushed, 1)
        loss = (misfit + HELD_WEIGHT * held) / num_pushed
        return Standing(
            int(away), log_p / num_pushed, aim / num_pushed, held / max(num_held, 1), loss
        )

    def _shifts(self, answers: Sequence[Answers]) -> dict[str, ForgetRows]:
        """Return this worker's inputs and wanted shifts at every module: the loss's gradient."""
        rows = self.one_pass.empty_rows(self.one_pass.layers)
        pushed = sum(int(one.pushed_N.sum()) for one in answers)
        # Of all workers: each has a part of the loss.
        num_pushed = max(sum(exchange.gather_all(pushed)), 1)
        for one in answers:
            with torch.enable_grad():
                with self._recording() as seen:
                    log_p_NV = self._log_p(one.batch)
                terms = _terms(one, log_p_NV)
                held = HELD_WEIGHT * terms.held_N.sum()
                loss = _huber(terms.gap_N).sum() + terms.others_N.sum() + held
                gradients = torch.autograd.grad(
                    loss / num_pushed, [output for _, output in seen.values()]
                )
            tokens_BT = one.batch.forget_tokens_BT("all")
            for name, gradient in zip(seen, gradients, strict=True):
                input_ND = one.batch.select(seen[name][0], tokens_BT).feature_ND
                shift_NO = -one.batch.select(as_positions(gradient), tokens_BT).feature_ND
                added_rows = ForgetRows.of(input_ND.float().cpu(), shift_NO.float().cpu())
                rows[name] = rows[name].merged(added_rows)
        return rows

    @contextmanager
    def _recording(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Record input [B, S, D] and output of every adapted module within the block."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def record(name: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = input_positions(module.base_layer, inputs[0]).detach(), output

        with ExitStack() as stack:
            for name, layer in self.one_pass.layers.items():
                hook = layer.register_forward_hook(partial(record, name))
                stack.enter_context(hook_scope(hook))
            yield seen

    def _take_step(
        self,
        rows: dict[str, ForgetRows],
        step: dict[str, LowRankUpdate],
        answers: Sequence[Answers],
        factor: float,
        before: Standing,
    ) -> tuple[float, Standing | None]:
        """Add the step, times the factor at which pushed tokens fall as far as they may.

        The search starts from `factor`. Returns the factor that the next round should start from,
        and where the tokens then stand; None where no factor that was tried lowers the loss.
        """
        for _ in range(TRIES):
            totals = self._totals(rows, step, factor)
            self.one_pass.write(self.one_pass.layers, totals)
            standing = self._standing(answers)
            fall = before.log_p - standing.log_p
            # Pushed labels fall about in proportion to the factor.
            growth = min(max(FALL / max(fall, 1e-3), 1 / 4), MOST_GROWTH)
            is_better = standing.loss < before.loss and standing.divergence <= MOST_HELD
            if is_better and fall <= SLACK * FALL:
                self._updates = totals
                return factor * growth, standing
            factor *= min(growth, 1 / 2)
        self.one_pass.write(self.one_pass.layers, self._updates)
        return factor, None

    def _totals(
        self, rows: dict[str, ForgetRows], step: dict[str, LowRankUpdate], factor: float
    ) -> dict[str, LowRankUpdate]:
        """Return all rounds' updates with this one, of the modules that this worker owns."""
        totals: dict[str, LowRankUpdate] = {}
        for name, update in step.items():
            totals[name] = LowRankUpdate(factor * update.a_KD, update.b_OK)
            if name in self._updates:
                rank = self.one_pass.layers[name].r[ADAPTER]
                inverse = self.one_pass.inverses[name]
                totals[name] = added(
                    self._updates[name], totals[name], rows[name], inverse, rank=rank
                )
        return totals


def _of_labels(log_p_NV: Tensor, batch: UnlearnBatch) -> Tensor:
    """Return the log-probabilities of the answers' own tokens, [N]."""
    return log_p_NV.gather(-1, batch.expected(batch.answer_BT)[:, None])[:, 0]


class _Terms(NamedTuple):
    """The parts of the loss: of the pushed tokens gap and divergence, of the held ones the latter."""

    gap_N: Tensor
    others_N: Tensor
    held_N: Tensor


def _terms(answers: Answers, log_p_NV: Tensor) -> _Terms:
    """Return the parts of the loss, of log-probabilities at the answers' tokens."""
    pushed_N = answers.pushed_N
    log_p_PV, aim_P = log_p_NV[pushed_N], answers.aim_N[pushed_N]
    label_P1 = answers.batch.expected(answers.batch.answer_BT)[pushed_N][:, None]
    # log(1 - p) as a sum over the other tokens keeps its digits, and its gradient, near p = 1.
    not_label_P = log_p_PV.scatter(-1, label_P1, -torch.inf).logsumexp(-1)
    odds_P = log_p_PV.gather(-1, label_P1)[:, 0] - not_label_P
    aim_odds_P = aim_P - torch.log(-torch.expm1(aim_P))
    others_P = answers.others.divergence(log_p_PV - not_label_P[:, None])
    return _Terms(odds_P - aim_odds_P, others_P, answers.held.divergence(log_p_NV[~pushed_N]))


def _huber(gap_N: Tensor) -> Tensor:
    """Return half the square of a gap, and a line beyond MOST_GAP."""
    zero_N = torch.zeros_like(gap_N)
    return torch.nn.functional.huber_loss(gap_N, zero_N, reduction="none", delta=MOST_GAP)
