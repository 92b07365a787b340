"""The mirror, against a sqlite store, a real `mlflow server` that is killed and restarted, and one that is mute."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config.schema import ConfigError, TrackingConfig
from pipelines.tracking import mirror as tracking
from pipelines.tracking import mlflow_store
from pipelines.tracking.mirror import Mirror, open_mirror
from tests.mlflow_server import Server, free_port

KEY = "9f2c81d7a0b3"
MODEL = "ray-unlearn-adapter"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Folder:
    """A run folder that a test fills file by file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)

    def begin(self, parameters: dict[str, Any], **sets: tuple[str, int]) -> None:
        (self.path / "config.yaml").write_text(yaml.safe_dump(parameters))
        entries = {name: {"digest": digest, "rows": rows} for name, (digest, rows) in sets.items()}
        self.update(purpose="run", sets=entries)

    def update(self, **fields: Any) -> None:
        path = self.path / "manifest.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **fields}))

    def step(self, number: int, **metrics: float) -> None:
        with (self.path / "losses.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": number, "loss": float(number), **metrics}) + "\n")

    def score(self, **models: dict[str, float | None]) -> None:
        content = {"schema": 1, "models": models, "cost": {}}
        (self.path / "scores.json").write_text(json.dumps(content))

    def adapter(self, weights: bytes = b"\x01" * 1000, config: str = '{"r": 16}') -> None:
        (self.path / "adapter").mkdir(exist_ok=True)
        (self.path / "adapter" / "adapter_config.json").write_text(config)
        (self.path / "adapter" / "adapter_model.safetensors").write_bytes(weights)

    def trial(self, number: int, state: str, score: dict[str, float] | None) -> None:
        line = {"number": number, "state": state, "values": {"adapter.rank": number}}
        scores = {"forget.rouge": 0.5, "privleak": None} if score else {}
        with (self.path / "trials.jsonl").open("a") as stream:
            stream.write(json.dumps({**line, "score": score, "scores": scores}) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def client_of(run: Folder) -> Any:
    return client(f"sqlite:///{run.path}/mlflow.db")


def runs(mlflow: Any) -> list[Any]:
    experiment = mlflow.get_experiment_by_name("ray-unlearn")
    return [] if experiment is None else mlflow.search_runs([experiment.experiment_id])


def steps(mlflow: Any, run_id: str | None) -> list[tuple[int, float]]:
    """(step, loss) in the order in which they were logged."""
    history = mlflow.get_metric_history(str(run_id), "loss")
    history = sorted(history, key=lambda point: (point.timestamp, point.step))
    return [(point.step, point.value) for point in history]


def test_a_run_arrives_whole_in_a_file_of_its_own_and_prints_nothing(
    run: Folder, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # as a server may be set
    warnings: list[str] = []
    parameters = {"seed": 7, "train": {"steps": 60, "deepspeed": {"stage": "auto"}}}
    run.begin({**parameters, "note": "x" * 7000}, forget=("c" * 64, 40))
    mirror = open_mirror(TrackingConfig(), run.path, "unlearn", KEY, warnings.append)
    for step in range(3):
        run.step(step, **{"loss": 1 / 2**step, "grad norm@all": 2.0})
        mirror.send_lines()
    run.score(after={"forget.probability": 0.25, "privleak": None})
    run.adapter()
    mirror.send()
    (run.path / "report.html").write_text("<html>")
    mirror.send("FINISHED")
    printed = capfd.readouterr()

    mlflow = client_of(run)
    logged = mlflow.get_run(mirror.run_id)
    assert (logged.info.status, logged.info.run_name) == ("FINISHED", "unlearn")
    assert {**logged.data.params, "note": ""} == {
        "seed": "7",
        "train.steps": "60",
        "train.deepspeed.stage": "auto",
        "note": "",
    }
    assert len(logged.data.params["note"]) == 6000
    assert logged.data.metrics == {
        "loss": 0.25,
        "grad norm_all": 2.0,
        "after.forget.probability": 0.25,
    }
    assert steps(mlflow, mirror.run_id) == [(0, 1.0), (1, 0.5), (2, 0.25)]
    dataset = logged.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, dataset.profile) == (
        "forget",
        "c" * 36,
        '{"num_rows": 40}',
    )
    assert dataset.schema is None
    assert dataset.source == "{}"
    artifacts = {file.path for file in mlflow.list_artifacts(mirror.run_id)}
    assert artifacts == {"adapter", "report.html"}
    assert Path(logged.info.artifact_uri).is_relative_to(run.path / "mlartifacts")
    registered = mlflow.get_model_version(MODEL, str(mirror.model_version))
    assert (mirror.model_version, registered.run_id) == (1, mirror.run_id)
    assert (Path(registered.source) / "adapter_model.safetensors").read_bytes() == b"\x01" * 1000
    assert mirror.is_complete
    assert (warnings, printed.out, printed.err) == ([], "", "")


def test_a_run_that_is_opened_again_stays_one_run_and_registers_equal_weights_once(
    run: Folder,
) -> None:
    mlflow = client_of(run)
    ids, versions, states = [], [], []
    for rank in (16, 16, 8):
        run.begin({"adapter": {"rank": rank}})
        run.score(after={"forget.rouge": 0.5})
        run.adapter(bytes([rank]) * 1000, json.dumps({"r": rank, "saved": len(ids)}))
        mirror = open_mirror(TrackingConfig(), run.path, "unlearn", KEY)
        states.append(mlflow.get_run(mirror.run_id).info.status)
        mirror.send("FINISHED")
        ids.append(mirror.run_id)
        versions.append(mirror.model_version)
        states.append(mlflow.get_run(mirror.run_id).info.status)

    assert len(set(ids)) == len(runs(mlflow)) == 1
    assert states == ["RUNNING", "FINISHED"] * 3
    assert versions == [1, 1, 2]
    assert len(mlflow.search_model_versions(f"name = '{MODEL}'")) == 2
    first = mlflow.get_model_version(MODEL, "1")
    assert (Path(first.source) / "adapter_model.safetensors").read_bytes() == bytes([16]) * 1000
    logged = mlflow.get_run(ids[0])
    assert logged.data.params == {"adapter.rank": "16"}
    assert logged.data.tags["resumed.adapter.rank"] == "8"
    assert len(mlflow.get_metric_history(ids[0], "after.forget.rouge")) == 1


def test_a_server_that_dies_and_comes_back_has_every_record_once(
    run: Folder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    warnings: list[str] = []
    mlflow, cfg = client(server.uri), TrackingConfig(uri=server.uri)
    run.begin({"empty": "", "train": {"steps": 8}})
    mirror = open_mirror(cfg, run.path, "unlearn", KEY, warnings.append)
    for step in range(3):
        run.step(step)
        mirror.send_lines()
    assert steps(mlflow, mirror.run_id) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert mirror.is_complete

    server.kill()
    began_s = time.monotonic()
    for step in range(3, 8):
        run.step(step)
        mirror.send_lines()
    run.score(after={"forget.rouge": 0.5})
    run.update(sets={"retain": {"digest": "ab12", "rows": 400}})
    run.adapter()
    mirror.send()
    assert mirror.model_version is None
    mirror.send("FINISHED")
    assert time.monotonic() - began_s < 2
    assert len(warnings) == 1
    assert server.uri in warnings[0]
    assert "\n" not in warnings[0]
    assert not mirror.is_complete

    server.start()
    for _ in range(2):  # the second finds nothing to send
        again = open_mirror(cfg, run.path, "unlearn", KEY, warnings.append)
        assert again.run_id == mirror.run_id
        assert again.model_version == 1
        again.send("FINISHED")
        assert again.is_complete
    assert len(warnings) == 1
    [logged] = runs(mlflow)
    assert logged.info.status == "FINISHED"
    assert logged.data.params == {"empty": "", "train.steps": "8"}
    assert logged.data.metrics["after.forget.rouge"] == 0.5
    assert len(mlflow.get_metric_history(logged.info.run_id, "after.forget.rouge")) == 1
    assert [entry.dataset.name for entry in logged.inputs.dataset_inputs] == ["retain"]
    assert steps(mlflow, logged.info.run_id) == [(step, float(step)) for step in range(8)]
    [version] = mlflow.search_model_versions(f"name = '{MODEL}'")
    assert version.run_id == logged.info.run_id
    fetched = Path(mlflow.download_artifacts(logged.info.run_id, "adapter", str(run.path)))
    assert (fetched / "adapter_model.safetensors").read_bytes() == b"\x01" * 1000


def test_a_server_unreachable_at_the_start_costs_one_warning_and_gets_all_from_the_folder_later(
    run: Folder,
) -> None:
    warnings: list[str] = []
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    # The preflight refuses a password; whoever came here without it must not find it in a warning.
    cfg = TrackingConfig(uri=uri)
    mirror = open_mirror(cfg, run.path, "first", "key-1", warnings.append)
    for step in range(4):
        run.step(step)
        mirror.send_lines()
    mirror.send("KILLED")
    assert mirror.run_id is None
    assert len(warnings) == 1
    assert "secret" not in warnings[0]
    with (run.path / "losses.jsonl").open("a") as file:  # a process killed in the middle of a line
        file.write('{"step": 4, "loss"')

    other = Folder(run.path.parent / "other")
    other.step(9)
    cfg = TrackingConfig(uri=f"sqlite:///{run.path}/all.db")
    for folder, name, key, status in (
        (run, "first", "key-1", "KILLED"),
        (other, "second", "key-2", "FINISHED"),
    ):
        open_mirror(cfg, folder.path, name, key, warnings.append).send(status)
    mlflow = client(str(cfg.uri))
    logged = {entry.info.run_name: entry.info for entry in runs(mlflow)}
    states = {name: info.status for name, info in logged.items()}
    assert states == {"first": "KILLED", "second": "FINISHED"}
    first = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert steps(mlflow, logged["first"].run_id) == first
    assert steps(mlflow, logged["second"].run_id) == [(9, 9.0)]
    assert len(warnings) == 1


def test_a_step_that_a_restarted_run_repeats_is_sent_once(run: Folder) -> None:
    for step in (0, 1, 2, 3, 2, 3):
        run.step(step)
    mirror = open_mirror(TrackingConfig(), run.path, "unlearn", KEY)
    for step in (2, 3, 4):  # a worker that has failed begins again
        run.step(step)
    mirror.send_lines(at_once=True)
    expected = [(step, float(step)) for step in range(5)]
    assert steps(client_of(run), mirror.run_id) == expected


def test_a_server_that_takes_connections_and_never_answers_holds_up_one_request(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "REQUEST_TIMEOUT_S", 1)
    mlflow_store.load_mlflow()  # its import is not what is measured
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    before = dict(os.environ)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cfg = TrackingConfig(uri=f"http://127.0.0.1:{listener.getsockname()[1]}")
        began_s = time.monotonic()
        mirror = open_mirror(cfg, run.path, "unlearn", KEY, lambda _: None)
        assert 0.9 < time.monotonic() - began_s < 2.5
        began_s = time.monotonic()
        for step in range(200):
            run.step(step)
            mirror.send_lines(at_once=True)
        assert time.monotonic() - began_s < 0.9
    assert dict(os.environ) == before


class RecordingStore:
    """Stands for a store with one run, and for that run; raises what `faults` has for a kind of record."""

    uri = "http://tracking.example"
    id = "run-1"

    def __init__(self) -> None:
        self.written: list[Any] = []
        self.faults: dict[str, Exception] = {}
        self.steps: set[int] = set()

    def open_run(self, _key: str, _name: str) -> "RecordingStore":
        self._write("open")
        return self

    def log_parameters(self, _parameters: dict[str, str]) -> None:
        self._write("parameters")

    def log_steps(self, steps: dict[int, Any]) -> None:
        self._write("steps", *steps)
        self.steps |= steps.keys()

    def log_scores(self, _scores: dict[str, float]) -> None:
        self._write("scores")

    def log_dataset(self, name: str, _digest: str, _rows: int) -> None:
        self._write("dataset", name)

    def register(self, _folder: Path, _alias: str | None) -> int:
        self._write("adapter")
        return 1

    def log_file(self, path: Path) -> None:
        self._write(path.name)

    def end(self, status: str) -> None:
        self._write("end", status)

    def _write(self, *record: Any) -> None:
        if fault := self.faults.get(record[0]):
            raise fault
        self.written.append(record if len(record) > 1 else record[0])


def recording_mirror(run: Folder, warnings: list[str]) -> tuple[Mirror, RecordingStore]:
    store = RecordingStore()
    mirror = Mirror(store, run.path, "unlearn", KEY, warnings.append)  # pyright: ignore[reportArgumentType]
    mirror.send()
    return mirror, store


def test_steps_are_sent_together(run: Folder) -> None:
    mirror, store = recording_mirror(run, [])
    for step in range(30):
        run.step(step)
        mirror.send_lines()
    assert store.written == ["open", "parameters", "scores"]
    mirror.send()
    assert store.written[3:] == ["open", "parameters", "scores", ("steps", *range(30))]


def test_records_of_several_threads_all_arrive(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    mirror, store = recording_mirror(run, [])

    def log(first: int) -> None:
        for step in range(first, first + 50):
            run.step(step)
            mirror.send_lines()

    threads = [threading.Thread(target=log, args=(100 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent = [step for record in store.written if record[0] == "steps" for step in record[1:]]
    assert sorted(sent) == [100 * number + step for number in range(4) for step in range(50)]


def test_a_connection_that_the_server_closed_is_no_outage(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    mirror, store = recording_mirror(run, warnings)
    write, calls = store.log_scores, []

    def closed_once(scores: dict[str, float]) -> None:
        calls.append(scores)
        if len(calls) == 1:
            raise ConnectionResetError
        write(scores)

    monkeypatch.setattr(store, "log_scores", closed_once)
    mirror.send()
    assert store.written[-1] == "scores"
    assert len(calls) == 2
    assert warnings == []


def test_an_artifact_store_out_of_reach_holds_nothing_else_back(run: Folder) -> None:
    warnings: list[str] = []
    run.score(after={})
    run.adapter()
    run.step(1)
    (run.path / "report.html").write_text("")
    store = RecordingStore()
    store.faults["adapter"] = OSError("no credentials")
    mirror = Mirror(store, run.path, "unlearn", KEY, warnings.append)  # pyright: ignore[reportArgumentType]
    mirror.send("FINISHED")
    expected = ["open", "parameters", "scores", "report.html", ("steps", 1), ("end", "FINISHED")]
    assert store.written == expected
    assert mirror.model_version is None
    assert not mirror.is_complete
    assert len(warnings) == 1
    assert "no credentials" in warnings[0]


def test_a_failed_store_is_tried_again_after_a_while_and_gets_what_waited_in_order(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    clock_s = time.monotonic()
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock_s)
    mirror, store = recording_mirror(run, warnings)
    store.faults["steps"] = OSError("down")
    run.step(0)
    mirror.send_lines(at_once=True)
    clock_s += tracking.RETRY_S + 1
    run.trial(1, "failed", None)
    mirror.send_lines(at_once=True)  # tried in vain: what comes after the failed record waits too
    store.faults.clear()
    store.written.clear()
    clock_s += tracking.RETRY_S - 1
    run.step(1)
    mirror.send_lines(at_once=True)  # too early to try again
    assert store.written == []
    clock_s += 2
    trials: list[str] = []
    monkeypatch.setattr(store, "log_trial", lambda *a: trials.append(a[1]), raising=False)
    mirror.send_lines()
    assert store.written == ["open", "parameters", "scores", ("steps", 0, 1)]
    assert trials == [f"{KEY}-trial-0001"]
    assert len(warnings) == 1
    assert mirror.is_complete


def test_a_record_that_the_server_refuses_is_named_and_left_out(run: Folder) -> None:
    warnings: list[str] = []
    run.begin({}, **{"n" * 501: ("d" * 36, 1)})
    run.step(1)
    mirror = open_mirror(TrackingConfig(), run.path, "unlearn", KEY, warnings.append)
    mirror.send("FINISHED")
    [warning] = warnings
    assert "refuses data set nnn" in warning
    assert "is left out" in warning
    assert steps(client_of(run), mirror.run_id) == [(1, 1.0)]
    assert client_of(run).get_run(mirror.run_id).info.status == "FINISHED"


def test_a_run_deleted_on_the_server_is_begun_anew_without_loss(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    warnings: list[str] = []
    mlflow = client_of(run)
    mirror = open_mirror(TrackingConfig(), run.path, "unlearn", KEY, warnings.append)
    run.step(1)
    mirror.send_lines()
    deleted = str(mirror.run_id)
    mlflow.delete_run(deleted)
    run.step(2)
    mirror.send_lines()
    assert mirror.run_id != deleted
    assert steps(mlflow, mirror.run_id) == [(1, 1.0), (2, 2.0)]
    assert warnings == []


def test_a_search_is_a_run_with_one_inside_a_trial_and_its_adapter_is_the_champion(
    run: Folder,
) -> None:
    run.begin({"seed": 1})
    run.update(purpose="tune")
    mirror = open_mirror(TrackingConfig(), run.path, "search", KEY)
    run.trial(0, "finished", {"distance": 0.5})
    mirror.send_lines(at_once=True)
    run.trial(1, "failed", None)
    run.adapter()
    mirror.send()
    assert mirror.model_version is None, "nothing has been picked"
    run.update(pick=0)
    for _ in range(2):
        open_mirror(TrackingConfig(), run.path, "search", KEY).send("FINISHED")
    mlflow = client_of(run)
    by_name = {entry.info.run_name: entry for entry in runs(mlflow)}
    assert len(runs(mlflow)) == 3
    states = {name: entry.info.status for name, entry in by_name.items()}
    assert states == {"search": "FINISHED", "trial-0000": "FINISHED", "trial-0001": "FAILED"}
    trial = by_name["trial-0000"]
    assert trial.data.tags["mlflow.parentRunId"] == mirror.run_id
    assert trial.data.params == {"adapter.rank": "0"}
    assert trial.data.metrics == {"trial.distance": 0.5, "after.forget.rouge": 0.5}
    assert len(mlflow.get_metric_history(trial.info.run_id, "trial.distance")) == 1
    assert by_name["trial-0001"].data.metrics == {}
    assert by_name["search"].data.metrics == {"pick.distance": 0.5}
    champion = mlflow.get_model_version_by_alias(MODEL, "champion")
    assert (champion.run_id, str(champion.version)) == (mirror.run_id, "1")


@pytest.mark.parametrize(
    "uri",
    [
        "foo://server",
        "localhost:5000",
        "127.0.0.1:5000",
        "http://",
        "http://host:port",
        "http://a b",
        "sqlite://x.db",
    ],
)
def test_a_uri_that_mlflow_cannot_take_is_one_line_with_the_choices(
    tmp_path: Path, uri: str
) -> None:
    with pytest.raises(ConfigError) as error:
        open_mirror(TrackingConfig(uri=uri), tmp_path, "unlearn", KEY)
    assert str(error.value).startswith(f"tracking.uri: found '{uri}', allowed: http(s)://")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "store", "artifacts"),
    [
        (None, "sqlite:////run/mlflow.db", "/run/mlartifacts"),
        ("/data/tracking", "sqlite:////data/tracking/mlflow.db", "/data/tracking/mlartifacts"),
        ("file:///data", "sqlite:////data/mlflow.db", "/data/mlartifacts"),
        ("sqlite:////data/all.db", "sqlite:////data/all.db", "/data/mlartifacts"),
        ("https://me:pw@host/mlflow", "https://me:pw@host/mlflow", None),
        ("http://[::1]:5000", "http://[::1]:5000", None),
        (
            "postgresql+psycopg2://me:pw@db/mlflow",
            "postgresql+psycopg2://me:pw@db/mlflow",
            "/run/mlartifacts",
        ),
    ],
)
def test_artifacts_lie_beside_the_store_or_where_the_server_decides(
    uri: str | None, store: str, artifacts: str | None
) -> None:
    assert mlflow_store.locate(uri, Path("/run")) == (store, artifacts)


def test_a_model_name_that_mlflow_cannot_register_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.model_name: found 'team/adapter', allowed: "):
        open_mirror(TrackingConfig(model_name="team/adapter"), tmp_path, "unlearn", KEY)


def test_a_folder_whose_name_mlflow_would_decode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"output_dir: found '.*50%20off/mlflow.db', allowed: a path without % and \?",
    ):
        open_mirror(TrackingConfig(), tmp_path / "50%20off", "unlearn", KEY)


def test_http_limits_that_the_user_has_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with mlflow_store._limits(5):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_the_module_is_imported_without_mlflow() -> None:
    check = "import sys, pipelines.tracking.mirror; sys.exit('mlflow' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[3]).returncode == 0
    )
