"""The closed form against brute force: normal equations, singular value decompositions, gradient descent."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfa.closed_form import InverseMoments, added, solve
from rfa.moments import ForgetRows, InputMoments

INPUTS, OUTPUTS = 12, 8  # features of a module


class Problem:
    """Random inputs of both sets and shifts of the forget set, with the objective written out."""

    def __init__(self, seed: int = 0, forget: int = 9, retain: int = 60) -> None:
        generator = torch.Generator().manual_seed(seed)
        mix_DD = torch.randn(INPUTS, INPUTS, generator=generator)
        self.forget_ND = torch.randn(forget, INPUTS, generator=generator) @ mix_DD
        self.shift_NO = torch.randn(forget, OUTPUTS, generator=generator)
        self.weight_N = torch.rand(forget, generator=generator) * 5 + 0.5
        self.retain_ND = torch.randn(retain, INPUTS, generator=generator) @ mix_DD
        self.ridge = 1e-3

    def sums(self, columns: int = INPUTS) -> InputMoments:
        sums = InputMoments.empty("module", INPUTS, columns)
        sums.add(self.retain_ND)
        return sums

    def kept(self) -> InverseMoments:
        return InverseMoments([(1.0, self.sums())], self.ridge)

    def rows(self) -> ForgetRows:
        return ForgetRows.of(self.forget_ND, self.shift_NO, self.weight_N)

    def kept_DD(self) -> Tensor:
        mean_DD = (self.retain_ND.T @ self.retain_ND).double() / len(self.retain_ND)
        return mean_DD + self.ridge * mean_DD.diagonal().mean() * torch.eye(INPUTS)

    def objective(self, map_OD: Tensor, strength: float) -> Tensor:
        left_NO = self.forget_ND.double() @ map_OD.T - self.shift_NO.double()
        weight_N = self.weight_N.double() / self.weight_N.sum()
        return (
            strength * (weight_N @ left_NO.square()).sum()
            + (map_OD @ self.kept_DD() @ map_OD.T).trace()
        )

    def brute_force(self, strength: float) -> tuple[Tensor, Tensor]:
        """The full-rank solution by the normal equations, and their matrix S."""
        scaled_ND = (
            strength
            * self.forget_ND.double()
            * (self.weight_N.double() / self.weight_N.sum())[:, None]
        )
        whole_DD = self.kept_DD() + scaled_ND.T @ self.forget_ND.double()
        return self.shift_NO.double().T @ scaled_ND @ whole_DD.inverse(), whole_DD

    def solved(self, rank: int, strength: float) -> Tensor:
        found = solve(self.rows(), self.kept(), rank=rank, strength=strength, scaling=2.0)
        assert len(found.a_KD) <= rank
        return 2.0 * found.b_OK @ found.a_KD


@given(seed=st.integers(0, 99), forget=st.integers(1, 40), strength=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_at_full_rank_it_is_the_least_squares_solution(
    seed: int, forget: int, strength: float
) -> None:
    problem = Problem(seed, forget)
    torch.testing.assert_close(
        problem.solved(OUTPUTS, strength), problem.brute_force(strength)[0], rtol=1e-4, atol=1e-6
    )


@given(seed=st.integers(0, 99), rank=st.integers(1, OUTPUTS))
@settings(max_examples=20, deadline=None)
def test_at_low_rank_it_is_reduced_rank_regression(seed: int, rank: int) -> None:
    problem = Problem(seed)
    full_OD, whole_DD = problem.brute_force(1.0)
    left_OO = torch.linalg.svd(full_OD @ torch.linalg.cholesky(whole_DD))[0][:, :rank]
    torch.testing.assert_close(
        problem.solved(rank, 1.0), left_OO @ left_OO.T @ full_OD, rtol=1e-4, atol=1e-6
    )


def test_no_long_gradient_run_finds_a_better_low_rank_answer() -> None:
    problem = Problem()
    ours = float(problem.objective(problem.solved(2, 1.0), 1.0))
    generator = torch.Generator().manual_seed(1)
    b_OK = (
        torch.randn(OUTPUTS, 2, generator=generator, dtype=torch.float64).mul_(0.1).requires_grad_()
    )
    a_KD = (
        torch.randn(2, INPUTS, generator=generator, dtype=torch.float64).mul_(0.1).requires_grad_()
    )
    optimizer = torch.optim.LBFGS(
        [b_OK, a_KD], max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.objective(b_OK @ a_KD, 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]  # LBFGS takes tensors
    theirs = float(problem.objective(b_OK @ a_KD, 1.0).detach())
    assert ours <= theirs + 1e-9
    assert ours == pytest.approx(theirs, rel=1e-3), (
        "the gradient run came close, so the comparison means something"
    )


@given(cuts=st.lists(st.integers(0, 60), max_size=4), order=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_shards_in_any_split_and_order_give_the_same_statistics(
    cuts: list[int], order: object
) -> None:
    problem = Problem()
    for columns in (INPUTS, 5):
        shards = []
        for part_ND in torch.tensor_split(problem.retain_ND, sorted(cuts)):
            shards.append(InputMoments.empty("module", INPUTS, columns))
            shards[-1].add(part_ND)
        order.shuffle(shards)  # type: ignore[attr-defined]
        total = InputMoments.empty("module", INPUTS, columns)
        for shard in shards:
            total.merge(shard)
        whole = problem.sums(columns)
        assert (total.count, total.trace) == (60, pytest.approx(whole.trace))
        torch.testing.assert_close(total.sum_DL, whole.sum_DL, rtol=1e-4, atol=1e-3)


@given(cut=st.integers(1, 59), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_the_statistics_of_all_less_those_of_a_part_are_those_of_the_rest(
    cut: int, seed: int
) -> None:
    problem = Problem(seed)
    part_ND, rest_ND = problem.retain_ND[:cut], problem.retain_ND[cut:]
    for columns in (INPUTS, 5):
        found = InputMoments.empty("module", INPUTS, columns)
        found.add(part_ND)
        found.negate_()
        found.merge(problem.sums(columns))
        rest = InputMoments.empty("module", INPUTS, columns)
        rest.add(rest_ND)
        assert (found.count, found.trace) == (len(rest_ND), pytest.approx(rest.trace, rel=1e-4))
        largest = float(problem.sums(columns).sum_DL.abs().max())
        torch.testing.assert_close(found.sum_DL, rest.sum_DL, rtol=0, atol=1e-5 * largest)


def test_forget_rows_in_any_split_give_the_same_adapter() -> None:
    problem = Problem(
        forget=40
    )  # more rows than input features: they are replaced by as many rows as features
    parts = [
        ForgetRows.of(problem.forget_ND[s], problem.shift_NO[s], problem.weight_N[s])
        for s in (slice(25, 40), slice(0, 0), slice(0, 25))
    ]
    merged = parts[0].merged(parts[1]).merged(parts[2])
    assert (merged.count, len(merged.input_ND)) == (
        pytest.approx(float(problem.weight_N.sum())),
        INPUTS,
    )
    found = solve(merged, problem.kept(), rank=3, strength=1.0)
    torch.testing.assert_close(
        2 * found.b_OK @ found.a_KD, 2 * problem.solved(3, 1.0), rtol=1e-6, atol=1e-9
    )


@given(seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_more_strength_moves_retain_features_more_and_forget_features_nearer(seed: int) -> None:
    problem = Problem(seed)
    maps = [problem.solved(OUTPUTS, strength) for strength in (0.01, 0.1, 1.0, 10.0)]
    moved = [float((problem.retain_ND.double() @ m.T).square().mean()) for m in maps]
    left = [
        float((problem.forget_ND.double() @ m.T - problem.shift_NO).square().mean()) for m in maps
    ]
    assert moved == sorted(moved)
    assert left == sorted(left, reverse=True)


def test_a_kept_set_with_more_weight_moves_less() -> None:
    problem = Problem()
    other = InputMoments.empty("module", INPUTS, INPUTS)
    other.add(torch.randn(30, INPUTS, generator=torch.Generator().manual_seed(5)))
    moved = []
    for weight in (0.1, 1.0, 10.0):
        found = solve(
            problem.rows(),
            InverseMoments([(weight, problem.sums()), (1.0, other)], 1e-3),
            rank=OUTPUTS,
            strength=1.0,
        )
        moved.append(
            float((problem.retain_ND.double() @ found.a_KD.T @ found.b_OK.T).square().mean())
        )
    assert moved == sorted(moved, reverse=True)


def test_kept_sets_are_weighted_means() -> None:
    problem, generator = Problem(), torch.Generator().manual_seed(5)
    other_ND = torch.randn(30, INPUTS, generator=generator)
    other = InputMoments.empty("module", INPUTS, INPUTS)
    other.add(other_ND)
    kept = InverseMoments([(2.0, problem.sums()), (0.5, other)], 1e-2)
    first_DD, second_DD = (
        (own.T @ own).double() / len(own) for own in (problem.retain_ND, other_ND)
    )
    mean_DD = 2.0 * first_DD + 0.5 * second_DD
    mean_DD += 1e-2 * mean_DD.diagonal().mean() * torch.eye(INPUTS)
    torch.testing.assert_close(kept(torch.eye(INPUTS)), mean_DD.inverse(), rtol=1e-4, atol=1e-6)


def test_singular_statistics_are_solved() -> None:
    sums = InputMoments.empty("module", INPUTS, INPUTS)
    sums.add(torch.ones(3, INPUTS))  # rank 1
    rows = ForgetRows.of(torch.ones(5, INPUTS), torch.ones(5, OUTPUTS))
    for ridge in (1e-12, 1e-3):
        found = solve(rows, InverseMoments([(1.0, sums)], ridge), rank=4, strength=1.0)
        assert len(found.a_KD) == 1, "one direction carries everything"
        assert bool(found.a_KD.isfinite().all()) and bool(found.b_OK.isfinite().all())
        # The same input in both sets: the shift is halved between leaving and moving it.
        torch.testing.assert_close(
            torch.ones(INPUTS).double() @ found.a_KD.T @ found.b_OK.T,
            torch.full((OUTPUTS,), 0.5).double(),
            rtol=1e-2,
            atol=0,
        )


def test_directions_that_are_rounding_alone_are_left_out() -> None:
    problem = Problem(forget=40)
    direction_O = torch.randn(OUTPUTS, generator=torch.Generator().manual_seed(3))
    problem.shift_NO = torch.arange(1.0, 41.0)[:, None] * direction_O
    found = solve(problem.rows(), problem.kept(), rank=OUTPUTS, strength=1.0)
    assert len(found.a_KD) == found.b_OK.shape[1] == 1, "all tokens are shifted along one line"


def test_no_forget_tokens_leave_the_module_as_it_is() -> None:
    found = solve(
        ForgetRows.of(torch.empty(0, INPUTS), torch.empty(0, OUTPUTS)),
        Problem().kept(),
        rank=3,
        strength=1.0,
    )
    assert (len(found.a_KD), found.b_OK.shape) == (0, (OUTPUTS, 0))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_features_that_are_not_finite_are_an_error(broken: float) -> None:
    problem = Problem()
    problem.forget_ND[0, 0] = broken
    with pytest.raises(ValueError, match="features are not finite"):
        problem.solved(2, 1.0)
    problem.retain_ND[0, 0] = broken
    with pytest.raises(ValueError, match="features are not finite"):
        problem.kept()


def test_retained_sets_without_tokens_are_an_error() -> None:
    with pytest.raises(ValueError, match="sets have no tokens"):
        InverseMoments([(1.0, InputMoments.empty("module", INPUTS, INPUTS))], 1e-3)


def test_the_low_memory_form_is_exact_for_inputs_of_low_rank() -> None:
    problem = Problem()
    generator = torch.Generator().manual_seed(2)
    problem.retain_ND = torch.randn(60, 3, generator=generator) @ torch.randn(
        3, INPUTS, generator=generator
    )
    exact, sketched = (
        InverseMoments([(1.0, problem.sums(columns))], 0.1)(problem.forget_ND)
        for columns in (INPUTS, 6)
    )
    assert not problem.sums(6).is_exact
    torch.testing.assert_close(sketched, exact, rtol=1e-3, atol=1e-4)


def test_the_low_memory_form_never_takes_a_used_direction_for_free() -> None:
    problem = Problem()
    exact_DD = problem.kept()(torch.eye(INPUTS)).inverse()
    sketched_DD = InverseMoments([(1.0, problem.sums(4))], problem.ridge)(
        torch.eye(INPUTS)
    ).inverse()
    assert float(sketched_DD.trace()) == pytest.approx(float(exact_DD.trace()), rel=1e-3)
    assert float(torch.linalg.eigvalsh(sketched_DD)[0]) > 10 * float(
        torch.linalg.eigvalsh(exact_DD)[0]
    )


@given(seed=st.integers(0, 99), rank=st.integers(1, OUTPUTS))
@settings(max_examples=20, deadline=None)
def test_two_updates_add_up_to_the_nearest_of_the_rank(seed: int, rank: int) -> None:
    problem = Problem(seed)
    inverse = problem.kept()
    first, second = (
        solve(problem.rows(), inverse, rank=3, strength=strength) for strength in (0.1, 10.0)
    )
    second = second._replace(b_OK=second.b_OK.flip(0))  # in other output directions
    both = added(first, second, problem.rows(), inverse, rank=rank)
    assert len(both.a_KD) <= rank
    # Brute force: the truncated singular value decomposition, in the metric of both sets' tokens.
    exact_OD = first.b_OK @ first.a_KD + second.b_OK @ second.a_KD
    root_DD = torch.linalg.cholesky(problem.brute_force(1.0)[1])
    left_OO, values_O, right_OD = torch.linalg.svd(exact_OD @ root_DD, full_matrices=False)
    values_O[rank:] = 0
    expected_OD = left_OO @ values_O.diag() @ right_OD @ root_DD.inverse()
    torch.testing.assert_close(both.b_OK @ both.a_KD, expected_OD, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("columns", [INPUTS, 5])
def test_the_energy_of_a_map_is_what_it_does_to_the_retained_tokens(columns: int) -> None:
    problem = Problem(retain=4)
    inverse = InverseMoments([(1.0, problem.sums(columns))], problem.ridge)
    map_KD = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(1)).double()
    # R is what R^-1 is the inverse of.
    moments_DD = inverse(torch.eye(INPUTS)).inverse()
    expected_KK = map_KD @ moments_DD @ map_KD.T
    torch.testing.assert_close(inverse.energy(map_KD), expected_KK, rtol=1e-6, atol=1e-8)
