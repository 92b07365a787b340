"""The check that a run's folder, and those of the requests before it, are as they were sealed."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from pipelines.config.schema import ConfigError
from pipelines.storage.output import OutputDir, open_output
from pipelines.storage.records import parse_record, read_json
from pipelines.storage.seal import (
    MANIFEST,
    MODEL,
    changes,
    digest_of_model,
    manifest_digest,
    top_of,
)


class Comparison(NamedTuple):
    """A line for each difference, and one for each earlier run that was not found."""

    differences: list[str]
    unreached: list[str]


class _Run(NamedTuple):
    """An earlier run that was found, with its manifest; {} where that is broken."""

    output: OutputDir
    manifest: Mapping[str, Any]


def compare(output: OutputDir) -> Comparison:
    """Compare a run's files, and those of all requests before it, with what was sealed.

    Raises:
        ConfigError: the folder is not that of a finished run, or a file cannot be read.
    """
    with output.local_copy(MANIFEST) as folder:
        path = folder / MANIFEST
        manifest = read_json(path)
        sealed, status = manifest.get("files"), manifest.get("status")
        if status != "complete" or not sealed:
            raise ConfigError(f"{path}: status: found {status!r}, allowed: 'complete', with files")
    found = Comparison(changes(sealed, output.digests()), [])
    earlier = _earlier(manifest)
    # From the last one back, each beside the one that began with its model.
    following: Mapping[str, Any] | None = manifest
    for index in reversed(range(len(earlier))):
        record = earlier[index]
        run = _reach(record["run"], output)
        name = f"request {index + 1} ({run.output.url if run else record['run']})"
        if run is None:
            found.unreached.append(f"{name}: not found, so its files were not compared")
            following = None
        elif manifest_digest(run.manifest) != record["manifest"]:
            # Its files are left alone: it may be any folder.
            found.differences.append(f"{name}: {MANIFEST}: changed")
            following = None
        else:
            lines = changes(run.manifest.get("files") or {}, run.output.digests())
            lines += _broken_links(run.manifest, earlier[:index], following)
            found.differences.extend(f"{name}: {line}" for line in lines)
            following = run.manifest
    return found


def _earlier(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    return (manifest.get("request") or {}).get("earlier", [])


def _broken_links(
    manifest: Mapping[str, Any],
    earlier: list[dict[str, Any]],
    following: Mapping[str, Any] | None,
) -> list[str]:
    """Return a line for each way in which a run does not stand between the two beside it."""
    lines: list[str] = []
    if _earlier(manifest) != earlier:
        lines.append(f"{MANIFEST}: names other runs before it")
    files = manifest.get("files") or {}
    model = {name[len(MODEL) + 1 :]: files[name] for name in files if top_of(name) == MODEL}
    if following is not None:
        began_with = (following.get("model") or {}).get("digest")
        if began_with != digest_of_model(model):
            lines.append("model: another one than the next request began with")
    return lines


def _reach(place: str, output: OutputDir) -> _Run | None:
    """Return the run that lies at a place or, by its folder's name, beside another run's results.

    Results are moved and copied together: those of a chain often lie side by side.
    """
    beside = output.url.rpartition("/")[0] + "/" + place.rstrip("/").rpartition("/")[2]
    for url in (place, beside):
        # A manifest may name any place, and what is wrong with that one is all the same.
        with suppress(ValueError, OSError):
            run = open_output(url)
            content = run.read(MANIFEST)
            if content is not None:
                return _Run(run, _parsed(content, url))
    return None


def _parsed(content: bytes, url: str) -> dict[str, Any]:
    try:
        return parse_record(content, url)
    except ConfigError:
        return {}
