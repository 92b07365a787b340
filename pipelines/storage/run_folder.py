"""The output folder of a run: checked, filled step by step and sealed by a manifest."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.config.load import changed_keys, short_hash, to_yaml
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.config.text import one_line
from pipelines.storage.atomic import write_text
from pipelines.storage.chain import earlier_runs, hash_of_id, write_request_key
from pipelines.storage.output import open_output
from pipelines.storage.prepared import prepared_digest
from pipelines.storage.records import (
    WRITTEN_BY_RUN,
    Manifest,
    Record,
    Scores,
    parse_config,
    parse_record,
)
from pipelines.storage.seal import REQUEST_KEY, digest_of_model, file_digest, file_digests

PACKAGES = (
    "ray-unlearn",
    "torch",
    "ray",
    "deepspeed",
    "peft",
    "transformers",
    "datasets",
    "mlflow",
    "numpy",
)


class RunFolder:
    """One run's output folder. Opening it checks its content and writes nothing.

    Attributes:
        path: the folder where the run works.
        output: the location of its results.
        key: identifies the run by its command and configuration.
    """

    def __init__(self, cfg: UnlearnConfig, purpose: str) -> None:
        """Check the folder's content and its disk.

        Raises:
            ConfigError: it holds a different run or other files, its disk is too full, or it
                cannot be reached.
        """
        self.cfg, self.purpose = cfg, purpose
        self.output = open_output(cfg.output_dir)
        self.path = self.output.folder
        self.key = short_hash(f"{purpose}\n{to_yaml(cfg)}")
        self._refuse_other_run()
        self._refuse_full_disk()

    def _refuse_other_run(self) -> None:
        # A command writes its log before it has checked its inputs, and may then be refused.
        names = sorted(self.output.names() - {"run.log", REQUEST_KEY})
        config = self.output.read("config.yaml")
        # A run that was killed before it wrote its manifest has left only its configuration.
        if not names or (names == ["config.yaml"] and config == to_yaml(self.cfg).encode()):
            return
        if config is None or "manifest.json" not in names:
            raise ConfigError(
                f"output_dir: {self.output.url} holds other files ({names[0]}, ...), "
                "allowed: a new or empty folder"
            )
        old = parse_config(config, f"output_dir: {self.output.url}/config.yaml")
        changed = changed_keys(old, self.cfg.model_dump(mode="json"))
        if changed or self.manifest().get("purpose") != self.purpose:
            differences = ", ".join(changed[:4]) or "the command"
            raise ConfigError(
                f"output_dir: {self.output.url} holds a different run "
                f"(it differs in: {differences}), "
                "allowed: a new folder, or the same configuration to continue it"
            )
        if self.is_complete and self.purpose == "run":
            self.scores()

    def _refuse_full_disk(self) -> None:
        existing = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
        if not existing.is_dir():
            raise ConfigError(f"output_dir: {existing} is no folder, allowed: a path in folders")
        # `run` writes the merged model. `finetune` trains all parameters, and its resume points
        # hold at most twice the optimizer state.
        copies = 5 if self.purpose == "finetune" else 1.3
        needed = int(weight_bytes(self.cfg.model.path) * copies) + 50 * 2**20
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise ConfigError(
                f"output_dir: {existing} has {free / 2**30:.1f} GiB free, "
                f"allowed: at least {needed / 2**30:.1f} GiB"
            )

    def manifest(self) -> dict[str, Any]:
        """Return the manifest, {} before the run began."""
        return self._read("manifest.json", Manifest) or {}

    @property
    def is_complete(self) -> bool:
        """Return whether an earlier call of the same command finished this run."""
        return self.manifest().get("status") == "complete"

    def check_inputs(self, sets: Mapping[str, Any]) -> None:
        """Refuse to continue a run with another model or other sets than it began with.

        `sets` has each set's number of rows and digest. They identify the run's inputs.
        """
        old = self.manifest()
        if not old:
            return
        inputs = self._inputs(sets)
        changed = changed_keys({key: old.get(key) for key in inputs}, inputs)
        if changed:
            raise ConfigError(
                f"output_dir: {self.output.url} was begun with other inputs "
                f"(changed since: {changed[0]}), "
                "allowed: a new folder, or the same inputs to continue"
            )

    def _inputs(self, sets: Mapping[str, Any]) -> dict[str, Any]:
        path = self.cfg.model.path
        inputs: dict[str, Any] = {
            "model": {"path": path, "digest": model_digest(path)},
            "sets": dict(sets),
        }
        prepared = self.cfg.solve.prepared
        if prepared is not None and self.purpose == "run":
            inputs["prepared"] = prepared_digest(prepared)
        return inputs

    def begin(self, sets: Mapping[str, Any], forget_ids: Sequence[str] = ()) -> None:
        """Write config.yaml and the manifest's first form, unless the run has begun before.

        `sets` has each set's number of rows and digest, which `check_inputs` has checked, and
        `forget_ids` the ids of the rows that a request is about.

        Raises:
            ConfigError: the folder cannot be written.
        """
        if self.manifest():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # In this order: a run that was killed between the two may be begun again.
        write_text(self.path / "config.yaml", to_yaml(self.cfg))
        versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
        for name in PACKAGES:
            # A package may be missing, as ray-unlearn itself is in a submitted job.
            with suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        manifest = {
            "schema": 1,
            "status": "running",
            "purpose": self.purpose,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions,
            "python": platform.python_version(),
            "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
            "git_commit": _git_commit(),
            "seed": self.cfg.seed,
            **self._inputs(sets),
        }
        if self.purpose == "run":
            manifest["request"] = self._request(forget_ids)
        write_text(self.path / "manifest.json", json.dumps(manifest, indent=2))
        try:
            self.output.upload()
        except OSError as error:
            raise ConfigError(
                f"output_dir: {self.output.url} cannot be written ({one_line(error)})"
            ) from None

    def _request(self, forget_ids: Sequence[str]) -> dict[str, Any]:
        """Return what the manifest says of a deletion request, and write the key of its hashes."""
        earlier = earlier_runs(self.cfg.model.path)
        key = write_request_key(self.path)
        return {
            "number": len(earlier) + 1,
            "earlier": earlier,
            "rows": sorted(hash_of_id(row_id, key) for row_id in forget_ids),
        }

    def update(self, **fields: Any) -> None:
        """Add fields to the manifest, also to that of a search's trial, which never begins."""
        manifest = {"schema": 1, **self.manifest(), **fields}
        write_text(self.path / "manifest.json", json.dumps(manifest, indent=2))

    def write_scores(
        self, cost: Mapping[str, float | int | None], evaluation: Mapping[str, Any]
    ) -> None:
        """Write scores.json, with the models' scores as `Evaluation.content` gives them.

        Raises:
            ValueError: a score is NaN or infinite, which JSON does not have.
        """
        # The scores themselves come first: a reader of the file looks for them.
        content = {"schema": 1, "models": evaluation["models"], "cost": cost, **evaluation}
        write_text(self.path / "scores.json", json.dumps(content, indent=2, allow_nan=False))

    def scores(self) -> dict[str, Any]:
        """Return the content of scores.json.

        Raises:
            ConfigError: it is missing or is not what `ray-unlearn run` writes.
        """
        scores = self._read("scores.json", Scores)
        if scores is None:
            where = f"output_dir: {self.output.url}/scores.json"
            raise ConfigError(f"{where}: not found; {WRITTEN_BY_RUN}")
        return scores

    def _read(self, name: str, record: type[Record]) -> dict[str, Any] | None:
        """Return a checked JSON file's content, None without such a file."""
        content = self.output.read(name)
        if content is None:
            return None
        return parse_record(content, f"output_dir: {self.output.url}/{name}", record)

    def seal(self) -> None:
        """Write every result's digest into the manifest and mark the run complete."""
        self.update(status="complete", files=file_digests(self.path))


def _git_commit() -> str | None:
    """Return the commit of the source tree, None for a package installed from a wheel."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def model_digest(path: str) -> str | None:
    """Return the SHA-256 over a model folder's configuration and weights.

    Returns None for a hub name, which its revision identifies.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    files = [folder / "config.json", *folder.glob("*.safetensors")]
    return digest_of_model({file.name: file_digest(file) for file in files})


def weight_bytes(path: str) -> int:
    """Return the bytes of a local model folder's weights, 0 for a hub name."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
