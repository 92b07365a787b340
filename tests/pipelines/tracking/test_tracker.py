"""Tracking, against a sqlite store, a real `mlflow server` that is killed and restarted, and a server that is mute."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.schema import ConfigError, TrackingConfig
from pipelines.tracking import mlflow_store
from pipelines.tracking import tracker as tracking
from pipelines.tracking.tracker import Tracker, open_tracker

KEY = "9f2c81d7a0b3"
MODEL = "ray-unlearn-adapter"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """`mlflow server` on one port; can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store, artifacts = f"sqlite:///{self.folder}/server.db", str(self.folder / "artifacts")
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += [
            "--workers",
            "1",
            "--backend-store-uri",
            store,
            "--artifacts-destination",
            artifacts,
        ]
        settings = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **settings},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 16}')
    (folder / "adapter_model.safetensors").write_bytes(b"\x01" * 1000)
    return folder


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def runs(mlflow: Any) -> list[Any]:
    experiment = mlflow.get_experiment_by_name("ray-unlearn")
    return [] if experiment is None else mlflow.search_runs([experiment.experiment_id])


def steps(mlflow: Any, run_id: str) -> list[tuple[int, float]]:
    """(step, loss) in the order in which they were logged."""
    history = sorted(mlflow.get_metric_history(run_id, "loss"), key=lambda point: point.timestamp)
    return [(point.step, point.value) for point in history]


def unsent(folder: Path) -> Path:
    return folder / "tracking_unsent.jsonl"


def test_a_run_arrives_whole_in_a_file_of_its_own_and_prints_nothing(
    tmp_path: Path,
    adapter: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # as a server may be set
    warnings: list[str] = []
    (tmp_path / "scores.json").write_text("{}")
    tracker = open_tracker(TrackingConfig(), tmp_path, "unlearn", KEY, warnings.append)
    tracker.log_parameters(
        {"seed": 7, "train": {"steps": 60, "deepspeed": {"stage": "auto"}}, "note": "x" * 7000}
    )
    for step in range(3):
        tracker.log_step(step, {"loss": 1 / 2**step, "grad norm@all": 2.0})
    tracker.log_scores("after", {"forget.probability": 0.25, "privleak": None})
    tracker.log_dataset("forget", "c" * 64, 40)
    version = tracker.log_adapter(adapter)
    tracker.log_artifact(tmp_path / "scores.json")
    tracker.close("FINISHED")
    printed = capfd.readouterr()

    mlflow = client(f"sqlite:///{tmp_path}/mlflow.db")
    run = mlflow.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "unlearn")
    assert {**run.data.params, "note": ""} == {
        "seed": "7",
        "train.steps": "60",
        "train.deepspeed.stage": "auto",
        "note": "",
    }
    assert len(run.data.params["note"]) == 6000
    assert run.data.metrics == {
        "loss": 0.25,
        "grad norm_all": 2.0,
        "after.forget.probability": 0.25,
    }
    assert steps(mlflow, run.info.run_id) == [(0, 1.0), (1, 0.5), (2, 0.25)]
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, dataset.profile) == (
        "forget",
        "c" * 36,
        '{"num_rows": 40}',
    )
    assert dataset.schema is None
    assert dataset.source == "{}"
    assert {file.path for file in mlflow.list_artifacts(run.info.run_id)} == {
        "adapter",
        "scores.json",
    }
    assert Path(run.info.artifact_uri).is_relative_to(tmp_path / "mlartifacts")
    registered = mlflow.get_model_version(MODEL, str(version))
    assert (version, registered.run_id) == (1, run.info.run_id)
    assert (Path(registered.source) / "adapter_model.safetensors").read_bytes() == b"\x01" * 1000
    assert not unsent(tmp_path).exists()
    assert (warnings, printed.out, printed.err) == ([], "", "")


def test_a_run_that_is_opened_again_stays_one_run_and_registers_equal_weights_once(
    tmp_path: Path, adapter: Path
) -> None:
    mlflow = client(f"sqlite:///{tmp_path}/mlflow.db")
    ids, versions, states = [], [], []
    for rank in (16, 16, 8):
        tracker = open_tracker(TrackingConfig(), tmp_path, "unlearn", KEY)
        states.append(mlflow.get_run(tracker.run_id).info.status)
        tracker.log_parameters({"adapter": {"rank": rank}})
        (adapter / "adapter_config.json").write_text(json.dumps({"r": rank, "saved": len(ids)}))
        (adapter / "adapter_model.safetensors").write_bytes(bytes([rank]) * 1000)
        ids.append(tracker.run_id)
        versions.append(tracker.log_adapter(adapter))
        tracker.close("FINISHED")
        tracker.close("FAILED")
        states.append(mlflow.get_run(tracker.run_id).info.status)

    assert len(set(ids)) == len(runs(mlflow)) == 1
    assert states == ["RUNNING", "FINISHED"] * 3
    assert versions == [1, 1, 2]
    assert len(mlflow.search_model_versions(f"name = '{MODEL}'")) == 2
    first = mlflow.get_model_version(MODEL, "1")
    assert (Path(first.source) / "adapter_model.safetensors").read_bytes() == bytes([16]) * 1000
    run = mlflow.get_run(ids[0])
    assert run.data.params == {"adapter.rank": "16"}
    assert run.data.tags["resumed.adapter.rank"] == "8"


def test_a_server_that_dies_and_comes_back_has_every_record_once(
    tmp_path: Path, adapter: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    warnings: list[str] = []
    mlflow = client(server.uri)
    tracker = open_tracker(
        TrackingConfig(uri=server.uri), tmp_path, "unlearn", KEY, warnings.append
    )
    tracker.log_parameters({"empty": "", "train": {"steps": 8}})
    for step in range(3):
        tracker.log_step(step, {"loss": float(step)})
    assert steps(mlflow, str(tracker.run_id)) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert not unsent(tmp_path).exists()

    server.kill()
    began_s = time.monotonic()
    for step in range(3, 8):
        tracker.log_step(step, {"loss": float(step)})
    tracker.log_scores("after", {"forget.rouge": 0.5})
    tracker.log_dataset("retain", "ab12", 400)
    assert tracker.log_adapter(adapter) is None
    tracker.close("FINISHED")
    assert time.monotonic() - began_s < 2
    assert len(warnings) == 1
    assert server.uri in warnings[0]
    assert "\n" not in warnings[0]
    waiting = [json.loads(line) for line in unsent(tmp_path).read_text().splitlines()]
    assert [record["kind"] for record in waiting] == ["metrics"] * 5 + [
        "scores",
        "dataset",
        "adapter",
        "close",
    ]
    assert [record["step"] for record in waiting[:5]] == [3, 4, 5, 6, 7]

    server.start()
    again = open_tracker(TrackingConfig(uri=server.uri), tmp_path, "unlearn", KEY, warnings.append)
    assert again.run_id == tracker.run_id
    assert not unsent(tmp_path).exists()
    assert again.log_adapter(adapter) == 1
    again.close("FINISHED")
    assert len(warnings) == 1
    [run] = runs(mlflow)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"empty": "", "train.steps": "8"}
    assert run.data.metrics["after.forget.rouge"] == 0.5
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["retain"]
    assert steps(mlflow, run.info.run_id) == [(step, float(step)) for step in range(8)]
    [version] = mlflow.search_model_versions(f"name = '{MODEL}'")
    assert version.run_id == run.info.run_id
    fetched = Path(mlflow.download_artifacts(run.info.run_id, "adapter", str(tmp_path)))
    assert (fetched / "adapter_model.safetensors").read_bytes() == b"\x01" * 1000


def test_a_server_unreachable_at_the_start_costs_one_warning_and_each_run_gets_its_own_records_later(
    tmp_path: Path,
) -> None:
    warnings: list[str] = []
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    tracker = open_tracker(TrackingConfig(uri=uri), tmp_path, "first", "key-1", warnings.append)
    for step in range(4):
        tracker.log_step(step, {"loss": float(step)})
    tracker.close("KILLED")
    assert tracker.run_id is None
    assert len(warnings) == 1
    assert "secret" not in warnings[0]
    with unsent(tmp_path).open("a") as file:  # a process that was killed in the middle of a line
        file.write('{"kind": "metrics", "values": {"loss": 1.0}')

    second = open_tracker(TrackingConfig(), tmp_path, "second", "key-2", warnings.append)
    second.log_step(9, {"loss": 9.0})
    second.close("FINISHED")
    mlflow = client(f"sqlite:///{tmp_path}/mlflow.db")
    found = {run.info.run_name: run for run in runs(mlflow)}
    assert {name: run.info.status for name, run in found.items()} == {
        "first": "KILLED",
        "second": "FINISHED",
    }
    assert steps(mlflow, found["first"].info.run_id) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert steps(mlflow, found["second"].info.run_id) == [(9, 9.0)]
    assert found["second"].info.run_id == second.run_id
    assert len(warnings) == 1


def test_a_server_that_takes_connections_and_never_answers_holds_up_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "REQUEST_TIMEOUT_S", 1)
    mlflow_store.load_mlflow()  # its import is not what is measured
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    before = dict(os.environ)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cfg = TrackingConfig(uri=f"http://127.0.0.1:{listener.getsockname()[1]}")
        began_s = time.monotonic()
        tracker = open_tracker(cfg, tmp_path, "unlearn", KEY, lambda _: None)
        assert 0.9 < time.monotonic() - began_s < 2.5
        began_s = time.monotonic()
        for step in range(200):
            tracker.log_step(step, {"loss": 1.0})
        tracker.log_scores("after", {"privleak": 0.1})
        assert time.monotonic() - began_s < 0.9
    assert dict(os.environ) == before


class RecordingStore:
    """Stands for a store; raises what `faults` has for a kind of record."""

    uri = "http://tracking.example"

    def __init__(self) -> None:
        self.written: list[list[tuple[str, Any]]] = []
        self.faults: dict[str, Exception] = {}
        self.versions: dict[str, int] = {}

    def write(self, records: list[dict[str, Any]]) -> str:
        if fault := self.faults.get(records[0]["kind"]):
            raise fault
        self.written.append([(record["kind"], record.get("step")) for record in records])
        return "run-1"


def recording_tracker(folder: Path, warnings: list[str]) -> tuple[Tracker, RecordingStore]:
    store, run = RecordingStore(), {"run_key": KEY, "run_name": "unlearn"}
    return Tracker(store, tracking._Unsent(unsent(folder)), run, warnings.append), store  # pyright: ignore[reportArgumentType]


def test_step_metrics_are_sent_together(tmp_path: Path) -> None:
    tracker, store = recording_tracker(tmp_path, [])
    for step in range(100):
        tracker.log_step(step, {"loss": 1.0})
    assert store.written == [[("open", None)]]
    tracker.log_scores("after", {})
    assert store.written[1:] == [[("metrics", step) for step in range(100)], [("scores", 0)]]


def test_records_of_several_threads_all_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    tracker, store = recording_tracker(tmp_path, [])

    def log(first: int) -> None:
        for step in range(first, first + 50):
            tracker.log_step(step, {"loss": 1.0})

    threads = [threading.Thread(target=log, args=(100 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent = [step for batch in store.written for kind, step in batch if kind == "metrics"]
    assert sorted(sent) == [100 * number + step for number in range(4) for step in range(50)]


def test_a_connection_that_the_server_closed_is_no_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    tracker, store = recording_tracker(tmp_path, warnings)
    write, calls = store.write, []

    def closed_once(records: list[dict[str, Any]]) -> str:
        calls.append(records)
        if len(calls) == 1:
            raise ConnectionResetError
        return write(records)

    monkeypatch.setattr(store, "write", closed_once)
    tracker.log_scores("after", {})
    assert store.written[-1] == [("scores", 0)]
    assert warnings == []


def test_an_artifact_store_out_of_reach_holds_nothing_else_back(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker, store = recording_tracker(tmp_path, warnings)
    store.faults["adapter"] = OSError("no credentials")
    assert tracker.log_adapter(tmp_path) is None
    tracker.log_step(1, {"loss": 1.0})
    tracker.close("FINISHED")
    assert store.written[1:] == [[("metrics", 1)], [("close", None)]]
    assert len(warnings) == 1
    assert "no credentials" in warnings[0]
    assert [json.loads(line)["kind"] for line in unsent(tmp_path).read_text().splitlines()] == [
        "adapter"
    ]


def test_a_failed_store_is_tried_again_after_a_while_and_gets_what_waited_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    clock_s = time.monotonic()
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock_s)
    tracker, store = recording_tracker(tmp_path, warnings)
    store.faults["scores"] = OSError("down")
    tracker.log_scores("before", {})
    clock_s += tracking.RETRY_S + 1
    tracker.log_parameters({})  # tried in vain: what comes after the failed record waits too
    store.faults.clear()
    clock_s += tracking.RETRY_S - 1
    tracker.log_parameters({})  # too early to try again
    assert store.written == [[("open", None)]]
    clock_s += 2
    tracker.log_step(1, {"loss": 1.0})
    assert store.written[1:] == [
        [("scores", 0)],
        [("parameters", None)],
        [("parameters", None)],
        [("metrics", 1)],
    ]
    assert len(warnings) == 1
    assert not unsent(tmp_path).exists()


def test_a_record_that_the_server_refuses_is_named_and_left_out(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = open_tracker(TrackingConfig(), tmp_path, "unlearn", KEY, warnings.append)
    tracker.log_dataset("n" * 501, "d" * 36, 1)
    tracker.log_artifact(tmp_path / "missing.html")
    tracker.log_step(1, {"loss": 0.5})
    tracker.close("FINISHED")
    assert [
        warning.partition("refuses a record of kind ")[2].split(";")[0] for warning in warnings
    ] == [
        "dataset",
        "artifact",
    ]
    assert steps(client(f"sqlite:///{tmp_path}/mlflow.db"), str(tracker.run_id)) == [(1, 0.5)]
    assert not unsent(tmp_path).exists()


def test_a_run_deleted_on_the_server_is_begun_anew_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    warnings: list[str] = []
    mlflow = client(f"sqlite:///{tmp_path}/mlflow.db")
    tracker = open_tracker(TrackingConfig(), tmp_path, "unlearn", KEY, warnings.append)
    tracker.log_step(1, {"loss": 1.0})
    deleted = str(tracker.run_id)
    mlflow.delete_run(deleted)
    tracker.log_step(2, {"loss": 2.0})
    assert tracker.run_id != deleted
    assert steps(mlflow, str(tracker.run_id)) == [(2, 2.0)]
    assert warnings == []


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
        "",
    ],
)
def test_a_uri_that_mlflow_cannot_take_is_one_line_with_the_choices(
    tmp_path: Path, uri: str
) -> None:
    with pytest.raises(ConfigError) as error:
        open_tracker(TrackingConfig(uri=uri), tmp_path, "unlearn", KEY)
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
        open_tracker(TrackingConfig(model_name="team/adapter"), tmp_path, "unlearn", KEY)


def test_a_folder_whose_name_mlflow_would_decode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"output_dir: found '.*50%20off/mlflow.db', allowed: a path without % and \?",
    ):
        open_tracker(TrackingConfig(), tmp_path / "50%20off", "unlearn", KEY)


def test_http_limits_that_the_user_has_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with mlflow_store._limits(5):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_the_module_is_imported_without_mlflow() -> None:
    check = "import sys, pipelines.tracking.tracker; sys.exit('mlflow' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[3]).returncode == 0
    )
