"""An S3 server on this machine whose answers can be late, broken off or not given."""

import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moto.server import ThreadedMotoServer
from pyarrow import fs

KEY, SECRET = "key", "wJalrXUtnFEMI-K7MDENG"
FAULTS = (
    "500",
    "reset",
    "reset midway",
    "silence",
    "silence midway",
)  # midway: of what is sent or is received
LATE_S = 4.0  # pyarrow's own patience is 3 s
logging.getLogger("werkzeug").setLevel(
    logging.WARNING
)  # a line a request would bury why a test failed


class Bucket:
    """s3://bucket: its files, and the environment of those who use it."""

    def __init__(self, server: ThreadedMotoServer) -> None:
        host, port = server.get_host_and_port()
        self.environment = {
            "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.s3 = fs.S3FileSystem(
            scheme="http", endpoint_override=f"{host}:{port}", access_key=KEY, secret_key=SECRET,
            allow_bucket_creation=True, background_writes=False,
        )  # fmt: skip
        self.s3.create_dir("bucket")
        self._healed = threading.Event()
        self.heal()
        assert server._server is not None
        self._app, server._server.app = server._server.app, self

    def heal(self) -> None:
        """From now on all is well, and nothing is refused yet."""
        self.refuses: Callable[[str, str], bool] = lambda _method, _path: (
            False
        )  # by method and path
        self.fault = "500"  # what is refused gets this: one of FAULTS, or "late", and answered then
        self.refused: list[str] = []
        self._healed.set()
        self._healed = threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if not self.refuses(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            return self._app(environ, start_response)
        self.refused.append(environ["PATH_INFO"])
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if self.fault == "late":
            time.sleep(LATE_S)
            return self._app(environ, start_response)
        if self.fault == "500":
            environ["wsgi.input"].read(length)
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return self._broken_off(environ, start_response, length // 2)

    def _broken_off(
        self, environ: dict[str, Any], start_response: Any, half: int
    ) -> Iterator[bytes]:
        fault, healed = self.fault, self._healed
        if "midway" in fault and environ["REQUEST_METHOD"] == "GET":
            whole = b"".join(self._app(environ, start_response))
            yield whole[: len(whole) // 2]
        elif "midway" in fault:
            environ["wsgi.input"].read(half)
        if "silence" in fault:
            healed.wait()
        reset(environ["werkzeug.socket"])
        raise ConnectionResetError

    def files(self, folder: str) -> list[str]:
        """Paths of the files below s3://bucket/folder, in it."""
        base = f"bucket/{folder}"
        entries = self.s3.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        return sorted(entry.path.removeprefix(f"{base}/") for entry in entries if entry.is_file)

    def read(self, path: str) -> bytes:
        """A file's content."""
        with self.s3.open_input_stream(f"bucket/{path}") as stream:
            return stream.read()

    def write(self, path: str, content: bytes) -> None:
        """A file, new or changed."""
        with self.s3.open_output_stream(f"bucket/{path}") as stream:
            stream.write(content)

    def fetch(self, path: str, target: Path) -> Path:
        """A copy of a file."""
        target.write_bytes(self.read(path))
        return target

    def resume_point(self, folder: str) -> int:
        """The step that an unfinished run would go on from: of the last resume point that Ray Train's controller has
        heard of, seconds after it was written; 0 while there is none."""
        try:
            snapshot = json.loads(
                self.read(f"{folder}/checkpoints/train/checkpoint_manager_snapshot.json")
            )
        except (FileNotFoundError, ValueError):  # none yet, or replaced between two reads
            return 0
        latest = snapshot["latest_checkpoint_result"]
        return latest["metrics"]["step"] if latest else 0

    def steps(self, folder: str) -> list[int]:
        """The steps that the driver of a run has heard of, in that order."""
        return [
            json.loads(line)["step"] for line in self.read(f"{folder}/losses.jsonl").splitlines()
        ]


def reset(connection: socket.socket) -> None:
    """End a connection with RST. The server, which would end it politely, is left with one to nobody."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    here, there = socket.socketpair()
    os.dup2(here.fileno(), connection.fileno())
    here.close()
    there.close()


@contextmanager
def running_bucket() -> Iterator[Bucket]:
    """A server with an empty bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    bucket = Bucket(server)
    yield bucket
    bucket.heal()
    server.stop()
