"""How long a store that is not there keeps a command waiting."""

import pytest

from pipelines.config.schema import ConfigError
from pipelines.storage import filesystem


def test_a_google_store_that_does_not_answer_is_told_after_the_first_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(filesystem, "FIRST_LOOK_S", 1)
    with pytest.raises(ConfigError) as caught:
        filesystem.open_filesystem("gs://bucket/run", "output_dir")
    told = str(caught.value)
    assert told.startswith("output_dir: gs://bucket/run cannot be reached (within 1 s: ")
    assert "Could not connect" in told
