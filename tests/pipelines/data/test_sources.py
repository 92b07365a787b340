"""The formats and places that rows are read from: one set of rows, one digest, wherever it lies."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from pipelines.config.data import DataConfig, SourceConfig
from pipelines.config.schema import ConfigError
from pipelines.data.readers import Piece, SourceError, open_rows
from pipelines.data.sets import Sets, load_sets
from pipelines.data.sources import find_pieces, request_ids

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS: list[dict[str, Any]] = [
    {
        "id": f"{i}",
        "prompt": f"Who, {i}?",
        "answer": f"Line\n{i}",
        "author": "Ann",
        "perturbed_answers": ["x", f"y{i}"],
    }
    for i in range(5)
]
SOURCES = {
    "jsonl": {"path": "rows.jsonl"},
    "parquet": {"path": "rows.parquet"},
    "csv": {"path": "rows.csv"},
    "saved": {"path": "saved"},
    "saved_splits": {"path": "splits", "split": "test"},
    "jsonl_folder": {"path": "parts"},
    "parquet_glob": {"path": "glob/part-*.parquet"},
}


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROWS in every format of SOURCES, a retain set and a deletion request."""
    folder = tmp_path_factory.mktemp("sources")
    write_jsonl(folder / "rows.jsonl", ROWS)
    write_parquet(
        folder / "rows.parquet", [{**row, "id": int(row["id"]), "other": 1.5} for row in ROWS]
    )
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(
            {**row, "perturbed_answers": json.dumps(row["perturbed_answers"])} for row in ROWS
        )
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"test": saved, "train": saved.select([0])}).save_to_disk(
        str(folder / "splits")
    )
    (folder / "parts").mkdir()
    write_jsonl(folder / "parts" / "a.jsonl", ROWS[:2])
    write_jsonl(folder / "parts" / "b.jsonl", ROWS[2:])
    (folder / "parts" / "README.md").write_text("Not data.")
    (folder / "parts" / "_SUCCESS").write_text("")
    (folder / "glob").mkdir()
    write_parquet(folder / "glob" / "part-0.parquet", ROWS[:4])
    write_parquet(folder / "glob" / "part-1.parquet", ROWS[4:])
    write_parquet(folder / "glob" / "old-0.parquet", ROWS[:1])
    write_jsonl(folder / "retain.jsonl", [{"text": "Kept."}])
    write_jsonl(folder / "request.jsonl", ["3", "1"])
    return folder


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[str]:
    """The same files in a bucket. The address and keys are in this process's environment only, not in the workers'."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        bucket = fs.S3FileSystem(
            scheme="http",
            endpoint_override=f"{host}:{port}",
            allow_bucket_creation=True,
            background_writes=False,
        )
        bucket.create_dir("bucket")
        fs.copy_files(str(folder), "bucket/data", destination_filesystem=bucket)
        yield "s3://bucket/data"
    server.stop()


class _CloudStorage(BaseHTTPRequestHandler):
    """The three requests of Google Cloud Storage's JSON API that reading makes, over a local folder."""

    folder = Path()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        _, _, name = url.path.partition("/storage/v1/b/bucket/o")
        file = self.folder / unquote(name).lstrip("/")
        if not name:
            prefix = query.get("prefix", [""])[0]
            files = [f for f in self.folder.rglob("*") if f.is_file()]
            names = sorted(str(f.relative_to(self.folder)) for f in files)
            self._send(
                json.dumps(
                    {"items": [self._about(name) for name in names if name.startswith(prefix)]}
                ).encode()
            )
        elif not file.is_file():
            self.send_error(404)
        elif query.get("alt") == ["media"]:
            first, _, last = (
                self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            )
            self._send(file.read_bytes()[int(first) : int(last) + 1 if last else None])
        else:
            self._send(json.dumps(self._about(str(file.relative_to(self.folder)))).encode())

    def _about(self, name: str) -> dict[str, str]:
        size = str((self.folder / name).stat().st_size)
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": size,
            "generation": "1",
        }

    def _send(self, body: bytes) -> None:
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def gs(folder: Path) -> Iterator[str]:
    handler = type("Handler", (_CloudStorage,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{server.server_port}")
        yield "gs://bucket"
    server.shutdown()


def load(forget: dict[str, str], place: object, **more: Any) -> Sets:
    forget = {**forget, "path": f"{place}/{forget['path']}"}
    return load_sets(
        DataConfig.model_validate(
            {"forget": forget, "retain": {"path": f"{place}/retain.jsonl"}, **more}
        )
    )


@pytest.fixture(scope="module")
def expected(folder: Path, ray_session: None) -> tuple[list[dict[str, Any]], str]:
    """The rows and the digest that JSONL gives."""
    sets = load(SOURCES["jsonl"], folder)
    rows = sets.forget.take_all()
    assert [
        {k: row[k] for k in ("id", "prompt", "answer", "perturbed_answers")} for row in rows
    ] == [{k: v for k, v in row.items() if k != "author"} for row in ROWS]
    return rows, sets.digests["forget"]


@pytest.mark.parametrize("source", SOURCES)
def test_every_local_format_gives_the_same_rows_and_digest(
    folder: Path, expected: Any, source: str
) -> None:
    sets = load(SOURCES[source], folder)
    assert (sets.forget.take_all(), sets.digests["forget"]) == expected


@pytest.mark.parametrize("source", SOURCES)
def test_every_format_in_s3_gives_the_same_rows_and_digest(
    s3: str, expected: Any, source: str
) -> None:
    sets = load(SOURCES[source], s3)
    assert (sets.forget.take_all(), sets.digests["forget"]) == expected


@pytest.mark.parametrize("source", ["jsonl", "parquet", "jsonl_folder"])
def test_google_cloud_storage_gives_the_same_rows_and_digest(
    gs: str, expected: Any, source: str
) -> None:
    sets = load(SOURCES[source], gs)
    assert (sets.forget.take_all(), sets.digests["forget"]) == expected


def test_local_and_remote_sets_are_read_together_with_a_request_in_a_bucket(
    folder: Path, s3: str
) -> None:
    request = f"{s3}/request.jsonl"
    assert request_ids(request) == ["3", "1"]
    forget, retain = (
        {"path": f"{folder}/rows.jsonl", "ids": request},
        {"path": f"{s3}/parts", "exclude_ids": request},
    )
    sets = load_sets(DataConfig.model_validate({"forget": forget, "retain": retain}))
    assert [row["id"] for row in sets.forget.take_all()] == ["1", "3"]
    assert [row["id"] for row in sets.retain.take_all()] == ["0", "2", "4"]
    assert [row["row"] for row in sets.retain.take_all()] == [0, 1, 2]


def test_a_relative_path_and_one_from_the_home_folder_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert (
        load(SOURCES["jsonl"], ".").counts
        == load(SOURCES["jsonl"], "~").counts
        == {"forget": 5, "retain": 1}
    )


def refusal(path: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_sets(
            DataConfig.model_validate({"forget": {"path": path, **more}, "retain": {"path": path}})
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_split_of_a_saved_data_set_lists_the_splits(folder: Path) -> None:
    expected = f"data.forget.split: {folder}/splits has no split 'dev'; it has: test, train"
    assert refusal(f"{folder}/splits", split="dev") == expected


def test_a_missing_object_and_a_missing_bucket_are_refused(s3: str) -> None:
    for path in (f"{s3}/none.jsonl", "s3://none/rows.jsonl", f"{s3}/none"):
        assert refusal(path).startswith(f"data.forget.path: {path} not found")
    with pytest.raises(
        ConfigError,
        match=r"^request: s3://bucket/data/none.jsonl not found; allowed: a JSONL file of",
    ):
        request_ids(f"{s3}/none.jsonl")


def test_a_server_that_does_not_answer_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert refusal("s3://bucket/rows.jsonl").startswith(
        "data.forget.path: s3://bucket/rows.jsonl cannot be reached"
    )


def test_half_a_pair_of_keys_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    assert refusal("s3://bucket/rows.jsonl").startswith(
        "data.forget.path: s3://bucket/rows.jsonl cannot be reached"
    )


def test_a_hub_that_does_not_answer_is_refused_in_one_line() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    message = refusal("nobody/nothing:part")
    assert message.startswith(
        "data.forget.path: nobody/nothing:part is no file here, and the hub does not give it ("
    )


def test_a_hub_data_set_is_read_by_load_dataset_and_its_splits_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_dataset` takes a folder as it takes a hub name, so the code that reads from the hub can run here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    piece = Piece("forget", "hub", "hub", f"{folder}/glob", None, "train")
    with open_rows(piece, {"id", "answer"}) as (columns, rows):
        assert columns == list(ROWS[0])
        assert sorted(row["id"] for row in rows) == ["0", "0", "1", "2", "3", "4"]
    expected = 'hub does not give it (Unknown split "dev". Should be one of'
    with pytest.raises(SourceError) as caught, open_rows(replace(piece, split="dev"), {"id"}):
        pass
    assert expected in caught.value.text


@pytest.mark.parametrize(
    "path, is_hub_name",
    [("owner/name", True), ("owner/name:part", True), ("name", False), ("pipelines/rows", False)],
)
def test_a_missing_path_is_a_hub_name_only_if_it_looks_like_one(
    path: str, is_hub_name: bool
) -> None:
    source = SourceConfig.model_validate({"path": path, "split": "dev"})
    if is_hub_name:
        [piece] = find_pieces("forget", source)
        assert (piece.format, piece.path, piece.split) == ("hub", path, "dev")
    else:
        with pytest.raises(ConfigError, match=f"^data.forget.path: {path} not found"):
            find_pieces("forget", source)
