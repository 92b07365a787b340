"""Deletion requests one after another: what ties a run to the runs before it, and what finds a change."""

import hashlib
import hmac
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.config.schema import ConfigError, ModelConfig, UnlearnConfig
from pipelines.storage.chain import check_parent, earlier_runs
from pipelines.storage.run_folder import RunFolder
from pipelines.storage.seal import MANIFEST, REQUEST_KEY, manifest_digest
from tests.bucket import Bucket

Finish = Callable[..., Path]


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model that no run has left."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"base")
    return folder


@pytest.fixture
def begin(cfg: UnlearnConfig, tmp_path: Path) -> Callable[..., RunFolder]:
    """Begins a run in the folder of this name, on a model, about the rows of these ids."""

    def begun(name: str, model: Path, *ids: str, purpose: str = "run") -> RunFolder:
        own = {"output_dir": str(tmp_path / name), "model": ModelConfig(path=str(model))}
        run = RunFolder(cfg.model_copy(update=own), purpose)
        run.begin({"forget": {"rows": len(ids), "digest": "0" * 64}}, ids)
        return run

    return begun


@pytest.fixture
def finish(begin: Callable[..., RunFolder]) -> Finish:
    """The folder of a run that has reached its end, with a model as short as can be."""

    def finished(name: str, model: Path, *ids: str, purpose: str = "run") -> Path:
        run = begin(name, model, *ids, purpose=purpose)
        (run.path / "model").mkdir()
        for file, text in (("config.json", "{}"), ("tokenizer.json", "[]")):
            (run.path / "model" / file).write_text(text)
        (run.path / "model" / "model.safetensors").write_bytes(name.encode() * 99)
        run.update(verdict="traces_remain")
        run.seal()
        return run.path

    return finished


@pytest.fixture
def three(base: Path, finish: Finish) -> tuple[Path, Path, Path]:
    """Three requests, each on the model that the one before it left."""
    first = finish("first", base, "anna-birthplace")
    second = finish("second", first / "model", "bob-job")
    return first, second, finish("third", second / "model", "carl-job")


def test_a_request_has_the_number_and_the_digests_of_all_before_it(
    three: tuple[Path, Path, Path], base: Path
) -> None:
    requests = [manifest_of(folder)["request"] for folder in three]
    assert [request["number"] for request in requests] == [1, 2, 3]
    assert requests[0]["earlier"] == []
    expected: list[dict[str, Any]] = []
    for folder, model in zip(three, (base, three[0] / "model"), strict=False):
        manifest = manifest_of(folder)
        digest = manifest_digest(manifest)
        record = {"run": str(folder), "manifest": digest, "model": str(model)}
        expected.append({**record, "created": manifest["created"], "verdict": "traces_remain"})
    assert requests[1]["earlier"] == expected[:1]
    assert requests[2]["earlier"] == expected


def test_a_manifest_that_mlflow_was_told_of_later_is_the_same_and_any_other_is_not(
    begin: Callable[..., RunFolder], base: Path
) -> None:
    run = begin("out", base)
    digest = manifest_digest(run.manifest())
    run.update(mlflow={"run_id": "later", "is_complete": True})
    assert manifest_digest(run.manifest()) == digest
    path = run.path / MANIFEST
    path.write_text(json.dumps(dict(reversed(run.manifest().items()))))
    assert manifest_digest(run.manifest()) == digest, "order and white space say nothing"
    for key in run.manifest():
        if key != "mlflow":
            assert manifest_digest({**run.manifest(), key: "other"}) != digest, key


def test_ids_are_hashed_with_a_key_that_lies_beside_the_manifest(
    begin: Callable[..., RunFolder], base: Path
) -> None:
    run, other = begin("one", base, "bob-job", "anna-job"), begin("two", base, "anna-job")
    path = run.path / REQUEST_KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = bytes.fromhex(path.read_text())
    assert len(key) == 32
    expected = {
        hmac.new(key, name, hashlib.sha256).hexdigest() for name in (b"anna-job", b"bob-job")
    }
    rows = run.manifest()["request"]["rows"]
    assert rows == sorted(expected)
    assert not expected & set(other.manifest()["request"]["rows"]), "a key a run"
    text = (run.path / MANIFEST).read_text()
    assert "job" not in text and key.hex() not in text
    run.seal()
    assert set(run.manifest()["files"]) == {"config.yaml"}, "the key may be kept from who verifies"


def test_a_run_killed_before_its_manifest_is_begun_again(
    begin: Callable[..., RunFolder], base: Path
) -> None:
    run = begin("out", base, "anna-job")
    (run.path / MANIFEST).unlink()
    key = (run.path / REQUEST_KEY).read_text()
    again = begin("out", base, "anna-job")
    assert len(again.manifest()["request"]["rows"]) == 1
    assert (again.path / REQUEST_KEY).read_text() != key


def test_other_models_begin_a_chain(base: Path, finish: Finish, tmp_path: Path) -> None:
    tuned = finish("tuned", base, purpose="finetune")
    assert "request" not in manifest_of(tuned)
    (tmp_path / "foreign" / "model").mkdir(parents=True)
    (tmp_path / "foreign" / MANIFEST).write_text("of another tool")
    for model in (base, tuned / "model", tmp_path / "foreign" / "model", tmp_path / "none"):
        assert earlier_runs(str(model)) == []
        check_parent(str(model))
    assert earlier_runs("owner/model") == []


def test_a_link_to_a_runs_model_is_that_runs_model(
    base: Path, finish: Finish, tmp_path: Path
) -> None:
    first = finish("first", base)
    (tmp_path / "current").symlink_to(first / "model")
    assert earlier_runs(str(tmp_path / "current")) == earlier_runs(str(first / "model"))
    assert len(earlier_runs(str(first / "model"))) == 1


def test_a_run_that_lies_on_a_store_is_named_by_its_address_there(
    base: Path, finish: Finish
) -> None:
    copy = finish("copy", base)
    (copy / "config.yaml").write_text("output_dir: s3://bucket/runs/first\n")
    [record] = earlier_runs(str(copy / "model"))
    assert record["run"] == "s3://bucket/runs/first"


def test_a_run_of_an_older_version_is_the_first_request(base: Path, finish: Finish) -> None:
    first = finish("first", base)
    manifest = manifest_of(first)
    del manifest["request"]
    (first / MANIFEST).write_text(json.dumps(manifest))
    second = manifest_of(finish("second", first / "model"))["request"]
    assert second["number"] == 2
    assert [record["run"] for record in second["earlier"]] == [str(first)]


def test_a_run_that_is_not_complete_leaves_no_model_for_the_next_request(
    begin: Callable[..., RunFolder], base: Path
) -> None:
    run = begin("first", base)
    (run.path / "model").mkdir()
    for read in (check_parent, earlier_runs):
        with pytest.raises(ConfigError, match=r"^model\.path: .*/first/model is of a run that is"):
            read(str(run.path / "model"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda model: flip_a_byte(model / "model.safetensors"), "model.safetensors: changed"),
        (lambda model: flip_a_byte(model / "tokenizer.json"), "tokenizer.json: changed"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (
            lambda model: (model / "chat_template.jinja").write_text("x"),
            "chat_template.jinja: not in the manifest",
        ),
    ],
)
def test_a_model_that_is_not_what_its_run_sealed_is_refused(
    base: Path, finish: Finish, spoil: Callable[[Path], Any], found: str
) -> None:
    model = finish("first", base) / "model"
    (model.parent / "scores.json").write_text("another file is none of the model's")
    check_parent(str(model))
    spoil(model)
    with pytest.raises(ConfigError) as caught:
        check_parent(str(model))
    assert str(caught.value) == (
        f"model.path: {model} is not as its run has sealed it (model/{found}); "
        f"allowed: the files that {model.parent}/manifest.json names, unchanged"
    )


def verify(folder: Path) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.stdout == ""
    return result.exit_code, result.stderr.splitlines()


def test_an_untouched_chain_is_verified_also_where_mlflow_was_told_later(
    three: tuple[Path, Path, Path],
) -> None:
    manifest = manifest_of(three[0])
    (three[0] / MANIFEST).write_text(json.dumps({**manifest, "mlflow": {"is_complete": True}}))
    assert verify(three[2]) == (0, [f"Verified: {three[2]}"])


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["model/model.safetensors", "model/tokenizer.json", "config.yaml"])
def test_a_changed_byte_of_an_earlier_run_is_told_with_its_request(
    three: tuple[Path, Path, Path], number: int, name: str
) -> None:
    folder = three[number - 1]
    flip_a_byte(folder / name)
    assert verify(three[2]) == (1, [f"request {number} ({folder}): {name}: changed"])


@pytest.mark.parametrize("number", [1, 2])
def test_every_changed_byte_of_an_earlier_manifest_is_told(
    three: tuple[Path, Path, Path], number: int
) -> None:
    path = three[number - 1] / MANIFEST
    whole = path.read_bytes()
    told = [f"request {number} ({path.parent}): {MANIFEST}: changed"]
    for index in range(0, len(whole), 29):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        if whole[index : index + 1].isspace():  # another white space, or a character for it
            continue
        assert verify(three[2]) == (1, told), index


def test_a_run_that_is_not_found_is_told_and_the_others_are_compared(
    three: tuple[Path, Path, Path],
) -> None:
    first, second, third = three
    shutil.rmtree(second)
    missing = f"request 2 ({second}): not found, so its files were not compared"
    assert verify(third) == (0, [missing, f"Verified: {third}"])
    flip_a_byte(first / "model" / "config.json")
    changed = f"request 1 ({first}): model/config.json: changed"
    assert verify(third) == (1, [changed, missing])


def test_a_chain_that_was_moved_is_found_side_by_side(
    three: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "archive").mkdir()
    first, second, third = (folder.rename(tmp_path / "archive" / folder.name) for folder in three)
    assert verify(third) == (0, [f"Verified: {third}"])
    flip_a_byte(first / "model" / "model.safetensors")
    told = f"request 1 ({first}): model/model.safetensors: changed"
    assert verify(third) == (1, [told])
    assert verify(second) == (1, [told])


def test_a_chain_on_a_store_is_followed_there(
    three: tuple[Path, Path, Path], bucket: Bucket
) -> None:
    for folder in three:
        for path in filter(Path.is_file, folder.rglob("*")):
            name = path.relative_to(folder.parent)
            bucket.write(f"runs/{name}", path.read_bytes())
        shutil.rmtree(folder)
    url = "s3://bucket/runs/third"
    run = CliRunner().invoke(app, ["verify", url])
    assert (run.exit_code, run.stderr) == (0, f"Verified: {url}\n")
    bucket.write("runs/first/model/config.json", b"[]")
    run = CliRunner().invoke(app, ["verify", url])
    assert run.exit_code == 1
    assert run.stderr == "request 1 (s3://bucket/runs/first): model/config.json: changed\n"


def test_a_run_that_began_with_another_model_than_was_left_to_it_is_told(
    three: tuple[Path, Path, Path],
) -> None:
    first, second, third = three
    manifest = manifest_of(third)
    manifest["model"]["digest"] = "0" * 64
    (third / MANIFEST).write_text(json.dumps(manifest))
    told = f"request 2 ({second}): model: another one than the next request began with"
    assert verify(third) == (1, [told])
    manifest = manifest_of(second)
    manifest["request"]["earlier"] = manifest["request"]["earlier"][:0]
    (second / MANIFEST).write_text(json.dumps(manifest))
    forged = manifest_of(third)
    forged["request"]["earlier"][1]["manifest"] = manifest_digest(manifest)
    (third / MANIFEST).write_text(json.dumps(forged))
    names = f"request 2 ({second}): {MANIFEST}: names other runs before it"
    assert verify(third) == (1, [names, told])
    assert verify(first)[0] == 0


def test_any_place_that_a_manifest_names_is_one_that_is_not_found(
    base: Path, finish: Finish
) -> None:
    second = finish("second", base)
    manifest = manifest_of(second)
    for place in ("", "/", "a\0b", "x" * 5000, "ftp://host/run", "\ud800"):
        record = {"run": place, "manifest": "0" * 64}
        manifest["request"]["earlier"] = [record]
        (second / MANIFEST).write_text(json.dumps(manifest))
        code, told = verify(second)
        assert (code, len(told)) == (0, 2), place
        assert "not found, so its files were not compared" in told[0]
