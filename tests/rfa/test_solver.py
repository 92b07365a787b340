"""From batches to adapters, on tiny models of three architectures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rfa import exchange
from rfa.adapters import ADAPTER, lora_layers
from rfa.batch import UnlearnBatch, collate
from rfa.blocks import call_order
from rfa.closed_form import InverseMoments, solve
from rfa.moments import ForgetRows, InputMoments
from rfa.objective import ResidualAlignment
from rfa.settings import Objective, SolveSettings
from rfa.solver import OnePassSolver
from tests.rfa.conftest import FAMILIES, tiny_rows

Build = Callable[..., ResidualAlignment]
RETAIN = tiny_rows(12, seed=1)
FORGET = [
    row._replace(fact=(2 + index % 2, 4) if index else (0, 0))
    for index, row in enumerate(tiny_rows(5, seed=2))
]
FACT_WEIGHT = 5.0
UTILITY = [row._replace(utility=True) for row in tiny_rows(8, seed=3)]


def solved(
    alignment: ResidualAlignment, *, mode: str = "blockwise", rows_a_batch: int = 50, **more: Any
) -> OnePassSolver:
    """A solver that has done its work at strength 1, from batches of at most so many rows."""
    one_pass = OnePassSolver(alignment, SolveSettings(mode=mode, fact_weight=FACT_WEIGHT, **more))
    kept = [*RETAIN, *UTILITY]
    for start in range(0, len(kept), rows_a_batch):
        one_pass.collect(collate(kept[start : start + rows_a_batch], [], 0))
    one_pass.reduce()
    forget = [
        collate([], FORGET[start : start + rows_a_batch], 0)
        for start in range(0, len(FORGET), rows_a_batch)
    ]
    one_pass.solve(forget, 1.0)
    return one_pass


def maps(one_pass: OnePassSolver) -> dict[str, Tensor]:
    """What each adapter adds, as a matrix."""
    return {
        name: layer.scaling[ADAPTER]
        * layer.lora_B[ADAPTER].weight.detach()
        @ layer.lora_A[ADAPTER].weight.detach()
        for name, layer in one_pass.layers.items()
    }


def recorded(
    alignment: ResidualAlignment, layer: Any, batch: UnlearnBatch
) -> tuple[Tensor, Tensor]:
    """Inputs and base outputs of a module, as the model stands, [B, T, D] also where it sees [B * T, D]."""
    found: list[tuple[Tensor, Tensor]] = []
    form = *batch.input_ids_BT.shape, -1
    handle = layer.base_layer.register_forward_hook(
        lambda _m, args, out: found.append((args[0].view(form), out.view(form)))
    )
    with torch.no_grad():
        alignment.runner(batch)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("mode", ["one_pass", "blockwise"])
@pytest.mark.parametrize(
    "target", ["retain_mean", "class_mean", "cluster_mean", "balanced_mean", "gaussian"]
)
def test_every_module_is_solved_from_what_it_sees(
    build: Build, kind: str, mode: str, target: str
) -> None:
    alignment = build(Objective(target=target, clusters=3, tokens="answer"), kind=kind)
    one_pass = solved(alignment, mode=mode)
    ours = maps(one_pass)
    kept_batches = {
        name: collate(rows, [], 0) for name, rows in (("retain", RETAIN), ("utility", UTILITY))
    }
    forget = collate([], FORGET, 0)
    # Brute force: all adapters off, then on one by one as a forward calls them (blockwise) or never (one pass).
    for layer in one_pass.layers.values():
        layer.scaling[ADAPTER], layer.wanted = 0.0, layer.scaling[ADAPTER]
    sums = {}
    for name, layer in one_pass.layers.items():
        for kind_of_set, batch in kept_batches.items():
            sums[name, kind_of_set] = InputMoments.empty(name, layer.in_features, 10**6)
            sums[name, kind_of_set].add(
                recorded(alignment, layer, batch)[0][batch.retain_tokens_BT()]
            )
    assert alignment.targets is not None
    tokens_BT = forget.forget_tokens_BT("answer")
    row_N, token_N = tokens_BT.nonzero().T
    carries_N = [
        FORGET[row].fact[0] <= token + 1 < FORGET[row].fact[1]
        for row, token in zip(row_N, token_N, strict=True)
    ]
    weight_N = torch.where(torch.tensor(carries_N), FACT_WEIGHT, 1.0)
    assert 3 <= sum(carries_N) < len(carries_N)
    modules = {name: layer.base_layer for name, layer in one_pass.layers.items()}
    for name in call_order(modules, lambda: alignment.runner(forget)):
        layer = one_pass.layers[name]
        input_BTD, output_BTO = recorded(alignment, layer, forget)
        feature_NO = output_BTO[tokens_BT]
        target_NO = alignment.targets(name, feature_NO, forget.row_B[row_N], forget.label_B[row_N])
        rows = ForgetRows.of(input_BTD[tokens_BT], target_NO - feature_NO, weight_N)
        kept = InverseMoments([(1.0, sums[name, "retain"]), (1.0, sums[name, "utility"])], 1e-3)
        expected = solve(rows, kept, rank=2, strength=1.0)
        torch.testing.assert_close(
            ours[name].double(), expected.b_OK @ expected.a_KD, rtol=1e-2, atol=1e-4
        )
        if mode == "blockwise":
            layer.scaling[ADAPTER] = layer.wanted
    assert max(float(value.abs().max()) for value in ours.values()) > 1e-2


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("mode", ["one_pass", "blockwise"])
def test_the_split_into_batches_changes_nothing(build: Build, mode: str, kind: str) -> None:
    whole, parts = (
        maps(solved(build(kind=kind), mode=mode, rows_a_batch=rows)) for rows in (50, 3)
    )
    for name, expected in whole.items():
        torch.testing.assert_close(
            parts[name], expected, rtol=1e-3, atol=1e-4
        )  # float32 sums in another order


@pytest.mark.parametrize("mode", ["one_pass", "blockwise"])
def test_solving_again_begins_from_the_base_model(build: Build, mode: str) -> None:
    one_pass = solved(build(), mode=mode)
    first = maps(one_pass)
    one_pass.solve([collate([], FORGET, 0)], 7.0)
    stronger = maps(one_pass)
    one_pass.solve([collate([], FORGET, 0)], 1.0)
    for name, again in maps(one_pass).items():
        torch.testing.assert_close(again, first[name])
        assert not torch.allclose(stronger[name], first[name], rtol=1e-2)


@pytest.mark.parametrize("rows_a_batch", [50, 3])
@pytest.mark.parametrize("mode", ["one_pass", "blockwise"])
def test_dropout_is_for_gradient_steps_alone(build: Build, mode: str, rows_a_batch: int) -> None:
    expected = maps(solved(build(), mode=mode, rows_a_batch=rows_a_batch))
    alignment = build(dropout=0.5)
    found = maps(solved(alignment, mode=mode, rows_a_batch=rows_a_batch))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    # A solve that also tells what the model then predicts runs the whole model.
    in_passing = [solved(build(dropout=rate), mode=mode) for rate in (0.0, 0.5)]
    for one_pass in in_passing:
        one_pass.solve([collate([], FORGET, 0)], 2.0, with_logits=True)
    without, with_dropout = map(maps, in_passing)
    for name, value in without.items():
        torch.testing.assert_close(with_dropout[name], value, rtol=1e-3, atol=1e-4)
    dropouts = [layer.lora_dropout for _, layer in lora_layers(alignment.model)]
    assert all(dropout.training for dropout in dropouts), "steps after it have theirs"


def test_a_solve_in_passing_tells_what_the_solved_model_predicts(build: Build) -> None:
    alignment, batch = build(), collate([], FORGET, 0)
    one_pass = solved(alignment)
    told = one_pass.solve([batch], 2.0, with_logits=True)
    again = alignment.runner(batch, logits_at_BT=batch.answer_BT).logits_NV
    assert told is not None
    assert again is not None
    torch.testing.assert_close(told[0], again)
    assert one_pass.solve([batch, batch], 2.0, with_logits=True) is None


def test_forget_features_come_nearer_to_the_target_and_retain_features_stay(build: Build) -> None:
    alignment = build(Objective(target="retain_mean"))
    one_pass = OnePassSolver(alignment, SolveSettings(mode="blockwise"))
    one_pass.collect(collate([*RETAIN, *UTILITY], [], 0))
    one_pass.reduce()
    batch = collate(RETAIN, FORGET, 0)
    left, moved = [], []
    for strength in (1e-6, 0.1, 10.0):
        one_pass.solve([collate([], FORGET, 0)], strength)
        loss = alignment(batch)
        left.append(float(loss.forget.detach()))
        moved.append(float(loss.retain.detach()))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.9 * left[0]
    assert moved == sorted(moved)
    assert moved[0] < 1e-6


def test_columns_that_no_token_needs_can_still_learn(build: Build) -> None:
    alignment = build(Objective(tokens="answer"))
    one_pass = OnePassSolver(alignment, SolveSettings(mode="blockwise"))
    one_pass.collect(collate(RETAIN, [], 0))
    one_pass.reduce()
    # One row with one answer token: one direction, for adapters of rank 2.
    one_pass.solve(
        [collate([], [FORGET[0]._replace(answer_start=len(FORGET[0].input_ids) - 1)], 0)], 1.0
    )
    for layer in one_pass.layers.values():
        used_K = layer.lora_B[ADAPTER].weight.abs().sum(0) > 0
        assert used_K.tolist() == [True, False]
        assert bool((layer.lora_A[ADAPTER].weight.abs().sum(1) > 0).all())


def test_wide_modules_take_the_low_memory_form(build: Build) -> None:
    one_pass = OnePassSolver(
        build(), SolveSettings(mode="blockwise", exact_width=40, sketch_columns=20)
    )
    one_pass.collect(collate(RETAIN, [], 0))
    shapes = {
        name.rsplit(".", 1)[-1]: tuple(own.sum_DL.shape)
        for name, own in one_pass.sums["retain"].items()
    }
    assert shapes == {"o_proj": (32, 32), "down_proj": (48, 20)}


def test_rows_forgotten_before_are_held_by_a_mean_of_their_own_and_are_no_target(
    build: Build,
) -> None:
    earlier = [row._replace(earlier=True) for row in tiny_rows(2, seed=4)]
    kept = collate([*RETAIN, *earlier], [], 0)
    assert kept.retain_B.tolist() == [True] * len(RETAIN) + [False] * 2
    one_pass = OnePassSolver(build(Objective(target="retain_mean")), SolveSettings())
    one_pass.collect(kept)
    assert one_pass.sums["utility"] == {}, "a set without rows takes no memory"
    without = OnePassSolver(build(Objective(target="retain_mean")), SolveSettings())
    without.collect(collate(RETAIN, [], 0))
    for name, sums in one_pass.features.items():
        assert sums.count == without.features[name].count > 0
    expected: dict[str, InverseMoments] = {}
    for name, sums in one_pass.sums["earlier"].items():
        weighted = [(1.0, one_pass.sums["retain"][name]), (1.0, sums)]
        expected[name] = InverseMoments(weighted, 1e-3)
    energy: list[float] = []
    for solver in (one_pass, without):
        solver.reduce()
        solver.solve([collate([], FORGET, 0)], 1.0)
        batch = collate(earlier, [], 0)
        total = 0.0
        for name, layer in solver.layers.items():
            moved_BTO = recorded(solver.alignment, layer, batch)[0] @ maps(solver)[name].T
            total += float(moved_BTO[batch.retain_tokens_BT()].square().sum())
        energy.append(total)
    for name, inverse in expected.items():
        input_ND = torch.ones(1, one_pass.layers[name].in_features)
        torch.testing.assert_close(one_pass.inverses[name](input_ND), inverse(input_ND))
    assert energy[0] < 0.5 * energy[1], "they move less"


def test_a_worker_reduces_also_the_sets_of_which_others_alone_have_rows(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_pass = OnePassSolver(build(), SolveSettings())
    one_pass.collect(collate(RETAIN, [], 0))
    added: list[tuple[str, float]] = []

    def gather_all(value: Any) -> list[Any]:
        return [value, ["utility", "earlier"]] if isinstance(value, list) else [value]

    monkeypatch.setattr(exchange, "gather_all", gather_all)
    monkeypatch.setattr(
        exchange, "sum_on", lambda _owner, sums: added.append((sums.name, sums.count))
    )
    one_pass.reduce()
    number = len(one_pass.layers)
    assert [name for name, _ in added] == [name for name in one_pass.layers for _ in range(3)]
    assert sum(count > 0 for _, count in added) == number
