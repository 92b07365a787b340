"""`ray-unlearn serve`: Ray Serve on this machine or cluster, until Ctrl-C."""

import socket
import threading
from pathlib import Path

import ray
from ray import serve

from deploy.serve import APPLICATION, Settings, build_app
from pipelines.cluster.session import session
from pipelines.cluster.tasks import on_this_node, result_of
from pipelines.config.load import load_config
from pipelines.config.schema import ConfigError, ModelConfig
from pipelines.terminal import Terminal


def serve_run(settings: Settings, host: str, port: int, terminal: Terminal) -> None:
    """Serve a run's merged model until it is interrupted.

    Raises:
        ConfigError: the run is not finished, its model is not in safetensors, the port is taken, or
            the cluster has fewer GPUs.
    """

    def check_model(model: ModelConfig) -> None:
        # It imports transformers, which the driver must not. So it runs in a task.
        from pipelines.model.folder import load_model_config

        load_model_config(model, "RUN_DIR")

    run_dir = Path(settings.run_dir)
    if not (run_dir / "model").is_dir():
        raise ConfigError(
            f"RUN_DIR: {run_dir / 'model'} not found, allowed: the output_dir of a finished run"
        )
    cfg = load_config(str(run_dir / "config.yaml"))
    if cfg.task != "causal_lm":
        raise ConfigError(
            f"RUN_DIR: {run_dir} holds a run with task={cfg.task}, allowed: causal_lm"
        )
    # A taken port is refused before Ray starts and the model is loaded.
    with socket.socket() as probe:
        # A port that was closed a moment ago is free to Serve, and would be refused without this.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--port: {host}:{port} cannot be had ({error.strerror}), allowed: a free one"
            ) from None
    with session(cfg.train, run_dir / "serve.log", terminal):
        result_of(on_this_node(check_model).remote(settings.model))
        have = ray.cluster_resources().get("GPU", 0)
        if settings.gpus > have:
            raise ConfigError(
                f"--gpus: found {settings.gpus:g}, allowed: up to {have:g}, which this cluster has"
            )
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        try:
            serve.run(build_app(settings), name=APPLICATION)
            terminal.say(
                f"Serving {settings.name} at http://{host}:{port}/v1/completions; Ctrl-C stops it."
            )
            threading.Event().wait()
        finally:
            serve.shutdown()
