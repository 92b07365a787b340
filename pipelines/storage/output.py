"""Where a run's results lie: in the folder that the run works in, or on an object store.

A run always works in a folder of the driver's node. For `s3://` and `gs://` that folder lies in the user's cache, and
the store tells what has been done: a run begins with the files that are there and sends what it has finished, the
manifest last. So a manifest on the store never speaks of what is not there, and any machine can go on.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from pyarrow import fs

from pipelines.config.load import short_hash
from pipelines.config.schema import ConfigError
from pipelines.storage.filesystem import one_line, open_filesystem, send_file

NOT_SEALED = (
    "report.html",
    "manifest.json",
    "run.log",
    "serve.log",
    "mlflow.db",
    "mlartifacts",
    "checkpoints",
    "tracking_unsent.jsonl",
)
STATE = (
    "config.yaml",
    "manifest.json",
    "scores.json",
)  # tell whose the results are, and whether they are complete
MODELS = (
    "adapter",
    "model",
)  # stand on the store before the manifest that counts on them, or not at all


class OutputDir:
    """A folder, where results lie as soon as they are written. An object store is the other kind.

    `folder` is where the run works, `url` what the user calls the place; `is_shared`: all nodes see the folder.
    """

    is_shared = True

    def __init__(self, url: str) -> None:
        self.folder = Path(os.path.abspath(url))
        self.url = str(self.folder)

    def created(self) -> str:
        """When the run in the folder was begun, which tells it from others; empty where there is none."""
        path = self.folder / "manifest.json"
        return (
            json.loads(path.read_text(encoding="utf-8")).get("created", "") if path.exists() else ""
        )

    def clear(self, but: Iterable[str] = ()) -> None:
        """Empty the folder, of files at the top but these."""
        for entry in self.folder.iterdir() if self.folder.exists() else ():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in but:
                entry.unlink()

    def names(self) -> set[str]:
        """What lies at the top."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"output_dir: {self.url} is a file, allowed: a folder")
        return {entry.name for entry in self.folder.iterdir()} if self.folder.exists() else set()

    def fetch_state(self) -> None:
        """Have the files of STATE in the folder as they are at the place."""

    @contextmanager
    def working_copy(self) -> Iterator[None]:
        """The folder is as the place is when the block begins, and the place as the folder is when it ends."""
        yield

    def upload(self) -> None:
        """The place becomes as the folder is, or OSError is raised."""

    def try_upload(self, name: str) -> None:
        """Keep one file that grows, if that can be done just now."""

    @contextmanager
    def local_copy(self, *names: str) -> Iterator[Path]:
        """A folder with these files, where they exist."""
        yield self.folder

    def upload_file(self, file: Path) -> None:
        """Keep a file that was written in the folder of `copied`."""

    def digests(self) -> dict[str, str]:
        """Digests of the results, by their paths."""
        return file_digests(self.folder)

    def copy_to_node(self, name: str, run: str) -> bool:
        """Have a subfolder of that run on this node too; whether this has put it there, for somebody to remove."""
        return False


class BucketDir(OutputDir):
    """A prefix of an object store. Opening it lists it, and that is all.

    Raises:
        ConfigError: it cannot be reached, its bucket is missing, or a file has its name; later, a file of it cannot be
            read. An OSError is one that cannot be written. Both after pyarrow's own retries.
    """

    is_shared = False

    def __init__(self, url: str, key: str) -> None:
        self.url, self._key = url.rstrip("/"), key
        self._filesystem, self._base = open_filesystem(self.url, key)
        self.folder = work_folder(self.url)
        self._sent: dict[
            str, tuple[int, int]
        ] = {}  # size and time of the files here that are there as well
        bucket = self._base.split("/")[0]
        try:  # GCS tells of a bucket itself only to some of those who may write in it
            has_bucket = self._filesystem.type_name != "s3" or self._is(
                fs.FileType.Directory, bucket
            )
            is_file = has_bucket and self._is(fs.FileType.File, self._base)
            self._files = self._list() if has_bucket else []
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: {self.url} cannot be reached ({one_line(error)})") from None
        if not has_bucket:
            raise ConfigError(
                f"{key}: {self.url} found no bucket '{bucket}', allowed: one that is there"
            )
        if is_file:
            raise ConfigError(f"{key}: {self.url} is a file, allowed: a folder")

    def names(self) -> set[str]:
        return {name.split("/")[0] for name in self._files}

    def fetch_state(self) -> None:
        with self._locked():
            for name in STATE:
                (self.folder / name).unlink(missing_ok=True)
            self._fetch(self.folder, set(STATE).intersection(self._files))

    @contextmanager
    def working_copy(self) -> Iterator[None]:
        with self._locked():
            self.clear()
            self._fetch(
                self.folder, [name for name in self._files if name.split("/")[0] != "checkpoints"]
            )
            self._sent = {name: self._stamp(name) for name in _files_in(self.folder)}
            try:
                yield
            except BaseException:
                if (self.folder / "manifest.json").exists():
                    with suppress(OSError):
                        self._send_changed(lambda top: top not in (*MODELS, "manifest.json"))
                raise
            self.upload()
            self.clear(but=STATE)

    def upload(self) -> None:
        self._send_changed(lambda top: top != "manifest.json")
        for name in self._sent.keys() - set(_files_in(self.folder)):
            self._filesystem.delete_file(f"{self._base}/{name}")
            del self._sent[name]
        self._send_changed(lambda top: top == "manifest.json")

    def try_upload(self, name: str) -> None:
        with suppress(OSError):
            self._send(self.folder / name, name)

    @contextmanager
    def local_copy(self, *names: str) -> Iterator[Path]:
        with TemporaryDirectory() as temporary:
            try:
                self._fetch(Path(temporary), set(names).intersection(self._files))
                yield Path(temporary)
            except ConfigError as error:
                raise ConfigError(str(error).replace(temporary, self.url)) from None

    def upload_file(self, file: Path) -> None:
        self._send(file, file.name)

    def digests(self) -> dict[str, str]:
        return {
            name: self._digest(name) for name in self._files if name.split("/")[0] not in NOT_SEALED
        }

    def copy_to_node(self, name: str, run: str) -> bool:
        if self.created() == run:  # the driver's node, or one that sees its files
            return False
        self.clear()
        self._fetch(self.folder, [file for file in self._list() if file.startswith(f"{name}/")])
        return True

    def _list(self) -> list[str]:
        entries = self._filesystem.get_file_info(
            fs.FileSelector(self._base, recursive=True, allow_not_found=True)
        )
        return sorted(
            str(PurePosixPath(entry.path).relative_to(self._base))
            for entry in entries
            if entry.is_file
        )

    def _is(self, kind: fs.FileType, path: str) -> bool:
        return self._filesystem.get_file_info(path).type == kind

    def _fetch(self, folder: Path, names: Iterable[str]) -> None:
        for name in names:
            target = folder / name
            if ".." in target.parts:
                raise ConfigError(
                    f"{self._key}: {self.url} holds '{name}', allowed: names without .."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._read(name):
                fs.copy_files(
                    f"{self._base}/{name}", str(target),
                    source_filesystem=self._filesystem, destination_filesystem=fs.LocalFileSystem(),
                )  # fmt: skip

    def _digest(self, name: str) -> str:
        with self._read(name), self._filesystem.open_input_stream(f"{self._base}/{name}") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @contextmanager
    def _read(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self._key}: {self.url}/{name} cannot be read ({one_line(error)})"
            ) from None

    def _send(self, file: Path, name: str) -> None:
        """In a thread, which Ctrl-C does not interrupt: pyarrow would take what has been written for the whole file."""
        with ThreadPoolExecutor(1) as thread:
            thread.submit(send_file, file, self._filesystem, f"{self._base}/{name}").result()

    def _send_changed(self, wanted: Callable[[str], bool]) -> None:
        for name in _files_in(self.folder):
            stamp = self._stamp(name)
            if wanted(name.split("/")[0]) and self._sent.get(name) != stamp:
                self._send(self.folder / name, name)
                self._sent[name] = stamp

    def _stamp(self, name: str) -> tuple[int, int]:
        found = (self.folder / name).stat()
        return found.st_size, found.st_mtime_ns

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder for this process alone."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / "lock").open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                found = f"found {self.url} in the hands of another process of this machine"
                raise ConfigError(f"{self._key}: {found}, allowed: to wait for its end") from None
            yield


def open_output(url: str, key: str = "output_dir") -> OutputDir:
    """The place of an `output_dir`, or of what `key` names."""
    return BucketDir(url, key) if "://" in url else OutputDir(url)


def refuse_store(output_dir: str) -> None:
    """What a search needs: its trials share its folder."""
    if "://" in output_dir:
        allowed = "allowed in a search: a folder, on a cluster one that all nodes share"
        raise ConfigError(f"output_dir: found '{output_dir}', {allowed}")


def work_folder(url: str) -> Path:
    """The folder in the user's cache where a run works whose results go to an object store."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute()
    return cache / "ray-unlearn" / short_hash(url) / url.rsplit("/", 1)[-1]


def file_digests(run_dir: Path) -> dict[str, str]:
    """Digests of a run folder's results, by their paths in it."""
    files = sorted(
        p
        for p in run_dir.rglob("*")
        if p.is_file() and p.relative_to(run_dir).parts[0] not in NOT_SEALED
    )
    return {str(p.relative_to(run_dir)): file_digest(p) for p in files}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files_in(folder: Path) -> list[str]:
    """Files below a folder, without what is half written."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in files if not any(part.startswith(".") for part in Path(name).parts)]
