"""What is heard from the workers step by step: the progress bar, losses.jsonl, MLflow."""

import json
import time
from types import TracebackType
from typing import Any

from pipelines.storage.output import OutputDir
from pipelines.terminal import Terminal
from pipelines.tracking.mirror import Mirror

FILE_NAME = "losses.jsonl"
UPLOAD_S = 10.0  # between two uploads of the file, where results lie on a store


class ProgressLog:
    """Receives every step's metrics; a restart may tell of a step twice, the last one counts."""

    def __init__(
        self,
        output: OutputDir,
        title: str,
        steps: int,
        terminal: Terminal,
        mirror: Mirror | None = None,
    ) -> None:
        self._bar = terminal.bar(title, steps or None)
        self._steps = steps
        self._stream = (output.folder / FILE_NAME).open("a", encoding="utf-8")
        self._output, self._upload_at_s = output, 0.0
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
        """Take one step's metrics (`step`, `loss`, its terms, `tokens_per_s`, `learning_rate`) or the solver's progress
        (`done`, `of`, `what`)."""
        if "of" in message:
            self._bar.at(message["done"], note=message["what"], total=message["of"])
            return
        self._stream.write(json.dumps(message) + "\n")
        self._stream.flush()
        if time.monotonic() >= self._upload_at_s:
            self._output.try_upload(FILE_NAME)
            self._upload_at_s = time.monotonic() + UPLOAD_S
        step = int(message["step"])
        self._bar.at(step + 1, note=f"loss {message['loss']:.3f}", total=self._steps)
        if self._mirror is not None:
            self._mirror.send_lines()
