"""The objective and the solver on classifiers: a ViT, a convolutional network and a BERT, tiny and random."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from rfa.adapters import ADAPTER, attach, lora_layers, target_names
from rfa.batch import Row, TokenCounts, UnlearnBatch, collate
from rfa.blocks import BlockRunner
from rfa.features import input_positions
from rfa.objective import ResidualAlignment
from rfa.settings import Objective, SolveSettings, Weights
from rfa.solver import OnePassSolver

CLASSES = 5
TARGETS = {
    "vit": ("o_proj", "fc2", "classifier"),
    "resnet": ("convolution", "classifier.1"),
    "bert": ("attention.output.dense", "pooler.dense", "classifier"),
}
KINDS = list(TARGETS)
ALL_TERMS = Weights(retain=1.0, forget=1.0, kl=0.5, task=0.5, output=0.5)


def classifier(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    if kind == "vit":
        return ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES, **shape)
        )
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(vocab_size=60, num_labels=CLASSES, **shape))
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=CLASSES, **sizes))


def rows(kind: str, number: int, seed: int) -> list[Row]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for index in range(number):
        ids = torch.randint(
            3, 60, (int(torch.randint(3, 9, (1,), generator=draw)),), generator=draw
        ).tolist()
        pixels = None if kind == "bert" else torch.randn(1, 8, 8, generator=draw)
        found.append(
            Row(
                ids if kind == "bert" else [0],
                0,
                index,
                index % CLASSES,
                classified=True,
                pixels_CHW=pixels,
            )
        )
    return found


def build(
    kind: str, objective: Objective, targets: tuple[str, ...] | None = None, rank: int = 4
) -> ResidualAlignment:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = attach(
            classifier(kind),
            rank=rank,
            alpha=rank,
            targets=targets or TARGETS[kind],
            everywhere=True,
        )
    alignment = ResidualAlignment(model, objective)
    alignment.fit(alignment.feature_sums(collate(rows(kind, 12, 1), [], 0)))
    return alignment


def warm(alignment: ResidualAlignment) -> None:
    draw = torch.Generator().manual_seed(3)
    for name, parameter in alignment.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_and_what_lies_outside_the_blocks_can_be_adapted(kind: str) -> None:
    names = target_names(classifier(kind), TARGETS[kind], None, everywhere=True)
    assert any(name.startswith("classifier") for name in names)
    with pytest.raises(ValueError, match="no linear layer ends with 'classifier"):
        target_names(classifier(kind), (TARGETS[kind][-1],), None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", ["local", "drift"])
@pytest.mark.parametrize("target", ["retain_mean", "class_mean", "cluster_mean"])
def test_two_batches_have_the_terms_of_one(kind: str, residual: str, target: str) -> None:
    alignment = build(
        kind, Objective(residual=residual, target=target, clusters=3, weights=ALL_TERMS)
    )
    warm(alignment)
    retain, forget = rows(kind, 6, 4), rows(kind, 4, 5)
    whole = alignment(collate(retain, forget, 0))
    counts = collate(retain, forget, 0).counts("all")
    assert counts == TokenCounts(6, 4, 6, 4, 4)
    parts = [alignment(collate(retain[i::2], forget[i::2], 0), counts) for i in range(2)]
    for name, value in whole._asdict().items():
        assert float(sum(getattr(part, name) for part in parts)) == pytest.approx(
            float(value), rel=1e-4
        ), name


@pytest.mark.parametrize("kind", KINDS)
def test_task_is_the_models_own_cross_entropy(kind: str) -> None:
    alignment = build(kind, Objective(weights=Weights(task=1.0)))
    batch = collate(rows(kind, 5, 4), [], 0)
    with torch.no_grad():
        expected = alignment.model(**batch.model_inputs(), labels=batch.label_B).loss
    assert float(alignment(batch).task.detach()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_lower_precision_reads_the_same_batches(kind: str) -> None:
    batch = collate(rows(kind, 3, 4), [], 0)
    model = classifier(kind).eval()
    with torch.no_grad():
        whole_BV = BlockRunner(model)(batch, logits_at_BT=batch.answer_BT).logits_NV
        half_BV = BlockRunner(model.bfloat16())(batch, logits_at_BT=batch.answer_BT).logits_NV
    assert half_BV is not None
    torch.testing.assert_close(half_BV.float(), whole_BV, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_is_zero_at_the_start_and_every_adapter_learns(kind: str) -> None:
    alignment = build(kind, Objective(weights=ALL_TERMS))
    loss = alignment(collate(rows(kind, 4, 4), rows(kind, 3, 5), 0))
    assert float(loss.retain.detach()) == 0
    loss.total.backward()
    silent = [
        n for n, p in alignment.model.named_parameters() if "lora_B" in n and not p.grad.abs().sum()
    ]
    assert not silent


def residual_errors(
    alignment: ResidualAlignment, batch: UnlearnBatch, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, base outputs and what LoRA adds, at all places of one module."""
    layer = dict(lora_layers(alignment.model))[name]
    found: list[Tensor] = []
    handle = layer.base_layer.register_forward_hook(
        lambda module, args, output: found.extend((input_positions(module, args[0]), output))
    )
    with torch.no_grad(), alignment.hooks.recording() as base:
        alignment.run(batch, None, 0, alignment.hooks.last_block + 1)
        added = alignment.hooks.residuals()[name]
    handle.remove()
    return found[0].flatten(0, 1), base[name].flatten(0, 1), added.flatten(0, 1)


def weights_of(batch: UnlearnBatch, positions: int) -> Tensor:
    """Weights of all positions of one module: each row weighs 1, padding nothing."""
    if batch.pixels_BCHW is not None:
        return torch.full((positions,), len(batch.row_B) / positions)
    real_BT = batch.attention_BT.float()
    return (real_BT / real_BT.sum(1, keepdim=True)).flatten()


@pytest.mark.parametrize("kind", KINDS)
def test_the_solver_finds_least_squares_at_full_rank_also_for_convolutions_and_long_texts(
    kind: str,
) -> None:
    alignment = build(kind, Objective(), rank=120)
    one_pass = OnePassSolver(alignment, SolveSettings(mode="one_pass", ridge=1e-3))
    kept, forget = collate(rows(kind, 30, 6), [], 0), collate([], rows(kind, 4, 7), 0)
    one_pass.collect(kept)
    one_pass.reduce()
    one_pass.solve([forget], 2.0)
    targets = alignment.targets
    assert targets is not None
    name = next(
        name
        for name in one_pass.layers
        if name.endswith(
            ("stages.1.layers.0.layer.1.convolution", "2.mlp.fc2", "2.attention.output.dense")
        )
    )
    layer = one_pass.layers[name]
    a_KD, b_OK = (
        own[ADAPTER].weight.detach().flatten(1).double() for own in (layer.lora_A, layer.lora_B)
    )
    for other in one_pass.layers.values():  # inputs from the base model's features
        nn.init.zeros_(other.lora_B[ADAPTER].weight)
    kept_ND, _, _ = residual_errors(alignment, kept, name)
    forget_ND, base_NO, _ = residual_errors(alignment, forget, name)
    shift_NO = (
        targets(name, base_NO, torch.zeros(len(base_NO)), torch.zeros(len(base_NO))) - base_NO
    )
    kept_ND, forget_ND, shift_NO = kept_ND.double(), forget_ND.double(), shift_NO.double()
    kept_N1 = weights_of(kept, len(kept_ND)).double()[:, None]
    forget_N1 = weights_of(forget, len(forget_ND)).double()[:, None]
    second_DD = kept_ND.T @ (kept_N1 * kept_ND) / kept_N1.sum()
    second_DD += 1e-3 * second_DD.diagonal().mean() * torch.eye(len(second_DD))
    weight_N1 = 2.0 / forget_N1.sum() * forget_N1
    expected_OD = torch.linalg.solve(
        forget_ND.T @ (weight_N1 * forget_ND) + second_DD, forget_ND.T @ (weight_N1 * shift_NO)
    ).T
    torch.testing.assert_close(
        b_OK @ a_KD * layer.scaling[ADAPTER], expected_OD, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_block_by_block_in_passing_and_from_several_batches_agree(kind: str) -> None:
    found = []
    for parts in (1, 2):
        alignment = build(kind, Objective(target="class_mean"))
        one_pass = OnePassSolver(alignment, SolveSettings(mode="blockwise"))
        one_pass.collect(collate(rows(kind, 20, 6), [], 0))
        one_pass.reduce()
        forget = rows(kind, 6, 7)
        one_pass.solve([collate([], forget[part::parts], 0) for part in range(parts)], 1.0)
        with torch.no_grad():
            found.append(alignment.run(collate([], rows(kind, 3, 8), 0), None, 0, 2).hidden_BTD)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
