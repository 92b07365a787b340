"""The four files of MNIST-like data: what becomes of them, and what is said of broken ones."""

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image
from pyarrow import fs

from pipelines.config.data import SourceConfig
from pipelines.config.schema import ConfigError
from pipelines.data.sources import SourceError, find_pieces, open_rows

NUMBERS = {"train": 600, "test": 3}  # rows of each split: of train, more than are read at once
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


def read(path: object, split: str = "train") -> tuple[list[str] | None, list[dict[str, Any]]]:
    [piece] = find_pieces("forget", SourceConfig(path=f"idx:{path}", split=split))
    with open_rows(piece, {"image", "label"}) as (columns, rows):
        return columns, list(rows)


def assert_rows_of(split: str, found: tuple[list[str] | None, list[dict[str, Any]]]) -> None:
    columns, rows = found
    assert columns == ["image", "label"]
    assert [row["label"] for row in rows] == [row % 10 for row in range(NUMBERS[split])]
    opened = [Image.open(io.BytesIO(row["image"])) for row in rows]
    assert {image.mode for image in opened} == {"L"}
    assert np.array_equal([np.asarray(image) for image in opened], pixels(split))


@pytest.mark.parametrize("split", NUMBERS)
@pytest.mark.parametrize("pack, suffix", [(bytes, ""), (gzip.compress, ".gz")])
def test_both_splits_are_read_packed_or_not_and_no_grey_value_changes(
    tmp_path: Path, split: str, pack: Callable[[bytes], bytes], suffix: str
) -> None:
    for each in NUMBERS:
        write_split(tmp_path, each, pack, suffix)
    assert_rows_of(split, read(tmp_path, split))


def test_a_bucket_is_read_as_a_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path, "test", gzip.compress, ".gz")
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        bucket = fs.S3FileSystem(
            scheme="http",
            endpoint_override=f"{host}:{port}",
            allow_bucket_creation=True,
            background_writes=False,
        )
        bucket.create_dir("digits")
        fs.copy_files(str(tmp_path), "digits/data", destination_filesystem=bucket)
        assert_rows_of("test", read("s3://digits/data", "test"))
    finally:
        server.stop()


@pytest.mark.parametrize(
    "split, words",
    [
        ("dev", "data.forget.split: idx:{tmp} has no split 'dev'; it has: train, test"),
        (
            "train",
            "data.forget.path: idx:{tmp} has no file train-images-idx3-ubyte; allowed: a folder with it, as it is",
        ),
        ("test", "data.forget.path: idx:{tmp} has no file t10k-labels-idx1-ubyte; allowed: "),
    ],
)
def test_a_split_that_is_not_there_is_refused_by_the_driver(
    tmp_path: Path, split: str, words: str
) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(images_file(pixels("test")))
    with pytest.raises(ConfigError) as caught:
        find_pieces("forget", SourceConfig(path=f"idx:{tmp_path}", split=split))
    assert str(caught.value).startswith(words.format(tmp=tmp_path))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"^data.forget.path: idx:{tmp_path}/none has no file train-images"
    ):
        find_pieces("forget", SourceConfig(path=f"idx:{tmp_path}/none"))


IMAGES, LABELS = images_file(pixels("test")), labels_file([1, 2, 3])
BROKEN = {
    "labels for images": (
        LABELS,
        LABELS,
        "t10k-images-idx3-ubyte with magic number 2049; allowed: 2051",
    ),
    "images for labels": (
        IMAGES,
        IMAGES,
        "t10k-labels-idx1-ubyte with magic number 2051; allowed: 2049",
    ),
    "an empty file": (b"", LABELS, "t10k-images-idx3-ubyte with magic number 0; allowed: 2051"),
    "half a header": (IMAGES[:9], LABELS, "t10k-images-idx3-ubyte that ends within its header"),
    "images of no width": (
        struct.pack(">4I", 2051, 3, 2, 0),
        LABELS,
        "with images of 2 x 0; allowed: at least 1 x 1",
    ),
    "a label less": (
        IMAGES,
        labels_file([1, 2]),
        "has 3 images in t10k-images-idx3-ubyte but 2 labels in t10k-labels",
    ),
    "images cut off": (IMAGES[:-1], LABELS, "t10k-images-idx3-ubyte that ends before its 3 rows"),
    "labels cut off": (IMAGES, LABELS[:-1], "t10k-labels-idx1-ubyte that ends before its 3 rows"),
    "images too long": (
        IMAGES + b"0",
        LABELS,
        "t10k-images-idx3-ubyte that is longer than its header says",
    ),
    "labels too long": (
        IMAGES,
        LABELS + b"0",
        "t10k-labels-idx1-ubyte that is longer than its header says",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    images, labels, words = BROKEN[case]
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(SourceError) as caught:
        read(tmp_path, "test")
    assert words in caught.value.text
    assert "; allowed: " in caught.value.text
    assert caught.value.key == "path"


def test_a_packed_file_that_is_cut_off_or_not_packed_is_refused(tmp_path: Path) -> None:
    for broken in (gzip.compress(IMAGES)[:-12], IMAGES):
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(broken)
        (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(LABELS))
        with pytest.raises(SourceError, match=r"t10k-images|cannot be read as idx"):
            read(tmp_path, "test")
