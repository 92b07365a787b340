"""The trials of a search that goes on: read back as they were written, or refused by their line."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.schema import ConfigError
from tuning.record import TrialRecord, read_trials
from tuning.score import Score

SCORE = Score(0.5, 0.9, 0.5, 0.0, 3.0)
TRIAL = TrialRecord(0, "finished", {"adapter.rank": 4}, SCORE, {"a": None}, [{"b": 1.0}], 2.0, 9.0)
FIELDS = {**TRIAL._asdict(), "score": SCORE._asdict()}


def written(folder: Path, *lines: str) -> Path:
    (folder / "trials.jsonl").write_text("\n".join(lines))
    return folder


def test_trials_come_back_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    failed = {**FIELDS, "number": 1, "state": "failed", "score": None, "reason": "why"}
    lines = (json.dumps(FIELDS), '{"number": 7, "sta', json.dumps(failed), '{"num')
    trials = read_trials(written(tmp_path, *lines))
    assert trials == {0: TRIAL, 1: TrialRecord(**failed)}
    assert isinstance(trials[0].score, Score)
    assert read_trials(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"number": "many"}, "number: "),
        ({"score": 3}, "score"),
        ({"values": []}, "values: "),
        ({"scores": {"a": "b"}}, "scores.a: "),
        ({"strengths": {}}, "strengths: "),
    ],
)
def test_a_line_of_other_types_is_refused(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    lines = (json.dumps(FIELDS), json.dumps({**FIELDS, **changed}))
    with pytest.raises(ConfigError) as caught:
        read_trials(written(tmp_path, *lines))
    assert f"{tmp_path}/trials.jsonl: line 2: {words}" in str(caught.value)


@pytest.mark.parametrize("line", ["[]", "7", '"text"', "null"])
def test_a_line_that_is_no_trial_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"trials\.jsonl: line 1: "):
        read_trials(written(tmp_path, line))
