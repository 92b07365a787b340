"""What a search refuses before it starts Ray."""

from pathlib import Path

import pytest

from pipelines.config.load import load_config, to_yaml
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.terminal import Terminal
from tuning import search as module
from tuning.search import SearchOptions, search


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a search that starts Ray."""
    monkeypatch.setattr(module, "session", lambda *_: pytest.fail("Ray would be started"))


@pytest.fixture
def cfg(overrides: list[str], tmp_path: Path) -> UnlearnConfig:
    return load_config("quick", [*overrides, f"output_dir={tmp_path}/out"])


def options(space: Path | None = None, *, resume: bool = False) -> SearchOptions:
    return SearchOptions.of(1, space, "random", (), resume=resume)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot be read (FileNotFoundError)"), ("- 1", "found list"), ("{", "not YAML: ")],
)
def test_a_wrong_space_file(
    cfg: UnlearnConfig, tmp_path: Path, text: str | None, words: str
) -> None:
    space = tmp_path / "space.yaml"
    if text is not None:
        space.write_text(text)
    with pytest.raises(ConfigError) as caught:
        search(cfg, options(space), Terminal())
    assert str(caught.value).startswith(f"{space}: {words}")


@pytest.mark.parametrize("name", ["trials.jsonl", "space.yaml"])
def test_a_broken_file_of_the_search_that_goes_on(cfg: UnlearnConfig, name: str) -> None:
    out = Path(cfg.output_dir)
    out.mkdir()
    (out / "config.yaml").write_text(to_yaml(cfg))
    (out / "manifest.json").write_text('{"schema": 1, "purpose": "tune", "status": "running"}')
    (out / name).write_text("[]\n")
    with pytest.raises(ConfigError, match=f"^{out}/{name}: "):
        search(cfg, options(resume=True), Terminal())


def test_what_no_trial_reads_is_refused(overrides: list[str], tmp_path: Path) -> None:
    own = load_config("quick", [*overrides, f"output_dir={tmp_path}/out", "prune.sparsity=0.2"])
    with pytest.raises(
        ConfigError, match=r"^prune\.sparsity: found another value than the default"
    ):
        search(own, options(), Terminal())
    space = tmp_path / "space.yaml"
    space.write_text("adapter.rank: {choice: [2, 4]}")
    with pytest.raises(
        ConfigError, match=r"^prune\.sparsity: found another value than the default"
    ):
        search(own, options(space), Terminal())
    space.write_text("prune.method: {choice: [none, rows]}")
    with pytest.raises(pytest.fail.Exception, match="Ray would be started"):
        search(own, options(space), Terminal())
