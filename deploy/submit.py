"""Plan a command of ray-unlearn as a Ray job, with its code, its configuration and pinned packages.

The command and the configuration's keys and values are checked here. Paths are not, as they are the
cluster's.
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
# The commands of a job, and for which purpose the configuration is checked before it is sent.
COMMANDS: dict[str, Purpose] = {
    "run": "run",
    "tune": "tune",
    "check": "run",
    "finetune": "finetune",
    "prepare": "prepare",
    "evaluate": "evaluate",
}
OVERRIDE = re.compile(r"[\w.]+=")
PACKAGES = ("rfa", "pipelines", "tuning", "deploy")
CONSTRAINTS = "constraints.txt"
# pip replaces the variable on each node with the folder that Ray has unpacked the job's code into.
SHIPPED_CONSTRAINTS = f"-c ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{CONSTRAINTS}"


class Plan(NamedTuple):
    """A job to submit. `files` maps names in its folder to files or folders here, or to content."""

    entrypoint: str
    runtime_env: dict[str, Any]
    files: dict[str, Path | str]


def plan_job(command: Sequence[str], env_file: Path | None, *, install: bool) -> Plan:
    """Plan a job that runs one of COMMANDS in a cluster.

    Args:
        command: `run CONFIG key=value ...`, or another of COMMANDS.
        env_file: variables for the job's processes, one `NAME=value` a line.
        install: whether to install the pinned packages on every node first.

    Raises:
        ConfigError: the command, its configuration or a file is wrong. Nothing has been sent.
    """
    arguments, own_files = _shipped_command(command)
    files: dict[str, Path | str] = {}
    for name in (*PACKAGES, CONSTRAINTS):
        files[name] = _source(name)
    files |= own_files
    runtime_env: dict[str, Any] = {}
    if install:
        project = tomllib.loads(_source("pyproject.toml").read_text(encoding="utf-8"))["project"]
        runtime_env["pip"] = {"packages": [SHIPPED_CONSTRAINTS, *project["dependencies"]]}
    if env_file is not None:
        files[ENVIRONMENT_FILE] = json.dumps(read_env_file(env_file))
        runtime_env["worker_process_setup_hook"] = "deploy.job.load_environment"
    # Quoted, as Ray runs an entrypoint in a shell.
    return Plan(shlex.join(["python", "-m", "deploy.job", *arguments]), runtime_env, files)


def _shipped_command(command: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """Return the job's command, and the configuration and space files here that it needs."""
    if len(command) < 2 or command[0] not in COMMANDS:
        found = " ".join(command) or "nothing"
        raise ConfigError(
            f"submit: found '{found}' after --, allowed: {', '.join(COMMANDS)}, and then CONFIG"
        )
    name, config, *rest = command
    cfg = read_config(config, [text for text in rest if OVERRIDE.match(text)])
    check_settings(cfg, COMMANDS[name])
    for key, place in (("output_dir", cfg.output_dir), ("solve.prepared", cfg.solve.prepared)):
        if place is not None and "://" not in place and not Path(place).is_absolute():
            raise ConfigError(
                f"{key}: found '{place}', allowed in a job: an absolute path that all nodes share, "
                "s3:// or gs://; a relative one would go with the job"
            )
    spaces = [text for option, text in pairwise(rest) if option == "--space"]
    arguments = [name]
    files: dict[str, Path] = {}
    for text in (config, *rest):
        path = Path(text)
        if text in (config, *spaces) and path.is_file():
            # The files lie in the job's folder, which is the command's working directory there.
            files[path.name] = path
            text = path.name
        arguments.append(text)
    return arguments, files


def _source(name: str) -> Path:
    """Return a file or folder of this installation's source."""
    path = CODE / name
    if not path.exists():
        raise ConfigError(
            f"{path}: not found; "
            "allowed: ray-unlearn installed from its source folder with --editable"
        )
    return path


def read_env_file(path: Path) -> dict[str, str]:
    """Read the variables of a file of `NAME=value` lines.

    Raises:
        ConfigError: the file cannot be read, or a line has another form. No message holds a value.
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
            # The parser counts blank lines before a variable as part of it.
            blank = len(line.original.string) - len(line.original.string.lstrip("\n"))
            raise ConfigError(
                f"--env-file: {path}: found no NAME=value in line {line.original.line + blank}"
            )
    return {line.key: str(line.value) for line in lines if line.key is not None}
