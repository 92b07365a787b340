"""The check that a run folder is unchanged since its run was sealed."""

from pipelines.config.schema import ConfigError
from pipelines.storage.output import OutputDir
from pipelines.storage.records import read_json
from pipelines.storage.seal import changes


def differences(output: OutputDir) -> list[str]:
    """Return one line per file that was changed, removed or added since the run was sealed.

    Raises:
        ConfigError: the folder is not that of a finished run.
    """
    with output.local_copy("manifest.json") as folder:
        path = folder / "manifest.json"
        manifest = read_json(path)
        sealed, status = manifest.get("files"), manifest.get("status")
        if status != "complete" or not sealed:
            raise ConfigError(f"{path}: status: found {status!r}, allowed: 'complete', with files")
    return changes(sealed, output.digests())
