"""Where files lie: the file system behind a path (local, `s3://`, `gs://`)."""

import os
import re
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs

from pipelines.config.schema import ConfigError

MESSAGE_CHARS = 600
CHUNK_BYTES = 16 * 2**20
# S3's client asks three times. Its own patience, 1 s for a connection and 3 s of silence, is short for a busy store.
CONNECT_S = 5.0
SILENCE_S = 15.0


def open_filesystem(path: str, key: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path, and the path inside it. Pickled to workers with the driver's endpoint and keys."""
    scheme, separator, rest = path.partition("://")
    if not separator or scheme == "file":
        local = Path(rest if separator else path).expanduser()
        return fs.LocalFileSystem(), os.path.abspath(local)  # workers have another directory
    try:
        if scheme == "s3":
            return _s3(rest), rest.rstrip("/")
        if scheme == "gs":
            return _gcs(), rest.rstrip("/")
    except (OSError, ValueError) as error:  # ValueError: half a pair of keys
        raise ConfigError(f"{key}: {path} cannot be reached ({one_line(error)})") from None
    raise ConfigError(f"{key}: {path} found {scheme}://, allowed: a local path, s3:// or gs://")


def _s3(path: str) -> fs.S3FileSystem:
    """S3 as the usual AWS_ variables describe it; without keys there, each worker asks AWS's own chain for them."""
    env = os.environ
    endpoint = urlsplit(env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or "")
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
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


def _gcs() -> fs.GcsFileSystem:
    """Google Cloud Storage, or the emulator that STORAGE_EMULATOR_HOST names. Arrow would retry for 15 minutes."""
    retry = timedelta(seconds=30)
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if not emulator:
        return fs.GcsFileSystem(retry_time_limit=retry)
    url = urlsplit(emulator if "://" in emulator else f"http://{emulator}")
    return fs.GcsFileSystem(
        anonymous=True, scheme=url.scheme, endpoint_override=url.netloc, retry_time_limit=retry
    )


def send_file(source: Path, filesystem: fs.FileSystem, path: str) -> None:
    """Copy a file here to a file system. OSError where that fails, which pyarrow 25's `copy_files` keeps to itself: a
    file smaller than a part of an upload is then missing, and nobody knows."""
    with source.open("rb") as file, filesystem.open_output_stream(path) as target:
        while True:
            try:
                piece = file.read(CHUNK_BYTES)
            except BaseException:
                target.close()  # makes a file of the half; pyarrow's streams have no other end
                filesystem.delete_file(path)
                raise
            if not piece:
                return
            target.write(piece)


def one_line(message: object) -> str:
    """Return a message in one line, without the password that a URI in it may hold."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(str(message).split()))[:MESSAGE_CHARS]
