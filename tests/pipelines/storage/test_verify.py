import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.storage.seal import file_digests


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A sealed folder: what `RunFolder.seal` writes, over files of this test's."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "scores.json").write_text("{}")
    (tmp_path / "run.log").write_text("chatter")
    manifest = {"schema": 1, "status": "complete", "files": file_digests(tmp_path)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def verify(folder: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_an_untouched_run_is_verified_whatever_its_log_says(run_dir: Path) -> None:
    (run_dir / "run.log").write_text("more chatter")
    (run_dir / "report.html").write_text("a page rebuilt")
    (run_dir / "report.pdf").write_text("the page, printed")
    assert verify(run_dir) == (0, f"Verified: {run_dir}\n")


def test_one_changed_byte_is_exit_code_1_and_names_the_file(run_dir: Path) -> None:
    weights = run_dir / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[9000] ^= 1
    weights.write_bytes(content)
    assert verify(run_dir) == (1, "model/model.safetensors: changed\n")


def test_removed_and_added_files_are_named(run_dir: Path) -> None:
    (run_dir / "scores.json").unlink()
    (run_dir / "model" / "tokenizer.json").write_text("{}")
    assert verify(run_dir) == (
        1,
        "model/tokenizer.json: not in the manifest\nscores.json: missing\n",
    )


def test_links_and_pipes_are_named_and_none_is_followed(run_dir: Path) -> None:
    model = run_dir / "model"
    (model / "folder").symlink_to(run_dir.parent)
    (model / "dangling").symlink_to(run_dir / "nothing")
    os.mkfifo(model / "pipe")
    # The same content, but elsewhere, where it may change.
    weights = model / "model.safetensors"
    weights.rename(run_dir.parent / "weights")
    weights.symlink_to(run_dir.parent / "weights")
    names = ("dangling", "folder", "model.safetensors", "pipe")
    lines = [f"model/{name}: not in the manifest\n" for name in names]
    lines[2] = "model/model.safetensors: changed\n"
    assert verify(run_dir) == (1, "".join(lines))


def test_a_link_that_was_sealed_is_its_target(run_dir: Path) -> None:
    link = run_dir / "model" / "tokenizer.json"
    link.symlink_to("one.json")
    manifest = {"schema": 1, "status": "complete", "files": file_digests(run_dir)}
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    assert verify(run_dir) == (0, f"Verified: {run_dir}\n")
    link.unlink()
    link.symlink_to("other.json")
    assert verify(run_dir) == (1, "model/tokenizer.json: changed\n")


def test_a_manifest_that_points_outside_opens_nothing_there(run_dir: Path) -> None:
    manifest = json.loads((run_dir / "manifest.json").read_text())
    manifest["files"]["../outside"] = "0" * 64
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    (run_dir.parent / "outside").write_text("x")
    assert verify(run_dir) == (1, "../outside: missing\n")


@pytest.mark.parametrize(
    "manifest, message",
    [
        (None, "manifest.json: not found"),
        ('{"schema": 1, "status": "running"}', "status: found 'running', allowed: 'complete'"),
        ("{", "manifest.json: not JSON"),
    ],
)
def test_what_is_no_finished_run_is_wrong_input(
    run_dir: Path, manifest: str | None, message: str
) -> None:
    (run_dir / "manifest.json").unlink()
    if manifest is not None:
        (run_dir / "manifest.json").write_text(manifest)
    code, told = verify(run_dir)
    assert (code, told.count("\n")) == (2, 1)
    assert message in told
