"""DPO with refusals, from rows to the loss, against the model's own log-probabilities."""

import math
from collections.abc import Callable

import pytest
import torch

from rfa.batch import Row, UnlearnBatch, collate, refusals_of
from rfa.objective import ResidualAlignment
from rfa.settings import Objective, Weights
from tests.rfa.conftest import tiny_rows

Build = Callable[..., ResidualAlignment]
DPO = Objective(output="dpo", output_parameters={"beta": 0.5}, weights=Weights(0, 0, 0, 0, 1))


def forget_rows() -> list[Row]:
    """Three rows, each with the refusal of another length in place of its answer."""
    rows: list[Row] = []
    for number, row in enumerate(tiny_rows(3, seed=2)):
        refused = [*row.input_ids[: row.answer_start], *range(40, 42 + number)]
        rows.append(row._replace(refusal=(refused, row.answer_start), fact=(2, 3)))
    return rows


def batch_of(retain: list[Row], forget: list[Row], objective: Objective = DPO) -> UnlearnBatch:
    return collate(retain, forget, 0, refusals=refusals_of(forget, objective))


def log_ratio(alignment: ResidualAlignment, ids: list[int], start: int) -> float:
    """The sum over an answer's tokens of log p - log p_base."""
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        adapted_TV = alignment.model(input_ids).logits[0].log_softmax(-1)
        with alignment.model.disable_adapter():
            base_TV = alignment.model(input_ids).logits[0].log_softmax(-1)
    places = range(start - 1, len(ids) - 1)
    return sum(float(adapted_TV[t, ids[t + 1]] - base_TV[t, ids[t + 1]]) for t in places)


def test_it_prefers_each_refusal_to_its_own_answer(build: Build) -> None:
    alignment = build(DPO, warm=True)
    expected: list[float] = []
    for row in forget_rows():
        assert row.refusal is not None
        ids, start = row.refusal
        lost = log_ratio(alignment, list(row.input_ids), row.answer_start)
        won = log_ratio(alignment, list(ids), start)
        expected.append(2 / 0.5 * math.log(1 + math.exp(-0.5 * (won - lost))))
    assert max(expected) - min(expected) > 0.1, "the rows differ"
    found = alignment(batch_of(tiny_rows(4, seed=1), forget_rows()))
    assert float(found.output.detach()) == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert float(found.total.detach()) == float(found.output.detach())


@pytest.mark.parametrize("shares", [[(2, 1), (2, 2)], [(4, 0), (0, 3)], [(0, 0), (4, 3)]])
def test_it_does_not_depend_on_how_rows_are_split(
    build: Build, shares: list[tuple[int, int]]
) -> None:
    everything = DPO._replace(weights=Weights(1, 1, 0.5, 0.5, 1))
    alignment = build(everything, warm=True)
    retain, forget = tiny_rows(4, seed=1), forget_rows()
    whole = batch_of(retain, forget)
    counts = whole.counts("all")
    together = torch.stack(alignment(whole, counts)).detach()
    apart = torch.zeros_like(together)
    for retained, forgotten in shares:
        part = batch_of(retain[:retained], forget[:forgotten])
        retain, forget = retain[retained:], forget[forgotten:]
        apart += torch.stack(alignment(part, counts)).detach()
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-6)


def test_refusals_count_in_no_other_term(build: Build) -> None:
    retain, forget = tiny_rows(4, seed=1), forget_rows()
    with_refusals, without = batch_of(retain, forget), collate(retain, forget, 0)
    assert len(with_refusals.forget_B) == len(without.forget_B) + 3
    assert with_refusals.counts("answer") == without.counts("answer")
    assert with_refusals.counts("all") == without.counts("all")
    alignment = build(Objective(weights=Weights(1, 1, 0.5, 0.5, 0)), warm=True)
    found, expected = alignment(with_refusals), alignment(without)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_other_objectives_read_no_refusals() -> None:
    assert len(refusals_of(forget_rows(), DPO)) == 3
    assert refusals_of(forget_rows(), DPO._replace(output="npo", output_parameters={})) == []
    assert refusals_of(forget_rows(), DPO._replace(weights=Weights(output=0))) == []
    assert [row.fact for row in refusals_of(forget_rows(), DPO)] == [(0, 0)] * 3
