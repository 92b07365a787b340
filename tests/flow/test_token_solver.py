"""The token solver on real Ray Train: the same adapter from any number of workers and from ZeRO 3."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.config.schema import UnlearnConfig
from pipelines.data.sets import load_sets
from pipelines.encoding.text import TextEncoder
from pipelines.model.load import load_base
from pipelines.storage.prepared import check_prepared
from pipelines.storage.verify import compare
from pipelines.terminal import Terminal
from pipelines.unlearn import prepare
from rfa.batch import Row, collate
from tests.flow.test_solver import assert_same, run

Quick = Callable[..., UnlearnConfig]
SOLVE = ("solve.mode=per_token", "train.steps=0", "train.deepspeed.stage=0", "adapter.rank=16")
EPOCHS = 120


@pytest.fixture(scope="module")
def learned(
    ray_session: None, quick: Quick, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., UnlearnConfig]:
    """A configuration of a model that knows the forget and retain sets by heart."""
    folder = tmp_path_factory.mktemp("learned")
    cfg = quick(*SOLVE)
    encoder = TextEncoder(cfg.model, cfg.data.system_prompt, cfg.data.max_tokens)
    rows: list[Row] = []
    for source in (cfg.data.forget, cfg.data.retain):
        for line in Path(source.path).read_text().splitlines():
            record = json.loads(line)
            rows.append(Row(*encoder.pair(record["prompt"], record["answer"])))
    batch = collate(rows, [], encoder.pad_token_id)
    model = load_base(cfg.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = torch.tensor(torch.inf)
    for _ in range(EPOCHS):
        logits_NV = model(**batch.model_inputs()).logits[batch.answer_BT]
        loss = torch.nn.functional.cross_entropy(logits_NV, batch.expected(batch.answer_BT))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    model.save_pretrained(folder)
    for path in Path(cfg.model.path).glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    for path in Path(cfg.model.path).glob("*.jinja"):
        (folder / path.name).write_bytes(path.read_bytes())

    def load(*changes: str) -> UnlearnConfig:
        return quick(*SOLVE, f"model.path={folder}", *changes)

    return load


@pytest.fixture(scope="module")
def reference(
    learned: Callable[..., UnlearnConfig], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """The adapter of two workers."""
    return run(learned(f"output_dir={tmp_path_factory.mktemp('reference')}"))[0]


@pytest.mark.parametrize(
    "changes",
    [
        # Gradient steps need targets, which the solver has not fitted. These change nothing.
        ("train.num_workers=1", "train.steps=2", "train.learning_rate=1e-12"),
        ("train.deepspeed.stage=3",),
    ],
    ids=["one worker, then steps", "ZeRO 3"],
)
def test_the_adapter_is_the_same(
    reference: dict[str, Tensor],
    learned: Callable[..., UnlearnConfig],
    tmp_path: Path,
    changes: tuple[str, ...],
) -> None:
    assert_same(run(learned(*changes, f"output_dir={tmp_path}"))[0], reference)


def test_from_prepared_statistics_it_is_the_same_however_the_rows_are_parted(
    learned: Callable[..., UnlearnConfig], tmp_path: Path
) -> None:
    cfg = learned()
    named, kept = (
        Path(source.path).read_text().splitlines() for source in (cfg.data.forget, cfg.data.retain)
    )

    def part(forget: list[str], retain: list[str]) -> list[str]:
        """The changes of a configuration with these rows."""
        folder = tmp_path / f"rows-{len(forget)}"
        folder.mkdir()
        for name, lines in (("forget", forget), ("retain", retain), ("earlier", kept[-2:])):
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        return [f"data.{name}.path={folder}/{name}.jsonl" for name in ("forget", "retain")]

    # The last two rows are of an earlier request: they are no part of what the model is trained on.
    first = part(named, kept[:-2])
    prepared = prepare(learned(*first, f"output_dir={tmp_path}/prepared"), Terminal())
    # A later request names other rows than the configuration that was prepared.
    changes = part(kept[:4], named + kept[4:-2])
    changes.append(f"data.earlier.path={tmp_path}/rows-4/earlier.jsonl")
    whole, whole_metrics = run(learned(*changes, f"output_dir={tmp_path}/whole"))
    changes += [f"solve.prepared={prepared.path}", "train.num_workers=1"]
    request = learned(*changes, f"output_dir={tmp_path}/request")
    heard: list[dict[str, Any]] = []
    found, metrics = run(request, heard.append)
    (left,) = (message for message in heard if "away" in message)
    assert 0 <= left["away"] <= left["pushed"] > 0
    assert_same(found, whole)
    assert 0 < metrics["tokens"] < whole_metrics["tokens"] / 4, "the retained rows were not read"
    check_prepared(request, load_sets(request.data).inputs())
    assert not compare(prepared.output).differences
    texts = [json.loads(line)["answer"] for line in named + kept]
    for path in prepared.path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(text.encode() in content for text in texts), path
