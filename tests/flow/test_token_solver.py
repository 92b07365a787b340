"""The token solver on real Ray Train: the same adapter from any number of workers and from ZeRO 3."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pipelines.config.schema import UnlearnConfig
from pipelines.data.sets import load_sets
from pipelines.encoding.text import TextEncoder
from pipelines.model.load import load_base
from pipelines.storage.output import open_output
from pipelines.storage.prepared import check_prepared
from pipelines.storage.verify import compare
from pipelines.terminal import Terminal
from pipelines.unlearn import prepare
from rfa.batch import Row, collate
from tests.flow.test_solver import assert_same
from tests.trained import Trained, fit_all, products_of

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


class Rows(NamedTuple):
    """A request for other rows than those that were prepared, and the changes that name them."""

    prepared: str
    request: list[str]
    texts: list[str]


@pytest.fixture(scope="module")
def rows(learned: Callable[..., UnlearnConfig], tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("rows")
    cfg = learned()
    named, kept = (
        Path(source.path).read_text().splitlines() for source in (cfg.data.forget, cfg.data.retain)
    )

    def part(forget: list[str], retain: list[str]) -> list[str]:
        """The changes of a configuration with these rows."""
        own = folder / f"{len(forget)}"
        own.mkdir()
        for name, lines in (("forget", forget), ("retain", retain), ("earlier", kept[-2:])):
            (own / f"{name}.jsonl").write_text("\n".join(lines))
        return [f"data.{name}.path={own}/{name}.jsonl" for name in ("forget", "retain")]

    # The last two rows are of an earlier request: they are no part of what the model is trained on.
    first = part(named, kept[:-2])
    prepared = prepare(learned(*first, f"output_dir={folder}/prepared"), Terminal())
    request = part(kept[:4], named + kept[4:-2])
    request.append(f"data.earlier.path={folder}/4/earlier.jsonl")
    texts = [json.loads(line)["answer"] for line in named + kept]
    return Rows(str(prepared.path), request, texts)


class Together(NamedTuple):
    """What two workers solve one run after another, and what one worker does."""

    reference: Trained
    zero_3: Trained
    whole: Trained
    with_steps: Trained
    from_prepared: Trained


@pytest.fixture(scope="module")
def together(
    learned: Callable[..., UnlearnConfig], rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> Together:
    folder = tmp_path_factory.mktemp("together")
    out = f"output_dir={folder}"
    (folder / "two").mkdir()
    two = fit_all(
        folder / "two",
        learned(out),
        learned("train.deepspeed.stage=3", out),
        learned(*rows.request, out),
    )
    (folder / "one").mkdir()
    alone = ("train.num_workers=1", out)
    one = fit_all(
        folder / "one",
        # Gradient steps need targets, which the solver has not fitted. These change nothing.
        learned("train.steps=2", "train.learning_rate=1e-12", *alone),
        learned(*rows.request, f"solve.prepared={rows.prepared}", *alone),
    )
    return Together(*two, *one)


@pytest.mark.parametrize("which", ["zero_3", "with_steps"])
def test_the_adapter_is_the_same(together: Together, which: str) -> None:
    assert_same(products_of(getattr(together, which)), products_of(together.reference))


def test_from_prepared_statistics_it_is_the_same_however_the_rows_are_parted(
    learned: Callable[..., UnlearnConfig], rows: Rows, together: Together
) -> None:
    found, whole = together.from_prepared, together.whole
    (left,) = (message for message in found.messages if "away" in message)
    assert 0 <= left["away"] <= left["pushed"] > 0
    assert_same(products_of(found), products_of(whole))
    share = found.metrics["tokens"] / whole.metrics["tokens"]
    assert 0 < share < 1 / 4, "the retained rows were not read"
    request = learned(*rows.request, f"solve.prepared={rows.prepared}")
    check_prepared(request, load_sets(request.data).inputs())
    assert not compare(open_output(rows.prepared)).differences
    for path in Path(rows.prepared).rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(text.encode() in content for text in rows.texts), path
