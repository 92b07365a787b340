"""The four files of MNIST-like data as Parquet, and the refusal of broken ones."""

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.config.data import SourceConfig
from pipelines.data.readers import open_rows
from pipelines.data.sources import find_pieces
from tests.benchmarks.idx import convert, read_split

NUMBERS = {"train": 600, "test": 3}  # rows of each split
PREFIXES = {"train": "train", "test": "t10k"}
HEIGHT, WIDTH = 2, 3


def pixels(split: str) -> np.ndarray:
    return np.random.default_rng(NUMBERS[split]).integers(
        0, 256, (NUMBERS[split], HEIGHT, WIDTH), np.uint8
    )


def images_file(values: np.ndarray) -> bytes:
    return struct.pack(">4I", 2051, *values.shape) + values.tobytes()


def labels_file(labels: list[int]) -> bytes:
    return struct.pack(">2I", 2049, len(labels)) + bytes(labels)


def write_split(
    folder: Path, split: str, pack: Callable[[bytes], bytes] = bytes, suffix: str = ""
) -> None:
    labels = [row % 10 for row in range(NUMBERS[split])]
    (folder / f"{PREFIXES[split]}-images-idx3-ubyte{suffix}").write_bytes(
        pack(images_file(pixels(split)))
    )
    (folder / f"{PREFIXES[split]}-labels-idx1-ubyte{suffix}").write_bytes(pack(labels_file(labels)))


def read_set(path: Path) -> tuple[list[str] | None, list[dict[str, Any]]]:
    """The rows as a set's source gives them."""
    [piece] = find_pieces("forget", SourceConfig(path=str(path)))
    with open_rows(piece, {"image", "label"}) as (columns, rows):
        return columns, list(rows)


@pytest.mark.parametrize("pack, suffix", [(bytes, ""), (gzip.compress, ".gz")])
def test_both_splits_are_converted_packed_or_not_and_no_grey_value_changes(
    tmp_path: Path, pack: Callable[[bytes], bytes], suffix: str
) -> None:
    for split in NUMBERS:
        write_split(tmp_path, split, pack, suffix)
    target = convert(tmp_path, tmp_path / "parquet")
    for split, number in NUMBERS.items():
        columns, rows = read_set(target / f"{split}.parquet")
        assert columns == ["image", "label"]
        assert [row["label"] for row in rows] == [row % 10 for row in range(number)]
        opened = [Image.open(io.BytesIO(row["image"])) for row in rows]
        assert {image.mode for image in opened} == {"L"}
        assert np.array_equal([np.asarray(image) for image in opened], pixels(split))


@pytest.mark.parametrize(
    "split, missing",
    [("train", "train-images-idx3-ubyte"), ("test", "t10k-labels-idx1-ubyte")],
)
def test_a_missing_file_is_named(tmp_path: Path, split: str, missing: str) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(images_file(pixels("test")))
    with pytest.raises(ValueError, match=f"^{tmp_path} has no file {missing}, as it is or as "):
        read_split(tmp_path, split)


def test_a_folder_that_is_not_there_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path}/none has no file train-images"):
        convert(tmp_path / "none", tmp_path / "parquet")
    assert not (tmp_path / "parquet").exists()


IMAGES, LABELS = images_file(pixels("test")), labels_file([1, 2, 3])
BROKEN = {
    "labels for images": (
        LABELS,
        LABELS,
        "t10k-images-idx3-ubyte has the magic number 2049, allowed: 2051",
    ),
    "images for labels": (
        IMAGES,
        IMAGES,
        "t10k-labels-idx1-ubyte has the magic number 2051, allowed: 2049",
    ),
    "an empty file": (b"", LABELS, "t10k-images-idx3-ubyte has the magic number 0, allowed: 2051"),
    "half a header": (IMAGES[:9], LABELS, "t10k-images-idx3-ubyte ends within its header"),
    "images of no width": (
        struct.pack(">4I", 2051, 3, 2, 0),
        LABELS,
        "has images of 2 x 0, allowed: at least 1 x 1",
    ),
    "a label less": (
        IMAGES,
        labels_file([1, 2]),
        "has 3 images of test but 2 labels, allowed: equally many",
    ),
    "images cut off": (IMAGES[:-1], LABELS, "t10k-images-idx3-ubyte ends before its 3 rows"),
    "labels cut off": (IMAGES, LABELS[:-1], "t10k-labels-idx1-ubyte ends before its 3 rows"),
    "images too long": (
        IMAGES + b"0",
        LABELS,
        "t10k-images-idx3-ubyte is longer than its header says",
    ),
    "labels too long": (
        IMAGES,
        LABELS + b"0",
        "t10k-labels-idx1-ubyte is longer than its header says",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    images, labels, words = BROKEN[case]
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ValueError) as caught:
        read_split(tmp_path, "test")
    assert words in str(caught.value)


def test_a_packed_file_that_is_cut_off_or_not_packed_is_refused(tmp_path: Path) -> None:
    for broken in (gzip.compress(IMAGES)[:-12], IMAGES):
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(broken)
        (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(LABELS))
        with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz cannot be unpacked"):
            read_split(tmp_path, "test")
