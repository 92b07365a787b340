"""What a model folder that somebody else wrote may not do, and what presets expect of published architectures."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import BertConfig, PretrainedConfig, ResNetConfig, ViTConfig, dynamic_module_utils

from pipelines.config.load import load_config
from pipelines.config.schema import ConfigError, ModelConfig
from pipelines.encoding.text import load_tokenizer
from pipelines.model.load import blank_model, load_base, load_model_config
from rfa.adapters import lora_layers


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
