"""The results of a run: in the folder where the run works, or on an object store.

A run always works in a folder of the driver's node. For `s3://` and `gs://` that folder lies in
the user's cache and is a working copy. A run begins by downloading the files of the store, and
uploads its results with the manifest last. A manifest on the store therefore never names missing
files, and any machine can continue the run.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from pyarrow import fs

from pipelines.config.load import short_hash
from pipelines.config.schema import ConfigError
from pipelines.config.text import one_line
from pipelines.storage.filesystem import (
    after_waiting,
    cache_folder,
    open_filesystem,
    send_file,
)
from pipelines.storage.records import WRITTEN_BY_RUN, read_bytes, read_json
from pipelines.storage.seal import (
    CHECKPOINTS,
    MANIFEST,
    entries_in,
    file_digests,
    is_sealed,
    top_of,
)

# These are complete on the store before the manifest that names them, or absent.
MODELS = ("adapter", "model")


class OutputDir:
    """A folder of results. They need no upload, because the run writes them there.

    Attributes:
        folder: where the run works.
        url: the results' location as messages name it.
        is_shared: whether all nodes see `folder`.
    """

    is_shared = True

    def __init__(self, url: str) -> None:
        self.folder = Path(os.path.abspath(url))
        self.url = str(self.folder)

    def names(self) -> set[str]:
        """Return the names at the top of the results.

        Raises:
            ConfigError: a file has the folder's name.
        """
        if not self.folder.exists():
            return set()
        if not self.folder.is_dir():
            raise ConfigError(f"output_dir: {self.url} is a file, allowed: a folder")
        return {entry.name for entry in self.folder.iterdir()}

    def read(self, name: str) -> bytes | None:
        """Return a result file's content, or None without such a file.

        Raises:
            ConfigError: it cannot be read.
        """
        path = self.folder / name
        return read_bytes(path) if path.exists() else None

    def digests(self) -> dict[str, str]:
        """Return the digest of every sealed result by its path."""
        return file_digests(self.folder)

    @contextmanager
    def working_copy(self) -> Iterator[None]:
        """Download the results into `folder`, and upload them when the block ends."""
        yield

    def upload(self) -> None:
        """Upload every changed file and delete removed ones. The manifest goes last.

        Raises:
            OSError: a file cannot be uploaded.
        """

    def try_upload(self, name: str) -> None:
        """Upload one file of the working copy.

        A failure is ignored, because the next upload sends the file again.
        """

    @contextmanager
    def local_copy(self, *names: str) -> Iterator[Path]:
        """Yield a folder with those of the named files that exist."""
        yield self.folder

    def upload_file(self, file: Path) -> None:
        """Upload a file that was written into the folder of `local_copy`."""

    def run_in_folder(self) -> str:
        """Return the start time of the run in `folder`, which identifies it, or '' without one."""
        path = self.folder / MANIFEST
        if not path.exists():
            return ""
        created = read_json(path).get("created")
        if created is None:
            raise ConfigError(f"{path}: created: missing, required; {WRITTEN_BY_RUN}")
        return created

    def copy_to_node(self, name: str, run: str) -> bool:
        """Copy a subfolder of that run to this node, unless this node has it.

        Returns whether it was copied.
        """
        return False

    def clear(self) -> None:
        """Empty the folder."""
        if not self.folder.exists():
            return
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


class BucketDir(OutputDir):
    """A prefix of an object store. Opening it lists its files and changes nothing.

    Failures are raised after pyarrow's own retries.

    Raises:
        ConfigError: it cannot be reached, its bucket does not exist, or a file has its name. The
            methods raise it for a file that cannot be read.
        OSError: a method cannot write a file.
    """

    is_shared = False

    def __init__(self, url: str, key: str) -> None:
        self.url, self._key = url.rstrip("/"), key
        started_s = time.monotonic()
        self._filesystem, self._base = open_filesystem(self.url, key)
        self.folder = work_folder(self.url)
        # Size and time of each file in the working copy when it last equalled the store's. None
        # means that there is no working copy.
        self._uploaded: dict[str, tuple[int, int]] | None = None
        bucket = self._base.split("/")[0]
        try:
            # GCS hides the bucket itself from some users who may write in it.
            shows_buckets = self._filesystem.type_name == "s3"
            has_bucket = not shows_buckets or self._is(fs.FileType.Directory, bucket)
            is_file = has_bucket and self._is(fs.FileType.File, self._base)
            self._files = self._list() if has_bucket else []
        except (OSError, ValueError) as error:
            reason = after_waiting(error, started_s)
            raise ConfigError(f"{key}: {self.url} cannot be reached ({reason})") from None
        if not has_bucket:
            raise ConfigError(f"{key}: {self.url}: bucket '{bucket}' does not exist")
        if is_file:
            raise ConfigError(f"{key}: {self.url} is a file, allowed: a folder")

    def names(self) -> set[str]:
        return {top_of(name) for name in self._files}

    def read(self, name: str) -> bytes | None:
        if self._uploaded is not None:
            return super().read(name)
        if name not in self._files:
            return None
        with self._stream(name) as stream:
            return stream.read()

    def digests(self) -> dict[str, str]:
        digests: dict[str, str] = {}
        for name in self._files:
            if is_sealed(name):
                # Digested as it streams in: no model is downloaded to be verified.
                with self._stream(name) as stream:
                    digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return digests

    @contextmanager
    def working_copy(self) -> Iterator[None]:
        with self._locked():
            # A run that was killed here may have left files which the store does not have.
            self.clear()
            names = [name for name in self._files if top_of(name) != CHECKPOINTS]
            self._download(self.folder, names)
            self._uploaded = {name: self._stamp(name) for name in _files_in(self.folder)}
            try:
                yield
            except BaseException:
                # A failed run's results serve the run that continues it. Its models may be
                # incomplete, and the manifest on the store does not name them.
                if (self.folder / MANIFEST).exists():
                    with suppress(OSError):
                        self._upload_changed(lambda top: top not in (*MODELS, MANIFEST))
                raise
            self.upload()
            self._files, self._uploaded = sorted(self._uploaded), None
            self.clear()

    def upload(self) -> None:
        assert self._uploaded is not None
        self._upload_changed(lambda top: top != MANIFEST)
        for name in self._uploaded.keys() - set(_files_in(self.folder)):
            self._filesystem.delete_file(self._path(name))
            del self._uploaded[name]
        self._upload_changed(lambda top: top == MANIFEST)

    def try_upload(self, name: str) -> None:
        with suppress(OSError):
            self._upload(self.folder / name, name)

    @contextmanager
    def local_copy(self, *names: str) -> Iterator[Path]:
        with TemporaryDirectory() as temporary:
            try:
                self._download(Path(temporary), set(names).intersection(self._files))
                yield Path(temporary)
            except ConfigError as error:
                raise ConfigError(str(error).replace(temporary, self.url)) from None

    def upload_file(self, file: Path) -> None:
        self._upload(file, file.name)

    def copy_to_node(self, name: str, run: str) -> bool:
        if self.run_in_folder() == run:  # the driver's node, or one that sees its files
            return False
        self.clear()
        self._download(self.folder, [file for file in self._list() if top_of(file) == name])
        return True

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _list(self) -> list[str]:
        selector = fs.FileSelector(self._base, recursive=True, allow_not_found=True)
        files = [entry for entry in self._filesystem.get_file_info(selector) if entry.is_file]
        return sorted(str(PurePosixPath(file.path).relative_to(self._base)) for file in files)

    def _is(self, kind: fs.FileType, path: str) -> bool:
        return self._filesystem.get_file_info(path).type == kind

    def _download(self, folder: Path, names: Iterable[str]) -> None:
        for name in names:
            target = folder / name
            # A store's keys are any text, and one with `..` would be written outside of the folder.
            if ".." in target.parts:
                raise ConfigError(
                    f"{self._key}: {self.url} holds '{name}', allowed: names without .."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._reading(name):
                fs.copy_files(
                    self._path(name),
                    str(target),
                    source_filesystem=self._filesystem,
                    destination_filesystem=fs.LocalFileSystem(),
                )

    @contextmanager
    def _stream(self, name: str) -> Iterator[Any]:
        with self._reading(name), self._filesystem.open_input_stream(self._path(name)) as stream:
            yield stream

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{self._key}: {self.url}/{name}"
            raise ConfigError(f"{where} cannot be read ({one_line(error)})") from None

    def _upload(self, file: Path, name: str) -> None:
        # Ctrl-C interrupts the main thread only. There it would make pyarrow close the stream, and
        # the store would take the part that was written for the complete file.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(send_file, file, self._filesystem, self._path(name)).result()

    def _upload_changed(self, wanted: Callable[[str], bool]) -> None:
        """Upload changed files that lie in a wanted file or folder of the top level."""
        assert self._uploaded is not None
        for name in _files_in(self.folder):
            stamp = self._stamp(name)
            if wanted(top_of(name)) and self._uploaded.get(name) != stamp:
                self._upload(self.folder / name, name)
                self._uploaded[name] = stamp

    def _stamp(self, name: str) -> tuple[int, int]:
        status = (self.folder / name).stat()
        return status.st_size, status.st_mtime_ns

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold a lock that keeps other processes of this machine out of the folder."""
        # The kernel releases an flock when the process dies, so no stale lock blocks a later run.
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / "lock").open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                problem = f"{self.url} is in use by another process of this machine"
                raise ConfigError(f"{self._key}: {problem}; wait for it to finish") from None
            yield


def open_output(url: str, key: str = "output_dir") -> OutputDir:
    """Open a location of results, which the configuration key or option `key` names."""
    return BucketDir(url, key) if "://" in url else OutputDir(url)


def refuse_store(output_dir: str) -> None:
    """Refuse an object store for a search, whose trials share its folder."""
    if "://" in output_dir:
        allowed = "allowed in a search: a folder, on a cluster one that all nodes share"
        raise ConfigError(f"output_dir: found '{output_dir}', {allowed}")


def work_folder(url: str) -> Path:
    """Return the working folder, in the user's cache, of a run with results on a store."""
    return cache_folder() / short_hash(url) / url.rsplit("/", 1)[-1]


def _files_in(folder: Path) -> list[str]:
    """List the files below a folder, without hidden ones, which are incomplete.

    Raises:
        OSError: something there is a link or no file, which a store cannot hold.
    """
    files = [name for name in entries_in(folder) if "/." not in f"/{name}"]
    for name in files:
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise OSError(f"{folder / name} is a link or no file, allowed: files and folders")
    return files
