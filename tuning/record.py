"""The record of a search: every trial that has ended, in a file, in MLflow and on the terminal."""

import json
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ray import tune

from pipelines.storage.atomic import write_text
from pipelines.terminal import Terminal
from pipelines.tracking.mirror import Mirror
from tuning.score import Score

FILE_NAME = "trials.jsonl"


class TrialRecord(NamedTuple):
    """A trial that has ended: `finished`, `stopped` on the way by the scheduler, or `failed` for a reason.

    `values` are its changes to the configuration, `seconds` what it took in all, `ended_s` when it ended, in seconds of
    the clock.
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


class TrialLog(tune.Callback):
    """Keeps `trials.jsonl`, and tells MLflow and the terminal of each trial as it ends."""

    def __init__(self, folder: Path, mirror: Mirror, terminal: Terminal, wanted: int) -> None:
        self.folder = folder
        self.trials = read_trials(folder)
        if self.trials:  # without the half line that a killed search may have left
            write_text(folder / FILE_NAME, "".join(_line(own) for own in self.trials.values()))
        self.left = max(0, wanted - len(self.trials))
        self._mirror = mirror
        self._started: dict[str, float] = {}
        if self.trials:
            terminal.say(f"Going on after {len(self.trials)} trials")
        self._bar = terminal.bar("Trials", wanted)
        self._bar.at(len(self.trials), total=wanted, note=self._note())
        self._wanted = wanted

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks down for a way of resuming that is not ours

    def settle(self, study: Any) -> None:
        """Tell Optuna's study how its trials ended; those that a killed search was at are to be tried again."""
        from optuna.trial import TrialState

        for own in study.get_trials(states=(TrialState.RUNNING,)):
            score = self.trials[own.number].score if own.number in self.trials else None
            if score is None:
                study.tell(own.number, state=TrialState.FAIL)
                if own.number not in self.trials:
                    study.enqueue_trial(own.params, user_attrs=own.user_attrs)
            else:
                study.tell(own.number, [score.distance, score.utility])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray Tune: a trial begins."""
        self._started[trial.trial_id] = time.time()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray Tune: a trial has ended by itself, or was stopped."""
        result = trial.last_result
        score = Score(**{name: float(result[name]) for name in Score._fields})
        state = "finished" if result["whole"] else "stopped"
        self._add(trial, state, score=score, scores=result["scores"], strengths=result["strengths"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray Tune: a trial has raised an error, or its process has died."""
        self._add(trial, "failed", reason=_reason(trial))

    def _add(self, trial: Any, state: str, **content: Any) -> None:
        now = time.time()
        ended = TrialRecord(
            number=int(trial.config["number"]),
            state=state,
            values=json.loads(trial.config["values"]),
            seconds=now - self._started.get(trial.trial_id, now),
            ended_s=now,
            **({"score": None, "scores": {}, "strengths": []} | content),
        )
        self.trials[ended.number] = ended
        with (self.folder / FILE_NAME).open("a", encoding="utf-8") as stream:
            stream.write(_line(ended))
        self._mirror.send_lines(at_once=True)
        self._bar.at(len(self.trials), total=self._wanted, note=self._note())

    def _note(self) -> str:
        failed = sum(own.state == "failed" for own in self.trials.values())
        scored = [own for own in self.trials.values() if own.score is not None]
        best = min(scored, key=lambda own: own.score.distance if own.score else 0.0, default=None)
        parts = (
            [f"nearest {best.score.distance:.3f}, utility {best.score.utility:.3f}"]
            if best and best.score
            else []
        )
        return ", ".join(parts + ([f"{failed} failed"] if failed else []))


def as_configured(trials: Mapping[int, TrialRecord]) -> TrialRecord | None:
    """The trial without changes to the configuration, once it has ended."""
    return next((own for own in trials.values() if not own.values), None)


def _reason(trial: Any) -> str:
    """The kind of error and the first line of what it says."""
    path = trial.pickled_error_file
    if path is None:
        return Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()[-1][:300]
    error = pickle.loads(Path(path).read_bytes())
    cause = getattr(error, "cause", None) or error
    first = (str(cause).strip().splitlines() or [""])[0]
    return f"{type(cause).__name__}: {first}"[:300]


def _line(ended: TrialRecord) -> str:
    return (
        json.dumps({**ended._asdict(), "score": ended.score._asdict() if ended.score else None})
        + "\n"
    )


def read_trials(folder: Path) -> dict[int, TrialRecord]:
    """The trials of a search folder by number; a line that a killed search has torn is passed over."""
    path = folder / FILE_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: dict[int, TrialRecord] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        score = Score(**entry.pop("score")) if entry["score"] is not None else entry.pop("score")
        found[entry["number"]] = TrialRecord(score=score, **entry)
    return found
