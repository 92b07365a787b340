"""The verdict on real models, tiny ones: what was done to each is known, and the verdict must say so."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.config.load import load_config
from pipelines.config.schema import ModelConfig
from pipelines.data.sets import load_sets
from pipelines.data.synthetic import write_problem
from pipelines.encoding.text import TextEncoder
from pipelines.evaluation.pool import evaluate
from pipelines.evaluation.verdict import Verdict, verdict
from rfa.batch import Row, collate
from rfa.blocks import BlockRunner
from tests.tiny_model import write_tiny_model

SETS = ("forget", "retain", "utility", "holdout", "general")
BROAD_ROWS = 40  # of the general and utility sets
LEARNING = 250, 4e-3  # steps and learning rate
ASCENT = 80, 1e-3
BATCH = 16
ASCENT_END = 9.0  # nats a token


def settings(folder: Path) -> list[str]:
    """Return what the `quick` preset is given."""
    sets = [f"data.{name}.path={folder}/data/{name}.jsonl" for name in SETS]
    return [f"model.path={folder}/model", *sets, "evaluation.quick=true", "evaluation.max_rows=40"]


def encoded(folder: Path, name: str) -> list[Row]:
    """Return a set's rows as the model reads them."""
    cfg = load_config("quick", settings(folder))
    encoder = TextEncoder(cfg.model, cfg.data.system_prompt, cfg.data.max_tokens)
    lines = (folder / "data" / f"{name}.jsonl").read_text().splitlines()
    rows: list[Row] = []
    for line in lines:
        row = json.loads(line)
        rows.append(Row(*encoder.pair(row["prompt"], row["answer"])))
    return rows


def train(
    start: Path, end: Path, rows: Sequence[Row], seed: int, *, ascend: Sequence[Row] = ()
) -> None:
    """Train a model on answers, and by gradient ascent on the answers of `ascend`; write it."""
    steps, rate = ASCENT if ascend else LEARNING
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    for _ in range(steps):
        loss = answer_loss(model, drawn(rows))
        if ascend:
            # Without an end, ascent would take along what should stay.
            loss = loss - answer_loss(model, drawn(ascend)).clamp(max=ASCENT_END)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(end)
    AutoTokenizer.from_pretrained(start).save_pretrained(end)


def drawn(rows: Sequence[Row]) -> list[Row]:
    """Draw a batch."""
    return [rows[index] for index in torch.randperm(len(rows))[:BATCH].tolist()]


def answer_loss(model: Any, rows: list[Row]) -> Tensor:
    """Return the mean cross-entropy of the rows' answers."""
    batch = collate(rows, [], model.config.pad_token_id)
    logits_NV = BlockRunner(model)(batch, logits_at_BT=batch.answer_BT).logits_NV
    assert logits_NV is not None
    return torch.nn.functional.cross_entropy(logits_NV, batch.expected(batch.answer_BT))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A problem, a model that learned all of it, three without the forget set, and one by ascent."""
    folder = tmp_path_factory.mktemp("taught")
    base = write_tiny_model(folder / "model")
    write_problem(folder / "data", authors=16, questions=3, seed=0, forget=4)
    kept = encoded(folder, "retain")
    for name in ("general", "utility"):
        path = folder / "data" / f"{name}.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:BROAD_ROWS]))
        kept += encoded(folder, name)
    forget = encoded(folder, "forget")
    train(base, folder / "learned", kept + forget, 0)
    for seed in (1, 2, 3):
        train(base, folder / f"oracle{seed}", kept, seed)
    train(folder / "learned", folder / "ascended", kept, 4, ascend=forget)
    return folder


def verdict_on(folder: Path, name: str, *changes: str) -> Verdict:
    """Evaluate a model beside the one that learned all, and two oracles."""
    cfg = load_config("quick", [*settings(folder), *changes])
    names = {"before": "learned", "after": name, "oracle 1": "oracle1", "oracle 2": "oracle2"}
    models = {key: ModelConfig(path=str(folder / value)) for key, value in names.items()}
    cfg = cfg.model_copy(update={"model": models["before"]})
    return verdict(evaluate(cfg, models, load_sets(cfg.data), lambda _: None).content())


@pytest.mark.usefixtures("ray_session")
def test_the_verdict_says_what_was_done_to_a_model(taught: Path) -> None:
    done = {
        "learned": "traces_remain",
        "model": "utility_lost",
        "ascended": "over_forgotten",
        "oracle3": "indistinguishable",
    }
    found = {name: verdict_on(taught, name) for name in done}
    assert {name: one.level for name, one in found.items()} == done, found
    assert verdict_on(taught, "oracle3", "evaluation.max_rows=2").level == "undecided"
