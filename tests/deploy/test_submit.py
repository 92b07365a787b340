"""What is checked and planned before anything is sent."""

import json
from pathlib import Path

import pytest

from deploy.submit import plan_job, read_env_file
from pipelines.config.schema import ConfigError

CONFIG = """
model: {path: /shared/model}
data: {forget: {path: s3://bucket/forget.jsonl}, retain: {path: s3://bucket/retain.jsonl},
       holdout: {path: s3://bucket/holdout.jsonl}}
output_dir: /shared/out
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "request.yaml").write_text(CONFIG)
    return str(tmp_path / "request.yaml")


def test_the_configuration_travels_under_its_name_and_the_packages_are_pinned(config: str) -> None:
    plan = plan_job(
        ["run", config, "seed=3", "adapter.targets=[o_proj, up_proj]"], None, install=True
    )
    assert (
        plan.entrypoint
        == "python -m deploy.job run request.yaml seed=3 'adapter.targets=[o_proj, up_proj]'"
    )
    assert plan.files["request.yaml"] == Path(config)
    assert {"rfa", "pipelines", "tuning", "deploy", "constraints.txt"} <= plan.files.keys()
    constraint, *packages = plan.runtime_env["pip"]["packages"]
    assert constraint == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    assert {"torch", "peft", "transformers", "deepspeed"} <= set(packages)


def test_a_preset_needs_no_file_and_an_image_no_installation() -> None:
    plan = plan_job(["check", "demo", "output_dir=/shared/out"], None, install=False)
    assert plan.entrypoint == "python -m deploy.job check demo output_dir=/shared/out"
    assert plan.runtime_env == {}


def test_results_may_go_to_an_object_store(config: str) -> None:
    plan = plan_job(["run", config, "output_dir=s3://bucket/out"], None, install=False)
    assert plan.entrypoint == "python -m deploy.job run request.yaml output_dir=s3://bucket/out"


def test_a_search_takes_its_space_along(config: str, tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text("adapter.rank: {choice: [8, 16]}")
    command = [
        "tune",
        config,
        "--space",
        f"{tmp_path}/wide.yaml",
        "--require",
        "utility>=0.9",
        "seed=1",
    ]
    plan = plan_job(command, None, install=False)
    expected = (
        "python -m deploy.job tune request.yaml --space wide.yaml --require 'utility>=0.9' seed=1"
    )
    assert plan.entrypoint == expected
    assert plan.files["wide.yaml"] == tmp_path / "wide.yaml"


def test_secrets_travel_in_a_file_and_not_in_what_the_job_server_shows(
    config: str, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(
        "# keys\n\nexport AWS_SECRET_ACCESS_KEY='tr0ub4dor & 3'\nHF_TOKEN=${USER}\n"
    )
    plan = plan_job(["run", config], tmp_path / "keys", install=False)
    content = plan.files["environment.json"]
    assert isinstance(content, str)
    assert json.loads(content) == {"AWS_SECRET_ACCESS_KEY": "tr0ub4dor & 3", "HF_TOKEN": "${USER}"}
    assert "tr0ub4dor" not in f"{plan.entrypoint} {plan.runtime_env}"


@pytest.mark.parametrize(
    "command, message",
    [
        (
            ["gate", "{config}"],
            "submit: found 'gate {config}' after --, allowed: run, tune, check, finetune, prepare",
        ),
        (["run"], "submit: found 'run' after --, allowed: run, tune"),
        (["run", "demmo"], "preset 'demmo': not found, allowed: demo"),
        (["run", "{config}", "train.stepz=3"], "train.stepz: unknown key"),
        (
            ["run", "{config}", "output_dir=out"],
            "output_dir: found 'out', allowed in a job: an absolute path",
        ),
        (
            ["run", "{config}", "output_dir=ftp://host/out"],
            "output_dir: found 'ftp://host/out', allowed: a folder, on",
        ),
        (
            ["tune", "{config}", "output_dir=s3://bucket/out"],
            "output_dir: found 's3://bucket/out', allowed in a search: a folder, on",
        ),
        (["run", "{config}", "data.holdout=null"], "data.holdout: missing, required by solve"),
        (["check", "{config}", "data.holdout=null"], "data.holdout: missing, required by solve"),
        (["check", "{config}", "tracking.model_name=a/b"], "tracking.model_name: found 'a/b'"),
        (
            ["tune", "{config}", "data.holdout=null", "solve.mode=blockwise", "solve.strength=1"],
            "data.holdout: missing, required by a search without evaluation.oracle",
        ),
        (
            ["finetune", "{config}", "finetune.sets=[retain,general]"],
            "finetune.sets: found general, which data does not give, allowed: forget, retain, hold",
        ),
        (
            ["run", "{config}", "tracking.uri=http://me:hunter2@host"],
            "tracking.uri: holds a password, which the run's files would keep; allowed: passw",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(
    command: list[str], message: str, config: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_job([word.format(config=config) for word in command], None, install=False)
    assert message.format(config=config) in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("line", ["hunter2", "=hunter2", "KEY='hunter2", "A B=hunter2"])
def test_a_broken_line_of_secrets_is_told_by_its_number_alone(line: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"GOOD=1\n\n{line}\n")
    with pytest.raises(
        ConfigError, match=r"--env-file: .*keys: found no NAME=value in line 3"
    ) as caught:
        read_env_file(tmp_path / "keys")
    assert "hunter2" not in str(caught.value)


def test_a_missing_file_of_secrets_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"--env-file: .* cannot be read \(FileNotFoundError\); allowed: a text file",
    ):
        read_env_file(tmp_path / "none")
