"""Classifiers through the whole flow: learned, a class or a share of rows forgotten, pruned, scored."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ray.train import Checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from pipelines.config.load import load_config
from pipelines.config.schema import UnlearnConfig
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal
from pipelines.training.export import write_model
from pipelines.unlearn import finetune, unlearn
from tests.flow.conftest import CommandHere
from tests.tiny_classifiers import write_image_model, write_images, write_text_model, write_texts
from tests.trained import fit_all
from tuning.record import read_trials

Quick = Callable[..., UnlearnConfig]
SMALL = [
    "train.retain_batch_size=32",
    "train.forget_batch_size=32",
    "evaluation.max_rows=null",
    "tracking.uri=null",
]
LEARN = ["finetune.batch_size=16", "finetune.learning_rate=3e-3", "train.cpus_per_worker=1"]
PRUNE = [
    "solve.mode=off",
    "solve.strength=auto",  # the preset has a number, which only the solver reads
    "objective.weights={retain: 0, forget: 0, task: 1}",
    "prune.method=rows",
    "train.steps=40",
]


def images(folder: Path, *changes: str) -> list[str]:
    """Changes of the preset `rfa_image`: class 2 of the tiny images goes."""
    source = write_images(folder / "images")
    files = {"forget": "train", "retain": "train", "general": "test"}
    paths = [f"data.{name}.path={source}/{file}.parquet" for name, file in files.items()]
    kept = [f"data.{name}.values=[0, 1, 3]" for name in ("retain", "general")]
    head = "adapter.targets=[classifier.1]"
    return [*paths, "data.forget.values=[2]", *kept, *SMALL, *LEARN, head, *changes]


def train_pixels(folder: Path) -> torch.Tensor:
    """The training images as the model sees them: [240, 1, 8, 8], from -1 to 1."""
    files = pq.read_table(folder / "train.parquet")["image"].to_pylist()
    images = [np.array(Image.open(BytesIO(file))) for file in files]
    return torch.tensor(np.stack(images), dtype=torch.float32)[:, None] / 127.5 - 1


def scores_of(run: RunFolder) -> tuple[dict[str, float], dict[str, Any]]:
    scores = run.scores()
    return scores["models"]["after"], scores["cost"]


@pytest.fixture(scope="module")
def resnet(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images` and a ResNet that has learned them, `target`."""
    folder = tmp_path_factory.mktemp("resnet")
    fresh = write_image_model("resnet", folder / "fresh")
    changes = [
        f"model.path={fresh}",
        f"output_dir={folder}/target",
        "finetune.epochs=6",
        "train.num_workers=2",
    ]
    finetune(load_config("rfa_image", images(folder, *changes)), Terminal())
    return folder


def test_what_a_classifier_learns_lies_in_its_folder_batch_statistics_included(
    resnet: Path,
) -> None:
    model = AutoModelForImageClassification.from_pretrained(resnet / "target" / "model").eval()
    assert float(model.resnet.embedder.embedder.normalization.running_mean.abs().max()) > 0.01
    images = pq.read_table(resnet / "images" / "test.parquet")["image"].to_pylist()
    raw = b"".join(image[-64:] for image in images)  # behind a PGM file's header
    pixels = torch.tensor(list(raw), dtype=torch.float32).view(-1, 1, 8, 8) / 127.5 - 1
    with torch.no_grad():
        right = model(pixels).logits.argmax(1) == torch.arange(80) % 4
    assert float(right.float().mean()) > 0.9


def test_a_class_is_forgotten_in_one_pass(resnet: Path) -> None:
    changes = [f"model.path={resnet}/target/model", f"output_dir={resnet}/rfa"]
    run = unlearn(load_config("rfa_image", images(resnet, *changes)), Terminal())
    scores, cost = scores_of(run)
    before = run.scores()["models"]["before"]
    assert before["forget.accuracy"] > 0.9
    assert scores["forget.accuracy"] < 0.05
    assert scores["retain.accuracy"] > 0.9
    assert scores["mia_efficacy"] == 1
    assert cost["trained_parameters"] == 4 * (32 + 4), "of rank 8 a head of 4 classes has 4"
    page = (run.path / "report.html").read_text()
    assert "Accuracy" in page
    assert "MIA efficacy" in page


def test_a_search_scores_classifiers_by_accuracy(resnet: Path, command_here: CommandHere) -> None:
    changes = [f"model.path={resnet}/target/model", f"output_dir={resnet}/tune"]
    code, told = command_here("tune", "rfa_image", *images(resnet, *changes), "--trials", "1")
    assert code == 0, told
    trial = read_trials(resnet / "tune")[0]
    assert trial.score is not None
    assert trial.score.distance < 0.05, "accuracy 0 and efficacy 1: the class is gone"
    assert trial.score.utility > 0.97
    assert "accuracy" in (resnet / "tune" / "search.html").read_text()


def test_prunelora_keeps_pruned_filters_at_zero_and_sees_kept_rows_alone(resnet: Path) -> None:
    changes = [
        f"model.path={resnet}/target/model",
        f"output_dir={resnet}/pruned",
        "train.num_workers=2",
    ]
    changes += [
        *PRUNE,
        "prune.targets=[convolutions]",
        "adapter.targets=[convolution, classifier.1]",
    ]
    run = unlearn(load_config("rfa_image", images(resnet, *changes)), Terminal())
    masks = load_file(run.path / "masks.safetensors")
    merged = load_file(run.path / "model" / "model.safetensors")
    assert len(masks) == 6
    for name, mask in masks.items():
        filters = mask.flatten(1)
        assert int(filters.all(1).sum()) == int(filters.any(1).sum()) == len(mask) // 2
        assert not merged[name][~mask].any()
        assert merged[name][mask].all()
    _, cost = scores_of(run)
    assert cost["tokens"] == 40 * 30, "forget rows, which no term reads, were run"
    before = load_file(resnet / "target" / "model" / "model.safetensors")
    last = "resnet.encoder.stages.1.layers.0.layer.1.normalization.running_mean"
    assert (merged[last] - before[last]).abs().max() > 0.01, (
        "batch statistics are those of the whole model"
    )
    assert cost["sparsity"] == cost["sparsity_before_merge"] == 0.5
    assert json.loads((run.path / "manifest.json").read_text())["cost"]["sparsity"] == 0.5


def test_salun_trains_salient_weights_alone(resnet: Path, command_here: CommandHere) -> None:
    start = resnet / "target" / "model"
    changes = [
        f"model.path={start}",
        f"output_dir={resnet}/salun",
        "train.num_workers=2",
        "finetune.epochs=4",
    ]
    own = ["finetune.sets=[retain]", "finetune.salient=0.3", "finetune.learning_rate=1e-2"]
    code, told = command_here("finetune", "rfa_image", *images(resnet, *changes, *own))
    assert code == 0, told
    model = AutoModelForImageClassification.from_pretrained(start).eval()
    pixels = train_pixels(resnet / "images")
    torch.nn.functional.cross_entropy(model(pixels[2::4]).logits, torch.full((60,), 2)).backward()
    gradients = {
        name: own.grad.abs() for name, own in model.named_parameters() if own.grad is not None
    }
    least = torch.cat([own.flatten() for own in gradients.values()]).quantile(0.7)
    before, after = (
        load_file(start / "model.safetensors"),
        load_file(resnet / "salun" / "model" / "model.safetensors"),
    )
    wrong = 0
    for name, gradient in gradients.items():
        moved = before[name] != after[name]
        near = (gradient / least - 1).abs() < 1e-3  # sums in another order
        wrong += int((moved & (gradient < least) & ~near).sum())
        wrong += int((~moved & (gradient > least) & ~near).sum())
    assert wrong == 0
    with torch.no_grad():
        right = (
            model.from_pretrained(resnet / "salun" / "model").eval()(pixels).logits.argmax(1)
            == torch.arange(240) % 4
        )
    assert float(right[2::4].float().mean()) < 0.5, "the class goes"
    assert float(right[torch.arange(240) % 4 != 2].float().mean()) > 0.9, "the others stay"


def test_a_share_of_texts_is_forgotten_from_the_command_line(
    problem: Path, command_here: CommandHere, tmp_path: Path
) -> None:
    texts = write_texts(tmp_path / "texts")
    fresh = write_text_model(tmp_path / "fresh", problem / "model")
    paths = [f"data.{name}.path={texts}/train.jsonl" for name in ("forget", "retain")]
    paths += [f"data.{name}={{path: {texts}/test.jsonl}}" for name in ("holdout", "general")]
    shared = [*paths, *SMALL, *LEARN, "data.max_tokens=48", "finetune.epochs=20"]
    code, told = command_here(
        "finetune", "rfa_text", *shared, f"model.path={fresh}", f"output_dir={tmp_path}/target"
    )
    assert code == 0, told
    options = [
        f"model.path={tmp_path}/target/model",
        f"output_dir={tmp_path}/out",
        "train.num_workers=2",
    ]
    code, told = command_here("run", "rfa_text", *shared, *options)
    assert code == 0, told
    assert "General: accuracy" in told
    results = json.loads((tmp_path / "out" / "scores.json").read_text())["models"]
    assert set(results["after"]) >= {"forget.accuracy", "mia.loss", "mia_efficacy"}
    assert results["before"]["general.accuracy"] > 0.9
    text = "near the river"
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in files if text.encode() in path.read_bytes()]


def test_a_class_that_the_model_does_not_have_is_refused(
    resnet: Path, command_here: CommandHere
) -> None:
    fresh = write_image_model("vit", resnet / "vit", classes=2)
    code, told = command_here(
        "check",
        "rfa_image",
        *images(
            resnet, f"model.path={fresh}", f"output_dir={resnet}/none", "adapter.targets=[fc2]"
        ),
    )
    assert (code, told.splitlines()[-1][:31]) == (2, "data.columns.label: found '2', "), told


def test_wanda_prunes_alike_on_one_worker_and_two(
    ray_session: None, quick: Quick, tmp_path: Path
) -> None:
    changes = [
        "solve.mode=off",
        "prune.method=wanda",
        "prune.sparsity=0.3",
        "prune.targets=[o_proj,down_proj]",
    ]
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        cfg = quick(*changes, f"output_dir={folder}", f"train.num_workers={workers}")
        (trained,) = fit_all(folder, cfg)
        write_model(cfg, Checkpoint.from_directory(trained.folder), str(folder), full=False)
        found.append(load_file(folder / "masks.safetensors"))
        merged = load_file(folder / "model" / "model.safetensors")
        assert all(not merged[name][~mask].any() for name, mask in found[-1].items())
    assert len(found[0]) == 8
    for name, mask in found[0].items():
        assert (
            float((mask != found[1][name]).float().mean()) < 1e-3
        )  # sums in another order may swap equals
        assert abs(float(mask.float().mean()) - 0.7) < 0.02
