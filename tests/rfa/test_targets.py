"""The targets, by hand."""

import pytest
import torch

from rfa.settings import Objective
from rfa.targets import FeatureSums, Targets, fit_target


def sums_of(rows: list[tuple[list[list[float]], int]]) -> FeatureSums:
    total = FeatureSums()
    for row, (tokens, label) in enumerate(rows):
        total.add(torch.tensor(tokens), row, label, sample_tokens=8)
    return total


# Two classes: three tokens around (0, 0) and (0, 3), one at (6, 0).
ROWS = [([[0.0, 0.0], [0.0, 3.0]], 7), ([[0.0, 0.0]], 7), ([[6.0, 0.0]], 9)]


def target(kind: str, feature: list[list[float]], label: int = -1) -> list[list[float]]:
    place = fit_target(Objective(target=kind, clusters=3), sums_of(ROWS), seed=0)
    tokens = len(feature)
    zeros = torch.zeros(tokens, dtype=torch.long)
    return Targets(kind, {"place": place}, seed=0)(
        "place", torch.tensor(feature), zeros, zeros + label
    ).tolist()


def test_energy_is_the_mean_squared_norm() -> None:
    assert fit_target(
        Objective(target="retain_mean", clusters=1), sums_of(ROWS), seed=0
    ).energy == pytest.approx((9 + 36) / 4)


def test_retain_mean_is_the_mean_over_tokens() -> None:
    assert target("retain_mean", [[5.0, 5.0]]) == [[1.5, 0.75]]


def test_balanced_mean_gives_each_class_the_same_weight() -> None:
    assert target("balanced_mean", [[5.0, 5.0]]) == [[3.0, 0.5]]


def test_class_mean_is_the_nearest_other_class() -> None:
    assert target("class_mean", [[1.0, 0.0]]) == [[0.0, 1.0]]
    assert target("class_mean", [[1.0, 0.0]], label=7) == [[6.0, 0.0]]  # its own class is left out


def test_cluster_mean_is_the_nearest_centroid() -> None:
    found = target("cluster_mean", [[5.0, 1.0], [0.0, 2.0]])
    assert found == [pytest.approx([6.0, 0.0]), pytest.approx([0.0, 3.0])]


def test_gaussian_draws_have_the_retain_sets_mean_and_spread() -> None:
    place = fit_target(Objective(target="gaussian", clusters=1), sums_of(ROWS), seed=0)
    tokens = 20_000
    zeros = torch.zeros(tokens, dtype=torch.long)
    draws = Targets("gaussian", {"p": place}, seed=0)("p", torch.zeros(tokens, 2), zeros, zeros)
    assert draws.mean(0).tolist() == pytest.approx([1.5, 0.75], abs=0.08)
    assert draws.std(0).tolist() == pytest.approx(
        [(9 - 2.25) ** 0.5, (9 / 4 - 0.75**2) ** 0.5], abs=0.08
    )


def test_gaussian_draws_depend_on_the_row_alone() -> None:
    targets = Targets(
        "gaussian",
        {"p": fit_target(Objective(target="gaussian", clusters=1), sums_of(ROWS), seed=0)},
        seed=0,
    )
    both = targets("p", torch.zeros(4, 2), torch.tensor([5, 5, 6, 6]), torch.zeros(4))
    alone = targets("p", torch.zeros(2, 2), torch.tensor([6, 6]), torch.zeros(2))
    assert both[2:].tolist() == alone.tolist()
    assert both[:2].tolist() != alone.tolist()


def test_steering_is_one_random_direction_of_a_given_length() -> None:
    sums = sums_of(ROWS)
    vectors = []
    for seed in (0, 0, 1):
        fitted = fit_target(Objective(target="steering", steering=5.0), sums, seed=seed)
        vectors.append(fitted.centre_KD)
        assert float(fitted.centre_KD.norm()) == pytest.approx(5.0)
        assert float(fitted.centre_KD.min()) >= 0
    assert vectors[0].tolist() == vectors[1].tolist() != vectors[2].tolist()


def test_features_that_are_rerouted_are_compared_with_themselves() -> None:
    assert target("reroute", [[5.0, 1.0], [0.0, -2.0]]) == [[5.0, 1.0], [0.0, -2.0]]


def test_sums_of_shards_add_up() -> None:
    whole, first, second = sums_of(ROWS), FeatureSums(), FeatureSums()
    for row, (tokens, label) in enumerate(ROWS):
        (first if row != 1 else second).add(torch.tensor(tokens), row, label, sample_tokens=8)
    second.merge(first)
    for kind in ("retain_mean", "balanced_mean", "gaussian", "cluster_mean", "class_mean"):
        ours, theirs = (
            fit_target(Objective(target=kind, clusters=2), sums, seed=0) for sums in (second, whole)
        )
        assert ours.energy == pytest.approx(theirs.energy)
        assert ours.centre_KD.tolist() == theirs.centre_KD.tolist()


def test_clusters_see_every_part_of_a_row_whichever_worker_adds_it_first() -> None:
    # Two answers of one conversation, at 0 and at 6: neither takes the other's place.
    centres: list[list[list[float]]] = []
    for order in ((0, 1), (1, 0)):
        total = FeatureSums()
        for part in order:
            worker = FeatureSums()
            worker.add(torch.tensor([[6.0 * part, 0.0]]), 4, -1, sample_tokens=8, part=part)
            total.merge(worker)
        fitted = fit_target(Objective(target="cluster_mean", clusters=2), total, seed=0)
        centres.append(fitted.centre_KD.tolist())
    assert centres[0] == centres[1]
    assert sorted(centres[0]) == [[0.0, 0.0], [6.0, 0.0]]


def test_targets_by_class_need_labels() -> None:
    unlabelled = sums_of([([[1.0, 2.0]], -1)])
    with pytest.raises(ValueError, match="needs a label column"):
        fit_target(Objective(target="class_mean", clusters=1), unlabelled, seed=0)
    with pytest.raises(ValueError, match="at least two labels"):
        fit_target(Objective(target="class_mean", clusters=1), sums_of([([[1.0, 2.0]], 4)]), seed=0)
