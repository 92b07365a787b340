"""An object store that is late, answers with 500, falls silent or resets connections, before and in the middle."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from pipelines.config.data import ColumnsConfig, SourceConfig
from pipelines.config.schema import ConfigError
from pipelines.data.rows import Selection, read_piece
from pipelines.data.sources import find_pieces, request_ids
from pipelines.report.page import RUN_FILES
from pipelines.storage import filesystem as storage
from pipelines.storage.output import open_output
from tests.bucket import FAULTS, Bucket
from tests.pipelines.report.test_page import forget_entry, scores_of, write_run
from tests.pipelines.storage.test_output import URL, finish, invoke, write

ROWS_URL = "s3://bucket/rows.jsonl"
ROWS = {
    str(number): f"{number} " + "river " * 2000 for number in range(200)
}  # 2.4 MB: three requests
PARTS = b"0123456789abcdef" * 2**20  # sent in two parts
QUICK = ["500", "reset midway"]  # a silence costs 5 to 10 s


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is waited out for 1 s, three times. Nobody ends it: a client without a limit would wait for ever."""
    monkeypatch.setattr(storage, "SILENCE_S", 1.0)


def of(method: str, end: str, numbers: range = range(10**9)) -> Callable[[str, str], bool]:
    """The requests of a method whose paths end so: those of these numbers, in the order in which they come."""
    number = count()
    return lambda found, path: found == method and path.endswith(end) and next(number) in numbers


def read_rows() -> tuple[dict[str, str], str]:
    """The rows as a worker reads them, and the fault that it tells the driver."""
    [piece] = find_pieces("forget", SourceConfig(path=ROWS_URL))
    everything = Selection(None, frozenset(), None, frozenset())
    rows = [
        row for table in read_piece(piece, ColumnsConfig(), everything) for row in table.to_pylist()
    ]
    return {row["id"]: row["answer"] for row in rows if not row["fault"]}, "".join(
        row["fault"] or "" for row in rows
    )


@pytest.fixture
def rows(bucket: Bucket) -> None:
    lines = [json.dumps({"id": number, "text": text}) for number, text in ROWS.items()]
    bucket.write("rows.jsonl", "\n".join(lines).encode())


@pytest.mark.usefixtures("impatient", "rows")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_source_is_read_whole_where_a_request_fails(bucket: Bucket, fault: str) -> None:
    bucket.fault, bucket.refuses = fault, of("GET", "rows.jsonl", range(1, 2))
    assert read_rows() == (ROWS, "")
    assert len(bucket.refused) == 1


@pytest.mark.usefixtures("impatient", "rows")
@pytest.mark.parametrize("fault", [*QUICK, "silence"])
def test_a_source_that_cannot_be_read_is_one_line(bucket: Bucket, fault: str) -> None:
    bucket.fault, bucket.refuses = fault, of("GET", "rows.jsonl")
    _, told = read_rows()
    assert told.startswith(
        f"data.forget.path: {ROWS_URL} cannot be read as jsonl (OSError: AWS Error "
    )
    assert "\n" not in told
    with pytest.raises(
        ConfigError, match=rf"^request: {ROWS_URL} cannot be read \(OSError\); allowed: [^\n]*$"
    ):
        request_ids(ROWS_URL)
    bucket.refuses = of("HEAD", "rows.jsonl")
    with pytest.raises(
        ConfigError, match=rf"^data.forget.path: {ROWS_URL} cannot be reached \([^\n]*$"
    ):
        read_rows()


def test_a_late_answer_is_waited_for(bucket: Bucket) -> None:
    bucket.write("request.jsonl", b'"3"\n')
    bucket.fault, bucket.refuses = "late", of("GET", "request.jsonl")
    assert request_ids("s3://bucket/request.jsonl") == ["3"]
    assert len(bucket.refused) == 1, "it was asked for again"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [*QUICK, "reset", "silence midway"])
def test_a_file_is_sent_whole_where_a_request_fails(
    bucket: Bucket, tmp_path: Path, fault: str
) -> None:
    (tmp_path / "weights").write_bytes(b"w" * 1000)
    bucket.fault, bucket.refuses = fault, of("PUT", "weights", range(1))
    open_output(URL).upload_file(tmp_path / "weights")
    assert len(bucket.refused) == 1
    assert bucket.read("runs/one/weights") == b"w" * 1000


@pytest.mark.parametrize("fault", QUICK)
def test_an_upload_that_breaks_off_leaves_what_was_there(bucket: Bucket, fault: str) -> None:
    output = open_output(URL)
    with output.working_copy():
        write(
            output,
            model__weights="old",
            manifest_json='{"schema": 1, "status": "running", "created": "2026"}',
        )
    bucket.fault, bucket.refuses = fault, of("PUT", "weights", range(1, 10**9))  # all but one part
    with pytest.raises(OSError, match="weights"):
        finish(open_output(URL), weights=PARTS.decode())
    assert bucket.files("runs/one") == ["config", "losses", "manifest.json", "model/weights"]
    assert bucket.read("runs/one/model/weights") == b"old"
    code, told = invoke("verify", URL)
    assert (code, told.count("\n")) == (2, 1)
    assert "status: found 'running', allowed: 'complete'" in told
    bucket.heal()
    finish(open_output(URL), weights=PARTS.decode())
    assert bucket.read("runs/one/model/weights") == PARTS
    assert invoke("verify", URL)[0] == 0


def test_a_file_that_cannot_be_read_here_is_not_sent_in_part(bucket: Bucket) -> None:
    filesystem, path = storage.open_filesystem(f"{URL}/weights", "output_dir")
    with pytest.raises(OSError, match="Input/output error"):
        storage.send_file(Path("/proc/self/mem"), filesystem, path)
    assert bucket.files("runs/one") == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [*QUICK, "silence"])
def test_a_run_is_read_back_where_requests_fail(bucket: Bucket, fault: str) -> None:
    finish(open_output(URL))
    bucket.fault, bucket.refuses = fault, of("GET", "weights", range(1))
    assert invoke("verify", URL) == (0, f"Verified: {URL}\n")
    bucket.refuses = of("GET", "weights", range(1))
    again = open_output(URL)
    with again.working_copy():
        assert (again.folder / "model" / "weights").read_bytes() == b"w" * 1000
    assert len(bucket.refused) == 2


@pytest.mark.parametrize("fault", QUICK)
def test_a_run_that_cannot_be_read_back_is_one_line(
    bucket: Bucket, tmp_path: Path, fault: str
) -> None:
    write_run(
        tmp_path,
        scores_of(before=forget_entry(0.9), after=forget_entry(0.5), oracle=forget_entry(0.5)),
    )
    for name in RUN_FILES:
        bucket.write(f"runs/one/{name}", (tmp_path / name).read_bytes())
    finish(open_output("s3://bucket/runs/two"))
    bucket.fault = fault
    bucket.refuses = lambda method, path: (
        method == "GET" and path.endswith(("scores.json", "losses"))
    )
    for command, at_fault in (
        ("verify", "two/losses"),
        ("gate", "one/scores.json"),
        ("report", "one/scores.json"),
    ):
        code, told = invoke(command, f"s3://bucket/runs/{at_fault[:3]}")
        assert (code, told.count("\n")) == (2, 1), told
        assert told.startswith(f"RUN_DIR: s3://bucket/runs/{at_fault} cannot be read ("), told
    assert "report.html" not in bucket.files("runs/one")
