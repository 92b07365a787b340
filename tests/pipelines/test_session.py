"""What a command's session gives to Ray, and what it leaves behind."""

import os
import signal
import sys
from pathlib import Path

import pytest

from pipelines.cluster import session, spill
from pipelines.cluster.session import CHOSEN, sigterm_as_interrupt, temporary_log
from pipelines.config.schema import ConfigError, TrainConfig
from pipelines.terminal import Terminal


@pytest.mark.parametrize(
    ("error", "is_kept"), [(OSError("disk full"), True), (ConfigError("a key"), False)]
)
def test_a_log_without_a_run_folder_is_there_for_who_is_told_of_it(
    error: Exception, is_kept: bool
) -> None:
    with pytest.raises(type(error)), temporary_log() as log:
        assert log.exists()
        raise error
    assert log.exists() == is_kept
    log.unlink(missing_ok=True)


def test_a_log_without_a_run_folder_is_removed_at_a_good_end() -> None:
    with temporary_log() as log:
        assert log.exists()
    assert not log.exists()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The environment that Ray is started in, by a session without Ray."""
    for name in (*CHOSEN, *spill.CHOSEN, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    # No cluster that runs on this machine is found.
    monkeypatch.setattr(session, "canonicalize_bootstrap_address", lambda _address: None)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    seen: dict[str, str] = {}

    def init(**_: object) -> None:
        seen.update(os.environ)
        folder = Path(os.environ[spill.VARIABLE])
        seen["mode of the folder"] = oct(folder.stat().st_mode & 0o777)

    monkeypatch.setattr(session.ray, "init", init)
    return seen


def open_session(folder: Path) -> None:
    with session.session(TrainConfig(), folder / "run.log", Terminal()):
        pass


def test_ray_starts_with_a_token_of_its_own_and_a_private_folder(
    started: dict[str, str], tmp_path: Path
) -> None:
    open_session(tmp_path)
    assert len(started["RAY_AUTH_TOKEN"]) == 64
    assert started["mode of the folder"] == "0o700"
    assert started["RAY_IGNORE_UNHANDLED_ERRORS"] == "1"


@pytest.mark.parametrize("name", CHOSEN)
def test_a_token_that_the_user_chose_stays(
    started: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "mine")
    open_session(tmp_path)
    assert {key: started[key] for key in CHOSEN if key in started} == {name: "mine"}


def test_a_cluster_that_is_joined_keeps_its_token(
    started: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "canonicalize_bootstrap_address", lambda _address: "host:6379")
    open_session(tmp_path)
    assert not set(CHOSEN) & set(started)


def test_the_exit_of_rays_handler_while_it_starts_is_an_interrupt(
    started: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut_down: list[bool] = []
    monkeypatch.setattr(session.ray, "init", lambda **_: sys.exit(15))
    monkeypatch.setattr(session.ray, "shutdown", lambda: shut_down.append(True))
    with pytest.raises(KeyboardInterrupt):
        open_session(tmp_path)
    assert shut_down == [True]


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_interrupts_also_where_ctrl_c_is_ignored(ctrl_c: signal.Handlers) -> None:
    # Ray may have set a handler of its own in a test before this one.
    sigterm = signal.getsignal(signal.SIGTERM)
    sigint = signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, sigint)
    assert signal.getsignal(signal.SIGTERM) is sigterm
