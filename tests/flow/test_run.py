"""The whole flow from the command line, on a tiny random model and two workers."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.evaluation.metrics.relearning import STEPS
from pipelines.storage.chain import hash_of_id
from pipelines.storage.seal import manifest_digest
from tests.flow.conftest import Command, CommandHere

CONTRACT = {"config.yaml", "manifest.json", "adapter", "model", "scores.json", "report.html"}
METRICS = (
    "probability", "loss", "perplexity", "rouge", "fact_recall", "truth_ratio",
    "exact_memorization", "extraction_strength",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str], command: Command
) -> Path:
    """A finished run of the `quick` preset; the oracle is a copy of the model itself."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(Path(overrides[0].split("=")[1]), folder / "oracle")
    settings = [
        f"evaluation.oracle={folder}/oracle",
        "evaluation.robustness=[quantised_4bit,relearn,relearn_retain]",
    ]
    done = command("run", "quick", *overrides, f"output_dir={folder}/out", *settings)
    assert done.returncode == 0, done.stderr
    assert "Report:" in done.stderr
    assert "General: probability" in done.stderr
    assert done.stdout == ""
    return folder / "out"


def test_a_run_leaves_what_the_contract_names(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()}
    assert names >= CONTRACT
    assert "checkpoints" not in names
    assert not [name for name in names if name.endswith(".partial")]


def test_scores_hold_every_metric_of_every_model(run_dir: Path) -> None:
    scores = json.loads((run_dir / "scores.json").read_text())
    assert scores["schema"] == 1
    assert set(scores["models"]) == {"before", "after", "oracle"}
    for entry in scores["models"].values():
        for name in ("forget", "retain", "general"):
            assert {f"{name}.{metric}" for metric in METRICS} <= set(entry)
        attacks = {"loss", "zlib", "min_k", "min_k_plus_plus", "grad_norm"}
        assert {f"mia.{attack}" for attack in attacks} | {"model_utility"} <= set(entry)
        paraphrased = {
            f"forget.{metric}_paraphrased" for metric in ("rouge", "fact_recall", "probability")
        }
        assert paraphrased <= set(entry)
    # The oracle is the model itself, so before equals it, and what has been trained does not.
    before, after, oracle = (scores["models"][name] for name in ("before", "after", "oracle"))
    assert before["forget.loss"] == pytest.approx(oracle["forget.loss"])
    assert before["forget_quality"] == pytest.approx(1.0)
    assert before["forget.token_distance"] == pytest.approx(0, abs=1e-6)
    assert after["forget.loss"] != pytest.approx(before["forget.loss"], rel=1e-4)
    assert after["forget.token_distance"] > 1e-5
    assert after["forget.token_distance_paraphrased"] > 1e-5
    assert {f"{name}.kept_distance" for name in ("retain", "general")} <= set(after)
    assert scores["tokens"].keys() == scores["models"].keys()
    assert scores["tokens"]["before"] == pytest.approx(scores["tokens"]["oracle"], abs=0.002)
    cost = scores["cost"]
    assert cost["num_workers"] == 2
    assert (
        min(
            cost[key]
            for key in (
                "solve_s",
                "train_s",
                "evaluate_s",
                "tokens",
                "tokens_per_s",
                "peak_memory_bytes",
            )
        )
        > 0
    )


def test_robustness_is_that_of_after_and_oracle(run_dir: Path) -> None:
    models = json.loads((run_dir / "scores.json").read_text())["models"]
    rounded = {
        f"quantised_4bit.{name}.{metric}" for name in ("forget", "retain") for metric in METRICS
    }
    relearned: set[str] = set()
    for name in ("relearn", "relearn_retain"):
        relearned.add(f"{name}.steps")
        for step in STEPS:
            relearned |= {f"{name}.probability.{step}", f"{name}.fact_recall.{step}"}
    for name in ("after", "oracle"):
        assert {key for key in models[name] if key.startswith("quantised_")} >= rounded
        assert {key for key in models[name] if key.startswith("relearn")} == relearned
        assert models[name]["quantised_4bit.forget.loss"] != models[name]["forget.loss"]
        for way in ("relearn", "relearn_retain"):
            start, end = (models[name][f"{way}.probability.{step}"] for step in (0, 50))
            assert start != end
    # It is the original itself: nothing had been lost.
    assert models["oracle"]["relearn.steps"] == models["oracle"]["relearn_retain.steps"] == 0
    assert not [key for key in models["before"] if key.startswith(("quantised_", "relearn"))]
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "<h2>Robustness</h2>" in page
    assert "was not measured at both 8 and 4 bits" in page


def test_adapter_in_stock_peft_and_merged_model_give_the_same_logits(run_dir: Path) -> None:
    base_path = yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["path"]
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_path), str(run_dir / "adapter")
    )
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    base = AutoModelForCausalLM.from_pretrained(base_path)
    tokens = AutoTokenizer.from_pretrained(run_dir / "model")(
        "Who wrote this?", return_tensors="pt"
    )
    with torch.no_grad():
        expected = merged(**tokens).logits
        torch.testing.assert_close(adapted(**tokens).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base(**tokens).logits, expected, atol=1e-4)
    assert list((run_dir / "model").glob("*.safetensors"))
    assert not [p for p in run_dir.rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}]


def test_no_text_of_the_forget_set_is_left_anywhere(run_dir: Path, problem: Path) -> None:
    rows = [
        json.loads(line) for line in (problem / "data" / "forget.jsonl").read_text().splitlines()
    ]
    secrets = (
        {row["fact"] for row in rows}
        | {row["author"] for row in rows}
        | {row["answer"] for row in rows}
    )
    needles = [secret.encode() for secret in secrets]
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"run.log", "mlflow.db", "losses.jsonl", "report.html"}
    for path in files:
        content = path.read_bytes()
        found = [needle for needle in needles if needle in content]
        assert not found, f"{path} holds forget text"


def test_mlflow_holds_parameters_losses_scores_data_and_adapter(run_dir: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{run_dir}/mlflow.db")
    record = json.loads((run_dir / "manifest.json").read_text())["mlflow"]
    run = client.get_run(record["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "6"
    assert [m.step for m in client.get_metric_history(record["run_id"], "loss")] == list(range(6))
    assert run.data.metrics["after.forget.probability"] > 0
    assert run.data.metrics["solve.strength"] > 0
    assert {item.dataset.name for item in run.inputs.dataset_inputs} >= {"forget", "retain"}
    assert (
        client.get_model_version("ray-unlearn-adapter", str(record["model_version"])).run_id
        == record["run_id"]
    )
    assert "adapter" in {file.path for file in client.list_artifacts(record["run_id"])}


def test_the_manifest_seals_the_results(run_dir: Path) -> None:
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert {
        "scores.json",
        "config.yaml",
        "adapter/adapter_model.safetensors",
        "model/model.safetensors",
    } <= set(manifest["files"])
    assert manifest["sets"]["forget"]["rows"] == 6
    assert len(manifest["model"]["digest"]) == 64


def test_a_finished_run_is_shown_again_and_not_repeated(run_dir: Path, command: Command) -> None:
    scores = (run_dir / "scores.json").read_bytes()
    cfg = yaml.safe_load((run_dir / "config.yaml").read_text())
    done = command("run", str(run_dir / "config.yaml"))
    assert done.returncode == 0, done.stderr
    assert cfg["output_dir"] in done.stderr.replace("\n", "")
    assert (run_dir / "scores.json").read_bytes() == scores


def test_a_different_run_in_the_same_folder_is_refused(run_dir: Path, command: Command) -> None:
    done = command("run", str(run_dir / "config.yaml"), "train.steps=7")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "holds a different run (it differs in: train.steps)" in done.stderr


def test_the_report_is_rebuilt_from_the_folder(run_dir: Path, command: Command) -> None:
    page = (run_dir / "report.html").read_bytes()
    (run_dir / "report.html").unlink()
    assert command("report", str(run_dir)).returncode == 0
    assert (run_dir / "report.html").read_bytes() == page
    printed = command("report", str(run_dir), "--format", "open-unlearning").stdout
    after = json.loads((run_dir / "scores.json").read_text())["models"]["after"]
    assert json.loads(printed)["forget_Q_A_Prob"] == after["forget.probability"]


def test_the_next_request_begins_with_the_model_that_this_one_left_and_holds_its_rows(
    run_dir: Path,
    problem: Path,
    overrides: list[str],
    command_here: CommandHere,
    tmp_path: Path,
) -> None:
    data, out = problem / "data", tmp_path / "second"
    ids = [json.loads(line)["id"] for line in (data / "retain.jsonl").read_text().splitlines()][:3]
    request = tmp_path / "request.jsonl"
    request.write_text("".join(json.dumps(row_id) + "\n" for row_id in ids))
    settings = [
        f"model.path={run_dir}/model",
        f"data.forget={{path: {data}/retain.jsonl, ids: {request}}}",
        f"data.retain.exclude_ids={request}",
        f"data.earlier.path={data}/forget.jsonl",
        f"data.neighbours={{path: {data}/holdout.jsonl, max_rows: 3}}",
        f"evaluation.oracle={problem}/model",
        *("solve.strength=0.01", "train.steps=1", "evaluation.quick=true", f"output_dir={out}"),
    ]
    code, told = command_here("run", "quick", *overrides, *settings)
    assert code == 0, told
    first = json.loads((run_dir / "manifest.json").read_text())
    manifest = json.loads((out / "manifest.json").read_text())
    record = {"run": str(run_dir), "manifest": manifest_digest(first)}
    record |= {"created": first["created"], "verdict": first["verdict"]}
    record["model"] = first["model"]["path"]
    key = bytes.fromhex((out / "request.key").read_text())
    rows = sorted(hash_of_id(row_id, key) for row_id in ids)
    assert manifest["request"] == {"number": 2, "earlier": [record], "rows": rows}
    assert len(first["request"]["rows"]) == 6
    assert manifest["sets"]["earlier"] == first["sets"]["forget"]
    scores = json.loads((out / "scores.json").read_text())["models"]["after"]
    assert {f"earlier.{name}" for name in ("probability", "token_distance", "fact_recall")} <= set(
        scores
    )
    assert {
        f"neighbours.{name}" for name in ("probability", "kept_distance", "fact_recall")
    } <= set(scores)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h3>Requests</h3>" in page and "Earlier requests" in page
    assert "Neighbours of the forget set" in page
    facts = {json.loads(line)["fact"] for line in (data / "forget.jsonl").read_text().splitlines()}
    for path in out.rglob("*"):
        found = path.is_file() and [fact for fact in facts if fact.encode() in path.read_bytes()]
        assert not found, path

    assert command_here("verify", str(out)) == (0, f"Verified: {out}\n")
    scored = run_dir / "scores.json"
    whole = scored.read_bytes()
    scored.write_bytes(whole.replace(b"0", b"1", 1))
    told = f"request 1 ({run_dir}): scores.json: changed\n"
    try:
        assert command_here("verify", str(out)) == (1, told)
        assert command_here("gate", str(out))[1].endswith(told)
    finally:
        scored.write_bytes(whole)
