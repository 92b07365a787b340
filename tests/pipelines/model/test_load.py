"""What a model folder that somebody else wrote may not do, and what presets expect of published architectures."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, PretrainedConfig, ResNetConfig, ViTConfig, dynamic_module_utils

from pipelines.config.load import load_config
from pipelines.config.schema import ConfigError, ModelConfig
from pipelines.encoding.text import load_tokenizer
from pipelines.model import load
from pipelines.model.folder import check_weights, load_model_config
from pipelines.model.load import blank_model, build_alignment, load_base
from pipelines.model.pruning import held_rows, keep_pruned_, prune_base
from rfa.adapters import ADAPTER, lora_layers
from tests.tiny_classifiers import write_image_model, write_text_model


@pytest.fixture
def folder(problem: Path, tmp_path: Path) -> Path:
    return shutil.copytree(problem / "model", tmp_path / "model")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_code_in_a_model_folder_is_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\n")
    change(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Config", None]})
    with pytest.raises(ConfigError, match=r"model\.path: .* cannot be loaded"):
        load_model_config(ModelConfig(path=str(folder)))
    load_tokenizer(ModelConfig(path=str(folder)))
    assert not trace.exists()
    with suppress(Exception):  # the bait is real
        load_model_config(ModelConfig(path=str(folder), trust_remote_code=True))
    assert trace.exists()


def test_pickled_weights_beside_a_decoy_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "decoy.safetensors").touch()
    load_model_config(ModelConfig(path=str(folder)))  # the decoy passes here
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_base(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/model.safetensors", "pytorch_model.bin"]
)
def test_an_index_names_safetensors_of_its_own_folder_alone(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps(
            {"weight_map": {"lm_head.weight": "model.safetensors", "model.norm.weight": name}}
        )
    )
    with pytest.raises(ConfigError) as caught:
        load_model_config(ModelConfig(path=str(folder)))
    assert f"names '{name}', allowed: .safetensors files of that folder" in str(caught.value)


def test_a_broken_index_is_one_line(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(
        ConfigError, match="is no index of weights, allowed: what save_pretrained writes"
    ):
        load_model_config(ModelConfig(path=str(folder)))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> ModelConfig:
    """The model of the folder with other weights."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return ModelConfig(path=str(folder))


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


def test_weights_that_are_those_of_the_model_pass(folder: Path) -> None:
    check_weights(ModelConfig(path=str(folder)), "causal_lm", "model.path")


@pytest.mark.parametrize(
    "change, message",
    [
        (without("lm_head"), "lack 1 of the tensors of its config.json (lm_head.weight)"),
        (without(".layers.2."), "lack 9 of the tensors of its config.json (model.layers.2.input_"),
        (
            lambda weights: {f"base_model.model.{name}": w for name, w in weights.items()},
            "and hold 39 that it does not have (base_model.model.lm_head.weight, ",
        ),
        (
            lambda weights: weights | {"model.layers.9.extra": torch.ones(1)},
            "hold 1 that it does not have (model.layers.9.extra)",
        ),
        (
            lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"][1:]},
            "do not load (",
        ),
    ],
    ids=["no head", "no block", "a wrapper's prefix", "one too many", "another shape"],
)
def test_weights_of_another_model_are_refused_by_name(
    folder: Path, change: Callable[..., dict[str, Tensor]], message: str
) -> None:
    model = rewrite(folder, change)
    with pytest.raises(ConfigError) as caught:
        check_weights(model, "causal_lm", "evaluation.oracle")
    assert str(caught.value).startswith(f"evaluation.oracle: the weights of {folder} ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b""]
)
def test_a_file_that_holds_no_weights_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.path: the weights of .* do not load \("):
        check_weights(ModelConfig(path=str(folder)), "causal_lm", "model.path")


def test_an_index_of_a_file_that_is_not_there_is_refused(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"names model-00002-of-00002\.safetensors, which is"):
        load_model_config(ModelConfig(path=str(folder)))


def test_only_fine_tuning_takes_a_classifier_without_its_head(
    problem: Path, tmp_path: Path
) -> None:
    write_text_model(tmp_path / "text", problem / "model")
    model = rewrite(tmp_path / "text", without("classifier."))
    check_weights(model, "sequence_classification", "model.path", new_head=True)
    language_model = ModelConfig(path=f"{problem}/model")
    check_weights(language_model, "sequence_classification", "model.path", new_head=True)
    with pytest.raises(ConfigError, match=r"lack 2 .*\(classifier\.bias, classifier\.weight\)"):
        check_weights(model, "sequence_classification", "model.path")
    model = rewrite(tmp_path / "text", without("embeddings"))
    with pytest.raises(ConfigError, match="lack 5 "):
        check_weights(model, "sequence_classification", "model.path", new_head=True)


def test_weights_of_a_hub_name_are_checked_when_they_are_loaded(
    folder: Path, problem: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There is no hub here: folders stand for hub names.
    monkeypatch.setattr(load, "is_local", lambda _model: False)
    load_base(ModelConfig(path=str(folder)))
    model = rewrite(folder, without(".layers.2."))
    with pytest.raises(ConfigError) as caught:
        load_base(model, key="evaluation.oracle")
    lack = f"evaluation.oracle: the weights of {folder} lack 9 of the tensors of its config.json ("
    assert str(caught.value).startswith(lack)
    write_text_model(tmp_path / "text", problem / "model")
    model = rewrite(tmp_path / "text", without("classifier."))
    load_base(model, task="sequence_classification", new_head=True)
    with pytest.raises(ConfigError, match=r"model\.path: .* lack 2 .*\(classifier\.bias, "):
        load_base(model, task="sequence_classification")


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds an adapter \(adapter_config\.json\)"):
        load_model_config(ModelConfig(path=str(folder)))


def test_an_attention_kernel_of_the_hub_is_refused(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="kernels-community/flash-attn")
    with pytest.raises(ConfigError, match=r"attention kernel of the hub .*flash-attn.* sdpa"):
        load_model_config(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes"])
def test_quantised_weights_are_refused_with_what_to_give_instead(folder: Path, method: str) -> None:
    change(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ConfigError, match=rf"are quantised \({method}\).* in 16 or 32 bits"):
        load_model_config(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    "preset, architecture, adapted",
    [
        (
            "prunelora_image",
            ViTConfig(num_labels=10),
            13,
        ),  # ViT-B: twelve attention outputs and the head
        (
            "prunelora_resnet",
            ResNetConfig(num_labels=10),
            54,
        ),  # ResNet-50: 53 convolutions and the head
        ("rfa_image", ViTConfig(num_labels=10), 1),
        ("rfa_text", BertConfig(), 2),
    ],
    ids=["PruneLoRA, ViT-B", "PruneLoRA, ResNet-50", "RFA, ViT-B", "RFA, BERT"],
)
def test_presets_name_layers_that_published_models_have(
    preset: str, architecture: PretrainedConfig, adapted: int
) -> None:
    assert len(lora_layers(blank_model(load_config(preset), architecture))) == adapted


def test_prunelora_resnet_drops_and_refills_as_published(tmp_path: Path) -> None:
    """Dropout of 0.1 before every adapter, also a convolution's, and adapters that fill pruned filters again."""
    torch.manual_seed(0)
    cfg = load_config("prunelora_resnet", [f"model.path={write_image_model('resnet', tmp_path)}"])
    base = load_base(cfg.model, task=cfg.task)
    masks = prune_base(cfg, base, {})
    alignment = build_alignment(cfg, base, masks)
    layers = dict(lora_layers(alignment.model))
    assert {layer.lora_dropout[ADAPTER].p for layer in layers.values()} == {0.1}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B[ADAPTER].weight)
    merged: Any = alignment.model.merge_and_unload()
    keep_pruned_(cfg, merged, masks)
    refilled: list[bool] = []
    for name, kept_O in held_rows(merged, masks).items():
        assert not kept_O.all(), f"{name}: nothing is pruned"
        refilled.append(bool(merged.get_parameter(name)[~kept_O].abs().amax() > 0))
    assert refilled
    assert all(refilled)
