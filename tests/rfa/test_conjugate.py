"""Conjugate gradients over low-rank updates against a dense solve."""

import pytest
import torch
from torch import Tensor

from rfa.closed_form import InverseMoments, LowRankUpdate
from rfa.conjugate import ModuleTokens, Shifts, conjugate_gradients
from rfa.moments import InputMoments

WIDTH, OUTPUTS = 6, 5
NAMES = ("lower", "upper")


def inverse(name: str, seed: int) -> InverseMoments:
    moments = InputMoments.empty(name, WIDTH, WIDTH)
    moments.add(torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(seed)))
    return InverseMoments([(1.0, moments)], 1e-3)


class Problem:
    """Two modules whose outputs at the tokens have a quadratic loss together."""

    def __init__(self, num_tokens: int) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        self.input_ND = {
            name: torch.randn(num_tokens, WIDTH, generator=generator).double() for name in NAMES
        }
        size = len(NAMES) * num_tokens * OUTPUTS
        root_SS = torch.randn(size, size, generator=generator).double()
        self.matrix_SS = root_SS @ root_SS.T / size
        self.gradient = {
            name: torch.randn(num_tokens, OUTPUTS, generator=generator).double() for name in NAMES
        }
        self.tokens = {
            name: ModuleTokens([input_ND[:2], input_ND[2:]], inverse(name, seed), caution=3.0)
            for seed, (name, input_ND) in enumerate(self.input_ND.items())
        }
        self.asked: list[float] = []

    def joined(self, shifts: Shifts) -> Shifts:
        return {
            name: self.tokens[name].joined([shift[:2], shift[2:]]) for name, shift in shifts.items()
        }

    def curved(self, updates: dict[str, LowRankUpdate], length: float) -> Shifts:
        """What the loss's matrix makes of the updates' shifts at the tokens."""
        self.asked.append(length)
        moved = [
            self.input_ND[name] @ (updates[name].b_OK @ updates[name].a_KD).T for name in NAMES
        ]
        image_S = self.matrix_SS @ torch.cat([shift_NO.flatten() for shift_NO in moved])
        parts = image_S.split(moved[0].numel())
        image = {
            name: part.view_as(shift_NO)
            for name, part, shift_NO in zip(NAMES, parts, moved, strict=True)
        }
        return self.joined(image)

    def solve(self, rank: int, steps: int) -> dict[str, Tensor]:
        """Each module's update as a matrix [O, D]."""
        ranks = dict.fromkeys(NAMES, rank)
        found = conjugate_gradients(
            self.tokens, self.joined(self.gradient), self.curved, ranks, steps, 0.1
        )
        updates = {
            name: self.tokens[name].span.cut(found[name].double(), WIDTH)[1] for name in NAMES
        }
        return {name: update.b_OK @ update.a_KD for name, update in updates.items()}

    def loss(self, changes: dict[str, Tensor]) -> float:
        shifts = [(self.input_ND[name] @ changes[name].T).flatten() for name in NAMES]
        shift_S = torch.cat(shifts)
        slope_S = torch.cat([self.gradient[name].flatten() for name in NAMES])
        return float(shift_S @ self.matrix_SS @ shift_S / 2 - slope_S @ shift_S)


# More tokens than features, too, which are rotated into as many rows as features.
@pytest.mark.parametrize("num_tokens", [4, 9])
def test_enough_steps_of_full_rank_find_the_lowest_loss(num_tokens: int) -> None:
    problem = Problem(num_tokens)
    found = problem.solve(rank=OUTPUTS, steps=200)
    # Dense: the loss in the updates' entries, whose matrix is singular where no token lies.
    blocks = [
        torch.kron(problem.input_ND[name], torch.eye(OUTPUTS, dtype=torch.float64))
        for name in NAMES
    ]
    design_SE = torch.block_diag(*blocks)
    slope_S = torch.cat([problem.gradient[name].flatten() for name in NAMES])
    entries_E = torch.linalg.lstsq(
        design_SE.T @ problem.matrix_SS @ design_SE, design_SE.T @ slope_S, driver="gelsd"
    ).solution
    parts = entries_E.split(WIDTH * OUTPUTS)
    lowest = {name: part.view(WIDTH, OUTPUTS).T for name, part in zip(NAMES, parts, strict=True)}
    assert problem.loss(found) == pytest.approx(problem.loss(lowest), rel=1e-3)


def test_each_step_goes_lower_also_where_directions_are_cut_to_a_rank() -> None:
    losses = [Problem(9).loss(Problem(9).solve(rank=1, steps=steps)) for steps in range(8)]
    assert losses[0] == 0.0
    assert losses == sorted(losses, reverse=True)
    problem = Problem(9)
    problem.solve(rank=1, steps=3)
    assert len(problem.asked) == 3 and min(problem.asked) > 0


def test_nothing_to_go_down_is_no_step() -> None:
    problem = Problem(4)
    problem.gradient = {name: torch.zeros(4, OUTPUTS).double() for name in NAMES}
    found = problem.solve(rank=2, steps=3)
    assert problem.asked == []
    assert not any(bool(change_OD.any()) for change_OD in found.values())


def test_where_nothing_curves_it_goes_the_way_down_as_far_as_was_tried() -> None:
    problem = Problem(4)
    problem.matrix_SS = torch.zeros_like(problem.matrix_SS)
    found = problem.solve(rank=OUTPUTS, steps=3)
    assert len(problem.asked) == 1
    assert problem.loss(found) == pytest.approx(-0.1, rel=1e-3)
