"""Progress of the workers on the driver: the progress bar, losses.jsonl and MLflow."""

import json
import time
from types import TracebackType
from typing import Any

from pipelines.storage.atomic import write_text
from pipelines.storage.output import OutputDir
from pipelines.terminal import Terminal
from pipelines.tracking.mirror import Mirror

FILE_NAME = "losses.jsonl"
UPLOAD_S = 10.0  # between two uploads of the file, where results lie on a store


class ProgressLog:
    """Record every step's metrics in losses.jsonl, and show them.

    A restarted run repeats the steps after its resume point. Of two lines with the same step the
    later one counts.
    """

    def __init__(
        self,
        output: OutputDir,
        title: str,
        steps: int,
        terminal: Terminal,
        mirror: Mirror | None = None,
    ) -> None:
        self._terminal = terminal
        self._bar = terminal.bar(title, steps or None)
        self._steps = steps
        path = output.folder / FILE_NAME
        if path.exists():
            # A killed run may have left half a line, which the next one would be joined to.
            recorded = path.read_text(encoding="utf-8")
            write_text(path, recorded[: recorded.rfind("\n") + 1])
        self._stream = path.open("a", encoding="utf-8")
        self._output = output
        self._upload_at_s = 0.0
        self._mirror = mirror

    def __enter__(self) -> "ProgressLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        if kind is None:
            self._bar.finish()

    def on_message(self, message: dict[str, Any]) -> None:
        """Record one message of the workers.

        A step's message has `step`, `loss`, its terms, `tokens_per_s` and `learning_rate`. The
        solver's has `done`, `of` and `what`, and moves the progress bar alone; at its end `away`,
        how many tokens of the `pushed` ones are more than a `margin` from their aims. `stopped_after` is
        the number of steps after which enough was forgotten.
        """
        if "away" in message:
            self._say_what_is_left(**message)
            return
        if "stopped_after" in message:
            steps = message["stopped_after"]
            self._bar.at(steps, total=steps)
            self._terminal.say(
                f"Unlearning: {steps} of {self._steps} steps were enough (objective.stop_at)"
            )
            return
        if "of" in message:
            self._bar.at(message["done"], note=message["what"], total=message["of"])
            return
        self._stream.write(json.dumps(message) + "\n")
        # The upload and the mirror read the file, and a killed run leaves all its lines.
        self._stream.flush()
        if time.monotonic() >= self._upload_at_s:
            self._output.try_upload(FILE_NAME)
            self._upload_at_s = time.monotonic() + UPLOAD_S
        step = int(message["step"])
        self._bar.at(step + 1, note=f"loss {message['loss']:.3f}", total=self._steps)
        if self._mirror is not None:
            self._mirror.send_lines()

    def _say_what_is_left(self, away: int, pushed: int, margin: float) -> None:
        if pushed:
            self._terminal.say(
                f"Unlearning: of {pushed} tokens to be forgotten {away} are more than {margin} nats "
                "from their aims"
            )
        else:
            self._terminal.say(
                "Unlearning: the model finds no token of the forget set likelier than its aim, so "
                "nothing was changed"
            )
