"""From IDX files, the format of MNIST and of data like it, to Parquet, which a set's source can be.

A split is a file of grey images and a file of labels. A file is a magic number (two zero bytes, 8 for unsigned bytes,
the number of dimensions), the dimensions as big-endian 32-bit numbers, and the values (yann.lecun.com/exdb/mnist).
Compressed files end in `.gz`. An image becomes a PGM file, which is its values behind a line of its size: nothing is
cheaper to write, and PIL opens it.

Usage: python -m tests.benchmarks.idx SOURCE TARGET, which writes train.parquet and test.parquet.
"""

import gzip
import struct
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PREFIXES = {"train": "train", "test": "t10k"}  # by split
UNSIGNED_BYTES = 0x0800  # the magic number, but for the number of dimensions


def convert(source: Path, target: Path) -> Path:
    """Write both splits of a folder of IDX files as Parquet with the columns `image` and `label`; return the folder.

    Raises:
        ValueError: names the file that is missing or broken.
    """
    splits = {split: read_split(source, split) for split in PREFIXES}
    target.mkdir(parents=True, exist_ok=True)
    for split, table in splits.items():
        pq.write_table(table, target / f"{split}.parquet")
    return target


def read_split(folder: Path, split: str) -> pa.Table:
    """Return a split's rows: `image`, a PGM file's bytes, and `label`, a number.

    Raises:
        ValueError: a file is missing, is not IDX, or is shorter or longer than its header says.
    """
    images, (count, height, width) = read_file(folder, f"{PREFIXES[split]}-images-idx3-ubyte", 3)
    labels, (num_labels,) = read_file(folder, f"{PREFIXES[split]}-labels-idx1-ubyte", 1)
    if count != num_labels:
        raise ValueError(
            f"{folder} has {count} images of {split} but {num_labels} labels, allowed: equally many"
        )
    return pa.table({"image": pgm_files(images, height, width), "label": pa.array(labels)})


def pgm_files(pixels: bytes, height: int, width: int) -> list[bytes]:
    """Cut the grey values of images of one size into PGM files."""
    header = f"P5 {width} {height} 255\n".encode()
    size = height * width
    return [header + pixels[start : start + size] for start in range(0, len(pixels), size)]


def read_file(folder: Path, name: str, dimensions: int) -> tuple[bytes, tuple[int, ...]]:
    """Return a file's values and its shape, from the file as it is or from its `.gz`."""
    path, packed = folder / name, folder / f"{name}.gz"
    if path.exists():
        content = path.read_bytes()
    elif packed.exists():
        try:
            content = gzip.decompress(packed.read_bytes())
        except (OSError, EOFError) as error:
            raise ValueError(f"{packed} cannot be unpacked ({error})") from None
    else:
        raise ValueError(f"{folder} has no file {name}, as it is or as {name}.gz")
    expected = UNSIGNED_BYTES + dimensions
    magic = int.from_bytes(content[:4], "big")
    if magic != expected:
        raise ValueError(f"{path} has the magic number {magic}, allowed: {expected}")
    start = 4 * (1 + dimensions)
    if len(content) < start:
        raise ValueError(f"{path} ends within its header")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if 0 in shape[1:]:
        raise ValueError(f"{path} has images of {shape[1]} x {shape[2]}, allowed: at least 1 x 1")
    values = content[start:]
    size = shape[0] * (shape[1] * shape[2] if dimensions == 3 else 1)
    if len(values) < size:
        raise ValueError(f"{path} ends before its {shape[0]} rows")
    if len(values) > size:
        raise ValueError(f"{path} is longer than its header says")
    return values, shape


if __name__ == "__main__":
    print(convert(Path(sys.argv[1]), Path(sys.argv[2])))
