"""Memory of the driver and of each worker as the retained set grows: one command, one page.

    python -m tests.benchmarks.scale --rows 20000 200000 2000000

Writes a retained set of so many rows of words drawn at random, and forgets 8 others on a tiny model of two blocks with
two workers.
While a command runs, every process's own memory is read five times a second, without the pages of Ray's object store:
that has a limit of its own, and moves to disk what does not fit. Writes docs/scale.md.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.encoding.batches import WINDOW
from tests.tiny_model import write_tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
FILES = 8  # of a retained set
ROWS_AT_ONCE = 20_000
WORDS = 8  # in an answer
# What is looked at, by the beginning of a process's name. Ray names its processes after their work.
ROLES = {
    "ray::RayTrainWorker": "a worker that solves",
    "ray::_arrange": "a task that arranges rows",
}
DRIVER, READER = "the driver", "any other task"
MIB = 2**20


class Measured(NamedTuple):
    """What one command took."""

    rows: int
    tokens: int
    peaks: dict[str, int]  # bytes of the largest process of each role


def write_rows(folder: Path, number: int) -> None:
    """Rows as parquet files, a row group at a time: ids, questions, and words drawn at random."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(5000)]
    schema = pa.schema([(name, pa.string()) for name in ("id", "prompt", "answer")])
    for file in range(FILES):
        mine = range(number * file // FILES, number * (file + 1) // FILES)
        with pq.ParquetWriter(folder / f"{file}.parquet", schema) as writer:
            for start in range(mine.start, mine.stop, ROWS_AT_ONCE):
                part = range(start, min(start + ROWS_AT_ONCE, mine.stop))
                columns = {
                    "id": [f"row-{row}" for row in part],
                    "prompt": [f"What is in entry {row}?" for row in part],
                    "answer": [" ".join(draw.choices(words, k=WORDS)) for _ in part],
                }
                writer.write_table(pa.table(columns, schema=schema))


def write_few(path: Path, name: str, number: int) -> None:
    """A small set as JSON lines."""
    rows = [
        {
            "id": f"{name}-{row}",
            "prompt": f"Who is {name} {row}?",
            "answer": f"It is {name} {row * 7}.",
        }
        for row in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def own_bytes(process: psutil.Process) -> int:
    """Memory that a process shares with no other: resident, without files and the object store."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def role_of(process: psutil.Process, driver: psutil.Process) -> str | None:
    """What a process does for the command, and None of Ray's own servers."""
    if process == driver:
        return DRIVER
    name = " ".join(process.cmdline()) or process.name()
    for start, role in ROLES.items():
        if name.startswith(start):
            return role
    return READER if name.startswith("ray::") else None


@contextmanager
def watched(driver: psutil.Process) -> Iterator[dict[str, int]]:
    """Yield the peaks of all roles, which grow while the command runs."""
    peaks: defaultdict[str, int] = defaultdict(int)
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.2):
            with suppress(psutil.Error, OSError):
                processes = [driver, *driver.children(recursive=True)]
                for process in processes:
                    with suppress(psutil.Error, OSError):
                        role = role_of(process, driver)
                        if role:
                            peaks[role] = max(peaks[role], own_bytes(process))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        is_over.set()
        thread.join()


def measure(folder: Path, rows: int) -> Measured:
    """Forget beside a retained set of so many rows; from an earlier start where it has finished."""
    note = folder / f"{rows}.json"
    if note.exists():
        return Measured(**json.loads(note.read_text()))
    data = folder / f"retain-{rows}"
    if not data.exists():
        print(f"Write {rows} rows", flush=True)
        write_rows(data, rows)
    output = folder / f"run-{rows}"
    command = [
        sys.executable, "-m", "pipelines", "run", "quick", f"model.path={folder}/model",
        *(f"data.{name}.path={folder}/{name}.jsonl" for name in ("forget", "holdout")),
        f"data.retain.path={data}/*.parquet", "data.utility=null", "data.general=null",
        "adapter.layers=[0,1]", "solve.mode=per_token", "train.steps=0", "train.retain_batch_size=256",
        "evaluation.quick=true", f"output_dir={output}",
    ]  # fmt: skip
    print(" ".join(command[2:]), flush=True)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    running = subprocess.Popen(command, env=environment)
    with watched(psutil.Process(running.pid)) as peaks:
        failed = running.wait()
    if failed:
        raise SystemExit(f"the command over {rows} rows failed: {failed}")
    cost = json.loads((output / "manifest.json").read_text())["cost"]
    measured = Measured(rows, cost["tokens"], dict(peaks))
    note.write_text(json.dumps(measured._asdict()))
    return measured


def write_page(measured: list[Measured]) -> None:
    """The page, smallest set first."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray"))
    sizes = " ".join(str(one.rows) for one in measured)
    roles = [DRIVER, *ROLES.values(), READER]
    lines = [
        "# Memory, measured",
        "",
        f"Written by `python -m tests.benchmarks.scale --rows {sizes}` on {platform.machine()}, "
        f"{os.cpu_count()} cores, {versions}: a tiny model, two workers, retained sets of so many rows.",
        "MiB are of a process's own memory at its peak, read five times a second, without the pages of Ray's",
        "object store.",
        "",
        "| retained rows | tokens | " + " | ".join(f"{role}, MiB" for role in roles) + " |",
        "|---:" * (2 + len(roles)) + "|",
    ]
    for one in measured:
        cells = [
            f"{one.rows:,}",
            f"{one.tokens:,}",
            *(f"{one.peaks[role] / MIB:.0f}" if role in one.peaks else "-" for role in roles),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first, last = measured[-2:] if len(measured) > 1 else (measured[0], measured[0])
    seen = [role for role in roles if role in first.peaks and role in last.peaks]
    ratios = [f"{role} {last.peaks[role] / first.peaks[role]:.2f}" for role in seen]
    lines += [
        "",
        f"{last.rows:,} rows against {first.rows:,}: " + ", ".join(ratios) + " times the memory. "
        f"Up to {WINDOW:,} rows are arranged together.",
        "",
    ]
    PAGE.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Measure each size, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000, 2_000_000])
    parser.add_argument("--output", type=Path, default=Path("outputs/scale"))
    arguments = parser.parse_args()
    folder: Path = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").exists():
        write_tiny_model(folder / "model", blocks=2)
    write_few(folder / "forget.jsonl", "forget", 8)
    write_few(folder / "holdout.jsonl", "holdout", 24)
    write_page([measure(folder, rows) for rows in sorted(arguments.rows)])


if __name__ == "__main__":
    main()
