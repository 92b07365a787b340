"""Prepared statistics serve the model, the rows and the settings that they were collected with, and no other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.load import with_values
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.storage.prepared import (
    STATISTICS,
    check_prepared,
    model_files_digest,
    prepared_digest,
)
from pipelines.storage.run_folder import RunFolder

LARGEST = f"{2**256 - 1:064x}"
SETS = {
    "forget": {"rows": 2, "digest": LARGEST},
    "retain": {"rows": 5, "digest": f"{5:064x}"},
    "utility": {"rows": 3, "digest": f"{7:064x}"},
}
OTHERWISE = {  # the same rows: sums of digests wrap around
    "forget": {"rows": 3, "digest": f"{1:064x}"},
    "retain": {"rows": 4, "digest": f"{3:064x}"},
    "utility": SETS["utility"],
}


@pytest.fixture
def prepared(cfg: UnlearnConfig, tmp_path: Path) -> Path:
    """The folder of statistics of SETS."""
    folder = tmp_path / "prepared"
    run = RunFolder(with_values(cfg, {"output_dir": str(folder)}), "prepare")
    run.begin(SETS)
    run.update(model_files=model_files_digest(cfg.model.path))
    (folder / STATISTICS).mkdir()
    (folder / STATISTICS / "statistics-0.pt").write_bytes(b"sums")
    run.seal()
    return folder


@pytest.fixture
def request_of(cfg: UnlearnConfig, prepared: Path) -> Callable[..., UnlearnConfig]:
    """A run on the statistics, with changes."""

    def changed(**changes: Any) -> UnlearnConfig:
        values = {name.replace("__", "."): value for name, value in changes.items()}
        return with_values(cfg, {"solve.prepared": str(prepared), **values})

    return changed


def refusal(cfg: UnlearnConfig, sets: Any = OTHERWISE) -> str:
    with pytest.raises(ConfigError) as caught:
        check_prepared(cfg, sets)
    return str(caught.value).replace(str(cfg.solve.prepared), "DIR")


def test_the_same_rows_are_taken_however_they_are_parted(
    request_of: Callable[..., UnlearnConfig], cfg: UnlearnConfig
) -> None:
    for sets in (SETS, OTHERWISE, {**OTHERWISE, "holdout": {"rows": 9, "digest": "0" * 64}}):
        check_prepared(request_of(), sets)
    # What the statistics do not depend on may differ.
    check_prepared(request_of(adapter__rank=7, seed=5, output_dir="other"), SETS)
    check_prepared(cfg, {})  # it names no statistics


@pytest.mark.parametrize(
    "sets",
    [
        {**SETS, "forget": {"rows": 2, "digest": f"{9:064x}"}},
        {**SETS, "retain": {"rows": 4, "digest": SETS["retain"]["digest"]}},
    ],
    ids=["digest", "number"],
)
def test_other_rows_are_refused(request_of: Callable[..., UnlearnConfig], sets: Any) -> None:
    number = sets["forget"]["rows"] + sets["retain"]["rows"]
    assert refusal(request_of(), sets) == (
        "solve.prepared: DIR: was prepared with other rows: data.forget and data.retain found "
        f"{number} rows in all, prepared 7; allowed: the same rows, however they are parted"
    )


def test_another_utility_set_is_refused(request_of: Callable[..., UnlearnConfig]) -> None:
    sets = {name: SETS[name] for name in ("forget", "retain")}
    assert refusal(request_of(), sets) == (
        "solve.prepared: DIR: was prepared with another data.utility; allowed: the same"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_another_model_or_tokenizer_is_refused(
    request_of: Callable[..., UnlearnConfig], cfg: UnlearnConfig, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(cfg.model.path, tmp_path / "model")
    check_prepared(request_of(model__path=str(folder)), SETS)  # a copy is the same model
    with (folder / name).open("ab") as file:
        file.write(b" ")
    told = refusal(request_of(model__path=str(folder)))
    assert told.startswith("solve.prepared: DIR: was prepared for another model (")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data__max_tokens", 99),
        ("data__system_prompt", "Be kind."),
        ("adapter__targets", ["o_proj"]),
        ("adapter__layers", [0, 1]),
        ("solve__exact_width", 8),
        ("solve__sketch_columns", 8),
        ("train__precision", "bf16"),
        ("model__date", "2024-01-01"),
    ],
)
def test_other_settings_are_refused(
    request_of: Callable[..., UnlearnConfig], key: str, value: Any
) -> None:
    assert refusal(request_of(**{key: value})) == (
        f"solve.prepared: DIR: was prepared with another {key.replace('__', '.')}; "
        "allowed: the same"
    )


def test_a_changed_file_is_refused(
    request_of: Callable[..., UnlearnConfig], prepared: Path
) -> None:
    (prepared / STATISTICS / "statistics-0.pt").write_bytes(b"sumz")
    assert refusal(request_of()) == (
        "solve.prepared: DIR: is not as it was sealed (statistics/statistics-0.pt: changed); "
        "allowed: unchanged"
    )


def test_what_is_not_complete_or_no_statistics_is_refused(
    request_of: Callable[..., UnlearnConfig], prepared: Path, tmp_path: Path
) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    for change, words in (
        ({"status": "running"}, "found status running of `prepare`; allowed: complete"),
        ({"purpose": "run"}, "found status complete of `run`; allowed: complete, of `prepare`"),
    ):
        (prepared / "manifest.json").write_text(json.dumps({**manifest, **change}))
        assert words in refusal(request_of())
    nowhere = request_of(solve__prepared=str(tmp_path / "nowhere"))
    assert refusal(nowhere) == (
        "solve.prepared: DIR: not found; allowed: a folder that ray-unlearn prepare wrote"
    )


def test_a_run_is_bound_to_the_statistics_that_it_began_with(
    cfg: UnlearnConfig, prepared: Path, tmp_path: Path
) -> None:
    values = {"solve.prepared": str(prepared), "output_dir": str(tmp_path / "run")}
    run = RunFolder(with_values(cfg, values), "run")
    run.begin(SETS)
    assert run.manifest()["prepared"] == prepared_digest(str(prepared))
    run.check_inputs(SETS)
    path = prepared / "manifest.json"
    path.write_text(path.read_text().replace('"prepare"', '"prepare "'))
    with pytest.raises(ConfigError, match=r"changed since: prepared"):
        run.check_inputs(SETS)
