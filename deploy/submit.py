"""A command of ours as a Ray job: the code and the configuration are shipped, the packages pinned.

What is checked here is what can be: the command, the configuration's keys and values. Paths are the cluster's.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.config.load import read_config
from pipelines.config.schema import ConfigError
from pipelines.preflight import Purpose, check_settings

ENVIRONMENT_FILE = "environment.json"
CODE = Path(__file__).parent.parent
# What a job may run, and what is checked of its configuration before it is sent.
COMMANDS: dict[str, Purpose] = {
    "run": "run",
    "tune": "tune",
    "check": "run",
    "finetune": "finetune",
    "evaluate": "evaluate",
}
OVERRIDE = re.compile(r"[\w.]+=")
PACKAGES = ("rfa", "pipelines", "tuning", "deploy")
CONSTRAINTS = "constraints.txt"
# pip reads the variable on each node: the folder that Ray has unpacked the job's code into.
SHIPPED_CONSTRAINTS = f"-c ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{CONSTRAINTS}"
PASSWORD = re.compile(r"//[^/@\s]*:[^/@\s]*@")


class Plan(NamedTuple):
    """What is submitted. `files` maps names in the job's folder to files or folders here, or to content."""

    entrypoint: str
    runtime_env: dict[str, Any]
    files: dict[str, Path | str]


def plan_job(command: Sequence[str], env_file: Path | None, *, install: bool) -> Plan:
    """What it takes to run one of our commands in a cluster.

    Args:
        command: `run CONFIG key=value ...`, or another of COMMANDS.
        env_file: variables for the job's processes, `NAME=value` a line.
        install: install the pinned packages on every node first.

    Raises:
        ConfigError: the command, its configuration or a file is not what it must be; nothing has been sent.
    """
    arguments, own = _shipped_command(command)
    files: dict[str, Path | str] = {
        **{name: _source(name) for name in (*PACKAGES, CONSTRAINTS)},
        **own,
    }
    runtime_env: dict[str, Any] = {}
    if install:
        project = tomllib.loads(_source("pyproject.toml").read_text(encoding="utf-8"))["project"]
        runtime_env["pip"] = {"packages": [SHIPPED_CONSTRAINTS, *project["dependencies"]]}
    if env_file is not None:
        files[ENVIRONMENT_FILE] = json.dumps(read_env_file(env_file))
        runtime_env["worker_process_setup_hook"] = "deploy.job.load_environment"
    return Plan(shlex.join(["python", "-m", "deploy.job", *arguments]), runtime_env, files)


def _shipped_command(command: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """The command as the job runs it, and the files that go with it: configuration and search space, where they are
    files here."""
    if len(command) < 2 or command[0] not in COMMANDS:
        found = " ".join(command) or "nothing"
        raise ConfigError(
            f"submit: found '{found}' after --, allowed: {', '.join(COMMANDS)}, and then CONFIG"
        )
    name, config, *rest = command
    cfg = read_config(config, [text for text in rest if OVERRIDE.match(text)])
    for text in (*rest, f"tracking.uri={cfg.tracking.uri}"):
        if PASSWORD.search(text):
            raise ConfigError(
                f"{text.split('=')[0]}: holds a password, allowed: passwords in --env-file"
            )
    check_settings(cfg, COMMANDS[name])
    if "://" not in cfg.output_dir and not Path(cfg.output_dir).is_absolute():
        raise ConfigError(
            f"output_dir: found '{cfg.output_dir}', allowed in a job: an absolute path that all nodes share, "
            "s3:// or gs://; a relative one would go with the job"
        )
    spaces = [text for option, text in pairwise(rest) if option == "--space"]
    local = {text: Path(text) for text in (config, *spaces) if Path(text).is_file()}
    arguments = [local[text].name if text in local else text for text in (config, *rest)]
    return [name, *arguments], {path.name: path for path in local.values()}


def _source(name: str) -> Path:
    path = CODE / name
    if not path.exists():
        raise ConfigError(
            f"{path}: not found; allowed: ray-unlearn installed from its source folder with --editable"
        )
    return path


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a file of `NAME=value` lines; no message holds a value.

    Raises:
        ConfigError: the file cannot be read, or a line is not like that.
    """
    from dotenv.parser import parse_stream

    try:
        with path.open(encoding="utf-8") as stream:
            lines = list(parse_stream(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--env-file: {path} cannot be read ({type(error).__name__}); allowed: a text file"
        ) from None
    for line in lines:
        if line.error or (line.key is not None and line.value is None):
            blank = len(line.original.string) - len(line.original.string.lstrip("\n"))
            raise ConfigError(
                f"--env-file: {path}: found no NAME=value in line {line.original.line + blank}"
            )
    return {line.key: str(line.value) for line in lines if line.key is not None}
