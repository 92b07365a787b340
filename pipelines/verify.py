"""Whether a run folder still is what the run sealed."""

from pathlib import Path

from pipelines.artifact import file_digests
from pipelines.config import ConfigError
from pipelines.report import read_json


def differences(run_dir: Path) -> list[str]:
    """One line for each file that was changed, removed or added since the run was sealed; none when all is as it was.

    Raises:
        ConfigError: the folder is not that of a finished run.
    """
    manifest = read_json(run_dir / "manifest.json")
    sealed, status = manifest.get("files"), manifest.get("status")
    if status != "complete" or not isinstance(sealed, dict):
        raise ConfigError(f"{run_dir / 'manifest.json'}: status: found {status!r}, allowed: 'complete', with files")
    found = file_digests(run_dir)
    changed = {name: "changed" for name in sealed.keys() & found.keys() if sealed[name] != found[name]}
    missing = dict.fromkeys(sealed.keys() - found.keys(), "missing")
    added = dict.fromkeys(found.keys() - sealed.keys(), "not in the manifest")
    return [f"{name}: {what}" for name, what in sorted((changed | missing | added).items())]
