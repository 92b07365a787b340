"""What a command's session leaves behind."""

import pytest

from pipelines.cluster.session import temporary_log
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
