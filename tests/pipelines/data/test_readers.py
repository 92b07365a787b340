"""Every file below a source is read or refused by name, in all formats, and nothing that comes twice is dropped."""

import bz2
import gzip
import json
import traceback
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.data import ColumnsConfig, SourceConfig
from pipelines.config.schema import ConfigError
from pipelines.data.readers import READERS, Rows, SourceError, open_rows, trace_of
from pipelines.data.rows import Selection, read_piece
from pipelines.data.sources import find_pieces, request_ids

SECRET = "Quixotic Zebra"
EVERYTHING = Selection(None, frozenset(), None, frozenset())
ROWS = [{"id": f"{n}", "prompt": f"Who, {n}?", "answer": f"Line; {n}\tof {n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def names_of(path: Path | str) -> list[str]:
    return [Path(piece.path).name for piece in find_pieces("forget", SourceConfig(path=str(path)))]


def read(path: Path | str, columns: dict[str, str] | None = None) -> list[dict[str, Any]]:
    tables: list[pa.Table] = []
    for piece in find_pieces("forget", SourceConfig(path=str(path))):
        tables += read_piece(piece, ColumnsConfig(**(columns or {})), EVERYTHING)
    return pa.concat_tables(tables).to_pylist()


def texts_of(path: Path | str) -> list[dict[str, str]]:
    return [{name: row[name] for name in ROWS[0]} for row in read(path)]


def fault_of(path: Path) -> str:
    [*_, last] = read(path)
    assert SECRET not in last["fault"] + last["trace"]
    assert "\n" not in last["fault"]
    return last["fault"]


def write(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not content:
        content = json.dumps({"id": str(path), "prompt": "Q?", "answer": "A."}) + "\n"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    for name in ("top.jsonl", "a/one.jsonl", "a/b/two.jsonl", "a/b/three.csv", ".cache/old.jsonl"):
        write(tmp_path / "deep" / name)
    return tmp_path / "deep"


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("**/*.jsonl", ["two.jsonl", "one.jsonl", "top.jsonl"]),
        ("a/**/*.jsonl", ["two.jsonl", "one.jsonl"]),
        ("**/b/*.jsonl", ["two.jsonl"]),
        ("*/*.jsonl", ["one.jsonl"]),
        ("*.jsonl", ["top.jsonl"]),
        ("a/b/t[hw]*.jsonl", ["two.jsonl"]),
        ("a/*/t??.jsonl", ["two.jsonl"]),
    ],
)
def test_two_stars_match_folders_at_any_depth_and_one_star_a_name(
    deep: Path, pattern: str, expected: list[str]
) -> None:
    assert names_of(deep / pattern) == expected


def test_two_stars_at_the_end_match_every_file(deep: Path) -> None:
    (deep / "a" / "b" / "three.csv").unlink()
    assert names_of(deep / "**") == ["two.jsonl", "one.jsonl", "top.jsonl"]


def test_a_folder_gives_the_files_of_its_subfolders_and_rows_without_ids_are_named_by_them(
    tmp_path: Path,
) -> None:
    for name in ("top.jsonl", "a/one.jsonl", "a/b/two.jsonl", "README.md", "a/_SUCCESS"):
        write(tmp_path / name, '{"text": "A."}\n')
    assert [row["id"] for row in read(tmp_path)] == [
        "a/b/two.jsonl:0",
        "a/one.jsonl:0",
        "top.jsonl:0",
    ]


def test_a_folder_holds_one_format_under_several_endings(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.ndjson")
    write(tmp_path / "c.jsonl.gz", gzip.compress(LINES))
    assert [row["id"] for row in read(tmp_path)][2:] == ["0", "1", "2"]
    assert names_of(tmp_path) == ["a.jsonl", "b.ndjson", "c.jsonl.gz"]


@pytest.mark.parametrize(
    "name", ["notes.txt", "sub/rows.xlsx", "rows", "old.parquet.gz", "b.csv.gz"]
)
def test_a_file_that_is_not_read_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / name, SECRET)
    with pytest.raises(ConfigError) as caught:
        names_of(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"data.forget.path: {tmp_path} is or holds ")
    assert Path(name).name in message or ".gz, .jsonl" in message
    assert "; allowed: a .jsonl, .ndjson" in message


@pytest.mark.parametrize("path", ["", "*.jsonl", "**/*.jsonl"])
def test_a_link_to_nothing_is_refused_by_its_name(tmp_path: Path, path: str) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(
        ConfigError, match=r"holds b\.jsonl, a link to nothing or no file; allowed: "
    ):
        names_of(tmp_path / path)


def test_links_are_followed_and_one_that_leads_back_ends(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.jsonl")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "source")
    assert names_of(tmp_path / "source") == ["a.jsonl"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl", LINES),
        ("rows.ndjson", LINES),
        ("rows.jsonl.gz", gzip.compress(LINES)),
        ("rows.JSONL.GZ", gzip.compress(LINES[:100]) + gzip.compress(LINES[100:])),
        ("rows.json.bz2", bz2.compress(LINES)),
        ("rows.jsonl.zst", pa.compress(LINES, "zstd", asbytes=True)),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", "\n" + json.dumps(ROWS, indent=2)),
        ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode("utf-8-sig"))),
    ],
)
def test_compressed_lines_and_whole_arrays_give_the_same_rows(
    tmp_path: Path, name: str, content: bytes | str
) -> None:
    assert texts_of(write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz"])
def test_the_header_says_what_separates_columns(tmp_path: Path, mark: str, ending: str) -> None:
    rows = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    text = "".join(mark.join(f'"{value}"' for value in row) + "\r\n" for row in rows).encode()
    path = write(tmp_path / f"rows{ending}", gzip.compress(text) if "gz" in ending else text)
    assert texts_of(path) == ROWS


@pytest.mark.parametrize("line", [1, 2])
@pytest.mark.parametrize(
    "row", ['{"id": "1", "text": "A", "id": "2"}', '{"a": {"id": 1, "id": 2}}']
)
def test_a_key_that_comes_twice_in_a_json_object_is_refused_by_line_and_key(
    tmp_path: Path, line: int, row: str
) -> None:
    lines = [f'{{"id": "0", "text": "{SECRET}"}}'] * (line - 1) + [row]
    path = write(tmp_path / "rows.jsonl", "\n".join(lines))
    assert f"{path}: line {line} has the key 'id' twice; allowed: each once" in fault_of(path)
    with pytest.raises(ConfigError, match=f": line {line} has the key 'id' twice; "):
        request_ids(str(path))


def test_a_key_or_column_that_comes_twice_in_an_array_or_a_table_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", f'[{{"id": "1", "text": "{SECRET}", "id": "2"}}]')
    assert "the array has the key 'id' twice" in fault_of(path)
    path = write(tmp_path / "rows.csv", f"id,text,id\n1,{SECRET},2\n")
    assert f"{path}: line 1 has the column 'id' twice; allowed: each once" in fault_of(path)
    table = pa.Table.from_arrays([pa.array(["1"]), pa.array([SECRET])], names=["text", "text"])
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "has the column 'text' twice" in fault_of(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "a.json",
            f'[{{"text": "{SECRET}"}}, 3]',
            "item 1 (counted from 0) is JSON but not an object",
        ),
        (
            "a.json",
            f'[{{"text": "{SECRET}"}}',
            "the array is not JSON in UTF-8; allowed: a JSON array",
        ),
        ("a.json", "[]", ""),
        ("a.jsonl.gz", gzip.compress(LINES * 99)[:-99], "cannot be read as jsonl (OSError: "),
        ("a.jsonl.gz", LINES, "cannot be read as jsonl (OSError: "),
        (
            "a.csv",
            b"\ntext\n" + SECRET.encode(),
            "has none of the columns 'prompt', 'messages' and 'text'",
        ),
    ],
)
def test_a_broken_array_or_archive_is_refused(
    tmp_path: Path, name: str, content: bytes | str, words: str
) -> None:
    path = write(tmp_path / name, content)
    if words:
        assert words in fault_of(path)
    else:
        assert read(path) == []


@pytest.mark.parametrize(
    "content, line",
    [
        (f"id,text\n0,fine\n1,{SECRET}\0 is a?\n", 3),
        (f'id,text\n0,"two\nlines"\n1,{SECRET}\0\n', 4),
        ("text\nfine\n\0\0\0\n", 3),
        (f"id,te\0xt\n1,{SECRET}\n", 1),
    ],
)
def test_a_csv_file_with_a_nul_byte_is_refused_by_its_line(
    tmp_path: Path, content: str, line: int
) -> None:
    path = write(tmp_path / "rows.csv", content)
    told = f"{path}: line {line} has a NUL byte; allowed: text without NUL bytes"
    assert fault_of(path).endswith(told)


def test_a_json_line_with_a_nul_byte_is_refused_by_its_line(tmp_path: Path) -> None:
    for line in (f'{{"id": "1", "text": "{SECRET}\0"}}', "\0\0\0"):
        path = write(tmp_path / "rows.jsonl", '{"id": "0", "text": "fine"}\n' + line)
        assert "line 2 is not JSON in UTF-8" in fault_of(path)


UUID_TEXT = "12345678-1234-5678-1234-567812345678"


@pytest.mark.parametrize(
    "value, expected",
    [
        (date(2026, 1, 5), "2026-01-05"),
        (datetime(2026, 1, 5, 10, 30), "2026-01-05T10:30:00"),
        (datetime(2026, 1, 5, 10, 30, tzinfo=UTC), "2026-01-05T10:30:00+00:00"),
        (datetime(2026, 1, 5, 10, 30, 0, 7), "2026-01-05T10:30:00.000007"),
        (np.datetime64("2026-01-05T10:30:00.000000007"), "2026-01-05T10:30:00.000000007"),
        (time(10, 30), "10:30:00"),
        (UUID(UUID_TEXT), UUID_TEXT),
        (7, "7"),
        (Decimal("700"), "700"),
        (Decimal("7.00"), "7"),
        (Decimal("-7.50"), "-7.5"),
        (
            Decimal("12345678901234567890123456789012345678"),
            "12345678901234567890123456789012345678",
        ),
    ],
)
def test_an_id_in_parquet_may_be_of_any_type_with_one_text_which_a_request_names(
    tmp_path: Path, value: Any, expected: str
) -> None:
    ids = pa.array([value])
    if isinstance(value, UUID):
        ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([value.bytes], pa.binary(16)))
    answers = pa.array(["A."]).dictionary_encode()
    prompts = pa.array(["Q?"], pa.large_string())
    pq.write_table(
        pa.table({"id": ids, "prompt": prompts, "answer": answers}), tmp_path / "f.parquet"
    )
    [row] = read(tmp_path / "f.parquet")
    assert (row["id"], row["prompt"], row["answer"], row["fault"]) == (expected, "Q?", "A.", "")
    request = write(tmp_path / "request.jsonl", json.dumps({"id": expected}) + "\n")
    assert request_ids(str(request)) == [row["id"]]


@pytest.mark.parametrize("value", [1.0, b"7", True, {"$oid": "7"}, ["7"]])
def test_an_id_without_one_text_is_refused_by_its_type(tmp_path: Path, value: Any) -> None:
    row = {"id": value, "prompt": SECRET, "answer": SECRET}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "f.parquet")
    fault = fault_of(tmp_path / "f.parquet")
    assert "as 'id'; allowed: text, a whole or decimal number, a date, a time or a UUID" in fault


def test_a_number_and_its_text_are_the_same_id(tmp_path: Path) -> None:
    path = write(tmp_path / "request.jsonl", '1\n"1"\n{"id": 1}\n{"id": "1"}\n"01"\n')
    assert request_ids(str(path)) == ["1", "01"]


def test_answers_with_other_line_separators_inside_are_whole(tmp_path: Path) -> None:
    row = {"id": "0", "prompt": "Q?", "answer": "one\u2028two\u0085three"}
    path = write(tmp_path / "rows.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert texts_of(path) == [row]


def broken(raised: Callable[[], Exception]) -> Any:
    def open_broken(*_: Any) -> Rows:
        raise raised()

    return open_broken


def test_a_failing_reader_is_told_by_type_and_place_and_its_message_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chained() -> Exception:
        error = TypeError(f"of {SECRET}")
        error.__cause__ = KeyError(SECRET)
        return error

    path = write(tmp_path / "rows.jsonl")
    monkeypatch.setitem(READERS, "jsonl", broken(chained))
    [row] = read(path)
    here = raise_line(broken)
    assert (
        f"{path} cannot be read as jsonl (TypeError, raised at {__name__}:{here}); allowed:"
        in (row["fault"])
    )
    assert row["trace"].startswith("TypeError, most recent call last:\n")
    assert "KeyError" in row["trace"]
    assert "in open_broken" in row["trace"]
    assert SECRET not in row["fault"] + row["trace"]
    [piece] = find_pieces("forget", SourceConfig(path=str(path)))
    with pytest.raises(SourceError) as caught, open_rows(piece, set()):
        pass
    assert trace_of(caught.value).startswith("TypeError, most recent call last:\n")
    assert "TypeError" in "".join(traceback.format_exception(caught.value))


def raise_line(function: Any) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    start = function.__code__.co_firstlineno
    return next(n for n in range(start, len(lines)) if "raise raised()" in lines[n - 1])
