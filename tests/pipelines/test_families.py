"""Every family of models that people use: checked, planned, solved and exported, or refused in a line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.config.load import load_config
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.evaluation.attacks import relearn_
from pipelines.evaluation.metrics.relearning import RELEARNINGS
from pipelines.model.answers import AnswerTraining
from pipelines.model.load import build_alignment, check_model, check_models
from pipelines.planning.check import plan_configured
from pipelines.planning.devices import Device
from pipelines.training import export
from pipelines.training.resume_point import ResumePoint
from rfa.adapters import ADAPTER
from rfa.batch import Row, UnlearnBatch, collate
from rfa.objective import ResidualAlignment
from rfa.settings import SolveSettings
from rfa.solver import OnePassSolver
from rfa.token_solver import TokenSolver
from tests.tiny_families import FAMILIES, endings, tiny_family, write_family

# Layers whose weights are read beside them, that see heads instead of positions, or that share a name with experts.
REFUSED = {
    "mamba": {"out_proj", "dt_proj"},
    "falcon_h1": {"out_proj"},
    "deepseek_v3": {"kv_b_proj", "gate_proj", "up_proj", "down_proj"},
}
VOCABULARY = 300


@pytest.fixture(scope="module")
def folders(problem: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders that were written, by family."""
    return {"": tmp_path_factory.mktemp("families"), "tokenizer": problem / "model"}


def config(folders: dict[str, Path], name: str, targets: list[str]) -> UnlearnConfig:
    if name not in folders:
        folders[name] = write_family(name, folders[""] / name, folders["tokenizer"])
    changes = [
        f"model.path={folders[name]}",
        f"adapter.targets={targets}",
        "adapter.layers=null",
        "data.max_tokens=32",
    ]
    return load_config("quick", changes)


def rows(number: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    found: list[Row] = []
    for index in range(number):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        found.append(Row(ids.tolist(), 2, index))
    return found


def solved(cfg: UnlearnConfig, mode: str, forget: list[UnlearnBatch]) -> ResidualAlignment:
    torch.manual_seed(0)
    alignment = build_alignment(cfg)
    solver = OnePassSolver(alignment, SolveSettings(mode=mode))
    solver.collect(collate(rows(8, seed=1), [], 0))
    solver.reduce()
    solver.solve(forget, 1.0)
    return alignment


def shifts_of(alignment: ResidualAlignment) -> dict[str, Tensor]:
    """What each adapter adds, as a matrix."""
    shifts: dict[str, Tensor] = {}
    for name, layer in alignment.hooks._layers.items():
        shifts[name] = layer.lora_B[ADAPTER].weight.detach() @ layer.lora_A[ADAPTER].weight.detach()
    return shifts


@pytest.mark.parametrize("name", FAMILIES)
def test_each_kind_of_layer_passes_the_check_or_is_refused_in_a_line(
    folders: dict[str, Path], name: str
) -> None:
    told: dict[str, str] = {}
    for target in endings(name):
        try:
            check_model(config(folders, name, [target]))
        except ConfigError as error:
            told[target] = str(error)
    assert told.keys() == REFUSED.get(name, set())
    for line in told.values():
        assert line.startswith("adapter.targets: ")
        assert "\n" not in line


@pytest.mark.parametrize("name", FAMILIES)
def test_all_layers_that_pass_the_check_are_planned_solved_and_merged(
    folders: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = sorted(set(endings(name)) - REFUSED.get(name, set()))
    cfg = config(folders, name, targets)
    size = check_models(cfg)
    plan = plan_configured(
        cfg, Device("CPU", "CPU", 2**33, 1e10), {"retain": 9, "forget": 3, "holdout": 3}, None
    )
    assert plan.fault is None
    assert plan.recommended == plan.configured
    assert plan.seconds > 0

    forget = rows(4, seed=2)
    together, apart = [collate([], forget, 0)], [collate([], [row], 0) for row in forget]
    alignments = {
        "blockwise": solved(cfg, "blockwise", together),
        "block by block": solved(cfg, "blockwise", apart),
        "one_pass": solved(cfg, "one_pass", together),
    }
    shifts = {mode: shifts_of(alignment) for mode, alignment in alignments.items()}
    for layer, shift in shifts["blockwise"].items():
        assert min(float(of_mode[layer].abs().max()) for of_mode in shifts.values()) > 0, layer
        # Rows one by one have other padding than in one batch, which is solved in passing.
        torch.testing.assert_close(
            shifts["block by block"][layer], shift, rtol=0.02, atol=0.02 * float(shift.abs().max())
        )

    trained = {
        own: value.detach()
        for own, value in alignments["blockwise"].named_parameters()
        if value.requires_grad
    }
    assert sum(value.numel() for value in trained.values()) == size.adapter
    point = ResumePoint({}, trained, None, None)
    monkeypatch.setattr(export, "read_point", lambda _checkpoint: point)
    checkpoint: Any = None
    cost = export.write_model(cfg, checkpoint, str(tmp_path), full=False)  # compares the logits
    assert cost["trained_parameters"] == size.adapter


def answered(alignment: ResidualAlignment, number: int) -> list[Row]:
    """Rows whose answers are the four tokens that the model itself finds likeliest: it knows them."""
    known: list[Row] = []
    for row in rows(number, seed=2):
        ids = list(row.input_ids[:4])
        for _ in range(4):
            with torch.no_grad():
                logits = alignment.model(torch.tensor([ids])).logits
            ids = [*ids, int(logits[0, -1].argmax())]
        known.append(Row(ids, 4, row.row))
    return known


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_known_comes_down_to_what_never_seen_rows_have(
    folders: dict[str, Path], name: str
) -> None:
    """Token by token, as language models are solved unless another mode is given."""
    torch.manual_seed(0)
    targets = sorted(set(endings(name)) - REFUSED.get(name, set()))
    alignment = build_alignment(config(folders, name, targets))
    alignment.model.eval()
    solver = OnePassSolver(alignment, SolveSettings(mode="per_token"))
    solver.collect(collate(rows(8, seed=1), [], 0))
    solver.reduce()
    forget = [collate([], answered(alignment, 4), 0)]
    unseen = [collate([], rows(8, seed=3), 0)]
    first, *_, last = TokenSolver(solver, lambda *_: None).solve(forget, unseen)
    assert first.away == 16
    assert first.log_p > first.aim + 2
    assert last.away <= 1
    assert last.log_p == pytest.approx(last.aim, abs=0.3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_of_the_relearning_attack_goes_on_every_family(name: str) -> None:
    (by,) = [relearning for relearning in RELEARNINGS if relearning.rank]
    model = tiny_family(name, VOCABULARY)
    learned = rows(3, seed=1)
    batch = collate(learned, [], 0)
    losses: list[float] = []
    for _ in relearn_(model, learned, 0, 0, by._replace(learning_rate=1e-2)):
        loss = AnswerTraining(model, classifies=False)(batch, batch.counts("all"))
        losses.append(float(loss.total.detach()))
    assert losses[-1] < losses[0] - 0.5
    trained = [own for own, weight in model.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in own for own in trained)
