"""The rule by which steps end, against the model's own probabilities."""

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from rfa.batch import UnlearnBatch
from rfa.objective import ResidualAlignment
from rfa.settings import Objective, Weights
from rfa.stopping import has_forgotten, unforgotten

Build = Callable[..., ResidualAlignment]
# An untrained model's answers have about a twelfth of their own and ten rivals' probability.
RHO = 0.084


def masc(stop_at: float) -> Objective:
    weights = Weights(retain=0, forget=0, output=1)
    return Objective(
        output="masc", output_parameters={"rho": RHO}, weights=weights, stop_at=stop_at
    )


def shares(alignment: ResidualAlignment, batch: UnlearnBatch) -> list[float]:
    """Of each forget row the share of its answer tokens that have more than rho."""
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_BT.long()}
    with torch.no_grad():
        probability_BTV = alignment.model(**inputs).logits.softmax(-1)
    found: list[float] = []
    for row in batch.forget_B.nonzero().flatten().tolist():
        over: list[bool] = []
        for token in batch.answer_BT[row].nonzero().flatten().tolist():
            others = probability_BTV[row, token].tolist()
            own = others.pop(int(batch.input_ids_BT[row, token + 1]))
            over.append(own / (own + sum(sorted(others)[-10:])) > RHO)
        found.append(sum(over) / len(over))
    return found


def test_a_token_is_not_forgotten_while_it_has_more_than_its_share(
    build: Build, batch: UnlearnBatch
) -> None:
    alignment = build(masc(0.5), warm=True, dropout=0.5)
    expected = shares(alignment.eval(), batch)
    assert 0 < sum(expected) < len(expected) == 3
    assert unforgotten(alignment.train(), batch) == pytest.approx(sum(expected)), (
        "of rows, without dropout"
    )


def test_steps_end_where_the_rows_mean_is_at_most_the_limit(
    build: Build, batch: UnlearnBatch
) -> None:
    alignment = build(masc(0.5), warm=True)
    mean = sum(shares(alignment, batch)) / 3
    for stop_at, expected in ((mean + 1e-6, True), (mean - 1e-6, False)):
        alignment.objective = masc(stop_at)
        assert has_forgotten(alignment, [batch]) == expected
        # Two workers, one of which has no row of the forget set.
        forget = batch.forget_B.nonzero().flatten()
        for own, other in ((forget[:1], forget[1:]), (forget[:0], forget)):
            own_batch, other_batch = (
                batch.rows(torch.cat([rows, torch.tensor([0])])) for rows in (own, other)
            )

            def total(
                sums: Mapping[str, float], elsewhere: UnlearnBatch = other_batch
            ) -> dict[str, float]:
                rows = elsewhere.counts("answer").forget_rows
                share = unforgotten(alignment, elsewhere)
                return {"share": sums["share"] + share, "rows": sums["rows"] + rows}

            assert has_forgotten(alignment, [own_batch], total) == expected


def test_the_other_rows_are_read_only_where_the_first_are_forgotten(
    build: Build, batch: UnlearnBatch
) -> None:
    alignment = build(masc(0.0), warm=True)
    read: list[int] = []

    def batches() -> Iterator[UnlearnBatch]:
        for number in range(3):
            read.append(number)
            yield batch

    assert not has_forgotten(alignment, batches())
    assert read == [0]
    alignment.objective = masc(1.0)
    assert has_forgotten(alignment, batches())
    assert read == [0, 0, 1, 2]
