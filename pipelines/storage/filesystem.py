"""The file system behind a path (local, `s3://`, `gs://`)."""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

from pipelines.config.schema import ConfigError
from pipelines.config.text import one_line

CHUNK_BYTES = 16 * 2**20
# S3's client tries three times. Its default limits, 1 s for a connection and 3 s of silence, are
# too short for a busy store.
CONNECT_S = 5.0
SILENCE_S = 15.0
# Google Cloud Storage's client retries for 15 minutes. The first look, before anything is read or
# written, ends sooner: an address may be wrong.
FIRST_LOOK_S = 10
RETRY_S = 30


def cache_folder() -> Path:
    """Return this project's folder in the user's cache. It may not exist yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute()
    return cache / "ray-unlearn"


def open_filesystem(path: str, key: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path, and the path inside it.

    It is pickled to workers with the driver's endpoint and keys, so that they need none.

    Raises:
        ConfigError: the scheme is unknown or the store cannot be reached.
    """
    started_s = time.monotonic()
    scheme, separator, rest = path.partition("://")
    if not separator or scheme == "file":
        local = Path(rest if separator else path).expanduser()
        return fs.LocalFileSystem(), os.path.abspath(local)  # workers have another directory
    try:
        if scheme == "s3":
            return _s3(rest), rest.rstrip("/")
        if scheme == "gs":
            return _gcs(rest.rstrip("/")), rest.rstrip("/")
    except (OSError, ValueError) as error:  # ValueError: half a pair of keys
        # Google's store says its limit itself.
        reason = one_line(error) if scheme == "gs" else after_waiting(error, started_s)
        raise ConfigError(f"{key}: {path} cannot be reached ({reason})") from None
    raise ConfigError(f"{key}: {path} found {scheme}://, allowed: a local path, s3:// or gs://")


def after_waiting(error: Exception, started_s: float) -> str:
    """Return a store's error as one line, with the seconds since `started_s` if there were any.

    The clients try for several seconds, and some choose themselves for how many.
    """
    waited_s = time.monotonic() - started_s
    return f"after {waited_s:.0f} s: {one_line(error)}" if waited_s >= 1 else one_line(error)


def _s3(path: str) -> fs.S3FileSystem:
    """Open S3 by the usual AWS_ variables.

    Without keys there, every worker looks for them in AWS's own chain of providers.
    """
    env = os.environ
    endpoint = urlsplit(env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or "")
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    # Only AWS itself can be asked where a bucket lies. Another store has no such request.
    if region is None and not endpoint.netloc:
        region = fs.resolve_s3_region(path.split("/")[0])
    return fs.S3FileSystem(
        access_key=env.get("AWS_ACCESS_KEY_ID"),
        secret_key=env.get("AWS_SECRET_ACCESS_KEY"),
        session_token=env.get("AWS_SESSION_TOKEN"),
        region=region,
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,  # on Linux too, whatever pyarrow's page says
        scheme=endpoint.scheme or "https",
        endpoint_override=endpoint.netloc + endpoint.path.rstrip("/") or None,
    )


def _gcs(path: str) -> fs.GcsFileSystem:
    """Open Google Cloud Storage, or the emulator that STORAGE_EMULATOR_HOST names."""
    settings: dict[str, Any] = {}
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        url = urlsplit(emulator if "://" in emulator else f"http://{emulator}")
        settings = {"anonymous": True, "scheme": url.scheme, "endpoint_override": url.netloc}
    first_look = timedelta(seconds=FIRST_LOOK_S)
    try:
        fs.GcsFileSystem(**settings, retry_time_limit=first_look).get_file_info(path)
    except OSError as error:
        raise OSError(f"within {FIRST_LOOK_S} s: {error}") from None
    return fs.GcsFileSystem(**settings, retry_time_limit=timedelta(seconds=RETRY_S))


def send_file(source: Path, filesystem: fs.FileSystem, path: str) -> None:
    """Copy a local file to a file system.

    Raises:
        OSError: the file cannot be read or written.
    """
    # pyarrow 25's `copy_files` hides a failed upload of a file smaller than one part: the file is
    # then missing without an error.
    with source.open("rb") as file, filesystem.open_output_stream(path) as target:
        while True:
            try:
                piece = file.read(CHUNK_BYTES)
            except BaseException:
                # pyarrow's streams cannot be aborted. Closing writes what was sent as a complete
                # file, which is deleted again.
                target.close()
                filesystem.delete_file(path)
                raise
            if not piece:
                return
            target.write(piece)
