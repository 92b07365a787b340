"""What a model folder that somebody else wrote may not do."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from pipelines.config import ConfigError, ModelConfig
from pipelines.model import load_base, load_model_config
from pipelines.prompts import load_tokenizer


@pytest.fixture
def folder(problem: Path, tmp_path: Path) -> Path:
    return shutil.copytree(problem / "model", tmp_path / "model")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_code_in_a_model_folder_is_not_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", "pytorch_model.bin"])
def test_an_index_names_safetensors_of_its_own_folder_alone(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model.safetensors", "model.norm.weight": name}}))
    with pytest.raises(ConfigError) as caught:
        load_model_config(ModelConfig(path=str(folder)))
    assert f"names '{name}', allowed: .safetensors files of that folder" in str(caught.value)


def test_a_broken_index_is_one_line(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no index of weights, allowed: what save_pretrained writes"):
        load_model_config(ModelConfig(path=str(folder)))
