"""The first look at the model hub: a local server stands for one that answers, and one that is silent."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from pipelines.config.schema import ConfigError, ModelConfig
from pipelines.model.folder import load_model_config
from pipelines.storage import hub
from pipelines.storage.hub import require_hub


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Tests run offline; here the client asks."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield monkeypatch
    monkeypatch.undo()
    huggingface_hub.close_session()


def test_a_hub_that_is_silent_or_not_there_is_told_with_the_time_limit(
    online: pytest.MonkeyPatch,
) -> None:
    online.setattr(hub, "LOOK_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        online.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}"
        )
        started = time.monotonic()
        with pytest.raises(
            OSError, match=r"^no answer within 1 s \(.*imed ?out.*; HF_HUB_OFFLINE=1"
        ):
            require_hub("owner/name", "dataset")
        assert time.monotonic() - started < 20, "the client alone asks again and again"
    with pytest.raises(ConfigError, match=r"^model\.path: owner/name cannot be loaded \(no answer"):
        load_model_config(ModelConfig(path="owner/name"))


def test_what_a_hub_answers_is_left_to_the_loading(online: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
        )
        require_hub("owner/name", "model", "main")
        server.shutdown()


def test_an_offline_client_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    require_hub("owner/name", "model")
