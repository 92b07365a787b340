"""A run's folder that was damaged since: one line that names the file."""

import json
from pathlib import Path

import pytest

from pipelines.config.load import to_yaml
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.storage.run_folder import RunFolder
from pipelines.tracking.mirror import lacks_records

MANIFEST = {"schema": 1, "purpose": "run", "status": "complete", "created": "2026"}
SCORES = {"schema": 1, "models": {"before": {"model_utility": 1}, "after": None}}
DEEP = b"[" * 100_000
BROKEN = [
    ("manifest.json", b"[]", "schema: found None, allowed: 1"),
    ("manifest.json", b"", "not JSON (Expecting value"),
    ("manifest.json", b"{", "not JSON (Expecting property name"),
    ("manifest.json", b"\xff\x00", "cannot be read (UnicodeDecodeError)"),
    ("manifest.json", DEEP, "not JSON (maximum recursion depth"),
    ("manifest.json", None, "cannot be read (IsADirectoryError)"),
    (
        "manifest.json",
        json.dumps({**MANIFEST, "mlflow": "x"}).encode(),
        'mlflow: found "x", input should be a valid dict',
    ),
    ("config.yaml", b"{", "not YAML (while parsing a flow node"),
    ("config.yaml", b"- 1", "found no mapping of keys"),
    ("config.yaml", b"\xff\x00", "cannot be read (UnicodeDecodeError)"),
    ("config.yaml", DEEP, "not YAML (found too many levels"),
    ("config.yaml", None, "cannot be read (IsADirectoryError)"),
    ("scores.json", b"[]", "schema: found None, allowed: 1"),
    ("scores.json", b'{"schema": 1, "models": 3}', "models: found 3, input should be a valid dict"),
    ("scores.json", None, "cannot be read (IsADirectoryError)"),
]


@pytest.fixture
def folder(cfg: UnlearnConfig, tmp_path: Path) -> Path:
    """A complete run's folder, but for its models."""
    own = cfg.model_copy(update={"output_dir": str(tmp_path)})
    (tmp_path / "config.yaml").write_text(to_yaml(own))
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    return tmp_path


def opened(cfg: UnlearnConfig, folder: Path) -> RunFolder:
    return RunFolder(cfg.model_copy(update={"output_dir": str(folder)}), "run")


def test_an_undamaged_one_is_complete(cfg: UnlearnConfig, folder: Path) -> None:
    run = opened(cfg, folder)
    assert run.is_complete
    assert run.scores() == SCORES
    assert not lacks_records(run)


@pytest.mark.parametrize(("name", "content", "words"), BROKEN)
def test_a_broken_file_is_named(
    cfg: UnlearnConfig, folder: Path, name: str, content: bytes | None, words: str
) -> None:
    (folder / name).unlink()
    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        opened(cfg, folder)
    assert f"{folder}/{name}: {words}" in str(caught.value)


def test_a_complete_run_without_scores_is_refused(cfg: UnlearnConfig, folder: Path) -> None:
    (folder / "scores.json").unlink()
    with pytest.raises(
        ConfigError, match=r"/scores\.json: not found; allowed: a folder written by"
    ):
        opened(cfg, folder)


def test_keys_of_several_types_are_another_run(cfg: UnlearnConfig, folder: Path) -> None:
    with (folder / "config.yaml").open("a") as stream:
        stream.write("7: x\n")
    with pytest.raises(ConfigError, match=r"a different run \(it differs in: 7\)"):
        opened(cfg, folder)


def test_a_trials_folder_keeps_what_it_is_told_without_a_beginning(
    cfg: UnlearnConfig, tmp_path: Path
) -> None:
    run = opened(cfg, tmp_path)
    run.update(cost={"solve_s": 1.0})
    run.update(strengths=[{"strength": 0.5}])
    expected = {"schema": 1, "cost": {"solve_s": 1.0}, "strengths": [{"strength": 0.5}]}
    assert run.manifest() == expected


def test_a_null_of_mlflow_is_no_record(cfg: UnlearnConfig, folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, "mlflow": None}))
    assert not lacks_records(opened(cfg, folder))
