"""A run whose MLflow server is down, and comes back when the run has ended."""

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.flow.conftest import CommandHere
from tests.mlflow_server import Server


def test_the_same_command_sends_what_a_server_that_was_down_at_the_end_lacks(
    command_here: CommandHere,
    overrides: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server = Server(tmp_path)
    settings = ["solve.mode=off", "train.steps=3", "evaluation.quick=true"]
    out = tmp_path / "out"
    command = ["run", "quick", *overrides, *settings, f"output_dir={out}"]
    command.append(f"tracking.uri={server.uri}")

    def record() -> dict[str, Any]:
        return json.loads((out / "manifest.json").read_text())["mlflow"]

    code, told = command_here(*command)
    assert code == 0, told
    told = capfd.readouterr().err  # where Ray's chatter is kept from
    assert told.count(f"tracking.uri: {server.uri} is out of reach") == 1, told
    missing = {"run_id": None, "uri": server.uri, "model_version": None, "is_complete": False}
    assert record() == missing
    scores = (out / "scores.json").read_bytes()
    weights = (out / "model" / "model.safetensors").stat()

    code, told = command_here(*command)  # it is down still
    assert code == 0 and "is out of reach" in told, told
    assert record() == missing

    try:
        server.start()
        code, told = command_here(*command)
        assert code == 0 and "is out of reach" not in told, told
        client = mlflow.MlflowClient(server.uri)
        run_id = record()["run_id"]
        assert record() == {**missing, "run_id": run_id, "model_version": 1, "is_complete": True}
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params["train.steps"] == "3"
        assert run.data.metrics["after.forget.probability"] > 0
        assert [point.step for point in client.get_metric_history(run_id, "loss")] == [0, 1, 2]
        artifacts = {file.path: file.file_size for file in client.list_artifacts(run_id)}
        assert artifacts["report.html"] == (out / "report.html").stat().st_size
        assert run_id in (out / "report.html").read_text(encoding="utf-8")
        assert {item.dataset.name for item in run.inputs.dataset_inputs} >= {"forget", "retain"}
    finally:
        server.kill()
    code, told = command_here(*command)  # nothing is left to send, and nobody is asked
    assert code == 0 and "is out of reach" not in told, told
    assert command_here("verify", str(out))[0] == 0
    assert (out / "scores.json").read_bytes() == scores
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
