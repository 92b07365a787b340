"""What a command's session leaves behind."""

import os
import signal
from pathlib import Path

import pytest

from pipelines.cluster.session import hide_token, sigterm_as_interrupt, temporary_log
from pipelines.config.schema import ConfigError


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


def test_rays_token_is_hidden_from_other_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    hide_token()  # there is none yet
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    hide_token()
    assert token.stat().st_mode & 0o777 == 0o600


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
