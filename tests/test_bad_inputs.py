"""Hundreds of wrong configurations, over all commands: one line that names the key, exit code 2, nothing begun."""

import json
import sys
from itertools import cycle, product
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app, main
from pipelines.config.text import MESSAGE_CHARS
from pipelines.report.page import RUN_FILES
from pipelines.storage.seal import file_digests
from tests.bad_inputs import BROKEN, OPTIONS, BadInput, bad_inputs
from tests.pipelines.report.test_page import forget_entry, scores_of, write_run

INPUTS = list(bad_inputs())
COMMANDS = {
    "run": [],
    "check": [],
    "check --gpu": ["--gpu", "H100"],
    "finetune": [],
    "tune": ["--trials", "1"],
    "evaluate": ["--model", "none"],
    "submit": ["--address", "http://127.0.0.1:1", "--", "run"],
}


def test_there_are_hundreds() -> None:
    assert len(INPUTS) == len({one.name for one in INPUTS}) >= 300


def told(command: str, given: BadInput, folder: Path) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    config = "quick"
    if given.text is not None:
        config = str(folder / "config.yaml")
        Path(config).write_text(given.text, encoding="utf-8")
    overrides = [f"output_dir={folder}/out"]
    for name in ("earlier", "neighbours"):
        if given.override.startswith(f"data.{name}"):
            overrides.append(f"data.{name}.path=rows.jsonl")  # the preset has no such set
    if given.override:
        overrides.append(given.override)
    arguments = [command.split()[0], *COMMANDS[command], config, *overrides]
    result = CliRunner().invoke(app, arguments)
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_each_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    handled_badly: list[str] = []
    for given, command in zip(INPUTS, cycle(COMMANDS), strict=False):
        code, line = told(command, given, tmp_path)
        if code != 2 or not is_one_line(line) or given.named not in line:
            handled_badly.append(f"{command} {given.name}: {code} {line!r}")
    assert not handled_badly, f"{len(handled_badly)} of {len(INPUTS)}:\n" + "\n".join(handled_badly)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_key_given_twice(command: str, tmp_path: Path) -> None:
    text = "data:\n  forget: {path: one.jsonl}\n  forget: {path: other.jsonl}\n"
    code, line = told(command, BadInput("twice", text=text), tmp_path)
    assert code == 2
    assert line == (
        f"{tmp_path}/config.yaml: not a configuration: line 3: found the key forget a second time\n"
    )


def is_one_line(text: str) -> bool:
    return text.count("\n") == 1 and text[:-1].isprintable() and len(text) <= MESSAGE_CHARS + 1


def test_each_wrong_option_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    handled_badly: list[str] = []
    for arguments in OPTIONS:
        monkeypatch.setattr(sys, "argv", ["ray-unlearn", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        if ended.value.code != 2 or told.out or not is_one_line(told.err):
            handled_badly.append(f"{arguments}: {ended.value.code} {told.err!r}")
    assert not handled_badly, "\n".join(handled_badly)
    assert not list(tmp_path.iterdir())


def test_each_broken_file_of_a_run_is_one_line(tmp_path: Path) -> None:
    """A report needs all but the losses whole, and so does the gate; the digests tell the rest."""
    handled_badly: list[str] = []
    for number, (name, content) in enumerate(product(RUN_FILES, BROKEN)):
        folder = tmp_path / str(number)
        folder.mkdir()
        scores = scores_of(before=forget_entry(0.9), after=forget_entry(0.5), oracle=None)
        write_run(folder, scores)
        manifest = {"schema": 1, "status": "complete", "files": file_digests(folder)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / name).unlink()
        if content == "a folder":
            (folder / name).mkdir()
        elif content != "gone":
            (folder / name).write_bytes(BROKEN[content] or b"")
        is_read = name != "losses.jsonl" or content in ("gone", "a folder", "binary")
        expected = {
            "report": 2 if is_read else 0,
            "gate": 2 if is_read else 3,
            "verify": 2 if name == "manifest.json" else 1,
        }
        for command, code in expected.items():
            result = CliRunner().invoke(app, [command, str(folder)])
            is_told = code != 2 or (is_one_line(result.stderr) and name in result.stderr)
            if result.exit_code != code or not is_told or "Failed" in result.stderr:
                told = f"{result.exit_code} {result.stderr[:200]!r}"
                handled_badly.append(f"{command}, {name}, {content}: {told}")
    assert not handled_badly, "\n".join(handled_badly)
