"""Pruning against brute force and torch's own, and pruned rows that stay zero through training and merging."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from rfa.pruning import (
    apply_masks_,
    collecting_norms,
    hold_rows_,
    kept_rows,
    prune_,
    prune_targets,
    sparsity,
)
from tests.rfa.conftest import VOCABULARY, tiny_model
from tests.tiny_families import tiny_family

LAYERS = {
    "linear": lambda: nn.Linear(7, 10),
    "conv1d": lambda: Conv1D(10, 7),
    "convolution": lambda: nn.Conv2d(3, 10, 3, padding=1),
    "grouped": lambda: nn.Conv2d(4, 10, 3, groups=2),
}


def single(kind: str, seed: int = 0) -> nn.Sequential:
    """A model of one layer, called `0`."""
    torch.manual_seed(seed)
    model = nn.Sequential(LAYERS[kind]())
    nn.init.normal_(model[0].weight)
    return model


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck", num_labels=5
    )
    return ResNetForImageClassification(config)


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=5, **shape))


def inputs_of(model: nn.Module, seed: int = 1, batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, ResNetForImageClassification):
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    if isinstance(model, ViTForImageClassification):
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, 6), generator=generator)}


MODELS = {
    "resnet": (resnet, ["convolutions"]),
    "vit": (vit, ["layers.1.attention.o_proj", "classifier", "projection"]),
    "llama": (tiny_model, ["o_proj", "down_proj"]),
    "gpt2": (lambda: tiny_model("gpt2"), ["attn.c_proj", "mlp.c_proj"]),
}


def adapted(model: nn.Module, names: list[str]) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PEFT sets fan_in_fan_out for Conv1D by itself, and says so
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names))  # pyright: ignore[reportArgumentType]


def train_(model: PeftModel, steps: int = 20, weight_decay: float = 0.0) -> None:
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=weight_decay)
    inputs = inputs_of(model.get_base_model())
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        optimizer.step()


def as_rows(weight: Tensor, layer: nn.Module) -> Tensor:
    return (weight.T if isinstance(layer, Conv1D) else weight).flatten(1)


shares = st.floats(0.01, 0.99)
seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("kind", LAYERS)
@given(share=shares, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_the_rows_of_smallest_norm_are_pruned_and_biases_stay(
    kind: str, share: float, seed: int
) -> None:
    model = single(kind, seed)
    layer, before = model[0], {name: p.clone() for name, p in model[0].named_parameters()}
    masks = prune_(model, ["0"], "rows", share)
    norms_O = as_rows(before["weight"], layer).norm(dim=1)
    keep_O = kept_rows(masks["0.weight"], layer)
    assert keep_O is not None
    assert int((~keep_O).sum()) == round(share * 10)
    smallest = sorted(norms_O.tolist())[: round(share * 10)]
    assert sorted(norms_O[~keep_O].tolist()) == smallest
    torch.testing.assert_close(layer.weight, before["weight"] * masks["0.weight"], rtol=0, atol=0)
    torch.testing.assert_close(layer.bias, before["bias"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped"])
@given(share=shares, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_masks_equal_torchs(kind: str, share: float, seed: int) -> None:
    theirs = single(kind, seed)[0]
    # Of weights of one size, which float32 draws now and then, torch leaves any.
    assume(len(theirs.weight.abs().unique()) == theirs.weight.numel())
    torch_prune.ln_structured(theirs, "weight", amount=share, n=2, dim=0)
    masks = prune_(single(kind, seed), ["0"], "rows", share)
    assert torch.equal(masks["0.weight"], theirs.weight_mask.bool())
    theirs = single(kind, seed)[0]
    torch_prune.l1_unstructured(theirs, "weight", amount=share)
    masks = prune_(single(kind, seed), ["0"], "magnitude", share)
    assert torch.equal(masks["0.weight"], theirs.weight_mask.bool())


def test_conv1d_loses_outputs_not_inputs() -> None:
    model = single("conv1d")
    prune_(model, ["0"], "rows", 0.5)
    zero_IO = model[0].weight == 0
    assert int(zero_IO.all(dim=0).sum()) == 5  # of 10 outputs
    assert not zero_IO.all(dim=1).any()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@given(share=shares, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_wanda_equals_brute_force_in_every_row(kind: str, share: float, seed: int) -> None:
    model = single(kind, seed)
    input_BTD = torch.randn(2, 5, 7) * torch.rand(7) * 10
    with collecting_norms(model, ["0"]) as norms:
        model(input_BTD)
    weight_OD = as_rows(model[0].weight.detach().clone(), model[0])
    keep_OD = as_rows(prune_(model, ["0"], "wanda", share, norms)["0.weight"], model[0])
    for o in range(10):
        scores = {d: float(weight_OD[o, d].abs() * input_BTD[..., d].norm()) for d in range(7)}
        pruned = sorted(scores, key=lambda d: scores[d])[: round(share * 7)]
        assert [d for d in range(7) if not keep_OD[o, d]] == sorted(pruned)


CONVOLUTIONS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": (2, 1)},
    "same": {"padding": "same", "kernel_size": (2, 3)},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_convolutions_norms_are_those_its_weights_meet(name: str) -> None:
    """The gradient of the summed output to one filter is the sum of each weight's inputs: on squares, the norms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, **{"kernel_size": 3, **CONVOLUTIONS[name]}))  # type: ignore[arg-type]
    input_BCHW = torch.randn(4, 3, 7, 6)
    with collecting_norms(model, ["0"]) as norms:
        model(input_BCHW)
    output_BOHW = model(input_BCHW.square())
    output_BOHW[:, 0].sum().backward()
    assert int(norms["0"][-1]) == output_BOHW[:, 0].numel()
    torch.testing.assert_close(
        norms["0"][:-1].float(), model[0].weight.grad[0].flatten(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", MODELS)
def test_two_shards_norms_add_up_to_the_wholes(kind: str) -> None:
    build, targets = MODELS[kind]
    model = build().eval()
    names = prune_targets(model, targets)
    inputs = inputs_of(model, batch=5)
    shards = [{k: v[:2] for k, v in inputs.items()}, {k: v[2:] for k, v in inputs.items()}]
    collected = []
    for batch in [inputs, *shards]:
        with collecting_norms(model, names) as norms:
            model(**batch)
        collected.append(norms)
    whole, first, second = collected
    assert list(whole) == names
    assert all(norms[-1] > 0 for norms in whole.values())
    for name in names:
        assert whole[name].dtype == torch.float64
        torch.testing.assert_close(first[name] + second[name], whole[name], rtol=1e-4, atol=1e-6)
    model(**inputs)
    assert all(torch.equal(norms[name], second[name]) for name in names), "hooks are gone"


def test_padding_that_is_not_chosen_counts_for_nothing() -> None:
    model = tiny_model().eval()
    names = prune_targets(model, ["o_proj"])
    ids_BT = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])
    attention_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with collecting_norms(model, names, chosen=attention_BT.bool) as padded:
        model(input_ids=ids_BT, attention_mask=attention_BT)
    with collecting_norms(model, names) as alone:
        model(input_ids=ids_BT[:1])
        model(input_ids=ids_BT[1:, :2])
    for name in names:
        torch.testing.assert_close(padded[name], alone[name], rtol=1e-4, atol=1e-8)
    expected = r"'model.layers.0.self_attn.o_proj' sees 3 positions of 8 tokens"
    with (
        pytest.raises(ValueError, match=expected),
        collecting_norms(model, names, chosen=attention_BT.bool),
    ):
        model(input_ids=ids_BT[1:, :3])


def test_equal_scores_are_pruned_in_the_order_of_their_index() -> None:
    for method, norms, expected in (
        ("rows", None, [[False] * 4] * 2 + [[True] * 4] * 2),
        ("magnitude", None, [[False] * 4] * 2 + [[True] * 4] * 2),
        ("wanda", {"0": torch.ones(5, dtype=torch.float64)}, [[False, False, True, True]] * 4),
    ):
        model = nn.Sequential(nn.Linear(4, 4))
        nn.init.ones_(model[0].weight)
        assert prune_(model, ["0"], method, 0.5, norms)["0.weight"].tolist() == expected, method


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["rows", "magnitude", "wanda"])
def test_half_of_every_chosen_layer_is_pruned_and_nothing_else(
    kind: str, method: str, tmp_path: Path
) -> None:
    build, targets = MODELS[kind]
    model = build().eval()
    names = prune_targets(model, targets)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with collecting_norms(model, names) as norms:
        model(**inputs_of(model))
    masks = prune_(model, names, method, 0.5, norms)
    assert list(masks) == [f"{name}.weight" for name in names]
    assert sparsity(model, masks) == pytest.approx(0.5, abs=0.05)  # 5 classes and 3 colours are odd
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * masks.get(name, 1), rtol=0, atol=0)
    save_file(masks, tmp_path / "masks.safetensors")
    loaded = load_file(tmp_path / "masks.safetensors")
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())
    fresh = build().eval()
    apply_masks_(fresh, loaded)
    torch.testing.assert_close(
        fresh(**inputs_of(model)).logits, model(**inputs_of(model)).logits, rtol=0, atol=0
    )


def test_merging_without_care_fills_the_zeros_and_remasking_brings_them_back() -> None:
    for method in ("rows", "magnitude"):
        model = tiny_model()
        names = prune_targets(model, ["o_proj", "down_proj"])
        masks = prune_(model, names, method, 0.5)
        peft_model = adapted(model, names)
        train_(peft_model)
        assert sparsity(peft_model, masks) == 0.5  # the layers below the adapters
        merged = peft_model.merge_and_unload()
        assert sparsity(merged, masks) < 0.01
        apply_masks_(merged, masks)
        assert sparsity(merged, masks) == 0.5


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_merging_keeps_the_pruned_rows_zero(kind: str, weight_decay: float) -> None:
    build, targets = MODELS[kind]
    model = build()
    names = prune_targets(model, targets)
    masks = prune_(model, names, "rows", 0.5)
    expected = sparsity(model, masks)
    peft_model = adapted(model, names)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:  # a warm start: the pruned rows of B are not zero by themselves
            nn.init.normal_(parameter, std=0.1)
    handles = hold_rows_(peft_model, masks)
    assert len(handles) == len(names)
    start = {name: p.clone() for name, p in peft_model.named_parameters() if "lora_B" in name}
    train_(peft_model, weight_decay=weight_decay)
    assert not any(
        torch.equal(p, start[n]) for n, p in peft_model.named_parameters() if n in start
    ), "B has learnt"
    merged = peft_model.merge_and_unload()
    assert sparsity(merged, masks) == expected
    for name, mask in masks.items():
        assert (merged.get_parameter(name)[~mask] == 0).all()


def test_released_rows_learn_again() -> None:
    model = tiny_model()
    names = prune_targets(model, ["o_proj"])
    masks = prune_(model, names, "rows", 0.5)
    peft_model = adapted(model, names)
    for handle in hold_rows_(peft_model, masks):
        handle.remove()
    train_(peft_model, steps=2)
    assert sparsity(peft_model.merge_and_unload(), masks) < 0.01


def test_a_pruned_row_without_a_finite_gradient_stays_zero() -> None:
    model = tiny_model()
    names = prune_targets(model, ["o_proj"])
    masks = prune_(model, names, "rows", 0.5)
    peft_model = adapted(model, names)
    hold_rows_(peft_model, masks)
    (peft_model(**inputs_of(model)).logits.sum() * float("inf")).backward()
    b = peft_model.get_base_model().model.layers[0].self_attn.o_proj.lora_B["default"].weight
    keep_O = masks[f"{names[0]}.weight"].any(dim=1)
    assert (b.grad[~keep_O] == 0).all()
    assert not b.grad[keep_O].isfinite().all()


def test_half_precision_weights_are_compared_in_full() -> None:
    """In bfloat16 the norms 16.00 and 16.03 would be equal, and the first row would go."""
    model = nn.Sequential(nn.Linear(64, 2).bfloat16())
    nn.init.constant_(model[0].weight, 2.0)
    with torch.no_grad():
        model[0].weight[0, 0] = 2.25
    assert prune_(model, ["0"], "rows", 0.5)["0.weight"].any(dim=1).tolist() == [True, False]
    assert model[0].weight.dtype == torch.bfloat16


def test_an_adapted_layer_tells_its_kept_rows_as_its_base_layer_does() -> None:
    model = tiny_model("gpt2")
    names = prune_targets(model, ["mlp.c_proj"])
    mask = prune_(model, names, "rows", 0.25)[f"{names[0]}.weight"]
    keep_O = kept_rows(mask, model.get_submodule(names[0]))
    assert keep_O is not None and int(keep_O.sum()) == 24  # of 32 outputs
    layer = adapted(model, names).get_base_model().get_submodule(names[0])
    assert torch.equal(kept_rows(mask, layer), keep_O)


def test_masks_that_prune_no_whole_rows_hold_nothing() -> None:
    model = tiny_model()
    names = prune_targets(model, ["o_proj"])
    masks = prune_(model, names, "magnitude", 0.5)
    assert kept_rows(masks[f"{names[0]}.weight"], model.get_submodule(names[0])) is None
    keep_all = {name: torch.ones_like(mask) for name, mask in masks.items()}
    peft_model = adapted(model, names)
    assert hold_rows_(peft_model, masks) == []
    assert hold_rows_(peft_model, keep_all) == [], "a mask that keeps all has no rows to hold"


def test_partitioned_weights_are_touched_only_while_whole() -> None:
    model = single("linear")
    entered: list[nn.Parameter] = []
    full = model[0].weight.data
    model[0].weight.data = torch.empty(0)  # as ZeRO-3 leaves it

    @contextmanager
    def whole(parameter: nn.Parameter) -> Iterator[None]:
        entered.append(parameter)
        parameter.data = full
        yield
        parameter.data = torch.empty(0)

    masks = prune_(model, ["0"], "rows", 0.5, whole=whole)
    assert sparsity(model, masks, whole) == 0.5
    nn.init.ones_(full)
    apply_masks_(model, masks, whole)
    assert sparsity(model, masks, whole) == 0.5
    assert len(entered) == 4


def test_groups_choose_by_kind_and_leave_out_the_head() -> None:
    convolutions = [name for name, m in resnet().named_modules() if isinstance(m, nn.Conv2d)]
    assert (
        prune_targets(resnet(), ["convolutions"])
        == prune_targets(resnet(), ["all"])
        == convolutions
    )
    assert convolutions[0] == "resnet.embedder.embedder.convolution"
    linear = prune_targets(vit(), ["linear"])
    assert len(linear) == 12 and "classifier" not in linear
    assert prune_targets(vit(), ["all"]) == ["vit.embeddings.patch_embeddings.projection", *linear]
    assert len(prune_targets(tiny_model(), ["all"])) == 4 * 7  # no lm_head
    assert len(prune_targets(tiny_model("gpt2"), ["linear"])) == 4 * 4
    # T5 has its base model's parts beside the head, under no common name
    shape = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    }
    encoder_decoder = prune_targets(T5ForConditionalGeneration(T5Config(**shape)), ["all"])
    assert {name.split(".")[0] for name in encoder_decoder} == {"encoder", "decoder"}


def test_targets_choose_by_name_in_the_models_order_and_through_adapters() -> None:
    names = ["model.layers.1.mlp.down_proj", "lm_head"]
    model = tiny_model()
    assert prune_targets(model, ["lm_head", "layers.1.mlp.down_proj", "1.mlp.down_proj"]) == names
    assert prune_targets(resnet(), ["classifier.1"]) == ["classifier.1"]
    everything = prune_targets(model, ["all"])
    assert prune_targets(adapted(model, ["down_proj"]), ["all"]) == everything


def test_a_target_that_matches_nothing_lists_the_choices() -> None:
    expected = "prune.targets: no layer ends with 'up_prj'; this model has: all, linear, down_proj, gate_proj, k_proj"
    with pytest.raises(ValueError, match=expected):
        prune_targets(tiny_model(), ["o_proj", "up_prj"])
    with pytest.raises(
        ValueError,
        match=r"no layer ends with 'fc'; .* all, convolutions, classifier.1, convolution$",
    ):
        prune_targets(resnet(), ["fc"])
    with pytest.raises(ValueError, match="no layer ends with 'convolutions'"):
        prune_targets(tiny_model(), ["convolutions"])


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'lm_head' shares its weight with another module \(Embedding\)"
    ):
        prune_targets(tiny_model("gpt2"), ["lm_head"])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_sparsity_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"prune.sparsity: found .*, allowed: above 0 and below 1"):
        prune_(single("linear"), ["0"], "rows", share)


def test_errors_name_what_is_allowed_and_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2))
    before = [p.clone() for p in model.parameters()]
    norms = {"0": torch.ones(5, dtype=torch.float64)}
    with pytest.raises(
        ValueError, match=r"prune.method: found 'random', allowed: rows, magnitude, wanda"
    ):
        prune_(model, ["0"], "random", 0.5)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="found 'wanda', '1' has 2 groups; allowed: rows, magnitude"
    ):
        prune_(model, ["0", "1"], "wanda", 0.5, norms)
    with pytest.raises(ValueError, match="'1' has 2 groups"), collecting_norms(model, ["1"]):
        pass
    for unseen in (None, {}, {"0": torch.zeros(5, dtype=torch.float64)}):
        with pytest.raises(ValueError, match="'wanda' needs inputs, none reached '0'; allowed"):
            prune_(model, ["0"], "wanda", 0.5, unseen)
    with pytest.raises(
        ValueError, match="no layer for '7' in this model, whose layers end with: 0, 1"
    ):
        prune_(model, ["0", "7"], "rows", 0.5)
    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"'0' is quantised \(torch.uint8\), allowed: float weights"
    ):
        prune_(quantised, ["0"], "rows", 0.5)
    masks = {
        "0.weight": torch.zeros(4, 4, dtype=torch.bool),
        "5.weight": torch.zeros(4, 4, dtype=torch.bool),
    }
    for act in (apply_masks_, hold_rows_, sparsity):
        with pytest.raises(ValueError, match=r"masks: no layer for '5.weight' in this model"):
            act(model, masks)
    with pytest.raises(ValueError, match=r"masks: '0.weight' has \[2, 4\], this model \[4, 4\]"):
        apply_masks_(model, {"0.weight": torch.zeros(2, 4, dtype=torch.bool)})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("group", ["linear", "all"])
def test_a_group_that_would_leave_out_experts_is_refused(group: str) -> None:
    model = tiny_family("mixtral")
    expected = (
        rf"prune.targets: '{group}' leaves out the fused weights of experts \(.*gate_up_proj, ...\), "
        r"\d\d% of the model; allowed: k_proj, lm_head, o_proj, q_proj, v_proj"
    )
    with pytest.raises(ValueError, match=expected):
        prune_targets(model, [group])
    assert len(prune_targets(model, ["o_proj"])) == 4
