"""Fine-tuning's loss and SalUn's choice of weights, against brute force."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from pipelines.model.answers import AnswerTraining, salient_weights
from rfa.batch import Row, collate
from tests.tiny_classifiers import CLASSES, write_image_model, write_text_model


def image_rows(count: int) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 1, 8, 8, generator=draw)
    return [
        Row([0], 0, row=n, label=n % CLASSES, classified=True, pixels_CHW=pixels[n])
        for n in range(count)
    ]


@pytest.fixture
def training(tmp_path: Path) -> AnswerTraining:
    model = AutoModelForImageClassification.from_pretrained(
        write_image_model("vit", tmp_path / "vit")
    )
    return AnswerTraining(model, classifies=False)


def expected(training: AnswerTraining, rows: list[Row]) -> Tensor:
    """Minus the log-probability of every class: [B, C]."""
    pixels = torch.stack([row.pixels_CHW for row in rows if row.pixels_CHW is not None])
    return -training.model(pixel_values=pixels).logits.log_softmax(1)


def loss(training: AnswerTraining, retain: list[Row], forget: list[Row]) -> float:
    batch = collate(retain, forget, 0)
    return float(training(batch, batch.counts("all")).total.detach())


def test_forget_rows_learn_another_class_each_beside_the_others_own(
    training: AnswerTraining,
) -> None:
    rows = image_rows(16)
    with torch.no_grad():
        cost_BC = expected(training, rows)
    own = [float(cost_BC[n, row.label]) for n, row in enumerate(rows)]
    assert loss(training, rows, []) == pytest.approx(sum(own) / 16, rel=1e-5)
    steps: set[int] = set()
    others: list[float] = []
    for n, row in enumerate(rows):
        others.append(loss(training, [], [row]))
        (chosen,) = [
            c for c in range(CLASSES) if float(cost_BC[n, c]) == pytest.approx(others[-1], rel=1e-5)
        ]
        steps.add((chosen - row.label) % CLASSES)
    assert 0 not in steps, "its own class"
    assert len(steps) > 1, "always the same other one"
    both = loss(training, rows[:4], rows[4:])
    assert both == pytest.approx(sum(own[:4]) / 4 + sum(others[4:]) / 12, rel=1e-5)


def test_weights_without_a_gradient_are_never_salient(
    problem: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _gradient: None)  # one worker
    model = AutoModelForSequenceClassification.from_pretrained(
        write_text_model(tmp_path / "bert", problem / "model")
    )
    batch = collate([], [Row([5, 6, 7], 0, label=1, classified=True)], 0)
    masks = salient_weights(1.0, model, [batch], torch.device("cpu"))
    (name,) = [name for name in masks if "word_embeddings" in name]
    assert masks[name].any(1).nonzero()[:, 0].tolist() == [5, 6, 7]
    few = salient_weights(0.01, model, [batch], torch.device("cpu"))
    share = sum(int(mask.sum()) for mask in few.values()) / sum(
        mask.numel() for mask in few.values()
    )
    assert share == pytest.approx(0.01, rel=0.01)
    assert all(bool((mask | ~few[name]).all()) for name, mask in masks.items())
