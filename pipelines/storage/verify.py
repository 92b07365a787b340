"""Whether a run folder still is what the run sealed."""

from pipelines.config.schema import ConfigError
from pipelines.storage.output import OutputDir
from pipelines.storage.run_folder import read_json


def differences(output: OutputDir) -> list[str]:
    """One line for each file that was changed, removed or added since the run was sealed; none when all is as it was.

    Raises:
        ConfigError: the folder is not that of a finished run.
    """
    with output.local_copy("manifest.json") as folder:
        path = folder / "manifest.json"
        manifest = read_json(path)
        sealed, status = manifest.get("files"), manifest.get("status")
        if status != "complete" or not isinstance(sealed, dict):
            raise ConfigError(f"{path}: status: found {status!r}, allowed: 'complete', with files")
    found = output.digests()
    changed = {
        name: "changed" for name in sealed.keys() & found.keys() if sealed[name] != found[name]
    }
    missing = dict.fromkeys(sealed.keys() - found.keys(), "missing")
    added = dict.fromkeys(found.keys() - sealed.keys(), "not in the manifest")
    return [f"{name}: {what}" for name, what in sorted((changed | missing | added).items())]
