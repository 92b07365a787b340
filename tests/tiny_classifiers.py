"""Tiny problems of classification that are learned in seconds: images, texts, and fresh models."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.benchmarks.idx import pgm_files

CLASSES = 4
WORDS = ("river", "copper", "lantern", "orchard")


def write_images(folder: Path, seed: int = 0) -> Path:
    """`train.parquet` (240 rows) and `test.parquet` (80): noisy images of 8 x 8, whose class is the bright quadrant."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for name, count in (("train", 240), ("test", 80)):
        labels = np.arange(count, dtype=np.uint8) % CLASSES
        images = draw.integers(0, 120, (count, 8, 8), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            top, left = 4 * (label // 2), 4 * (label % 2)
            image[top : top + 4, left : left + 4] += 110
        table = pa.table({"image": pgm_files(images.tobytes(), 8, 8), "label": pa.array(labels)})
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def write_image_model(kind: str, folder: Path, classes: int = CLASSES) -> Path:
    """A fresh ViT or ResNet for them, with its image processor."""
    torch.manual_seed(0)
    if kind == "vit":
        shape = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
        }
        config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=classes, **shape)
        model = ViTForImageClassification(config)
    else:
        sizes = {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "layer_type": "basic",
        }
        model = ResNetForImageClassification(
            ResNetConfig(num_channels=1, num_labels=classes, **sizes)
        )
    model.save_pretrained(folder)
    still = {"do_resize": False, "size": {"height": 8, "width": 8}}
    ViTImageProcessorPil(**still, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    return folder


def write_texts(folder: Path, seed: int = 0) -> Path:
    """`train.jsonl` (160 rows) and `test.jsonl` (40): a word says the class."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for name, count in (("train", 160), ("test", 40)):
        rows = [
            {
                "id": f"{name}-{n}",
                "label": n % CLASSES,
                "text": f"number {draw.integers(10**6)} near the {WORDS[n % 4]}",
            }
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder


def write_text_model(folder: Path, tokenizer: Path) -> Path:
    """A fresh BERT with the tokenizer of another model folder."""
    torch.manual_seed(0)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    config = BertConfig(vocab_size=len(loaded), num_labels=CLASSES, hidden_dropout_prob=0, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    loaded.save_pretrained(folder)
    return folder
