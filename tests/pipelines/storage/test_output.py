"""Results on an object store: what is there when, whatever fails in between."""

import json
import os
import pickle
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.config.schema import ConfigError
from pipelines.report.page import RUN_FILES
from pipelines.storage.output import BucketDir, OutputDir, open_output, work_folder
from pipelines.storage.seal import file_digests
from tests.bucket import Bucket
from tests.pipelines.report.test_page import forget_entry, scores_of, write_run

URL = "s3://bucket/runs/one"


def write(output: OutputDir, **files: str) -> None:
    for name, text in files.items():
        path = output.folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def seal(output: OutputDir) -> None:
    """What `RunFolder.seal` writes."""
    manifest = {
        "schema": 1,
        "created": "2026",
        "status": "complete",
        "files": file_digests(output.folder),
    }
    write(output, manifest_json=json.dumps(manifest))


def finish(output: OutputDir, weights: str = "w" * 1000) -> None:
    """A whole run, as short as can be."""
    with output.working_copy():
        write(output, config="a", model__weights=weights, losses="l")
        seal(output)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_results_lie_on_the_store_and_what_they_were_made_in_is_emptied(bucket: Bucket) -> None:
    finish(open_output(URL))
    assert bucket.files("runs/one") == ["config", "losses", "manifest.json", "model/weights"]
    assert list(work_folder(URL).iterdir()) == []
    assert invoke("verify", URL) == (0, f"Verified: {URL}\n")


def test_the_manifest_comes_after_all_that_it_names(bucket: Bucket) -> None:
    sent: list[str] = []
    bucket.refuses = lambda method, path: bool(
        method == "PUT" and sent.append(path.rsplit("/", 1)[-1])
    )
    finish(open_output(URL))
    assert sorted(sent[:-1]) == ["config", "losses", "weights"]
    assert sent[-1] == "manifest.json"


@pytest.mark.parametrize("name", ["weights", "losses", "manifest.json"])
def test_an_upload_that_fails_leaves_no_complete_run_and_the_next_one_completes_it(
    bucket: Bucket, name: str
) -> None:
    output = open_output(URL)
    with output.working_copy():
        write(
            output,
            config="a",
            manifest_json='{"schema": 1, "status": "running", "created": "2026"}',
        )
    bucket.refuses = lambda method, path: method == "PUT" and path.endswith(name)
    with pytest.raises(OSError, match=name):
        finish(open_output(URL))
    assert len(bucket.refused) > 1, "pyarrow tries again"
    assert json.loads(bucket.read("runs/one/manifest.json"))["status"] == "running"
    code, told = invoke("verify", URL)
    assert (code, told.count("\n")) == (2, 1)
    assert f"{URL}/manifest.json: status: found 'running', allowed: 'complete'" in told
    bucket.heal()
    again = open_output(URL)
    assert json.loads(again.read("manifest.json") or "{}")["created"] == "2026"
    finish(again)
    assert invoke("verify", URL)[0] == 0


def test_a_server_that_stumbles_is_asked_again(bucket: Bucket) -> None:
    stumbles = iter([True, True] + [False] * 1000)
    bucket.refuses = lambda _method, _path: next(stumbles)
    finish(open_output(URL))
    assert len(bucket.refused) == 2
    assert invoke("verify", URL)[0] == 0


def test_another_machine_goes_on_with_the_files_of_the_first(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = open_output(URL)
    with pytest.raises(KeyboardInterrupt), output.working_copy():
        write(
            output, config="a", manifest_json='{"schema": 1, "created": "2026"}', answers="secret"
        )
        output.upload()
        write(output, losses="0", model__weights="half", manifest_json='{"cost": 1}')
        raise KeyboardInterrupt
    assert bucket.files("runs/one") == ["answers", "config", "losses", "manifest.json"]
    assert b"cost" not in bucket.read("runs/one/manifest.json"), "it would count on the model"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    again = open_output(URL)
    with again.working_copy():
        assert (again.folder / "losses").read_text() == "0"
        (again.folder / "answers").unlink()
    assert bucket.files("runs/one") == ["config", "losses", "manifest.json"], (
        "what a run drops is dropped there"
    )


def test_ctrl_c_leaves_no_half_of_a_file(bucket: Bucket, tmp_path: Path) -> None:
    size = 64 * 2**20
    (tmp_path / "large").write_bytes(bytes(size))
    output = open_output(URL)

    def interrupt(method: str, _path: str) -> bool:
        if method == "PUT":
            bucket.refuses = lambda _method, _path: False
            signal.raise_signal(signal.SIGINT)  # to the main thread, which waits for the upload
        return False

    bucket.refuses = interrupt
    with pytest.raises(KeyboardInterrupt):
        output.upload_file(tmp_path / "large")
    assert bucket.s3.get_file_info("bucket/runs/one/large").size == size


def test_nothing_of_a_run_that_never_began_is_left(bucket: Bucket) -> None:
    output = open_output(URL)
    with pytest.raises(ConfigError), output.working_copy():
        write(output, log="chatter")
        raise ConfigError("data.forget.path: none")
    assert bucket.files("runs/one") == []


def test_one_process_of_a_machine_works_on_a_run(bucket: Bucket) -> None:
    with (
        open_output(URL).working_copy(),
        pytest.raises(ConfigError, match=f"^output_dir: {URL} is in use by another process"),
        open_output(URL).working_copy(),
    ):
        pass


def test_opening_results_deletes_and_downloads_nothing(bucket: Bucket) -> None:
    finish(open_output(URL))
    (work_folder(URL) / "scores.json").write_text("of another run")
    manifest = open_output(URL).read("manifest.json")
    assert json.loads(manifest or "{}")["status"] == "complete"
    assert [path.name for path in work_folder(URL).iterdir()] == ["scores.json"]
    with open_output(URL).working_copy():
        assert not (work_folder(URL) / "scores.json").exists()


def test_a_node_without_the_folder_gets_the_model(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = open_output(URL)
    assert isinstance(output, BucketDir)
    with output.working_copy():
        write(
            output,
            model__weights="w",
            adapter__weights="a",
            manifest_json='{"schema": 1, "created": "2026"}',
        )
        output.upload()
        sent = pickle.loads(pickle.dumps(output))
        assert not sent.copy_to_node("model", "2026"), "the driver's own node has it"
        sent.folder = tmp_path / "node"
        write(sent, model__old="of another run", manifest_json='{"schema": 1, "created": "2025"}')
        for name in bucket.environment:  # a node need not have the keys
            monkeypatch.delenv(name)
        assert sent.copy_to_node("model", "2026")
        assert [str(path.relative_to(sent.folder)) for path in sent.folder.rglob("*")] == [
            "model",
            "model/weights",
        ]
        sent.clear()
        assert not list(sent.folder.iterdir())


def test_what_a_store_cannot_hold_is_no_part_of_a_run(bucket: Bucket) -> None:
    refused = pytest.raises(OSError, match=r"weights is a link or no file, allowed: files and")
    with refused, open_output(URL).working_copy():
        (work_folder(URL) / "model").mkdir(parents=True)
        os.mkfifo(work_folder(URL) / "model" / "weights")
    assert bucket.files("runs/one") == []


def test_a_changed_a_missing_and_a_new_object_are_named(bucket: Bucket) -> None:
    finish(open_output(URL))
    bucket.write("runs/one/model/weights", b"v" + b"w" * 999)
    bucket.write("runs/one/model/more", b"")
    bucket.s3.delete_file("bucket/runs/one/losses")
    expected = "losses: missing\nmodel/more: not in the manifest\nmodel/weights: changed\n"
    assert invoke("verify", URL) == (1, expected)


def test_report_and_gate_read_a_run_on_the_store(bucket: Bucket, tmp_path: Path) -> None:
    scores = scores_of(before=forget_entry(0.9), after=forget_entry(0.5), oracle=forget_entry(0.5))
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", scores)
    files = file_digests(tmp_path / "run")
    sealed = {"schema": 1, "status": "complete", "files": files}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(sealed))
    for name in RUN_FILES:
        bucket.write(f"runs/one/{name}", (tmp_path / "run" / name).read_bytes())
    assert invoke("gate", URL) == (0, f"Passed: {URL}\n")
    assert invoke("gate", URL, "--require", "after.forget.rouge<=0.1")[0] == 3
    assert invoke("report", URL) == (0, f"Report: {URL}/report.html\n")
    assert invoke("report", str(tmp_path / "run"))[0] == 0
    assert bucket.read("runs/one/report.html") == (tmp_path / "run" / "report.html").read_bytes()
    bucket.s3.delete_file("bucket/runs/one/scores.json")
    found = f"{URL}/scores.json: not found; allowed: a folder written by ray-unlearn run\n"
    assert invoke("gate", URL) == (2, found)
    code, told = invoke("serve", URL)
    assert (code, told) == (2, f"RUN_DIR: found '{URL}', allowed: a folder with a copy of it\n")


def test_names_that_lead_out_of_the_folder_are_not_followed(bucket: Bucket) -> None:
    output = open_output(URL)
    assert isinstance(output, BucketDir)
    output._files = ["../escaped", "manifest.json"]
    with (
        pytest.raises(ConfigError, match=r"holds '../escaped', allowed: names without \.\."),
        output.working_copy(),
    ):
        pass


def test_what_cannot_be_reached_is_one_line(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("verify", "s3://none/run") == (
        2,
        "RUN_DIR: s3://none/run: bucket 'none' does not exist\n",
    )
    bucket.write("file", b"")
    assert invoke("verify", "s3://bucket/file") == (
        2,
        "RUN_DIR: s3://bucket/file is a file, allowed: a folder\n",
    )
    assert (
        invoke("verify", "ftp://host/run")[1]
        == "RUN_DIR: ftp://host/run found ftp://, allowed: a local path, s3:// or gs://\n"
    )
    bucket.refuses = lambda method, _path: method == "GET"
    code, told = invoke("verify", URL)
    assert (code, told.count("\n")) == (2, 1)
    assert told.startswith(f"RUN_DIR: {URL} cannot be reached (")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    code, told = invoke("verify", URL)
    assert (code, told.count("\n")) == (2, 1)
    assert told.startswith(f"RUN_DIR: {URL} cannot be reached (")
