"""IDX, the format of MNIST and of data like it: a file of grey images and a file of labels for each of two splits.

A file is a magic number (two zero bytes, 8 for unsigned bytes, the number of dimensions), the dimensions as big-endian
32-bit numbers, and the values (yann.lecun.com/exdb/mnist). Compressed files end in `.gz`. An image becomes a PGM file,
which is its values behind a line of its size: nothing is cheaper to write, and PIL opens it.
"""

import io
import struct
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pyarrow import fs

from pipelines.storage.filesystem import list_files

PREFIXES = {"train": "train", "test": "t10k"}  # by split
COLUMNS = ("image", "label")
UNSIGNED_BYTES = 0x0800  # the magic number, but for the number of dimensions
CHUNK_IMAGES = 256  # images read at once


class IdxError(Exception):
    """What is wrong with the files, without their content; `key` is the configuration key at fault."""

    def __init__(self, text: str, key: str = "path") -> None:
        super().__init__(text, key)
        self.text = text
        self.key = key


class _File(NamedTuple):
    """A file behind its header."""

    name: str
    stream: io.BufferedReader
    shape: tuple[int, ...]


def idx_files(filesystem: fs.FileSystem, folder: str, split: str) -> list[str]:
    """The paths of a split's images and labels.

    Raises:
        IdxError: the split is none of ours, or a file is not there.
        OSError: the folder cannot be listed.
    """
    if split not in PREFIXES:
        raise IdxError(f"has no split '{split}'; it has: {', '.join(PREFIXES)}", key="split")
    wanted = [f"{PREFIXES[split]}-images-idx3-ubyte", f"{PREFIXES[split]}-labels-idx1-ubyte"]
    found = {PurePosixPath(path).name: path for path in list_files(filesystem, folder)}
    paths = [found.get(name, found.get(f"{name}.gz")) for name in wanted]
    missing = [name for name, path in zip(wanted, paths, strict=True) if path is None]
    if missing:
        raise IdxError(
            f"has no file {missing[0]}; allowed: a folder with it, as it is or as {missing[0]}.gz"
        )
    return [path for path in paths if path is not None]


@contextmanager
def idx_rows(
    filesystem: fs.FileSystem, folder: str, split: str
) -> Generator[Iterator[dict[str, Any]]]:
    """The rows of a split, as a stream: `image`, a PGM file's bytes, and `label`, a number.

    Raises:
        IdxError: as `idx_files`, or a file is not such a file, or shorter or longer than its header says.
    """
    with ExitStack() as stack:
        images, labels = [
            stack.enter_context(_open(filesystem, path, dimensions))
            for path, dimensions in zip(idx_files(filesystem, folder, split), (3, 1), strict=True)
        ]
        if images.shape[0] != labels.shape[0]:
            raise IdxError(
                f"has {images.shape[0]} images in {images.name} but {labels.shape[0]} labels in {labels.name}; "
                "allowed: equally many"
            )
        yield _rows(images, labels)


@contextmanager
def _open(filesystem: fs.FileSystem, path: str, dimensions: int) -> Generator[_File]:
    name = PurePosixPath(path).name
    with (
        filesystem.open_input_stream(path) as raw,
        io.BufferedReader(raw, 1 << 20) as stream,
    ):  # Arrow unpacks .gz
        size = 4 * (1 + dimensions)
        header = stream.read(size)
        expected = UNSIGNED_BYTES + dimensions
        magic = int.from_bytes(header[:4], "big")
        if len(header) < 4 or magic != expected:
            raise IdxError(f"has a file {name} with magic number {magic}; allowed: {expected}")
        if len(header) < size:
            raise IdxError(f"has a file {name} that ends within its header; allowed: a whole file")
        shape = struct.unpack(f">{dimensions}I", header[4:])
        if 0 in shape[1:]:
            raise IdxError(
                f"has a file {name} with images of {shape[1]} x {shape[2]}; allowed: at least 1 x 1"
            )
        yield _File(name, stream, shape)


def _rows(images: _File, labels: _File) -> Iterator[dict[str, Any]]:
    count, height, width = images.shape
    size = height * width
    header = f"P5 {width} {height} 255\n".encode()
    for first in range(0, count, CHUNK_IMAGES):
        number = min(CHUNK_IMAGES, count - first)
        pixels = _read(images, number * size)
        classes = _read(labels, number)
        for index, label in enumerate(classes):
            yield {"image": header + pixels[index * size : (index + 1) * size], "label": label}
    for file in (images, labels):
        if file.stream.read(1):
            raise IdxError(
                f"has a file {file.name} that is longer than its header says; allowed: a whole file"
            )


def _read(file: _File, size: int) -> bytes:
    values = file.stream.read(size)
    if len(values) < size:
        raise IdxError(
            f"has a file {file.name} that ends before its {file.shape[0]} rows; allowed: a whole file"
        )
    return values
