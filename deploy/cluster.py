"""The job server of a running cluster, through Ray's job client.

The client is described at docs.ray.io, "Python SDK for Ray Jobs". It takes the cluster's token from
RAY_AUTH_MODE and RAY_AUTH_TOKEN in the environment.
"""

import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.submit import Plan
from pipelines.config.schema import ConfigError

ALLOWED = "the URL of a cluster's job server, such as http://127.0.0.1:8265"
# Loggers of Ray's client that report every step. Each has a level of its own.
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
POLL_S = 1
# Following ends after this many polls in a row without an answer.
MAX_LOST = 30


class LostError(ConfigError):
    """The job server does not answer now. It may come back."""


class Cluster:
    """The job server at an address.

    Raises:
        ConfigError: nothing answers there, or the server refuses the token. All methods raise it
            too, and also for a job that the server does not know.
    """

    def __init__(self, address: str) -> None:
        if not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", address):
            raise ConfigError(f"--address: found '{address}', allowed: {ALLOWED}")
        # Imported late, so that `--help` need not wait for Ray.
        from ray.job_submission import JobSubmissionClient

        for chatty in CHATTY:
            logging.getLogger(chatty).setLevel(logging.WARNING)
        self.address = address
        with self._explained():
            self._client = JobSubmissionClient(address)

    def submit(self, plan: Plan) -> str:
        """Ship a job, start it, and return its id."""
        # Ray ships one folder, so the files are copied into one.
        with tempfile.TemporaryDirectory() as folder, self._explained():
            for name, source in plan.files.items():
                target = Path(folder) / name
                if isinstance(source, str):
                    target.write_text(source, encoding="utf-8")
                elif source.is_dir():
                    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copyfile(source, target)
            runtime_env = {**plan.runtime_env, "working_dir": folder}
            return self._client.submit_job(entrypoint=plan.entrypoint, runtime_env=runtime_env)

    def info(self, job_id: str) -> Any:
        """Return Ray's `JobDetails` of a job."""
        with self._explained(job_id):
            return self._client.get_job_info(job_id)

    def logs(self, job_id: str) -> str:
        """Return a job's log so far."""
        with self._explained(job_id):
            return self._client.get_job_logs(job_id)

    def stop(self, job_id: str) -> bool:
        """Stop a job and wait for its end. Return whether it was running."""
        with self._explained(job_id):
            stopped = self._client.stop_job(job_id)
        self.follow(job_id, lambda _: None)
        return stopped

    def follow(self, job_id: str, write: Callable[[str], object]) -> Any:
        """Pass the log to `write` until the job ends, and return its `JobDetails`."""
        written = lost = 0
        while True:
            try:
                # In this order, so that the log of a job that has ended is complete.
                info = self.info(job_id)
                log = self.logs(job_id)
                lost = 0
            except LostError:
                lost += 1
                if lost == MAX_LOST:
                    raise
            else:
                # The server gives the whole log at every poll.
                write(log[written:])
                written = len(log)
                if info.status.is_terminal():
                    return info
            time.sleep(POLL_S)

    @contextmanager
    def _explained(self, job_id: str = "") -> Iterator[None]:
        """Turn the client's errors within the scope into a ConfigError that helps the user."""
        from ray.exceptions import AuthenticationError
        from requests import RequestException

        try:
            yield
        except AuthenticationError as error:
            found = "wants a token" if "Missing" in str(error) else "refuses the token"
            allowed = "RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN in the environment"
            raise ConfigError(f"--address: {self.address} {found}, allowed: {allowed}") from None
        except (ConnectionError, RequestException):
            raise LostError(
                f"--address: nothing answers at {self.address}, allowed: {ALLOWED}"
            ) from None
        except RuntimeError as error:
            # The client raises it for every status but 200.
            code = re.search(r"status code (\d+)", str(error))
            if code is None or code[1] != "404":
                raise LostError(
                    f"--address: {self.address} answers {' '.join(str(error).split())[:300]}"
                ) from None
            if not job_id:
                raise ConfigError(
                    f"--address: {self.address} is no job server, allowed: {ALLOWED}"
                ) from None
            jobs = self._client.list_jobs()
            job_ids = [str(job.submission_id) for job in jobs if job.submission_id]
            allowed = ", ".join(job_ids) or "none yet"
            raise ConfigError(f"JOB_ID: found '{job_id}', allowed: {allowed}") from None


def exit_code(info: Any) -> int:
    """Return the exit code of a job that has ended, as a shell does, and 130 if it was stopped."""
    if info.status == "STOPPED":
        return 130
    code = info.driver_exit_code
    # A job whose driver never started has none.
    if code is None:
        return int(info.status != "SUCCEEDED")
    # A negative code is a signal, which a shell reports as 128 more.
    if code < 0:
        return 128 - code
    return code
