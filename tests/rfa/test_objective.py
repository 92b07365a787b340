"""The objective against its properties."""

import itertools
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from rfa.adapters import adapters_off
from rfa.batch import Row, TokenCounts, UnlearnBatch, collate
from rfa.distances import distance
from rfa.methods import METHODS
from rfa.objective import LossOutput, ResidualAlignment
from rfa.settings import DistanceKind, Objective, TargetKind, Weights
from tests.rfa.conftest import FAMILIES, tiny_rows

Build = Callable[..., ResidualAlignment]
ALL_TERMS = Weights(1.0, 1.0, 0.5, 0.5, 0.5)
TARGETS = get_args(TargetKind)


def objective(residual: str = "local", **changes: object) -> Objective:
    return Objective(residual=residual, clusters=3)._replace(**changes)


def numbers(loss: LossOutput) -> list[float]:
    return [float(value.detach()) for value in loss]


def gradients(alignment: ResidualAlignment, total: Tensor) -> dict[str, Tensor]:
    alignment.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in alignment.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("residual", ["local", "drift"])
def test_the_residual_is_zero_at_the_start(
    build: Build, batch: UnlearnBatch, residual: str, kind: str
) -> None:
    loss = build(objective(residual, weights=ALL_TERMS), kind=kind)(batch)
    assert float(loss.retain.detach()) == pytest.approx(0, abs=1e-10)
    assert float(loss.kl.detach()) == pytest.approx(0, abs=1e-6)
    assert float(loss.forget.detach()) > 0.1


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_recomputed_activations_give_the_same_gradients(
    build: Build, batch: UnlearnBatch, kind: str
) -> None:
    """OPT's blocks drop features out where their own flag says that they are trained."""
    alignment = build(objective("local"), kind=kind, warm=True)
    expected = gradients(alignment, alignment(batch).total)
    alignment.zero_grad()
    alignment.model.get_base_model().activation_checkpointing_enable()
    alignment.train()
    seen: list[str] = []
    for name, layer in alignment.hooks._layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    found = gradients(alignment, alignment(batch).total)
    assert len(seen) > len(set(seen)), "layers run again in the backward pass"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("distance_name", get_args(DistanceKind))
def test_every_adapter_gets_a_finite_gradient_at_the_start(
    build: Build, batch: UnlearnBatch, distance_name: str
) -> None:
    for residual, target in itertools.product(("local", "drift", "last_drift"), TARGETS):
        alignment = build(objective(residual, target=target, distance=distance_name))
        found = gradients(alignment, alignment(batch).total)
        assert set(found) == {name for name, p in alignment.named_parameters() if p.requires_grad}
        assert all(bool(gradient.isfinite().all()) for gradient in found.values())
        assert any(bool(gradient.abs().sum() > 0) for gradient in found.values())


def test_local_equals_drift_at_the_lowest_adapted_module(build: Build, batch: UnlearnBatch) -> None:
    # One adapted module, the last of its block: what it adds is how far the block's output moves. Only the units
    # (E|h0|^2 of the module, of the block) differ.
    totals = {}
    for residual in ("local", "drift"):
        alignment = build(objective(residual), layers=(2, 2), targets=("down_proj",), warm=True)
        assert alignment.targets is not None
        [name] = alignment.hooks.names
        totals[residual] = float(alignment(batch).retain.detach()) * alignment.targets.energy(name)
    assert totals["local"] > 0
    assert totals["local"] == pytest.approx(totals["drift"], rel=1e-5)


def test_local_and_drift_differ_above_it(build: Build, batch: UnlearnBatch) -> None:
    totals = [
        float(build(objective(r), warm=True)(batch).retain.detach()) for r in ("local", "drift")
    ]
    assert totals[0] != pytest.approx(totals[1], rel=0.01)


def test_rmu_is_the_published_loss(build: Build, batch: UnlearnBatch) -> None:
    """Mean squared errors at one block's output: to a random vector, and to the base model's.

    The objective divides both by the retained features' mean square, and the optimizer's steps do not depend on that.
    """
    method = METHODS["rmu"]
    settings = Objective(**method.settings, weights=method.weights, tokens="answer")
    alignment = build(settings, warm=True)
    model, ids_BT = alignment.model, batch.input_ids_BT
    assert alignment.targets is not None
    [name] = alignment.hooks.names
    assert name.endswith("layers.2"), "the last adapted block alone is read"
    vector_D = alignment.targets.modules[name].centre_KD[0]
    assert float(vector_D.norm()) == pytest.approx(6.5)
    block = alignment.runner.blocks[2]
    seen: list[Tensor] = []
    hook = block.register_forward_hook(lambda _module, _args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=ids_BT, attention_mask=batch.attention_BT.long())
        with model.disable_adapter():
            model(input_ids=ids_BT, attention_mask=batch.attention_BT.long())
    hook.remove()
    adapted_BTD, base_BTD = seen
    forget_BT, retain_BT = batch.forget_tokens_BT("answer"), batch.retain_tokens_BT()
    to_vector_ND = adapted_BTD[forget_BT] - vector_D
    to_base_ND = adapted_BTD[retain_BT] - base_BTD[retain_BT]
    published = float(to_vector_ND.square().mean() + 1200 * to_base_ND.square().mean())
    unit = alignment.targets.energy(name) / len(vector_D)
    assert float(alignment(batch).total.detach()) * unit == pytest.approx(published, rel=1e-5)


@pytest.mark.parametrize("residual", ["local", "drift"])
@pytest.mark.parametrize("target", TARGETS)
def test_padding_changes_nothing(
    build: Build, batch: UnlearnBatch, residual: str, target: str
) -> None:
    alignment = build(objective(residual, target=target, weights=ALL_TERMS), warm=True)
    more = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, 7))
        for name in ("attention_BT", "answer_BT", "fact_BT")
    }
    longer = batch._replace(
        input_ids_BT=torch.nn.functional.pad(batch.input_ids_BT, (0, 7), value=5), **more
    )
    assert numbers(alignment(longer)) == pytest.approx(numbers(alignment(batch)), rel=1e-4)


@pytest.mark.parametrize("residual", ["local", "drift"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_loss_does_not_depend_on_how_rows_are_split(
    build: Build, residual: str, kind: str
) -> None:
    alignment = build(
        objective(residual, target="gaussian", weights=ALL_TERMS), kind=kind, warm=True
    )
    retain, forget = tiny_rows(4, seed=1), tiny_rows(3, seed=2)
    whole = collate(retain, forget, 0)
    counts = whole.counts("all")
    # Three workers: one without forget rows, one without retain rows, one without any.
    parts = [
        collate(retain[:3], [], 0),
        collate(retain[3:], forget[:1], 0),
        collate([], forget[1:], 0),
        collate([], [], 0),
    ]
    expected = gradients(alignment, alignment(whole, counts).total)
    alignment.zero_grad()
    losses = []
    for part in parts:
        loss = alignment(part, counts)
        loss.total.backward()
        losses.append(numbers(loss))
    assert [sum(term) for term in zip(*losses, strict=True)] == pytest.approx(
        numbers(alignment(whole, counts)), rel=1e-4
    )
    for name, parameter in alignment.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_the_frozen_prefix_changes_no_number(build: Build, batch: UnlearnBatch) -> None:
    # Drift by hand: two whole forward passes instead of a shared prefix and two partial ones.
    alignment = build(objective("drift"), kind="gemma", layers=(2, 2), warm=True)
    assert alignment.targets is not None
    blocks, outputs = alignment.runner.blocks, []
    handle = blocks[2].register_forward_hook(lambda _m, _i, output: outputs.append(output))
    alignment.model(batch.input_ids_BT, attention_mask=batch.attention_BT.long())
    with adapters_off(alignment.model):
        alignment.model(batch.input_ids_BT, attention_mask=batch.attention_BT.long())
    handle.remove()
    adapted, base = (o[0] if isinstance(o, tuple) else o for o in outputs)
    chosen = batch.retain_tokens_BT()
    [name] = alignment.hooks.names
    by_hand = (adapted - base)[chosen].square().sum(-1).mean() / alignment.targets.energy(name)
    assert float(alignment(batch).retain.detach()) == pytest.approx(
        float(by_hand.detach()), rel=1e-4
    )


def count_blocks(alignment: ResidualAlignment, batch: UnlearnBatch) -> list[int]:
    """How often each block's attention runs in one forward pass of the objective."""
    calls = [0] * len(alignment.runner.blocks)

    def counter(index: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            calls[index] += 1

        return count

    handles = [
        b.self_attn.register_forward_hook(counter(i)) for i, b in enumerate(alignment.runner.blocks)
    ]
    alignment(batch)
    for handle in handles:
        handle.remove()
    return calls


def test_blocks_run_only_as_often_as_terms_need(build: Build, batch: UnlearnBatch) -> None:
    # Adapters on blocks 1 and 2 of 4.
    assert count_blocks(build(objective("local")), batch) == [1, 1, 1, 0]
    assert count_blocks(build(objective("drift")), batch) == [1, 2, 2, 0]
    assert count_blocks(build(objective("local", weights=Weights(1, 1, 0, 1, 0))), batch) == [
        1,
        1,
        1,
        1,
    ]
    assert count_blocks(build(objective("local", weights=ALL_TERMS)), batch) == [1, 2, 2, 2]


def test_logits_are_computed_at_read_positions_alone(build: Build, batch: UnlearnBatch) -> None:
    alignment = build(objective("local", weights=Weights(1, 1, 0, 1, 0)))
    seen = []
    alignment.runner.model.lm_head.register_forward_hook(
        lambda _m, _i, output: seen.append(output.shape)
    )
    alignment(batch)
    retain_answers = int(batch.answer_BT[~batch.forget_B].sum())
    assert [tuple(shape) for shape in seen] == [(1, retain_answers, 97)]


def test_a_term_of_weight_zero_is_not_computed(build: Build, batch: UnlearnBatch) -> None:
    loss = build(objective("local", weights=Weights(0, 1, 0, 0, 0)), warm=True)(batch)
    assert [float(v.detach()) for v in (loss.retain, loss.kl, loss.task, loss.output)] == [
        0,
        0,
        0,
        0,
    ]
    assert float(loss.total.detach()) == float(loss.forget.detach())


@pytest.mark.parametrize("residual", ["local", "drift"])
def test_terms_of_the_outputs_alone_need_no_targets(
    build: Build, batch: UnlearnBatch, residual: str
) -> None:
    alignment = build(objective(residual, weights=Weights(0, 0, 1, 1, 1)), warm=True)
    expected = float(alignment(batch).total.detach())
    alignment.targets = None
    assert float(alignment(batch).total.detach()) == expected


def test_task_is_the_models_own_cross_entropy(build: Build, batch: UnlearnBatch) -> None:
    alignment = build(objective("local", weights=Weights(1, 1, 0, 1, 0)), warm=True)
    retain = batch.rows(~batch.forget_B)
    labels = retain.input_ids_BT.clone()
    labels[:, 1:][~retain.answer_BT[:, :-1]] = -100
    labels[:, 0] = -100
    expected = alignment.model(
        retain.input_ids_BT, attention_mask=retain.attention_BT.long(), labels=labels
    ).loss
    assert float(alignment(batch).task.detach()) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )


def test_answer_tokens_are_those_that_predict_the_answer() -> None:
    batch = collate([], [Row([11, 12, 13, 14, 15], answer_start=3)], 0)
    assert batch.forget_tokens_BT("answer").tolist() == [[False, False, True, True, False]]
    assert batch.forget_tokens_BT("all").tolist() == [[False, True, True, True, True]]
    assert batch.counts("answer") == TokenCounts(0, 2, 0, 2, 1)


def test_distances_by_hand() -> None:
    difference, desired = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, -3.0]])
    assert float(distance("squared", difference, desired, energy=5.0).sum()) == pytest.approx(
        25 / 5
    )
    assert float(distance("norm", difference, desired, energy=4.0).sum()) == pytest.approx(5 / 2)
    # Components in units of sqrt(50 / 2) = 5: 0.6 and 0.8, both in the quadratic part.
    assert float(distance("smooth_l1", difference, desired, energy=50.0).sum()) == pytest.approx(
        25 / 50
    )
    assert float(distance("cosine", difference, desired, energy=5.0).sum()) == pytest.approx(
        1 - 0.5**0.5
    )


@pytest.mark.parametrize("residual", ["local", "drift"])
def test_training_shifts_the_forget_set_and_keeps_the_retain_set(
    build: Build, batch: UnlearnBatch, residual: str
) -> None:
    alignment = build(objective(residual))
    before = alignment(batch)
    optimizer = torch.optim.Adam([p for p in alignment.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        alignment(batch).total.backward()
        optimizer.step()
    after = alignment(batch)
    assert float(after.forget.detach()) < 0.7 * float(before.forget.detach())
    assert float(after.total.detach()) < float(before.total.detach())


def test_dropout_in_the_frozen_model_is_off_while_training(
    build: Build, batch: UnlearnBatch
) -> None:
    alignment = build(objective("drift"), kind="gpt2").train()
    assert float(alignment(batch).retain.detach()) == pytest.approx(0, abs=1e-10)


def test_the_parts_of_a_row_are_sampled_one_by_one(build: Build) -> None:
    alignment = build(Objective(target="cluster_mean", clusters=2))
    parts = [row._replace(row=7, part=part) for part, row in enumerate(tiny_rows(2, seed=5))]
    for sums in alignment.feature_sums(collate(parts, [], 0)).values():
        assert sorted(sums.sample) == [(7, 0), (7, 1)]
