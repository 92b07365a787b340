"""Rounding and relearning, by hand and on the tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import norm
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.encoding.text import TextEncoder
from pipelines.evaluation.attacks import (
    NF4_VALUES,
    gradient_norm,
    learned_and_held_out,
    quantise_,
    quantise_blocks_,
    relearn_,
    round_to_nf4_,
)
from pipelines.evaluation.metrics.keys import ROUNDINGS
from pipelines.evaluation.metrics.relearning import RELEARNINGS, STEPS
from pipelines.evaluation.scored_model import CHANGES, Relearned, ScoredModel
from pipelines.evaluation.text_scorer import TextScorer
from pipelines.model.answers import AnswerTraining
from pipelines.model.load import load_base
from rfa.batch import Row, collate
from tests.tiny_families import tiny_family

BITS_4 = next(rounding for rounding in ROUNDINGS if rounding.name == "quantised_4bit")
RELEARNED = ScoredModel("after", Relearned(STEPS[-1]))


@pytest.fixture(scope="module")
def rows(problem: Path) -> list[dict[str, Any]]:
    lines = (problem / "data" / "forget.jsonl").read_text().splitlines()
    columns = (
        "prompt",
        "answer",
        "paraphrased_prompt",
        "paraphrased_answer",
        "fact",
        "perturbed_answers",
    )
    found = [json.loads(line) for line in lines]
    return [
        {**{key: row[key] for key in columns}, "set": "forget", "row": n}
        for n, row in enumerate(found)
    ]


def test_values_on_the_grid_stay_as_they_are() -> None:
    weight_OI = torch.tensor(
        [[7.0, -3, 0, 1], [-3.5, 0.5, 1, -1]]
    )  # steps of 1 and 0.5: 4 bits count to 7
    step_OG = quantise_(before := weight_OI.clone(), bits=4, group=4)
    assert torch.equal(before, weight_OI)
    assert step_OG.tolist() == [[1.0], [0.5]]


def test_values_between_go_to_the_nearest() -> None:
    weight_OI = torch.tensor([[0.7, 0.24, -0.36, 0.04]])
    quantise_(weight_OI, bits=4, group=4)
    assert weight_OI[0].tolist() == pytest.approx([0.7, 0.2, -0.4, 0.0])
    weight_OI = torch.tensor([[1.27, 0.244, -0.366, 0.004]])  # 8 bits count to 127
    quantise_(weight_OI, bits=8, group=4)
    assert weight_OI[0].tolist() == pytest.approx([1.27, 0.24, -0.37, 0.0])


def test_groups_know_nothing_of_each_other() -> None:
    weight_OI = torch.tensor([[0.7, 0.24, 70.0, 24.0], [0.0, 0.0, 0.07, 0.024]])
    step_OG = quantise_(weight_OI, bits=4, group=2)
    assert weight_OI.flatten().tolist() == pytest.approx([0.7, 0.2, 70, 20, 0, 0, 0.07, 0.02])
    assert step_OG.flatten().tolist() == pytest.approx([0.1, 10, 0, 0.01])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [31, 64, 50])  # 50: the last group is smaller
def test_no_value_moves_by_more_than_half_a_step(bits: int, inputs: int) -> None:
    original_OI = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0))
    weight_OI = original_OI.clone()
    step_OG = quantise_(weight_OI, bits)
    assert step_OG.shape == (5, -(-inputs // 32))
    moved_OI = (weight_OI - original_OI).abs()
    for group, step_O in enumerate(step_OG.T):
        inside = slice(32 * group, 32 * (group + 1))
        assert (moved_OI[:, inside] <= step_O[:, None] * 0.5001).all()
        assert moved_OI[:, inside].max() > 0
        assert torch.allclose(step_O, original_OI[:, inside].abs().amax(1) / (2 ** (bits - 1) - 1))


def test_nf4_has_the_quantiles_of_a_normal_distribution() -> None:
    # As bitsandbytes makes its map: 8 steps above 0 and 7 below it, the outermost quantile at `end`.
    end = 0.9677083
    above = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    values = np.sort([*above, 0, *below])
    assert pytest.approx(values / values.max(), abs=1e-5) == list(NF4_VALUES)


def test_a_value_goes_to_the_nearest_of_nf4() -> None:
    # 64 inputs are a group: the largest of the first is 2, of the second 0.5; the third has none.
    weight_OI = torch.zeros(1, 160)
    weight_OI[0, :6] = torch.tensor([-2.0, 0.15, 0.08, 0.07, -1.3, 0.89])
    weight_OI[0, 64:67] = torch.tensor([0.5, 0.04, -0.31])
    expected = {
        0: -2,
        1: 2 * 0.0795803,
        2: 2 * 0.0795803,
        3: 0,
        4: -2 * 0.6961928,
        5: 2 * 0.4407098,
    }
    expected |= {64: 0.5, 65: 0.5 * 0.0795803, 66: -0.5 * 0.6961928}
    round_to_nf4_(weight_OI)
    assert weight_OI[0].nonzero().flatten().tolist() == sorted(set(expected) - {3})
    for index, value in expected.items():
        assert float(weight_OI[0, index]) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("inputs", [64, 100])
def test_nf4_is_nearer_than_even_steps_where_weights_are_normal(inputs: int) -> None:
    original_OI = torch.randn(50, inputs, generator=torch.Generator().manual_seed(0))
    even_OI, normal_OI = original_OI.clone(), original_OI.clone()
    quantise_(even_OI, bits=4, group=64)
    round_to_nf4_(normal_OI)
    again_OI = normal_OI.clone()
    round_to_nf4_(again_OI)
    assert torch.equal(again_OI, normal_OI), "its values stay as they are"
    even, normal = ((one - original_OI).square().mean() for one in (even_OI, normal_OI))
    assert 0 < normal < even


def test_only_linear_layers_inside_the_blocks_are_rounded(cfg: UnlearnConfig) -> None:
    model, original = load_base(cfg.model), load_base(cfg.model)
    names = quantise_blocks_(model, BITS_4)
    assert len(names) == 4 * 7  # q, k, v, o, gate, up and down of four blocks
    changed = {
        name
        for name, weight in model.named_parameters()
        if not weight.equal(original.get_parameter(name))
    }
    assert changed == {f"{name}.weight" for name in names}


def test_layers_that_hold_their_weight_transposed_are_rounded_along_their_inputs() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    layer: Any = model.transformer.h[0].mlp.c_fc  # pyright: ignore[reportAttributeAccessIssue]
    expected_OI = layer.weight.detach().T.clone()
    quantise_(expected_OI, bits=4)
    assert "transformer.h.0.mlp.c_fc" in quantise_blocks_(model, BITS_4)
    assert torch.equal(layer.weight, expected_OI.T)


@pytest.mark.parametrize(("name", "transposed"), [("mixtral", False), ("gpt_oss", True)])
def test_the_fused_weights_of_experts_are_rounded_along_their_inputs(
    name: str, transposed: bool
) -> None:
    model = tiny_family(name)
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    expected_OI = experts.down_proj[1].detach().clone()
    if transposed:
        expected_OI = expected_OI.T.clone()
    quantise_(expected_OI, bits=4)
    assert "model.layers.0.mlp.experts.down_proj" in quantise_blocks_(model, BITS_4)
    found_OI = experts.down_proj[1].T if transposed else experts.down_proj[1]
    assert torch.equal(found_OI, expected_OI)


def test_a_model_is_rounded_after_it_is_loaded(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    scorer = TextScorer(cfg, {"after": ModelConfig(path=cfg.model.path)})
    table = pa.Table.from_pylist(rows)
    changes = (None, *(CHANGES[f"quantised_{name}"] for name in ("8bit", "4bit", "nf4")), None)
    losses: list[float] = []
    for change in changes:
        losses.append(scorer.score(ScoredModel("after", change), table)["forget", 0]["loss"])
    assert losses[0] == losses[4], "the model itself is loaded anew"
    assert 0 < abs(losses[1] - losses[0]) < min(abs(loss - losses[0]) for loss in losses[2:4])
    assert losses[2] != losses[3]


def test_the_halves_are_every_second_row_by_number_and_share_no_words() -> None:
    rows = [forget_row(number) for number in (7, 1, 3, 9, 5, 11)]
    learned, held_out = learned_and_held_out([*rows, forget_row(13)])
    assert [row["row"] for row in learned] == [1, 5, 9, 13]
    assert [row["row"] for row in held_out] == [3, 7, 11]
    rows[0]["prompt"] = " Q5 "  # row 7 is now row 5 in all but case
    assert [row["row"] for row in learned_and_held_out(rows)[1]] == [3, 11]


def test_of_another_set_all_rows_are_learned_and_all_forget_rows_scored_but_those_that_it_has() -> (
    None
):
    rows = [forget_row(number) for number in (3, 1, 2)]
    others = [{**forget_row(number), "set": "general"} for number in (8, 3, 7)]
    learned, held_out = learned_and_held_out([*rows, *others])
    assert [(row["set"], row["row"]) for row in learned] == [("general", n) for n in (3, 7, 8)]
    assert [(row["set"], row["row"]) for row in held_out] == [("forget", 1), ("forget", 2)]


def forget_row(number: int) -> dict[str, Any]:
    return {"set": "forget", "row": number, "prompt": f"q{number}", "answer": "a"}


def test_a_single_row_leaves_nothing_to_score(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    scorer = TextScorer(cfg, {"after": cfg.model})
    assert scorer.relearn(RELEARNED, pa.Table.from_pylist(rows[:1])) == {}


def test_relearning_makes_the_learned_rows_more_probable(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    model, encoder = load_base(cfg.model), TextEncoder(cfg.model, None, 128)
    encoded = [Row(*encoder.pair(row["prompt"], row["answer"])) for row in rows]
    training, batch = AnswerTraining(model, classifies=False), collate(encoded, [], pad_token_id=0)
    original = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    losses = {
        step: float(training(batch, batch.counts("all")).total.detach())
        for step in relearn_(model, encoded, 0, 0, RELEARNINGS[0])
    }
    assert tuple(losses) == STEPS
    assert sorted(losses.values(), reverse=True) == list(losses.values())
    assert all(not weight.equal(original[name]) for name, weight in model.named_parameters())


def test_a_lora_relearns_and_leaves_the_weights_alone(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    (by,) = [relearning for relearning in RELEARNINGS if relearning.rank]
    encoder = TextEncoder(cfg.model, None, 128)
    encoded = [Row(*encoder.pair(row["prompt"], row["answer"])) for row in rows]
    batch, ends = collate(encoded, [], pad_token_id=0), list[dict[int, float]]()
    for _ in range(2):
        torch.rand(1)  # somebody else draws in between
        model = load_base(cfg.model)
        original = {weight.data_ptr(): weight.detach().clone() for weight in model.parameters()}
        losses: dict[int, float] = {}
        for step in relearn_(model, encoded, 0, 0, by._replace(learning_rate=1e-3)):
            loss = AnswerTraining(model, classifies=False)(batch, batch.counts("all"))
            losses[step] = float(loss.total.detach())
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert trained and all("lora_" in name for name in trained)
        assert any(".mlp.up_proj." in name for name in trained)
        assert not any("lm_head" in name for name in trained)
        for weight in model.parameters():
            if not weight.requires_grad:
                assert weight.equal(original[weight.data_ptr()])
        ends.append(losses)
    assert ends[0] == ends[1], "what is drawn goes by the seed"
    assert ends[0][0] > ends[0][50] + 0.1


def test_a_larger_learning_rate_relearns_more(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    half = pa.Table.from_pylist(rows)
    moved: dict[float, float] = {}
    for by in RELEARNINGS:
        if by.learned == "forget" and by.rank is None:
            scorer = TextScorer(cfg, {"after": ModelConfig(path=cfg.model.path)})
            curve = scorer.relearn(ScoredModel("after", Relearned(STEPS[-1], by)), half)
            start, *_, end = curve.values()
            moved[by.learning_rate] = start["forget", 1]["loss"] - end["forget", 1]["loss"]
    assert [rate for rate, _ in sorted(moved.items(), key=lambda own: own[1])] == [1e-5, 2e-5, 1e-4]


def test_relearning_scores_the_other_half_and_starts_from_the_model(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    scorer = TextScorer(cfg, {"after": ModelConfig(path=cfg.model.path)})
    table = pa.Table.from_pylist(rows)
    curve = scorer.relearn(RELEARNED, table)
    assert list(curve) == [ScoredModel("after", Relearned(step)) for step in STEPS]
    for samples in curve.values():
        assert list(samples) == [("forget", 1), ("forget", 3), ("forget", 5)]
    unchanged = scorer.score(ScoredModel("after"), table)
    start, *_, end = curve.values()
    for row, sample in start.items():
        for name in sample.keys() - {"set_name"}:
            assert sample[name] == pytest.approx(unchanged[row][name])
        assert {"loss", "fact_recall"} < sample.keys()
    assert start != end
    assert scorer.relearn(RELEARNED, table) == curve, "the second time begins where the first did"


def test_relearning_from_another_set_scores_all_forget_rows(
    cfg: UnlearnConfig, rows: list[dict[str, Any]]
) -> None:
    scorer = TextScorer(cfg, {"after": ModelConfig(path=cfg.model.path)})
    others = [{**row, "set": "retain", "answer": row["paraphrased_answer"]} for row in rows[:2]]
    by = RELEARNINGS[1]
    relearned = ScoredModel("after", Relearned(STEPS[-1], by))
    curve = scorer.relearn(relearned, pa.Table.from_pylist([*rows, *others]))
    assert list(curve) == [ScoredModel("after", Relearned(step, by)) for step in STEPS]
    unchanged = scorer.score(ScoredModel("after"), pa.Table.from_pylist(rows))
    start, *_, end = curve.values()
    assert start.keys() == end.keys() == unchanged.keys()
    for row, sample in start.items():
        assert sample["loss"] == pytest.approx(unchanged[row]["loss"])
        assert sample["loss"] != pytest.approx(end[row]["loss"])


def test_relearning_computes_in_fp32_whatever_the_precision(
    cfg: UnlearnConfig, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()

    def look(model: nn.Module, *_: Any) -> list[int]:
        seen.add(next(model.parameters()).dtype)
        return [0]

    monkeypatch.setattr("pipelines.evaluation.text_scorer.relearn_", look)
    half = cfg.model_copy(update={"train": cfg.train.model_copy(update={"precision": "bf16"})})
    TextScorer(half, {"after": cfg.model}).relearn(RELEARNED, pa.Table.from_pylist(rows))
    assert seen == {torch.float32}


def test_the_gradient_norm_is_the_mean_over_parameters_and_leaves_no_gradient() -> None:
    model = nn.Linear(2, 1)
    gradient_by_hand = {"weight": [3.0, 4.0], "bias": [1.0]}  # norms 5 and 1
    loss = model(torch.tensor([gradient_by_hand["weight"]])).sum()
    assert gradient_norm(model, loss) == pytest.approx(3.0)
    assert model.weight.grad is None and model.bias.grad is None
    assert gradient_norm(model, 2 * model(torch.tensor([[3.0, 4.0]])).sum()) == pytest.approx(6.0)
