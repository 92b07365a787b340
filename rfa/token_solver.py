"""The token solver: rounds of second-order updates that bring each forget token to its own aim.

A round lowers the loss of `rfa.token_loss`: pushed tokens come to their aims, held ones stay. A step
down its gradient alone would move held tokens as freely as pushed ones, and only the next round would
see it. So a round minimises the quadratic model of the loss, with its Gauss-Newton matrix (Martens
2010, Deep learning via Hessian-free optimization), by a few conjugate gradients: what they need of
the matrix is its product with a direction, which costs a forward with the direction added, a
forward, and a backward over the forget rows.

The metric, in which gradients are taken and few of them go far, is that of what must stay: of the
retained sets' second moments R and, less by the factor CAUTION, the forget tokens' own. At a module
with the forget tokens' inputs X the gradient T by its outputs gives the update

    M = T^T (K + lambda)^-1 X R^-1,    K = X R^-1 X^T,    lambda = CAUTION * number of tokens

as in `rfa.closed_form`, so that all modules' updates are written as shifts of the same tokens. The
retained sets are read once, before. The sum of the rounds' updates stays within the adapter's rank.
This combination is the project's own. Its parts are common property: the normal equations are those
of MEMIT (arXiv 2210.07229).

Shapes: B rows, T tokens, N answer tokens, D input features, O outputs, K rank, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rfa import exchange
from rfa.adapters import ADAPTER, adapters_off, dropout_off
from rfa.aims import MARGIN, Neighbours, Prediction, Unseen
from rfa.batch import UnlearnBatch
from rfa.blocks import hook_scope
from rfa.closed_form import LowRankUpdate, added
from rfa.conjugate import ModuleTokens, Shifts, conjugate_gradients
from rfa.features import as_positions, input_positions
from rfa.moments import ForgetRows
from rfa.solver import OnePassSolver
from rfa.token_loss import Answers, Standing, curved, of_labels, sums_of, terms

ROUNDS = 6
STEPS = 3  # conjugate gradients of a round
TRIES = 6  # forwards at most that look for a round's length
CAUTION = 100.0  # of the metric: the larger, the less a round spares the forget tokens' own inputs
MOST_HELD = 0.3  # nats that held tokens may diverge from the original, on average, in between
# A round's first direction is tried at the length at which the loss would fall by this share: far
# enough to tell from rounding, near enough that the model is all but linear.
TRIED_FALL = 0.1

ProgressCallback = Callable[[int, int, str], None]  # done, of, what


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
        for index in range(ROUNDS):
            if not standings[-1].away:
                break
            self.on_progress(index, ROUNDS, f"{standings[-1].away} tokens away from their aim")
            tokens, step = self._step(answers, standings[-1].loss)
            standing = self._take_step(tokens, step, answers, standings[-1])
            if standing is None:
                break
            standings.append(standing)
            del tokens, step  # before the next round makes its own
        return standings

    @torch.no_grad()
    def aims(self, forget: Sequence[UnlearnBatch], unseen: Sequence[UnlearnBatch]) -> list[Answers]:
        """Return each forget batch's aims, from all workers' never-seen rows."""
        with adapters_off(self.alignment.model):
            parts: list[tuple[Tensor, ...]] = []
            for batch in unseen:
                feature_ND, log_p_NV = self._predictions(batch)
                label_N = batch.expected(batch.answer_BT)
                part = feature_ND, of_labels(log_p_NV, label_N), *Prediction.of(log_p_NV)
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
        label_N = batch.expected(batch.answer_BT)
        pushed_N = of_labels(log_p_NV, label_N) > aim_N + MARGIN
        of_pushed = Neighbours(*(column[pushed_N] for column in neighbours))
        others = of_pushed.others(unseen, label_N[pushed_N], log_p_NV.shape[1])
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
        sums = torch.zeros(len(Standing._fields) + 2, dtype=torch.float64)
        for one in answers:
            sums += sums_of(one, self._log_p(one.batch))
        return Standing.of(torch.stack(exchange.gather_all(sums)).sum(0))

    def _step(
        self, answers: Sequence[Answers], loss: float
    ) -> tuple[dict[str, ModuleTokens], Shifts]:
        """Return the forget tokens at each module of this worker, and the shifts of a round."""
        pushed = sum(int(one.pushed_N.sum()) for one in answers)
        # Of all workers: each has a part of the loss.
        num_pushed = max(sum(exchange.gather_all(pushed)), 1)

        def of_loss(one: Answers, log_p_NV: Tensor) -> Tensor:
            return -terms(one, log_p_NV).total() / num_pushed

        inputs: dict[str, Tensor] = {}
        gradients = self._gradients(answers, of_loss, inputs)
        tokens: dict[str, ModuleTokens] = {}
        for name, owner in self.one_pass.owner.items():
            parts = exchange.gather_on(owner, inputs.pop(name))
            if parts:
                tokens[name] = ModuleTokens(parts, self.one_pass.inverses[name], CAUTION)
        way_down = self._joined(tokens, gradients)
        del gradients  # those of every module, which the steps' own will join

        def of_direction(own: dict[str, LowRankUpdate], length: float) -> Shifts:
            updates = self._shared(own)

            def of_curvature(one: Answers, log_p_NV: Tensor) -> Tensor:
                with torch.no_grad(), self._adding(updates, length):
                    moved_NV = self._log_p(one.batch)
                now_NV = log_p_NV.detach()
                curved_NV = curved(one, now_NV, (moved_NV - now_NV) / length)
                return (log_p_NV * curved_NV).sum() / num_pushed

            return self._joined(tokens, self._gradients(answers, of_curvature))

        ranks = {name: layer.r[ADAPTER] for name, layer in self.one_pass.layers.items()}
        tried = TRIED_FALL * loss
        return tokens, conjugate_gradients(tokens, way_down, of_direction, ranks, STEPS, tried)

    def _gradients(
        self,
        answers: Sequence[Answers],
        of: Callable[[Answers, Tensor], Tensor],
        inputs: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return gradients [N, O] of a number by every module's outputs at this worker's tokens.

        `of` gives a batch's number from the log-probabilities at its answers' tokens. `inputs`, if
        given, gets the modules' inputs [N, D].
        """
        # A worker without forget rows brings empty ones, as all workers gather.
        rows = self.one_pass.empty_rows(self.one_pass.layers)
        seen_of = {name: [empty.input_ND.float()] for name, empty in rows.items()}
        gradients_of = {name: [empty.shift_NO.float()] for name, empty in rows.items()}
        for one in answers:
            with torch.enable_grad():
                with self._recording() as seen:
                    log_p_NV = self._log_p(one.batch)
                outputs = [output for _, output in seen.values()]
                gradients = torch.autograd.grad(of(one, log_p_NV), outputs)
            tokens_BT = one.batch.forget_tokens_BT("all")
            for name, gradient in zip(seen, gradients, strict=True):
                gradient_NO = one.batch.select(as_positions(gradient), tokens_BT).feature_ND
                gradients_of[name].append(gradient_NO.float().cpu())
                if inputs is not None:
                    input_ND = one.batch.select(seen[name][0], tokens_BT).feature_ND
                    seen_of[name].append(input_ND.float().cpu())
        if inputs is not None:
            inputs.update({name: torch.cat(parts) for name, parts in seen_of.items()})
        return {name: torch.cat(parts) for name, parts in gradients_of.items()}

    def _joined(
        self, tokens: Mapping[str, ModuleTokens], gradients: Mapping[str, Tensor]
    ) -> Shifts:
        """Return the gradients of all workers' tokens, at the modules of this worker."""
        shifts: Shifts = {}
        for name, gradient_NO in gradients.items():
            parts = exchange.gather_on(self.one_pass.owner[name], gradient_NO)
            if parts:
                shifts[name] = tokens[name].joined(parts)
        return shifts

    def _shared(self, own: Mapping[str, LowRankUpdate]) -> dict[str, LowRankUpdate]:
        """Return the updates of all modules, on every worker, from those of their owners."""
        shared: dict[str, LowRankUpdate] = {}
        for name, owner in self.one_pass.owner.items():
            update = None
            if name in own:
                update = LowRankUpdate(*(part.float() for part in own[name]))
            received = exchange.broadcast_from(owner, update)
            assert received is not None, "a module's owner has its update"
            shared[name] = received
        return shared

    @contextmanager
    def _adding(self, updates: Mapping[str, LowRankUpdate], length: float) -> Iterator[None]:
        """Add updates times a length to the adapted modules within the block."""

        def add(
            update: LowRankUpdate, _module: Any, inputs: tuple[Tensor, ...], output: Tensor
        ) -> Tensor:
            a_KD, b_OK = (part.to(output.device) for part in update)
            change = length * (inputs[0].float() @ a_KD.T @ b_OK.T)
            if change.ndim == 3:
                change[:, 0] = 0.0  # the gradients leave out the first token, too
            return output + change.to(output.dtype)

        with ExitStack() as stack:
            for name, layer in self.one_pass.layers.items():
                hook = layer.register_forward_hook(partial(add, updates[name]))
                stack.enter_context(hook_scope(hook))
            yield

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
        tokens: Mapping[str, ModuleTokens],
        step: Shifts,
        answers: Sequence[Answers],
        before: Standing,
    ) -> Standing | None:
        """Add a round's update, or the half, the quarter, ... of it that lowers the loss.

        Returns where the tokens then stand; None where nothing that was tried lowers it.
        """
        layers = self.one_pass.layers
        updates: dict[str, LowRankUpdate] = {}
        for name, shift_NO in step.items():
            _, update = tokens[name].span.cut(shift_NO.double(), layers[name].r[ADAPTER])
            # The layer multiplies B A with the scaling, so A is without it.
            scaling = layers[name].scaling[ADAPTER]
            updates[name] = LowRankUpdate(update.a_KD / scaling, update.b_OK)
        for halvings in range(TRIES):
            totals = self._totals(tokens, updates, 0.5**halvings)
            self.one_pass.write(layers, totals)
            standing = self._standing(answers)
            if standing.loss < before.loss and standing.divergence <= MOST_HELD:
                self._updates = totals
                return standing
        self.one_pass.write(layers, self._updates)
        return None

    def _totals(
        self,
        tokens: Mapping[str, ModuleTokens],
        updates: Mapping[str, LowRankUpdate],
        factor: float,
    ) -> dict[str, LowRankUpdate]:
        """Return all rounds' updates with this one, of the modules that this worker owns."""
        totals: dict[str, LowRankUpdate] = {}
        for name, update in updates.items():
            totals[name] = LowRankUpdate(factor * update.a_KD, update.b_OK)
            if name in self._updates:
                rank = self.one_pass.layers[name].r[ADAPTER]
                inverse, input_ND = self.one_pass.inverses[name], tokens[name].span.input_ND
                rows = ForgetRows(input_ND, input_ND[:, :0], tokens[name].count)
                totals[name] = added(self._updates[name], totals[name], rows, inverse, rank=rank)
        return totals
