"""A merged model behind a real Ray Serve on 127.0.0.1, started as a user starts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pipelines.__main__ import app
from tests.cluster.conftest import free_ports

PROMPT = "Who wrote this book?"


class Server(NamedTuple):
    """A running `ray-unlearn serve`."""

    process: subprocess.Popen[str]
    run_dir: Path
    port: int

    def post(self, body: dict[str, Any] | bytes) -> tuple[int, dict[str, Any]]:
        """Status and answer of a completion."""
        data = (
            body
            if isinstance(body, bytes)
            else json.dumps({"model": "out", "prompt": PROMPT} | body).encode()
        )
        return self.ask(
            urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", data=data)
        )

    def ask(self, request: urllib.request.Request | str) -> tuple[int, dict[str, Any]]:
        """Status and answer of a request."""
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def make_run(problem: Path, folder: Path) -> Path:
    """What `serve` reads of a finished run: its configuration and its merged model."""
    shutil.copytree(problem / "model", folder / "model")
    sets = "\n".join(
        f"  {name}: {{path: {problem}/data/{name}.jsonl}}" for name in ("forget", "retain")
    )
    text = f"model: {{path: {problem}/model}}\ndata:\n{sets}\noutput_dir: {folder}\n"
    (folder / "config.yaml").write_text(text)
    return folder


def start(run_dir: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines", "serve", str(run_dir), *options]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_A")
    }
    environment["RAY_ADDRESS"] = (
        "local"  # a cluster that somebody else left on this machine is not joined
    )
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def server(problem: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with small limits."""
    run_dir = make_run(problem, tmp_path_factory.mktemp("served") / "out")
    (port,) = free_ports(1)
    limits = ["--max-tokens", "400", "--max-queue", "1", "--max-body-bytes", "4000"]
    process = start(run_dir, "--port", str(port), *limits)
    assert process.stderr is not None
    try:
        told = process.stderr.readline()
        assert f"Serving out at http://127.0.0.1:{port}/v1/completions" in told, (
            told + process.stderr.read()
        )
        yield Server(process, run_dir, port)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=150) == 130
        assert "Stopped.\n" in process.stderr.read()


def test_a_completion_is_what_the_model_generates(server: Server) -> None:
    status, answer = server.post({"max_tokens": 8, "temperature": 0})
    assert status == 200, answer
    tokenizer = AutoTokenizer.from_pretrained(server.run_dir / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(server.run_dir / "model")
    tokens = tokenizer(PROMPT, return_tensors="pt")
    count = tokens["input_ids"].shape[1]
    with torch.no_grad():
        expected = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0, count:]
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == count
    assert answer["usage"]["completion_tokens"] == len(expected)
    ended = int(expected[-1]) == tokenizer.eos_token_id
    assert answer["choices"][0]["finish_reason"] == ("stop" if ended else "length")


def test_the_same_seed_gives_the_same_answer(server: Server) -> None:
    texts = [
        server.post({"seed": seed, "max_tokens": 12})[1]["choices"][0]["text"] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "body, status, message",
    [
        ({"max_tokens": 401}, 400, "max_tokens: found 401, allowed: up to 400"),
        ({"max_tokens": 0}, 400, "max_tokens: input should be greater than or equal to 1"),
        (
            {"stream": True},
            400,
            "stream: extra inputs are not permitted, allowed: model, prompt, max_tokens",
        ),
        ({"prompt": ""}, 400, "prompt: string should have at least 1 character"),
        ({"prompt": ["secret"]}, 400, "prompt: input should be a valid string"),
        ({"model": "gpt"}, 404, "model: found 'gpt', allowed: 'out'"),
        ({"prompt": "secret " * 1000}, 413, "body: found more than 4000 bytes, allowed: 4000"),
        (
            {"prompt": "x0" * 1900, "max_tokens": 400},
            400,
            "tokens of prompt and 400 of answer, allowed: 2048 together",
        ),
        (b"{secret", 400, "body: invalid JSON"),
    ],
)
def test_what_cannot_be_answered_is_said_and_nothing_of_it_is_repeated(
    server: Server, body: dict[str, Any] | bytes, status: int, message: str
) -> None:
    found, answer = server.post(body)
    assert found == status, answer
    assert message in answer["error"]["message"]
    assert "secret" not in json.dumps(answer)


def test_requests_beyond_the_queue_are_turned_away(server: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda _: server.post({"max_tokens": 400, "temperature": 0}), range(8))
        )
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503}, statuses
    turned_away = next(answer for status, answer in answers if status == 503)
    assert (
        turned_away["error"]["message"]
        == "queue: full, allowed: 1 waiting requests; try again later"
    )
    assert server.post({"max_tokens": 1})[0] == 200


def test_it_is_healthy_and_listens_on_127_0_0_1_alone(server: Server) -> None:
    assert server.ask(f"http://127.0.0.1:{server.port}/healthz") == (
        200,
        {"model": "out", "status": "HEALTHY"},
    )
    listening = {
        c.laddr.ip
        for c in psutil.net_connections("tcp")
        if c.status == "LISTEN" and c.laddr.port == server.port
    }
    assert listening == {"127.0.0.1"}


def test_no_prompt_is_logged(server: Server) -> None:
    marker = "xyzzy-plugh"
    assert server.post({"prompt": marker, "max_tokens": 1})[0] == 200
    time.sleep(1)
    log = (server.run_dir / "serve.log").read_text(errors="replace")
    assert "POST /v1/completions 200" in log
    assert marker not in log


def serve_here(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve", *arguments])
    return result.exit_code, result.stderr


@pytest.mark.usefixtures("ray_session")
def test_pickled_weights_are_refused(problem: Path, tmp_path: Path) -> None:
    run_dir = make_run(problem, tmp_path / "out")
    (run_dir / "model" / "model.safetensors").rename(run_dir / "model" / "pytorch_model.bin")
    code, told = serve_here(str(run_dir), "--port", str(free_ports(1)[0]))
    assert (code, told.count("\n")) == (2, 1), told
    assert "holds no .safetensors weights; pickled weights are refused" in told


@pytest.mark.usefixtures("ray_session")
def test_more_gpus_than_there_are_are_refused(problem: Path, tmp_path: Path) -> None:
    code, told = serve_here(
        str(make_run(problem, tmp_path / "out")), "--gpus", "1", "--port", str(free_ports(1)[0])
    )
    assert (code, told) == (2, "--gpus: found 1, allowed: up to 0, which this cluster has\n")


def test_a_port_that_is_taken_is_refused(server: Server) -> None:
    code, told = serve_here(str(server.run_dir), "--port", str(server.port))
    assert (code, told.count("\n")) == (2, 1)
    assert told.startswith(
        f"--port: 127.0.0.1:{server.port} cannot be had (Address already in use), allowed: a free"
    )


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    found = tmp_path / "model"
    assert serve_here(str(tmp_path)) == (
        2,
        f"RUN_DIR: {found} not found, allowed: the output_dir of a finished run\n",
    )
