"""Rows with a class: how texts and images become what a classifier reads.

An image stays the bytes of its file until a worker makes a batch of it, with the model's own image processor.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.data import Dataset

from pipelines.cluster.tasks import result_of
from pipelines.config.schema import ConfigError, ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets
from pipelines.encoding.text import Encoder, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from rfa.batch import Row

LABELS_NEEDED = {"class_mean": 2, "balanced_mean": 1}  # by the targets that go by labels


class ClassEncoder:
    """Encodes rows for one classifier. Picklable: tokenizer and image processor are loaded once in each process."""

    mixes = True

    def __init__(self, model: ModelConfig, max_tokens: int, *, reads_images: bool) -> None:
        self.model, self.max_tokens, self.reads_images = model, max_tokens, reads_images

    def encode_batch(self, batch: Any) -> dict[str, Any]:
        """Ray Data map: the columns that training needs; of an image, its file's bytes."""
        known = class_numbers(self.model)
        ids = np.empty(len(batch["row"]), dtype=object)
        for index, text in enumerate(batch["answer"]):
            ids[index] = np.asarray(
                [0] if self.reads_images else self._ids(str(text)), dtype=np.int32
            )
        columns = {
            "set": batch["set"],
            "row": batch["row"],
            "label": np.asarray(
                [class_number(str(label), known) for label in batch["label"]], dtype=np.int64
            ),
            "input_ids": ids,
            "answer_start": np.zeros(len(ids), dtype=np.int32),
            "length": np.asarray([len(own) for own in ids], dtype=np.int32),
        }
        return {**columns, "image": batch["image"]} if self.reads_images else columns

    def rows(self, records: Sequence[Mapping[str, Any]]) -> "list[Row]":
        """Encoded rows, for a batch."""
        from rfa.batch import Row  # late: whoever only encodes does without torch

        pixels = (
            self.pixels([record["image"] for record in records])
            if self.reads_images and records
            else None
        )
        return [
            Row(
                list(record["input_ids"]),
                0,
                int(record["row"]),
                int(record["label"]),
                utility=record["set"] == "utility",
                classified=True,
                pixels_CHW=None if pixels is None else pixels[index],
            )
            for index, record in enumerate(records)
        ]

    def pixels(self, images: Iterable[bytes]) -> "Tensor":
        """Images as the model reads them: [B, C, H, W]."""
        from PIL import Image

        processor = _image_processor(
            self.model.path, self.model.revision, self.model.trust_remote_code
        )
        mode = "L" if _channels(self.model) == 1 else "RGB"
        opened = [Image.open(io.BytesIO(image)).convert(mode) for image in images]
        return processor(opened, return_tensors="pt")["pixel_values"]

    def blank(self) -> "Row":
        """A row that no term counts, for a worker whose share is empty."""
        from rfa.batch import Row

        if not self.reads_images:
            return Row([self.pad_token_id], 0, classified=True)
        from PIL import Image

        side = getattr(load_class_config(self.model), "image_size", 32)
        file = io.BytesIO()
        Image.new("L", (side, side) if isinstance(side, int) else tuple(side)).save(file, "PNG")
        return Row([0], 0, classified=True, pixels_CHW=self.pixels([file.getvalue()])[0])

    @property
    def pad_token_id(self) -> int:
        """What rows are padded with."""
        if self.reads_images:
            return 0
        padding: Any = load_tokenizer(self.model, ends=False).pad_token_id
        return int(padding or 0)

    def _ids(self, text: str) -> list[int]:
        tokenizer = load_tokenizer(self.model, ends=False)
        return tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]


def build_encoder(cfg: UnlearnConfig) -> Encoder | ClassEncoder:
    """What encodes the rows of the configured task."""
    if cfg.task == "causal_lm":
        return Encoder(cfg.model, cfg.data.system_prompt, cfg.data.max_tokens)
    return ClassEncoder(
        cfg.model, cfg.data.max_tokens, reads_images=cfg.task == "image_classification"
    )


def class_numbers(model: ModelConfig) -> dict[str, int]:
    """The model's classes: their numbers by name, and by the number in words."""
    named = {int(number): str(name) for number, name in load_class_config(model).id2label.items()}
    return {str(number): number for number in named} | {
        name: number for number, name in named.items()
    }


def class_number(label: str, known: Mapping[str, int]) -> int:
    """The number of a row's class.

    Raises:
        ConfigError: the model has no such class.
    """
    if label not in known:
        raise ConfigError(
            f"data.columns.label: found '{label}', allowed: the model's classes, {', '.join(list(known)[:12])}"
        )
    return known[label]


def check_labels(cfg: UnlearnConfig, sets: Sets) -> None:
    """Refuse rows of a class that the model does not have, before anything is trained.

    Raises:
        ConfigError: names the label.
    """
    if cfg.task != "causal_lm":
        found = sorted(set().union(*(_labels_of(rows) for _, rows in sets.items())))
        result_of(ray.remote(_check_labels).remote(cfg.model, found))


def _check_labels(model: ModelConfig, labels: list[str]) -> None:
    known = class_numbers(model)
    for label in labels:
        class_number(label, known)


def check_target(cfg: UnlearnConfig, sets: Sets) -> None:
    """Refuse a target that goes by labels where the retain set has too few, before anything is trained.

    Raises:
        ConfigError: says how many labels it has.
    """
    least = LABELS_NEEDED.get(cfg.objective.target, 0)
    if not least or (cfg.solve.mode == "off" and not cfg.objective.weights.align):
        return
    found = len(_labels_of(sets.retain) - {""})
    if found < least:
        raise ConfigError(
            f"objective.target: found {cfg.objective.target}, and {found} labels in the column "
            f"'{cfg.data.columns.label}' of retain (data.columns.label), allowed: {least} or more, or another target"
        )


def _labels_of(rows: Dataset) -> set[str]:
    """The labels in a set: its blocks stay where they are."""
    return set().union(
        *ray.get([ray.remote(_distinct_labels).remote(block) for block in rows.to_arrow_refs()])
    )


def _distinct_labels(block: Any) -> list[str]:
    return block["label"].unique().to_pylist()


def load_class_config(model: ModelConfig) -> Any:
    """The model's configuration, read once a process."""
    return _cached_config(model.path, model.revision, model.trust_remote_code)


@lru_cache(maxsize=2)
def _cached_config(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


@lru_cache(maxsize=2)
def _image_processor(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoImageProcessor

    # Its torchvision backend is left out: PIL's gives the same on every machine.
    return AutoImageProcessor.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code, backend="pil"
    )


def load_image_processor(model: ModelConfig) -> Any:
    """The image processor of a model folder or hub name."""
    return _image_processor(model.path, model.revision, model.trust_remote_code)


def _channels(model: ModelConfig) -> int:
    return int(getattr(load_class_config(model), "num_channels", 3))
