"""Wrong input from the command line: one line, exit code 2, nothing trained, nothing overwritten."""

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from pipelines import preflight
from pipelines.__main__ import app
from pipelines.storage import run_folder as artifact
from tests.bad_models import few_learned_positions, small_vocabulary, unknown_activation
from tests.tiny_classifiers import write_text_model
from tests.tiny_model import TEMPLATE

pytestmark = pytest.mark.usefixtures("ray_session")


ALL = ("run", "check", "tune", "finetune", "evaluate", "prepare")
TRAINING = ("run", "check", "tune", "finetune")
UNLEARNING = ("run", "check", "tune")
BOTH = ("run", "check")


class Case(NamedTuple):
    """What the user gets wrong, what the line must say, what refuses it, and the commands that are held to it.

    `run` and `check` are asked wherever one of them is: whatever `run` refuses, `check` does.
    """

    name: str
    changes: list[str]
    message: str
    refusal: str
    commands: tuple[str, ...] = BOTH


CONFIGURATION = [
    ("unknown key", ["train.stepz=3"], "train.stepz: unknown key, allowed here: steps, learning_"),
    ("unknown section", ["trian.steps=3"], "trian: unknown key, allowed here: task, model, data"),
    (
        "wrong type",
        ["train.steps=many"],
        "train.steps: found 'many', input should be a valid integer",
    ),
    (
        "out of range",
        ["train.num_workers=0"],
        "train.num_workers: found 0, allowed: a number >= 1, or [min, max] with 1 <= min <= max",
    ),
    (
        "wrong choice",
        ["objective.target=mean"],
        "objective.target: found 'mean', input should be 'retain_mean'",
    ),
    (
        "an oracle twice",
        ["evaluation.oracle=[one,one]"],
        "evaluation.oracle: found ['one', 'one'], allowed: a model folder, or a list of different",
    ),
    (
        "relearning from a set that is not there",
        ["evaluation.robustness=[relearn_general]", "data.general=null"],
        "data.general: missing, required by evaluation.robustness with relearn_general; allowed: a",
    ),
    (
        "nothing forgets",
        ["objective.weights.forget=0"],
        "weights.forget, weights.output and weights.task are all 0",
    ),
    (
        "earlier requests taught again",
        ["data.earlier.path=rows.jsonl", "objective.weights.task=0.5"],
        "objective.weights.task: found 0.5 with data.earlier, whose answers it would teach again",
    ),
    (
        "layers reversed",
        ["adapter.layers=[2,1]"],
        "allowed: [first, last] with 0 <= first <= last",
    ),
]
TEMPLATES = {  # of models in folders of these names
    "plain": "",
    "dated": "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + TEMPLATE,
    "thinking": TEMPLATE + "{% if add_generation_prompt %}<think>{% endif %}",
    "unruly": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    + TEMPLATE,
    "short": TEMPLATE.replace("in messages", "in messages[-2:]"),
    "deaf": TEMPLATE.replace("in messages", "in messages if message.role != 'system'"),
}
BAD_MODELS = {  # in folders of these names
    "small": small_vocabulary,
    "few": few_learned_positions,
    "strange": unknown_activation,
}
OF_TEMPLATES = [
    (
        "a template with the time of day",
        ["model.path={folder}/dated"],
        "model.path: {folder}/dated: the chat template writes the date or the time (strftime_now)",
    ),
    (
        "a template that opens thoughts",
        ["model.path={folder}/thinking"],
        "model.path: {folder}/thinking: the chat template asks for an answer in another way than it "
        "begins one (it may open <think>); allowed: a template whose generation prompt begins its",
    ),
    (
        "a template without a system turn",
        ["model.path={folder}/unruly", "data.system_prompt=Be kind."],
        "data.system_prompt: the chat template of {folder}/unruly refuses a system turn or leaves "
        "it out; allowed: null (the text may stand in the prompts), or another template",
    ),
    (
        "a template that leaves out a system turn",
        ["model.path={folder}/deaf", "data.system_prompt=Be kind."],
        "data.system_prompt: the chat template of {folder}/deaf refuses a system turn or leaves",
    ),
    (
        "examples for a template of one question",
        ["model.path={folder}/short", "evaluation.robustness=[in_context]"],
        "evaluation.robustness: found in_context, and the chat template of {folder}/short refuses "
        "several turns or leaves some out; allowed: a list without it",
    ),
    (
        "a system prompt without a template",
        ["model.path={folder}/plain", "data.system_prompt=Be kind."],
        "data.system_prompt: found a text, and {folder}/plain has no chat template to write it in",
    ),
]
CLASSIFIER = [
    "task=sequence_classification",
    "model.path={folder}/classifier",
    "adapter.targets=[attention.output.dense]",
    "adapter.layers=null",
]
PREPARED = ["solve.prepared={folder}/nowhere"]
CASES = [
    *(Case(*case, "load_config", (*ALL, "submit")) for case in CONFIGURATION),
    Case(
        "no override",
        ["train.steps"],
        "override 'train.steps': found no '=', allowed: key=value",
        "load_config",
        ALL,
    ),
    Case(
        "weights that no solver reads",
        ["train.steps=0", "objective.weights.kl=1"],
        "objective.weights: found another value than the default, which is read with train.steps",
        "check_read",
        (*UNLEARNING, "submit"),
    ),
    Case(
        "a password",
        ["tracking.uri=http://me:word@host"],
        "tracking.uri: holds a password, which the run's files would keep; allowed: passwords in",
        "check_passwords",
        (*TRAINING, "submit"),
    ),
    Case(
        "strength without holdout",
        ["data.holdout=null"],
        "data.holdout: missing, required by",
        "check_holdout",
        (*UNLEARNING, "submit"),
    ),
    Case(
        "tracking server",
        ["tracking.uri=gopher://x"],
        "tracking.uri: found 'gopher://x', allowed:",
        "check_tracking",
        (*UNLEARNING, "submit"),
    ),
    Case(
        "registered name",
        ["tracking.model_name=a/b"],
        "tracking.model_name: found 'a/b', allowed: a name without / and :",
        "check_tracking",
        (*UNLEARNING, "submit"),
    ),
    Case(
        "search on a store",
        ["output_dir=s3://bucket/out"],
        "output_dir: found 's3://bucket/out', allowed in a search: a folder",
        "refuse_store",
        ("tune",),
    ),
    Case(
        "search without holdout",
        ["data.holdout=null", "solve.strength=1"],
        "data.holdout: missing, required by a search without evaluation.oracle",
        "check_comparison",
        ("tune",),
    ),
    Case(
        "learned set",
        ["finetune.sets=[retain,general]", "data.general=null"],
        "finetune.sets: found general, which data does not give, allowed: forget, retain, utility",
        "check_learned_sets",
        ("finetune",),
    ),
    Case(
        "workers",
        ["train.num_workers=64"],
        "train.num_workers: found 64 with 1 CPU each",
        "check_resources",
        ALL,
    ),
    Case(
        "fewest workers",
        ["train.num_workers=[64,99]"],
        "train.num_workers: found at least 64 with 1 CPU each",
        "check_resources",
    ),
    Case("GPUs", ["train.gpus_per_worker=1"], "this cluster has 0", "check_resources"),
    Case(
        "Wanda on parts of weights",
        ["prune.method=wanda"],
        "prune.method: needs unpartitioned weights, which train.deepspeed.stage=3 does not give",
        "check_partitioning",
        TRAINING,
    ),
    Case(
        "SalUn on parts of weights",
        ["finetune.salient=0.5", "finetune.sets=[retain]"],
        "finetune.salient: needs unpartitioned weights, which train.deepspeed.stage=3 does not",
        "check_partitioning",
        ("finetune",),
    ),
    Case(
        "target",
        ["adapter.targets=[up_prj]"],
        "adapter.targets: no linear layer ends with 'up_prj'; this model's blocks",
        "check_models",
        ALL,
    ),
    Case(
        "layers",
        ["adapter.layers=[2,9]"],
        "adapter.layers: found [2, 9], allowed: 0 to 3",
        "check_models",
    ),
    Case(
        "no model folder",
        ["model.path={folder}/nowhere"],
        "model.path: found no folder {folder}/nowhere",
        "check_models",
    ),
    Case(
        "not a model",
        ["model.path={folder}"],
        "is not a model folder: found no config.json",
        "check_models",
    ),
    Case(
        "no oracle",
        ["evaluation.oracle={folder}"],
        "evaluation.oracle: {folder} is not a model folder",
        "check_models",
        (*UNLEARNING, "evaluate"),
    ),
    Case(
        "no second oracle",
        ["evaluation.oracle=[{data}/../model,{folder}]"],
        "evaluation.oracle: {folder} is not a model folder",
        "check_models",
        (*UNLEARNING, "evaluate"),
    ),
    Case(
        "no tokenizer",
        ["model.path={folder}/dumb"],
        "model.path: no tokenizer loads from {folder}/dumb",
        "check_vocabulary",
    ),
    Case(
        "a small vocabulary",
        ["model.path={folder}/small"],
        "model.path: {folder}/small has a vocabulary of 300 tokens, and the tokenizer of",
        "check_vocabulary",
        ALL,
    ),
    Case(
        "an oracle of a small vocabulary",
        ["evaluation.oracle={folder}/small"],
        "evaluation.oracle: {folder}/small has a vocabulary of 300 tokens, and the tokenizer of",
        "check_vocabulary",
        (*UNLEARNING, "evaluate"),
    ),
    Case(
        "few positions",
        ["model.path={folder}/few", "data.max_tokens=64", "adapter.targets=[attn.c_proj]"],
        "for which {folder}/few (model.path) has too few positions; allowed: 32 at most",
        "check_lengths",
        ALL,
    ),
    Case(
        "an oracle of few positions",
        ["evaluation.oracle={folder}/few", "data.max_tokens=64"],
        "for which {folder}/few (evaluation.oracle) has too few positions; allowed: 32 at most",
        "check_lengths",
        (*UNLEARNING, "evaluate"),
    ),
    Case(
        "a configuration that makes no model",
        ["model.path={folder}/strange"],
        "model.path: no model can be made by the config.json of {folder}/strange (KeyError: 'nope')",
        "check_models",
        ALL,
    ),
    Case(
        "missing file",
        ["data.forget.path={folder}/no.jsonl"],
        "data.forget.path: {folder}/no.jsonl",
        "load_sets",
        ALL,
    ),
    Case("empty file", ["data.forget.path={folder}/empty.jsonl"], "empty.jsonl", "load_sets"),
    Case("broken line", ["data.forget.path={folder}/broken.jsonl"], "line 2", "load_sets"),
    Case("missing column", ["data.columns.answer=reply"], "'reply'", "load_sets"),
    Case(
        "a tool turn",
        ["data.forget.path={folder}/tool.jsonl"],
        "data.forget.path: {folder}/tool.jsonl: row 'r' has turn 1 (counted from 0) of column "
        "'messages' with a role 'tool'; allowed: system, user (or human), assistant (or gpt, model)",
        "load_sets",
        ALL,
    ),
    *(Case(*case, "check_template", ALL) for case in OF_TEMPLATES),
    Case(
        "several turns without a chat template",
        ["data.forget.path={folder}/turns.jsonl", "model.path={folder}/plain"],
        "data.forget.path: row 'r': several turns, and {folder}/plain has no chat template",
        "check_lengths",
        ALL,
    ),
    Case(
        "unknown request ids",
        ["data.forget.ids={folder}/request.jsonl"],
        "names 1 id that",
        "load_sets",
    ),
    Case(
        "forget in retain",
        ["data.retain.path={data}/forget.jsonl"],
        "shares 6 rows with retain",
        "load_sets",
    ),
    Case(
        "a language model as a classifier",
        [
            "task=sequence_classification",
            "data.columns.text=prompt",
            "data.utility=null",
            "data.general=null",
        ],
        "lack 1 of the tensors of its config.json (score.weight) and hold 1 that it does not have",
        "check_models",
    ),
    Case(
        "unknown class",
        [
            *CLASSIFIER,
            "data.columns.text=prompt",
            "data.utility=null",
            "data.general=null",
        ],
        "allowed: the model's classes, 0, 1, 2, 3, LABEL_0, LABEL_1, LABEL_2, LABEL_3",
        "check_labels",
        TRAINING,
    ),
    Case(
        "a text that a classifier would not read whole",
        [
            *CLASSIFIER,
            "data.forget.path={folder}/long.jsonl",
            "data.retain.path={folder}/short.jsonl",
            "data.columns.label=label",
            "data.max_tokens=64",
            *(f"data.{name}=null" for name in ("utility", "holdout", "general")),
            "solve.strength=1",
        ],
        "data.max_tokens: found 64, which cuts 1 rows of forget ('long'); allowed: as many tokens",
        "check_lengths",
        (*BOTH, "finetune"),
    ),
    Case(
        "target without labels",
        ["objective.target=class_mean", "data.columns.label=none"],
        "objective.target: found class_mean, and 0 labels in the column 'none' of retain (data.columns.label)",
        "check_target",
        UNLEARNING,
    ),
    Case(
        "a changed model of an earlier request",
        ["model.path={folder}/earlier/model"],
        "model.path: {folder}/earlier/model is not as its run has sealed it (model/",
        "check_parent",
        UNLEARNING,
    ),
    Case(
        "statistics that nobody has prepared",
        [*PREPARED, "solve.mode=per_token", "train.steps=0"],
        "solve.prepared: {folder}/nowhere: not found; allowed: a folder that ray-unlearn prepare",
        "check_prepared",
    ),
    Case(
        "prepared statistics that the mode does not read",
        [*PREPARED, "train.steps=0"],
        "solve.prepared: found another value than the default, which is read with solve.mode=per",
        "check_read",
        (*BOTH, "submit"),
    ),
    Case(
        "prepared statistics in a search",
        PREPARED,
        "solve.prepared: found {folder}/nowhere, allowed in a search: null",
        "refuse_prepared",
        ("tune",),
    ),
    Case(
        "statistics for a mode that needs more",
        ["solve.mode=blockwise"],
        "solve.mode: found blockwise, allowed with prepare: per_token",
        "check_preparable",
        ("prepare",),
    ),
    Case(
        "statistics of a pruned model",
        ["solve.mode=per_token", "prune.method=rows"],
        "prune.method: found rows, allowed with prepare: none",
        "check_preparable",
        ("prepare",),
    ),
    Case(
        "a part of the rows for prepared statistics",
        [*PREPARED, "solve.mode=per_token", "train.steps=0", "data.retain.max_rows=3"],
        "data.retain.max_rows: found 3, allowed with prepare and solve.prepared: null",
        "refuse_thinned",
        (*BOTH, "prepare", "submit"),
    ),
    Case(
        "statistics of rows without answers",
        ["data.utility.path={folder}/prompts.jsonl"],
        "2 of 2 rows have no answer, allowed for `run` only",
        "check_answered",
        ("prepare",),
    ),
    Case(
        "learned set without answers",
        ["data.utility.path={folder}/prompts.jsonl", "finetune.sets=[utility]"],
        "2 of 2 rows have no answer, allowed for `run` only",
        "check_answered",
        ("finetune",),
    ),
]
ELSEWHERE = {"check_inputs"}  # needs a run that has begun: a test of its own below
Invoke = Callable[..., tuple[int, str]]


@pytest.fixture
def invoke(problem: Path) -> Invoke:
    """Runs a command, `run` unless another one is named, in this process; gives exit code and stderr."""
    options = {
        "tune": ["--trials", "1"],
        "evaluate": ["--model", f"{problem}/model"],
        "submit": ["--address", "http://127.0.0.1:1", "--", "run"],
    }

    def run(*arguments: str, command: str = "run") -> tuple[int, str]:
        result = CliRunner().invoke(app, [command, *options.get(command, []), *arguments])
        assert result.stdout == ""
        return result.exit_code, result.stderr

    return run


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_mistake_is_one_line_and_exit_code_2(
    case: Case,
    invoke: Invoke,
    overrides: list[str],
    problem: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "stage_of", lambda _cfg: 3)  # as on GPUs too small for a model
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text(
        '{"id": 1, "prompt": "a", "answer": "b"}\n{"id": 2, "prompt": \n'
    )
    (tmp_path / "request.jsonl").write_text('"author-9999-birthplace"\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"id": "long", "label": 0, "text": "word " * 99}) + "\n"
        '{"id": "short", "label": 1, "text": "word"}\n'
    )
    (tmp_path / "short.jsonl").write_text('{"label": 1, "text": "another word"}\n')
    if set(CLASSIFIER) <= set(case.changes):
        write_text_model(tmp_path / "classifier", problem / "model")
    for name, role in (("tool", "tool"), ("turns", "system")):
        turns = [{"role": who, "content": f"say {who}"} for who in ("user", role, "assistant")]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": "r", "messages": turns}))
    for name, template in TEMPLATES.items():
        shutil.copytree(problem / "model", tmp_path / name, copy_function=os.symlink)
        (tmp_path / name / "chat_template.jinja").unlink()
        if template:
            (tmp_path / name / "chat_template.jinja").write_text(template)
    for name, spoil in BAD_MODELS.items():
        if f"{{folder}}/{name}" in " ".join(case.changes):
            spoil(shutil.copytree(problem / "model", tmp_path / name))
    shutil.copytree(problem / "model", tmp_path / "earlier" / "model")
    (tmp_path / "earlier" / "config.yaml").touch()
    manifest = {"purpose": "run", "status": "complete", "files": {"model/config.json": "0" * 64}}
    (tmp_path / "earlier" / "manifest.json").write_text(json.dumps({"schema": 1, **manifest}))
    (tmp_path / "dumb").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "dumb" / name).symlink_to(problem / "model" / name)
    names = {"folder": tmp_path, "data": problem / "data"}
    changes = [f"output_dir={tmp_path}/out", *(text.format(**names) for text in case.changes)]
    lines = {}
    for command in case.commands:
        # It is for one mode alone.
        mode = ["solve.mode=per_token"] if command == "prepare" else []
        code, lines[command] = invoke("quick", *overrides, *mode, *changes, command=command)
        assert code == 2, (command, lines[command])
        assert lines[command].count("\n") == 1, (command, lines[command])
        assert case.message.format(**names) in lines[command], command
    assert lines.get("run") == lines.get("check"), "check refuses what run refuses, in its words"
    left = {path.name for path in (tmp_path / "out").glob("*")}
    assert left <= {"run.log"}, "nothing of a run that never began is left"


def test_every_refusal_of_the_preflight_has_its_case() -> None:
    source = ast.parse(Path(preflight.__file__).read_text(encoding="utf-8"))
    called = {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    }
    refusals = {name for name in called if name.startswith(("check_", "refuse_", "load_"))}
    assert refusals == {case.refusal for case in CASES if case.refusal != "load_config"} | ELSEWHERE


def test_a_model_that_is_not_there_is_not_scored(
    invoke: Invoke, overrides: list[str], tmp_path: Path
) -> None:
    arguments = ["quick", *overrides, f"output_dir={tmp_path}/out", "--model", f"{tmp_path}/none"]
    code, told = invoke(*arguments, command="evaluate")
    assert (code, told) == (
        2, f"--model: found no folder {tmp_path}/none, allowed: a model folder or a hub name\n",
    )  # fmt: skip


def test_an_unknown_preset_lists_the_presets(invoke: Invoke) -> None:
    code, told = invoke("qick")
    assert (code, told.count("\n")) == (2, 1)
    assert told.startswith("preset 'qick': not found, allowed: demo")


def test_a_file_that_is_no_mapping_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    code, told = invoke(str(tmp_path / "list.yaml"))
    assert (code, told.count("\n")) == (2, 1)
    assert "a YAML mapping of keys" in told


def test_a_folder_with_other_files_is_refused_and_kept(
    invoke: Invoke, overrides: list[str], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, told = invoke("quick", *overrides, f"output_dir={tmp_path}")
    assert (code, told.count("\n")) == (2, 1)
    assert invoke("quick", *overrides, f"output_dir={tmp_path}", command="check") == (code, told)
    assert "holds other files (thesis.txt, ...), allowed: a new or empty folder" in told
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_is_refused(
    invoke: Invoke,
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        artifact.shutil, "disk_usage", lambda _path: usage._replace(free=10 * 2**20)
    )
    code, told = invoke("quick", *overrides, f"output_dir={tmp_path}/out")
    assert (code, told.count("\n")) == (2, 1)
    again = invoke("quick", *overrides, f"output_dir={tmp_path}/out", command="check")
    assert again == (code, told)
    assert "GiB free, allowed: at least" in told


def test_pickled_weights_are_refused(
    invoke: Invoke, overrides: list[str], problem: Path, tmp_path: Path
) -> None:
    shutil.copytree(problem / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    code, told = invoke(
        "quick", *overrides, f"model.path={tmp_path}/model", f"output_dir={tmp_path}/out"
    )
    assert (code, told.count("\n")) == (2, 1)
    assert "holds no .safetensors weights; pickled weights are refused" in told


def test_inputs_that_changed_since_a_run_began_are_refused(
    invoke: Invoke, overrides: list[str], problem: Path, tmp_path: Path
) -> None:
    shutil.copytree(problem / "data", tmp_path / "data")
    changed = [change.replace(f"{problem}/data", f"{tmp_path}/data") for change in overrides]
    out = tmp_path / "out"
    # A run that was begun: its folder as `RunFolder.begin` leaves it, with the digest of other data.
    code, told = invoke("quick", *changed, f"output_dir={out}", "train.num_workers=64")
    assert code == 2
    from pipelines.config.load import load_config, to_yaml

    cfg = load_config("quick", [*changed, f"output_dir={out}"])
    out.mkdir(exist_ok=True)
    (out / "config.yaml").write_text(to_yaml(cfg))
    digest = artifact.model_digest(cfg.model.path)
    sets = {"forget": {"rows": 6, "digest": "0" * 64}}
    manifest = {
        "schema": 1,
        "purpose": "run",
        "status": "running",
        "model": {"path": cfg.model.path, "digest": digest},
        "sets": sets,
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    code, told = invoke("quick", *changed, f"output_dir={out}")
    assert (code, told.count("\n")) == (2, 1)
    assert invoke("quick", *changed, f"output_dir={out}", command="check") == (code, told)
    assert "was begun with other inputs (changed since: sets.forget.digest)" in told
    assert json.loads((out / "manifest.json").read_text()) == manifest
