"""Conjugate gradients over the updates of many modules, each owned by one worker.

They lower 1/2 <M, H M> - <g, M> for a matrix H that is never negative and is known by its products
alone (Hestenes and Stiefel 1952), in the metric of `rfa.closed_form.TokenSpan`: an update is written
as the shifts of the tokens that span it, and so is what H makes of one. Few steps are taken, which
leaves directions alone that the metric finds dear and H flat.

Shapes: N tokens of all workers, D input features, O output features, K rank.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rfa import exchange
from rfa.closed_form import InverseMoments, LowRankUpdate, TokenSpan

Shifts = dict[str, Tensor]  # [N, O], of the modules that this worker owns


class ModuleTokens:
    """The forget tokens of all workers at a module, on the module's owner.

    Args:
        parts: each worker's inputs.
        kept: the inverse moments of the retained sets.
        caution: how much less a direction counts as dear that the tokens themselves are in.
    """

    def __init__(self, parts: Sequence[Tensor], kept: InverseMoments, caution: float) -> None:
        input_ND = torch.cat(list(parts)).double().cpu()
        self.count = len(input_ND)
        self._rotation_NR: Tensor | None = None
        # The updates depend on the tokens through X^T X and X^T T alone. A rotation changes neither,
        # and QR's makes all rows beyond D zero.
        if self.count > input_ND.shape[1]:
            self._rotation_NR, input_ND = torch.linalg.qr(input_ND)
        self.span = TokenSpan(input_ND, kept, caution * self.count)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the shifts of all workers' tokens, in the span's rows; float32, as there are many."""
        shift_NO = torch.cat(list(parts)).cpu()
        if self._rotation_NR is not None:
            shift_NO = self._rotation_NR.T @ shift_NO.double()
        return shift_NO.float()


def conjugate_gradients(
    tokens: Mapping[str, ModuleTokens],
    gradient: Shifts,
    curved: Callable[[dict[str, LowRankUpdate], float], Shifts],
    rank_of: Mapping[str, int],
    steps: int,
    tried: float,
) -> Shifts:
    """Return the shifts of the update that some steps find. Every worker calls it.

    The curvature is asked along directions of a module's rank alone, which its adapter can hold.

    Args:
        gradient: the way down, of the modules that this worker owns.
        curved: returns what H makes of a direction whose updates it gets, tried at a length.
        rank_of: the rank of every module.
        tried: how much the first direction should fall at the length that is tried. The others are
            tried as far in the metric.
    """
    solution = {name: torch.zeros_like(shift_NO) for name, shift_NO in gradient.items()}
    residual, direction = gradient, dict(solution)
    last, last_squared, first_squared = residual, 1.0, 0.0
    for step in range(steps):
        squared = _product(tokens, residual, residual)
        if not squared > 0:
            break
        # Polak's and Ribiere's: what the cut to a rank has spoilt is left behind.
        share = 0.0
        if step:
            share = max(0.0, (squared - _product(tokens, last, residual)) / last_squared)
        else:
            first_squared = squared
        updates: dict[str, LowRankUpdate] = {}
        for name, shift_NO in residual.items():
            wanted_NO = shift_NO + share * direction[name]
            cut_NO, updates[name] = tokens[name].span.cut(wanted_NO.double(), rank_of[name])
            direction[name] = cut_NO.float()
        norm = _product(tokens, direction, direction) ** 0.5
        slope = _product(tokens, direction, residual)
        length = tried / max(first_squared**0.5 * norm, torch.finfo(torch.float32).tiny)
        image = curved(updates, length)
        curvature = _product(tokens, image, direction)
        if not (slope > 0 and curvature > 0):
            # Rounding has the last word on so flat a way. At first it is still the way down.
            if not step:
                solution = {name: length * shift_NO for name, shift_NO in direction.items()}
            break
        length = slope / curvature
        last, last_squared = residual, squared
        residual = {name: residual[name] - length * image[name] for name in residual}
        solution = {name: solution[name] + length * direction[name] for name in solution}
    return solution


def _product(tokens: Mapping[str, ModuleTokens], one: Shifts, other: Shifts) -> float:
    """Return the product of two updates in the metric, over all workers' modules."""
    own = 0.0
    for name, shift_NO in one.items():
        own += float((shift_NO * tokens[name].span.weighted(other[name].double())).sum())
    # Added in the order of ranks, so that every worker gets the same bits.
    return sum(exchange.gather_all(own))
