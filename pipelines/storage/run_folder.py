"""The output folder: guarded against another run, filled step by step, sealed by a manifest."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from pipelines.config.load import changed_keys, short_hash, to_yaml
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.storage.atomic import write_text
from pipelines.storage.filesystem import one_line
from pipelines.storage.output import file_digest, file_digests, open_output

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
    """One run's output folder. Opening it refuses a folder that holds something else, and writes nothing.

    Attributes:
        path: where the run works.
        output: where its results end.
        key: identifies the run: the same for the same command and configuration.
    """

    def __init__(self, cfg: UnlearnConfig, purpose: str) -> None:
        """Check what the folder holds.

        Raises:
            ConfigError: it holds a different run or other files, its disk is too full, or it cannot be reached.
        """
        self.cfg, self.purpose = cfg, purpose
        self.output = open_output(cfg.output_dir)
        self.path = self.output.folder
        self.key = short_hash(f"{purpose}\n{to_yaml(cfg)}")
        self._refuse_other_run()
        self._refuse_full_disk()

    def _refuse_other_run(self) -> None:
        names = sorted(self.output.names() - {"run.log"})
        config = self.output.read("config.yaml")
        # A run that was killed before it wrote its manifest has left its configuration alone.
        if not names or (names == ["config.yaml"] and config == to_yaml(self.cfg).encode()):
            return
        if config is None or "manifest.json" not in names:
            raise ConfigError(
                f"output_dir: {self.output.url} holds other files ({names[0]}, ...), allowed: a new or empty folder"
            )
        old = yaml.safe_load(config)
        changed = changed_keys(old, self.cfg.model_dump(mode="json"))
        if changed or self.manifest().get("purpose") != self.purpose:
            what = ", ".join(changed[:4]) or "the command"
            raise ConfigError(
                f"output_dir: {self.output.url} holds a different run (it differs in: {what}), "
                "allowed: a new folder, or the same configuration to continue it"
            )

    def _refuse_full_disk(self) -> None:
        existing = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
        # The merged model, and resume points: twice the trained parameters' optimizer state at worst.
        copies = 5 if self.purpose == "finetune" else 1.3
        needed = int(weight_bytes(self.cfg.model.path) * copies) + 50 * 2**20
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise ConfigError(
                f"output_dir: {existing} has {free / 2**30:.1f} GiB free, allowed: at least {needed / 2**30:.1f} GiB"
            )

    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands; empty before the run began."""
        return json.loads(self.output.read("manifest.json") or "{}")

    @property
    def is_complete(self) -> bool:
        """Whether an earlier call of the same command finished this run."""
        return self.manifest().get("status") == "complete"

    def check_inputs(self, sets: Mapping[str, Any]) -> None:
        """Refuse to continue a run with another model or other sets than it began with.

        `sets` gives each set's number of rows and digest.
        """
        old = self.manifest()
        if not old:
            return
        inputs = self._inputs(sets)
        changed = changed_keys({key: old.get(key) for key in inputs}, inputs)
        if changed:
            raise ConfigError(
                f"output_dir: {self.output.url} was begun with other inputs (changed since: {changed[0]}), "
                "allowed: a new folder, or the same inputs to continue"
            )

    def _inputs(self, sets: Mapping[str, Any]) -> dict[str, Any]:
        path = self.cfg.model.path
        return {"model": {"path": path, "digest": model_digest(path)}, "sets": dict(sets)}

    def begin(self, sets: Mapping[str, Any]) -> None:
        """Write config.yaml and the manifest's first form, unless the run has begun before.

        `sets` gives each set's number of rows and digest, which `check_inputs` has checked.

        Raises:
            ConfigError: the folder cannot be written.
        """
        if self.manifest():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", to_yaml(self.cfg))
        manifest = {
            "schema": 1,
            "status": "running",
            "purpose": self.purpose,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
            "git_commit": _git_commit(),
            "seed": self.cfg.seed,
            **self._inputs(sets),
        }
        write_text(self.path / "manifest.json", json.dumps(manifest, indent=2))
        try:
            self.output.upload()
        except OSError as error:
            raise ConfigError(
                f"output_dir: {self.output.url} cannot be written ({one_line(error)})"
            ) from None

    def update(self, **fields: Any) -> None:
        """Add fields to the manifest."""
        write_text(self.path / "manifest.json", json.dumps({**self.manifest(), **fields}, indent=2))

    def write_scores(
        self,
        models: dict[str, dict[str, float | None]],
        cost: dict[str, float | int | None],
        versions: dict[str, int],
    ) -> None:
        """Write scores.json with each metric's version; `allow_nan=False` makes a NaN an error instead of a file."""
        content = {"schema": 1, "models": models, "cost": cost, "versions": versions}
        write_text(self.path / "scores.json", json.dumps(content, indent=2, allow_nan=False))

    def scores(self) -> dict[str, Any]:
        """What scores.json holds."""
        return json.loads(self.output.read("scores.json") or "{}")

    def seal(self) -> None:
        """Write every result's digest into the manifest and call the run complete."""
        self.update(status="complete", files=file_digests(self.path))


def read_text(path: Path) -> str:
    """A text file of a run folder.

    Raises:
        ConfigError: it is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = (
            "not found"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read ({type(error).__name__})"
        )
        raise ConfigError(
            f"{path}: {found}; allowed: a folder written by ray-unlearn run"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping of schema 1. NaN and Infinity, which no run writes, become null.

    Raises:
        ConfigError: the file is missing or is not what `ray-unlearn run` writes.
    """
    try:
        content = json.loads(read_text(path), parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not JSON ({error}); allowed: a folder written by ray-unlearn run"
        ) from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != 1:
        raise ConfigError(f"{path}: schema: found {schema!r}, allowed: 1")
    return content


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the source tree this package runs from; None where it was installed from a wheel."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def model_digest(path: str) -> str | None:
    """SHA-256 over a model folder's configuration and weights; None for a hub name (its revision identifies it)."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(file.name.encode())
        digest.update(file_digest(file).encode())
    return digest.hexdigest()


def weight_bytes(path: str) -> int:
    """Bytes of a local folder's weights; 0 for a hub name."""
    return (
        sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
        if Path(path).is_dir()
        else 0
    )
