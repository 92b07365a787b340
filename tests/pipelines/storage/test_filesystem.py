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


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.2, "no answer"), (6.7, "after 7 s: no answer"), (23, "after 23 s: no")]
)
def test_a_wait_is_told_with_its_length(
    monkeypatch: pytest.MonkeyPatch, seconds: float, told: str
) -> None:
    now_s = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(filesystem.time, "monotonic", lambda: next(now_s))

    def no_answer(_path: str) -> None:
        raise OSError("no\nanswer")

    monkeypatch.setattr(filesystem, "_s3", no_answer)
    with pytest.raises(ConfigError, match=rf"^output_dir: s3://b/r cannot be reached \({told}"):
        filesystem.open_filesystem("s3://b/r", "output_dir")
