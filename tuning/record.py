"""The record of a search: the trials that have ended, in a file, in MLflow and on the terminal."""

import json
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from ray import tune

from pipelines.config.schema import ConfigError
from pipelines.storage.atomic import write_text
from pipelines.storage.records import read_text
from pipelines.terminal import Terminal
from pipelines.tracking.mirror import Mirror
from tuning.score import Score

FILE_NAME = "trials.jsonl"


class TrialRecord(NamedTuple):
    """A trial that has ended: `finished`, `stopped` early by the scheduler, or `failed` for a
    reason.

    `values` are its changes to the configuration. `seconds` is its wall-clock time, and `ended_s`
    the time when it ended, in seconds since the epoch.
    """

    number: int
    state: str
    values: dict[str, Any]
    score: Score | None
    scores: dict[str, float | None]
    strengths: list[dict[str, float]]
    seconds: float
    ended_s: float
    reason: str | None = None


RECORD = TypeAdapter(TrialRecord)


class TrialLog(tune.Callback):
    """Append each trial to `trials.jsonl` as it ends, and report it to MLflow and the terminal.

    `trials` are those that have ended before, `wanted` is the number of trials in all.
    """

    def __init__(
        self,
        folder: Path,
        trials: dict[int, TrialRecord],
        mirror: Mirror,
        terminal: Terminal,
        wanted: int,
    ) -> None:
        self.folder = folder
        self.trials = trials
        self._mirror = mirror
        if self.trials:
            # This drops the half line that a killed search may have left.
            write_text(folder / FILE_NAME, "".join(map(_line, self.trials.values())))
            terminal.say(f"Going on after {len(self.trials)} trials")
        self.left = max(0, wanted - len(self.trials))
        self._wanted = wanted
        self._started: dict[str, float] = {}
        self._bar = terminal.bar("Trials", wanted)
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks to resume by itself, which is not used here.
        return {}

    def settle(self, study: Any) -> None:
        """Report recorded results to the Optuna study, and enqueue interrupted trials again."""
        from optuna.trial import TrialState

        for running in study.get_trials(states=(TrialState.RUNNING,)):
            record = self.trials.get(running.number)
            if record is not None and record.score is not None:
                study.tell(running.number, [record.score.distance, record.score.utility])
                continue
            # Optuna takes up no running trial. Its values are tried again under another number.
            study.tell(running.number, state=TrialState.FAIL)
            if record is None:
                study.enqueue_trial(running.params, user_attrs=running.user_attrs)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the time at which a trial starts (called by Ray Tune)."""
        self._started[trial.trial_id] = time.time()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that has ended or was stopped (called by Ray Tune)."""
        result = trial.last_result
        score = Score(**{name: float(result[name]) for name in Score._fields})
        record = self._ended(trial, "finished" if result["is_last"] else "stopped")
        self._add(
            record._replace(score=score, scores=result["scores"], strengths=result["strengths"])
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that raised an error or whose process died (called by Ray Tune)."""
        if trial.pickled_error_file is None:
            # The process died, and Ray has left text only.
            text = Path(trial.error_file).read_text(encoding="utf-8")
            reason = text.strip().splitlines()[-1]
        else:
            error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
            # Ray wraps the error that a trial raises.
            cause = getattr(error, "cause", None) or error
            message, _, _ = str(cause).strip().partition("\n")
            reason = f"{type(cause).__name__}: {message}"
        self._add(self._ended(trial, "failed")._replace(reason=reason[:300]))

    def _ended(self, trial: Any, state: str) -> TrialRecord:
        """Return a trial's record, as yet without scores."""
        now = time.time()
        return TrialRecord(
            number=int(trial.config["number"]),
            state=state,
            values=json.loads(trial.config["values"]),
            score=None,
            scores={},
            strengths=[],
            seconds=now - self._started.get(trial.trial_id, now),
            ended_s=now,
        )

    def _add(self, record: TrialRecord) -> None:
        self.trials[record.number] = record
        # The file comes first, as a resumed search reads it.
        with (self.folder / FILE_NAME).open("a", encoding="utf-8") as stream:
            stream.write(_line(record))
        self._mirror.send_lines(at_once=True)
        self._show()

    def _show(self) -> None:
        notes: list[str] = []
        # Scores compare by their first field, the distance.
        best = min(scores_of(self.trials).values(), default=None)
        if best is not None:
            notes.append(f"nearest {best.distance:.3f}, utility {best.utility:.3f}")
        failed = sum(record.state == "failed" for record in self.trials.values())
        if failed:
            notes.append(f"{failed} failed")
        self._bar.at(len(self.trials), total=self._wanted, note=", ".join(notes))


def scores_of(trials: Mapping[int, TrialRecord]) -> dict[int, Score]:
    """Return the score of each trial that has one, in order of the trials' numbers."""
    scores: dict[int, Score] = {}
    for number, record in sorted(trials.items()):
        if record.score is not None:
            scores[number] = record.score
    return scores


def as_configured(trials: Mapping[int, TrialRecord]) -> TrialRecord | None:
    """Return the trial without changes to the configuration, once it has ended."""
    for record in trials.values():
        if not record.values:
            return record
    return None


def _line(record: TrialRecord) -> str:
    fields = record._asdict()
    if record.score is not None:
        fields["score"] = record.score._asdict()
    return json.dumps(fields) + "\n"


def read_trials(folder: Path) -> dict[int, TrialRecord]:
    """Read a search folder's trials by number, without a line that a killed search left torn.

    Raises:
        ConfigError: the file is no text, or a line is not what a search writes.
    """
    path = folder / FILE_NAME
    trials: dict[int, TrialRecord] = {}
    if not path.exists():
        return trials
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            continue
        try:
            record = RECORD.validate_python(fields)
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(map(str, fault["loc"]))
            raise ConfigError(f"{path}: line {number}: {key}: {fault['msg'].lower()}") from None
        trials[record.number] = record
    return trials
