"""The token solver: rounds of closed-form updates that bring each forget token down to its own aim.

A token that the original model finds more likely than its aim (`rfa.aims`) by a margin was learned
from its row: it is *pushed*. All others, words that any model would say there, are *held*. A round
takes the gradient g of

    (sum over the pushed tokens still above their aim of the label's log-odds
     + HELD_WEIGHT * sum over the held tokens of KL(original || current)) / pushed tokens above

at the output of every adapted module. It asks each module for the shift T = -g at the forget rows'
tokens, which is about 0 at held ones, at the least cost to the retained sets' second moments R:

    M = T^T (K + lambda)^-1 X R^-1,    K = X R^-1 X^T,    lambda = number of tokens

That is `rfa.closed_form` with another shift. One factor for all modules makes the pushed tokens
fall by about `FALL` nats on average. The retained sets are read once, before. A round costs a
forward and a backward over the forget rows, and mostly one forward that tries the factor. The sum
of the rounds' updates stays within the adapter's rank. This combination is the project's own. Its
parts are common property: the normal equations are those of MEMIT (arXiv 2210.07229).

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
from rfa.aims import MARGIN, Prediction, neighbour_aims
from rfa.batch import UnlearnBatch
from rfa.blocks import hook_scope
from rfa.closed_form import LowRankUpdate, added
from rfa.features import as_positions, input_positions
from rfa.moments import ForgetRows
from rfa.solver import OnePassSolver

ROUNDS = 12
TRIES = 6  # forwards at most that look for a round's factor
FALL = 0.85  # nats that pushed tokens fall in a round at most, on average
SLACK = 1.5  # a round may exceed the fall by this factor
MOST_GROWTH = 2.0  # a factor is at most this many times one that held
HELD_WEIGHT = 3.0  # of a held token's divergence, beside a pushed token's log-odds
MOST_HELD = 0.03  # nats that held tokens may diverge from the original, on average

ProgressCallback = Callable[[int, int, str], None]  # done, of, what


class Answers(NamedTuple):
    """One batch of the forget set: the aim of each answer token, and what is held."""

    batch: UnlearnBatch
    aim_N: Tensor
    pushed_N: Tensor
    held: Prediction


class Standing(NamedTuple):
    """Where the forget set's answer tokens stand, over all workers."""

    above: int  # pushed tokens above their aim
    log_p: float  # of the pushed tokens, mean
    aim: float  # of the pushed tokens, mean
    divergence: float  # KL(original || current) of the held tokens, mean


class TokenSolver:
    """Solves the adapters of one alignment from the moments that `one_pass` has collected."""

    def __init__(self, one_pass: OnePassSolver, on_progress: ProgressCallback) -> None:
        self.one_pass, self.on_progress = one_pass, on_progress
        self.alignment = one_pass.alignment
        self._updates: dict[str, LowRankUpdate] = {}  # of the modules that this worker owns
        self._largest_factor = float("inf")  # half of the least that was refused, or less

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
        factor = 1.0
        for index in range(ROUNDS):
            # Also on the mean: single tokens that hardly move would drag all others down.
            if not standings[-1].above or standings[-1].log_p <= standings[-1].aim:
                break
            self.on_progress(index, ROUNDS, f"{standings[-1].above} tokens above their aim")
            rows = self.one_pass.gathered(self._shifts(answers, standings[-1]))
            step = {name: self.one_pass.solve_module(name, rows[name], 1.0) for name in rows}
            factor, standing = self._take_step(rows, step, answers, factor, standings[-1])
            if standing is None:
                break
            standings.append(standing)
        return standings

    @torch.no_grad()
    def aims(self, forget: Sequence[UnlearnBatch], unseen: Sequence[UnlearnBatch]) -> list[Answers]:
        """Return each forget batch's aims, from all workers' never-seen rows."""
        with adapters_off(self.alignment.model):
            parts: list[tuple[Tensor, Tensor]] = []
            for batch in unseen:
                feature_ND, log_p_NV = self._predictions(batch)
                parts.append((feature_ND.cpu(), _of_labels(log_p_NV, batch).cpu()))
            own = tuple(torch.cat(column) for column in zip(*parts, strict=True))
            unseen_MD, unseen_M = map(torch.cat, zip(*exchange.gather_all(own), strict=True))
            answers: list[Answers] = []
            for batch in forget:
                feature_ND, log_p_NV = self._predictions(batch)
                device = feature_ND.device
                aim_N = neighbour_aims(feature_ND, unseen_MD.to(device), unseen_M.to(device))
                pushed_N = _of_labels(log_p_NV, batch) > aim_N + MARGIN
                held = Prediction.of(log_p_NV[~pushed_N])
                answers.append(Answers(batch, aim_N, pushed_N, held))
        return answers

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
        sums = torch.zeros(6, dtype=torch.float64)
        for batch, aim_N, pushed_N, held in answers:
            log_p_NV = self._log_p(batch)
            log_p_N = _of_labels(log_p_NV, batch)
            sums += torch.tensor(
                [
                    float((log_p_N > aim_N)[pushed_N].sum()),
                    float(log_p_N[pushed_N].sum()),
                    float(aim_N[pushed_N].sum()),
                    float(pushed_N.sum()),
                    float(held.divergence(log_p_NV[~pushed_N]).sum()),
                    float((~pushed_N).sum()),
                ],
                dtype=torch.float64,
            )
        above, log_p, aim, pushed, divergence, num_held = (
            torch.stack(exchange.gather_all(sums)).sum(0).tolist()
        )
        num_pushed = max(pushed, 1)
        return Standing(
            int(above), log_p / num_pushed, aim / num_pushed, divergence / max(num_held, 1)
        )

    def _shifts(self, answers: Sequence[Answers], now: Standing) -> dict[str, ForgetRows]:
        """Return this worker's inputs and wanted shifts at every module: the loss's gradient."""
        rows = self.one_pass.empty_rows(self.one_pass.layers)
        # The count is of all workers' tokens.
        num_above = max(now.above, 1)
        for batch, aim_N, pushed_N, held in answers:
            with torch.enable_grad():
                with self._recording() as seen:
                    log_p_NV = self._log_p(batch)
                log_p_N = _of_labels(log_p_NV, batch)
                above_N = pushed_N & (log_p_N.detach() > aim_N)
                odds_N = log_p_N - _log_complement(log_p_NV, batch)
                divergence = held.divergence(log_p_NV[~pushed_N]).sum()
                loss = (odds_N[above_N].sum() + HELD_WEIGHT * divergence) / num_above
                gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
            tokens_BT = batch.forget_tokens_BT("all")
            for name, gradient in zip(seen, gradients, strict=True):
                input_ND = batch.select(seen[name][0], tokens_BT).feature_ND
                shift_NO = -batch.select(as_positions(gradient), tokens_BT).feature_ND
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
        and where the tokens then stand; None where no factor that was tried fits.
        """
        wanted = min(FALL, before.log_p - before.aim)
        for _ in range(TRIES):
            totals = self._totals(rows, step, factor)
            self.one_pass.write(self.one_pass.layers, totals)
            standing = self._standing(answers)
            fall = before.log_p - standing.log_p
            # Pushed tokens fall about in proportion to the factor.
            growth = min(max(wanted / max(fall, 1e-3), 1 / 4), MOST_GROWTH)
            if fall <= SLACK * wanted and standing.divergence <= MOST_HELD:
                self._updates = totals
                return min(factor * growth, self._largest_factor), standing
            factor *= min(growth, 1 / 2)
            # Later rounds fall less, for fewer tokens are above: no reason for longer steps.
            self._largest_factor = factor
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


def _log_complement(log_p_NV: Tensor, batch: UnlearnBatch) -> Tensor:
    """Return the log-probability of all tokens but the answers' own, [N]."""
    label_N1 = batch.expected(batch.answer_BT)[:, None]
    return log_p_NV.scatter(-1, label_N1, -torch.inf).logsumexp(-1)
