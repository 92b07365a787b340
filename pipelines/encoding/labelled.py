"""Rows with a class: texts and images as the inputs of a classifier.

An image stays the bytes of its file until a worker makes a batch of it, with the model's own image
processor.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.data import Dataset

from pipelines.cluster.tasks import result_of
from pipelines.config.schema import ConfigError, ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets
from pipelines.encoding.text import load_tokenizer, loaded_once
from pipelines.encoding.windows import RowLength

if TYPE_CHECKING:
    from torch import Tensor

    from rfa.batch import Row

LABELS_NEEDED = {"class_mean": 2, "balanced_mean": 1}  # by the targets that go by labels
LABELS_IN_A_MESSAGE = 12


class ClassEncoder:
    """Encodes rows for one classifier. Each process that uses it loads the tokenizer once."""

    mixes = True  # batches draw their rows from all over a source, which is often sorted by class

    def __init__(self, model: ModelConfig, max_tokens: int, *, reads_images: bool) -> None:
        self.model, self.max_tokens, self.reads_images = model, max_tokens, reads_images

    def encode_batch(self, batch: Any) -> dict[str, Any]:
        """Return the columns of a batch that training needs. Images stay the bytes of files."""
        classes = class_numbers(self.model)
        size = len(batch["row"])
        ids: list[list[int]] = []  # no arrays, of which Ray would make tensors of several types
        label, length = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int32)
        for index in range(size):
            tokens = [0]  # an image counts as one
            if not self.reads_images:
                tokens = self._tokens(str(batch["answer"][index]))
            ids.append(tokens)
            length[index] = len(tokens)
            label[index] = class_number(str(batch["label"][index]), classes)
        columns = {
            "set": batch["set"],
            "row": batch["row"],
            "label": label,
            "input_ids": ids,
            "answer_start": np.zeros(size, dtype=np.int32),
            "part": np.zeros(size, dtype=np.int32),
            "length": length,
        }
        if self.reads_images:
            columns["image"] = batch["image"]
        return columns

    def length(self, row: Mapping[str, Any]) -> RowLength:
        """Return the tokens of a row's text, which a classifier reads at once or not at all."""
        tokenizer = load_tokenizer(self.model, ends=False)
        return RowLength(len(tokenizer(row["answer"])["input_ids"]), 1)

    def _tokens(self, text: str) -> list[int]:
        tokenizer = load_tokenizer(self.model, ends=False)
        return tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]

    def rows(self, records: Sequence[Mapping[str, Any]]) -> "list[Row]":
        """Return encoded rows, for a batch."""
        from rfa.batch import Row  # imports torch, which a process that only encodes never needs

        rows: list[Row] = []
        for record in records:
            ids, label = list(record["input_ids"]), int(record["label"])
            row = Row(ids, 0, int(record["row"]), label, classified=True)
            utility, earlier = (record["set"] == name for name in ("utility", "earlier"))
            rows.append(row._replace(utility=utility, earlier=earlier))
        if not rows or not self.reads_images:
            return rows
        pixels_BCHW = self.pixels(record["image"] for record in records)
        for index, row in enumerate(rows):
            rows[index] = row._replace(pixels_CHW=pixels_BCHW[index])
        return rows

    def pixels(self, images: Iterable[bytes]) -> "Tensor":
        """Return image files as the model reads them, [B, C, H, W]."""
        from PIL import Image

        mode = "RGB"
        if getattr(load_class_config(self.model), "num_channels", 3) == 1:
            mode = "L"
        opened = [Image.open(io.BytesIO(image)).convert(mode) for image in images]
        return load_image_processor(self.model)(opened, return_tensors="pt")["pixel_values"]

    def blank(self) -> "Row":
        """Return a row that no term counts, for a worker whose share is empty."""
        from rfa.batch import Row

        if not self.reads_images:
            return Row([self.pad_token_id], 0, classified=True)
        from PIL import Image

        side = getattr(load_class_config(self.model), "image_size", 32)
        shape = (side, side) if isinstance(side, int) else tuple(side)
        file = io.BytesIO()
        Image.new("L", shape).save(file, "PNG")
        return Row([0], 0, classified=True, pixels_CHW=self.pixels([file.getvalue()])[0])

    @property
    def pad_token_id(self) -> int:
        """Return the token that rows are padded with."""
        if self.reads_images:
            return 0
        token: Any = load_tokenizer(self.model, ends=False).pad_token_id
        return int(token or 0)


def class_numbers(model: ModelConfig) -> dict[str, int]:
    """Map the name of each of the model's classes, and its number as a string, to its number."""
    numbers: dict[str, int] = {}
    names: dict[str, int] = {}
    for number, name in load_class_config(model).id2label.items():
        numbers[str(number)] = names[str(name)] = int(number)
    return numbers | names


def class_number(label: str, classes: Mapping[str, int]) -> int:
    """Return the number of a row's class.

    Raises:
        ConfigError: the model has no such class.
    """
    if label not in classes:
        names = ", ".join(list(classes)[:LABELS_IN_A_MESSAGE])
        raise ConfigError(
            f"data.columns.label: found '{label}', allowed: the model's classes, {names}"
        )
    return classes[label]


def check_labels(cfg: UnlearnConfig, sets: Sets) -> None:
    """Refuse rows of a class that the model does not have, before anything is trained.

    Raises:
        ConfigError: a row has such a class. The text names it.
    """
    if cfg.task != "causal_lm":
        labels: set[str] = set()
        for _, rows in sets.items():
            labels |= _labels_of(rows)
        result_of(ray.remote(_check_labels).remote(cfg.model, sorted(labels)))


def _check_labels(model: ModelConfig, labels: list[str]) -> None:
    classes = class_numbers(model)
    for label in labels:
        class_number(label, classes)


def check_target(cfg: UnlearnConfig, sets: Sets) -> None:
    """Refuse a target that goes by labels where the retain set has too few, before training.

    Raises:
        ConfigError: there are too few labels. The text has their number.
    """
    target = cfg.objective.target
    least = LABELS_NEEDED.get(target, 0)
    if not least or (cfg.solve.mode == "off" and not cfg.objective.settings().aligns):
        return
    count = len(_labels_of(sets.retain) - {""})
    if count < least:
        raise ConfigError(
            f"objective.target: found {target}, and {count} labels in the column "
            f"'{cfg.data.columns.label}' of retain (data.columns.label), "
            f"allowed: {least} or more, or another target"
        )


def _labels_of(rows: Dataset) -> set[str]:
    """Return the labels in a set. Each block is reduced where it lies, without moving its rows."""
    distinct = ray.remote(_distinct_labels)
    return set().union(*ray.get([distinct.remote(block) for block in rows.to_arrow_refs()]))


def _distinct_labels(block: Any) -> list[str]:
    return block["label"].unique().to_pylist()


@loaded_once
def load_class_config(model: ModelConfig) -> Any:
    """Read the model's configuration, once a process."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )


@loaded_once
def load_image_processor(model: ModelConfig) -> Any:
    """Load the image processor of a model folder or hub name, once a process."""
    from transformers import AutoImageProcessor

    # PIL's backend gives the same pixels on every machine, with or without torchvision.
    return AutoImageProcessor.from_pretrained(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        backend="pil",
    )
