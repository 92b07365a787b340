"""What is exported is what was trained: the written model is loaded again and compared."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.config.schema import UnlearnConfig
from pipelines.model.load import build_alignment
from pipelines.training import export
from pipelines.training.resume_point import ResumePoint


@pytest.fixture
def trained(cfg: UnlearnConfig, monkeypatch: pytest.MonkeyPatch) -> ResumePoint:
    """A checkpoint with adapters that say something."""
    torch.manual_seed(0)
    module = build_alignment(cfg)
    parameters = {
        name: torch.randn_like(own) / 10
        for name, own in module.named_parameters()
        if own.requires_grad
    }
    point = ResumePoint({}, parameters, None, None)
    monkeypatch.setattr(export, "read_point", lambda _checkpoint: point)
    return point


def write(cfg: UnlearnConfig, folder: Path, precision: str = "fp32") -> dict[str, float]:
    train = cfg.train.model_copy(update={"precision": precision})
    checkpoint: Any = None
    changed = cfg.model_copy(update={"train": train})
    return export.write_model(changed, checkpoint, str(folder), full=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_merged_model_says_what_the_adapter_says(
    cfg: UnlearnConfig, trained: ResumePoint, tmp_path: Path, precision: str
) -> None:
    cost = write(cfg, tmp_path, precision)
    assert cost["trained_parameters"] == sum(own.numel() for own in trained.parameters.values())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").float()
    base = AutoModelForCausalLM.from_pretrained(cfg.model.path)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")("Who?", return_tensors="pt")
    with torch.no_grad():
        found, untouched = merged(**tokens).logits, base(**tokens).logits
        expected = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(**tokens).logits
    tolerance = export.TOLERANCE[precision] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert float((untouched - expected).abs().max()) > 2 * tolerance


def test_a_negated_adapter_takes_away_what_was_learned(
    cfg: UnlearnConfig, trained: ResumePoint, tmp_path: Path
) -> None:
    """Task vectors: W - c (W_learned - W), in the merged model and in the adapter alike."""
    weights: dict[float, dict[str, torch.Tensor]] = {}
    for negate in (0.0, 0.4):
        objective = cfg.objective.model_copy(update={"negate": negate})
        folder = tmp_path / f"{negate:g}"
        write(cfg.model_copy(update={"objective": objective}), folder)
        merged = AutoModelForCausalLM.from_pretrained(folder / "model")
        weights[negate] = dict(merged.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(cfg.model.path)
    moved = 0.0
    for name, before in base.named_parameters():
        learned = weights[0.0][name] - before
        moved = max(moved, float(learned.detach().abs().max()))
        torch.testing.assert_close(weights[0.4][name], before - 0.4 * learned, rtol=0, atol=1e-6)
    assert moved > 0.01
    tokens = AutoTokenizer.from_pretrained(folder / "model")("Who?", return_tensors="pt")
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
        torch.testing.assert_close(
            adapted(**tokens).logits, merged(**tokens).logits, rtol=0, atol=1e-4
        )


def test_a_merge_that_lost_the_adapter_is_no_export(
    cfg: UnlearnConfig, trained: ResumePoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unload(self: PeftModel, **_options: bool) -> Any:
        return self.unload()

    monkeypatch.setattr(PeftModel, "merge_and_unload", unload, raising=False)
    with pytest.raises(RuntimeError, match="the exported model is not the one that was trained"):
        write(cfg, tmp_path)
    assert not (tmp_path / "model").exists()


def test_logits_that_are_not_numbers_are_no_export() -> None:
    logits = torch.tensor([[1.0, 2.0]])
    export.check_same(logits, logits, "fp32")
    with pytest.raises(RuntimeError, match="differ by nan"):
        export.check_same(logits * torch.nan, logits, "fp32")
