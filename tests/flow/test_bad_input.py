"""Wrong input from the command line: one line, exit code 2, nothing trained, nothing overwritten."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.storage import run_folder as artifact

pytestmark = pytest.mark.usefixtures("ray_session")


class Case(NamedTuple):
    """What the user gets wrong, and what the line must say."""

    name: str
    changes: list[str]
    message: str


CASES = [
    Case(
        "unknown key",
        ["train.stepz=3"],
        "train.stepz: unknown key, allowed here: steps, learning_rate",
    ),
    Case(
        "unknown section", ["trian.steps=3"], "trian: unknown key, allowed here: task, model, data"
    ),
    Case(
        "wrong type",
        ["train.steps=many"],
        "train.steps: found 'many', input should be a valid integer",
    ),
    Case(
        "out of range",
        ["train.num_workers=0"],
        "train.num_workers: found 0, allowed: a number >= 1, or [min, max] with 1 <= min <= max",
    ),
    Case(
        "wrong choice",
        ["objective.target=mean"],
        "objective.target: found 'mean', input should be 'retain_mean'",
    ),
    Case(
        "target without labels",
        ["objective.target=class_mean", "data.columns.label=none"],
        "objective.target: found class_mean, and 0 labels in the column 'none' of retain (data.columns.label)",
    ),
    Case(
        "no override", ["train.steps"], "override 'train.steps': found no '=', allowed: key=value"
    ),
    Case(
        "nothing forgets",
        ["objective.weights.forget=0"],
        "weights.forget, weights.output and weights.task are all 0",
    ),
    Case(
        "missing file",
        ["data.forget.path={folder}/no.jsonl"],
        "data.forget.path: {folder}/no.jsonl",
    ),
    Case("empty file", ["data.forget.path={folder}/empty.jsonl"], "empty.jsonl"),
    Case("broken line", ["data.forget.path={folder}/broken.jsonl"], "line 2"),
    Case("missing column", ["data.columns.answer=reply"], "'reply'"),
    Case("unknown request ids", ["data.forget.ids={folder}/request.jsonl"], "names 1 id that"),
    Case("forget in retain", ["data.retain.path={data}/forget.jsonl"], "shares 6 rows with retain"),
    Case(
        "target",
        ["adapter.targets=[up_prj]"],
        "adapter.targets: no linear layer ends with 'up_prj'; this model's blocks",
    ),
    Case("layers", ["adapter.layers=[2,9]"], "adapter.layers: found [2, 9], allowed: 0 to 3"),
    Case(
        "layers reversed",
        ["adapter.layers=[2,1]"],
        "allowed: [first, last] with 0 <= first <= last",
    ),
    Case("workers", ["train.num_workers=64"], "train.num_workers: found 64 with 1 CPU each"),
    Case(
        "fewest workers",
        ["train.num_workers=[64,99]"],
        "train.num_workers: found at least 64 with 1 CPU each",
    ),
    Case("GPUs", ["train.gpus_per_worker=1"], "this cluster has 0"),
    Case(
        "no model folder",
        ["model.path={folder}/nowhere"],
        "model.path: found no folder {folder}/nowhere",
    ),
    Case("not a model", ["model.path={folder}"], "is not a model folder: found no config.json"),
    Case(
        "no oracle",
        ["evaluation.oracle={folder}"],
        "evaluation.oracle: {folder} is not a model folder",
    ),
    Case("tracking", ["tracking.uri=gopher://x"], "tracking.uri: found 'gopher://x', allowed:"),
]


@pytest.fixture
def invoke(overrides: list[str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs `ray-unlearn run` in this process; gives exit code and stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["run", *arguments])
        assert result.stdout == ""
        return result.exit_code, result.stderr

    return run


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_mistake_is_one_line_and_exit_code_2(
    case: Case,
    invoke: Callable[..., tuple[int, str]],
    overrides: list[str],
    problem: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text(
        '{"id": 1, "prompt": "a", "answer": "b"}\n{"id": 2, "prompt": \n'
    )
    (tmp_path / "request.jsonl").write_text('"author-9999-birthplace"\n')
    names = {"folder": tmp_path, "data": problem / "data"}
    changes = [change.format(**names) for change in case.changes]
    code, told = invoke("quick", *overrides, f"output_dir={tmp_path}/out", *changes)
    assert code == 2, told
    assert told.count("\n") == 1, told
    assert case.message.format(**names) in told
    left = (
        {path.name for path in (tmp_path / "out").glob("*")}
        if (tmp_path / "out").exists()
        else set()
    )
    assert left <= {"run.log"}, "nothing of a run that never began is left"


def test_an_unknown_preset_lists_the_presets(invoke: Callable[..., tuple[int, str]]) -> None:
    code, told = invoke("qick")
    assert (code, told.count("\n")) == (2, 1)
    assert told.startswith("preset 'qick': not found, allowed: demo")


def test_a_file_that_is_no_mapping_is_refused(
    invoke: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    code, told = invoke(str(tmp_path / "list.yaml"))
    assert (code, told.count("\n")) == (2, 1)
    assert "a YAML mapping of keys" in told


def test_a_folder_with_other_files_is_refused_and_kept(
    invoke: Callable[..., tuple[int, str]], overrides: list[str], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, told = invoke("quick", *overrides, f"output_dir={tmp_path}")
    assert (code, told.count("\n")) == (2, 1)
    assert "holds other files (thesis.txt, ...), allowed: a new or empty folder" in told
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_is_refused(
    invoke: Callable[..., tuple[int, str]],
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        artifact.shutil, "disk_usage", lambda _path: usage._replace(free=10 * 2**20)
    )
    code, told = invoke("quick", *overrides, f"output_dir={tmp_path}/out")
    assert (code, told.count("\n")) == (2, 1)
    assert "GiB free, allowed: at least" in told


def test_pickled_weights_are_refused(
    invoke: Callable[..., tuple[int, str]], overrides: list[str], problem: Path, tmp_path: Path
) -> None:
    shutil.copytree(problem / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    code, told = invoke(
        "quick", *overrides, f"model.path={tmp_path}/model", f"output_dir={tmp_path}/out"
    )
    assert (code, told.count("\n")) == (2, 1)
    assert "holds no .safetensors weights; pickled weights are refused" in told


def test_inputs_that_changed_since_a_run_began_are_refused(
    invoke: Callable[..., tuple[int, str]], overrides: list[str], problem: Path, tmp_path: Path
) -> None:
    shutil.copytree(problem / "data", tmp_path / "data")
    changed = [change.replace(f"{problem}/data", f"{tmp_path}/data") for change in overrides]
    out = tmp_path / "out"
    # A run that was begun: its folder as `RunFolder.begin` leaves it, with the digest of other data.
    code, told = invoke("quick", *changed, f"output_dir={out}", "train.num_workers=64")
    assert code == 2
    from pipelines.config.load import load_config, to_yaml

    cfg = load_config("quick", [*changed, f"output_dir={out}"])
    out.mkdir(exist_ok=True)
    (out / "config.yaml").write_text(to_yaml(cfg))
    digest = artifact.model_digest(cfg.model.path)
    sets = {"forget": {"rows": 6, "digest": "0" * 64}}
    manifest = {
        "purpose": "run",
        "status": "running",
        "model": {"path": cfg.model.path, "digest": digest},
        "sets": sets,
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    code, told = invoke("quick", *changed, f"output_dir={out}")
    assert (code, told.count("\n")) == (2, 1)
    assert "was begun with other inputs (changed since: sets.forget.digest)" in told
    assert json.loads((out / "manifest.json").read_text()) == manifest
