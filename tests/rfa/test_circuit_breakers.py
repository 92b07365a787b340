"""Circuit breakers against the published loss, written out token by token."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rfa.batch import UnlearnBatch, collate
from rfa.distances import likeness
from rfa.methods import METHODS
from rfa.objective import ResidualAlignment
from rfa.settings import Objective, Weights
from tests.rfa.conftest import tiny_rows

Build = Callable[..., ResidualAlignment]
METHOD = METHODS["circuit_breakers"]
BLOCKS = (1, 2)  # those that `build` adapts


@pytest.fixture
def alignment(build: Build) -> ResidualAlignment:
    """Adapters so strong that some features point away from the base model's."""
    built = build(Objective(**METHOD.settings, weights=METHOD.weights), warm=True)
    for name, parameter in built.model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 5
    return built


def block_outputs(alignment: ResidualAlignment, batch: UnlearnBatch) -> list[Tensor]:
    """Each block's outputs [B, T, D], of two whole forward passes: adapted, then base."""
    seen: list[Tensor] = []
    handles = [
        alignment.runner.blocks[index].register_forward_hook(
            lambda _module, _args, output: seen.append(output)
        )
        for index in BLOCKS
    ]
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_BT.long()}
    with torch.no_grad():
        alignment.model(**inputs)
        with alignment.model.disable_adapter():
            alignment.model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def length(vector: list[float]) -> float:
    return math.sqrt(sum(value * value for value in vector))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def by_hand(alignment: ResidualAlignment, batch: UnlearnBatch) -> tuple[float, float, float]:
    """The retain and the forget term, each the mean over blocks and tokens, and the lowest cosine."""
    seen = block_outputs(alignment, batch)
    kept: list[float] = []
    like: list[float] = []
    cosines: list[float] = []
    for adapted_BTD, base_BTD in zip(seen[:2], seen[2:], strict=True):
        moved: list[float] = []
        squares: list[float] = []
        for row, is_forget in enumerate(batch.forget_B.tolist()):
            for token in range(1, int(batch.attention_BT[row].sum())):
                now, before = adapted_BTD[row, token].tolist(), base_BTD[row, token].tolist()
                if not is_forget:
                    moved.append(length([a - b for a, b in zip(now, before, strict=True)]))
                    squares.append(length(before) ** 2)
                    continue
                product = sum(a * b for a, b in zip(now, before, strict=True))
                cosines.append(product / length(now) / length(before))
                like.append(max(cosines[-1], 0.0))
        # The targets were fitted on these very retain rows.
        kept.append(mean(moved) / math.sqrt(mean(squares)))
    return mean(kept), mean(like), min(cosines)


def test_it_is_the_published_loss(alignment: ResidualAlignment, batch: UnlearnBatch) -> None:
    """But for the retain term's unit, and the blocks of the forget term, which are all adapted ones."""
    retain, forget, lowest = by_hand(alignment, batch)
    assert lowest < -0.01, "a cosine below 0 counts as 0"
    for progress in (1 / 150, 0.5, 1.0):
        alignment.progress = progress
        loss = alignment(batch)
        assert float(loss.retain.detach()) == pytest.approx(retain, rel=1e-4)
        assert float(loss.forget.detach()) == pytest.approx(forget, rel=1e-4)
        expected = progress / 2 * retain + (1 - progress / 2) * forget
        assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shares", [[(4, 3)], [(2, 1), (2, 2)], [(4, 0), (0, 3)], [(0, 0), (4, 3)]])
def test_it_does_not_depend_on_how_rows_are_split(
    alignment: ResidualAlignment, shares: list[tuple[int, int]]
) -> None:
    retain, forget = tiny_rows(4, seed=1), tiny_rows(3, seed=2)
    whole = collate(retain, forget, 0)
    counts = whole.counts("all")
    alignment.progress = 0.5
    alignment(whole, counts).total.backward()
    expected = {name: own.grad for name, own in alignment.named_parameters() if own.requires_grad}
    alignment.zero_grad()
    sums = torch.zeros(len(alignment(whole, counts)))
    for retained, forgotten in shares:
        part = collate(retain[:retained], forget[:forgotten], 0)
        retain, forget = retain[retained:], forget[forgotten:]
        loss = alignment(part, counts)
        loss.total.backward()
        sums += torch.stack(loss).detach()
    torch.testing.assert_close(sums, torch.stack(alignment(whole, counts)).detach())
    for name, gradient in expected.items():
        found = alignment.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6)


def test_training_turns_forget_features_away_and_holds_the_others(
    build: Build, batch: UnlearnBatch
) -> None:
    """It starts at a gradient of 0, from which rounding alone leads away."""
    alignment = build(Objective(**METHOD.settings, weights=METHOD.weights))
    trained = [own for own in alignment.parameters() if own.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    steps = 60
    for step in range(steps):
        alignment.progress = (step + 1) / steps
        optimizer.zero_grad()
        alignment(batch).total.backward()
        optimizer.step()
    after = alignment(batch)
    assert float(after.forget.detach()) < 0.2
    assert float(after.retain.detach()) < 0.3


def test_likeness_by_hand() -> None:
    feature_ND = torch.tensor([[1.0, 1.0], [-1.0, 0.5], [0.0, 2.0]])
    base_ND = torch.tensor([[3.0, 0.0]]).expand(3, -1)
    assert likeness(feature_ND, base_ND).tolist() == pytest.approx([0.5**0.5, 0.0, 0.0])


def test_a_schedule_changes_the_weights_of_features_alone() -> None:
    weights = Weights(retain=4, forget=2, kl=1, task=1, output=1)
    fading = Objective(weights=weights, schedule="crossfade")
    assert fading.weights_at(0.5) == Weights(retain=1, forget=1.5, kl=1, task=1, output=1)
    assert fading.weights_at(1.0) == Weights(retain=2, forget=1, kl=1, task=1, output=1)
    assert Objective(weights=weights).weights_at(0.5) == weights
