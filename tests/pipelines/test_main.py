"""The command line's own refusals: one line and exit code 2, before Ray or a configuration is looked at."""

import sys
from pathlib import Path

import pytest

from pipelines import unlearn
from pipelines.__main__ import main

LONG = "a" * 300


def told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ray-unlearn", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tune", "quick", "--trials", "0"), "Invalid value for '--trials': "),
        (("check", "quick", "--price", "x"), "Invalid value for '--price': "),
        (("serve", "out", "--port", "0"), "Invalid value for '--port': "),
        (("run",), "Missing argument 'CONFIG'"),
        (("rum",), "No such command 'rum'"),
        (("check", "quick", "--prices"), "No such option: --prices"),
        (("evaluate", "quick", "--model", "a\nb"), "--model: found 'a\\nb', allowed: a text"),
        (("evaluate", "quick", "--model", "  "), "--model: found ' ', allowed: a text that is"),
        (("evaluate", "quick", "--model", LONG), "--model: found 'aaa"),
        (("make-data", LONG), "DIR: found 'aaa"),
        (("make-data", "/dev/null/x"), "DIR: /dev/null/x cannot be written (Not a directory)"),
        (("serve", LONG), "RUN_DIR: found 'aaa"),
        (("finetune", "quick", "output_dir=/dev/null/x"), "output_dir: /dev/null is no folder"),
        (("run", "quick", "output_dir=/dev/null/x"), "output_dir: /dev/null is no folder"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, line = told(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert line.startswith(words)
    assert line.count("\n") == 1
    assert len(line) <= 501


def test_help_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = told(monkeypatch, capsys, "check", "--help")
    assert code == 0
    assert out.startswith("Usage: ray-unlearn check")
    # All of a key's limits are told, those of all keys as well.
    code, out, _ = told(monkeypatch, capsys, "run", "--help")
    assert "(>= 0, <= 1e+09)" in out
    code, out, line = told(monkeypatch, capsys)
    assert code == 2
    assert "Usage: ray-unlearn" in out + line


def test_a_key_that_is_missing_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text("seed: 1\n")
    code, _, line = told(monkeypatch, capsys, "run", f"{tmp_path}/own.yaml")
    assert (code, line) == (2, f"model: missing in {tmp_path}/own.yaml, required\n")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("nowhere/scores.json", "--output: found no folder {folder}/nowhere, allowed: an existing"),
        ("file/scores.json", "--output: found no folder {folder}/file, allowed: an existing"),
        ("", "--output: {folder}/ is a folder, allowed: a file's path"),
        (LONG, "--output: found '{folder}/aaa"),
    ],
)
def test_scores_that_could_not_be_written_are_refused_before_they_are_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    words: str,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(unlearn, "evaluate_model", lambda *_: pytest.fail("scored"))
    arguments = ("evaluate", "quick", "--model", "m", "--output", f"{tmp_path}/{output}")
    code, _, line = told(monkeypatch, capsys, *arguments)
    assert (code, line.count("\n")) == (2, 1)
    assert line.startswith(words.format(folder=tmp_path))
