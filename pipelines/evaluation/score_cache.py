"""What models were scored before, so that an unchanged model is never scored twice.

A row's numbers depend on the files of the model and of the tokenizer, on the row, on a few settings
and on the code. The digest of all of these is an entry's name. Entries lie in the user's cache, as
numbers without text. An evaluation that is interrupted goes on with what it has scored.

Of the forget set, and of those of earlier requests, nothing stays once an evaluation is complete:
who has the model could guess at a row's tokens by their probabilities.
"""

import hashlib
import json
import pickle
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

import rfa
from pipelines.config.data import FORGOTTEN_SETS
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.evaluation.metrics.keys import InContext
from pipelines.evaluation.scored_model import Beside, Change, Relearned, ScoredModel
from pipelines.storage.filesystem import cache_folder
from pipelines.storage.seal import file_digest

if TYPE_CHECKING:
    from pipelines.evaluation.scorer import Samples

PACKAGES = (Path(rfa.__file__).parent, Path(__file__).parents[1])
LIBRARIES = ("torch", "transformers", "numpy")


class Piece(NamedTuple):
    """Some rows of a set: a reference to their table, their number and their digest."""

    set_name: str
    rows: Any
    num_rows: int
    digest: str


class Task(NamedTuple):
    """A model, and the rows that a worker scores under it at a stretch."""

    model: ScoredModel
    pieces: list[Piece]

    @property
    def work(self) -> int:
        """The task's part of `evaluation_work`: rows, or steps of relearning."""
        if isinstance(self.model.change, Relearned):
            return self.model.change.steps
        if isinstance(self.model.change, InContext):  # the other pieces are examples
            return self.pieces[0].num_rows
        return sum(piece.num_rows for piece in self.pieces)

    @property
    def reads_forgotten(self) -> bool:
        return any(piece.set_name in FORGOTTEN_SETS for piece in self.pieces)


def digest_of(rows: pa.Table) -> str:
    """Return the digest of a table with all its columns."""
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, rows.schema) as writer:
        writer.write_table(rows)
    return hashlib.sha256(stream.getvalue()).hexdigest()


class ScoreCache:
    """The samples of tasks by what they depend on.

    Args:
        models: all models of the evaluation. Those named by a hub's name are scored each time, as
            the hub may change them.
    """

    def __init__(self, cfg: UnlearnConfig, models: Mapping[str, ModelConfig]) -> None:
        self._folder = cache_folder() / "scores"
        self._folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        self._models = {name: _folder_digest(model.path) for name, model in models.items()}
        self._encoder = _folder_digest(cfg.model.path, weights=False)
        self._shared = [
            _code_digest(),
            *(metadata.version(library) for library in LIBRARIES),
            cfg.task,
            cfg.seed,
            cfg.data.system_prompt,
            cfg.model.date,
            cfg.data.max_tokens,
            cfg.train.precision,
            cfg.train.gpus_per_worker > 0,
            cfg.evaluation.quick,
            "leak_at_k" in cfg.evaluation.robustness,
            cfg.evaluation.max_new_tokens,
        ]

    def load(self, task: Task) -> "dict[ScoredModel, Samples] | None":
        """Return what a task gave before, or None."""
        path = self._path(task)
        if path is None or not path.exists():
            return None
        # The folder is this user's alone.
        by_change: dict[Change | None, Samples] = pickle.loads(path.read_bytes())
        samples: dict[ScoredModel, Samples] = {}
        for relearned, of_model in by_change.items():
            model = task.model if relearned is None else task.model._replace(change=relearned)
            samples[model] = of_model
        return samples

    def save(self, task: Task, samples: "Mapping[ScoredModel, Samples]") -> None:
        """Keep what a task gave."""
        path = self._path(task)
        if path is None:
            return
        # Another run may know the model, and the one beside it, by another name.
        by_change: dict[Change | None, Samples] = {}
        for model, of_model in samples.items():
            relearned = model.change if isinstance(model.change, Relearned) else None
            by_change[relearned] = of_model
        # A name of its own, as two runs may score the same model at once.
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as partial:
            partial.write(pickle.dumps(by_change))
        Path(partial.name).replace(path)

    def drop(self, task: Task) -> None:
        """Remove what a task gave."""
        path = self._path(task)
        if path is not None:
            path.unlink(missing_ok=True)

    def _path(self, task: Task) -> Path | None:
        """Return the file of a task's samples, or None where a model has no digest."""
        name, change = task.model
        digests = [self._encoder, self._models[name]]
        if isinstance(change, Beside):
            digests.append(self._models[change.reference])
            change = Beside("")
        if None in digests:
            return None
        rows = [piece.digest for piece in task.pieces]
        depends_on = [*self._shared, digests, type(change).__name__, change, rows]
        return self._folder / hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()


def _folder_digest(path: str, *, weights: bool = True) -> str | None:
    """Return the digest of a model folder's files, or None for a hub name."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and (weights or file.suffix != ".safetensors"):
            digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def _code_digest() -> str:
    """Return the digest of this project's code, so that no change of it meets old numbers."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted(package.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
