"""What the papers' experiments compare: the arms, and five problems with the settings that each arm has there."""

from typing import NamedTuple

OFF = ["solve.mode=off", "solve.strength=auto"]
NO_RFA = [*OFF, "objective.weights.retain=0", "objective.weights.forget=0"]


def weights(**values: float) -> list[str]:
    """Weights of the objective's terms, as changes."""
    return [f"objective.weights.{name}={value}" for name, value in values.items()]


class Arm(NamedTuple):
    """One method: `finetune` trains all parameters from the fresh model or the target, `run` unlearns the target."""

    command: str
    changes: list[str]
    start: str = "target"
    epochs: float = 0.0  # of the retain set, in steps of `run`


ARMS = {
    "retrain": Arm("finetune", ["finetune.sets=[retain]"], start="fresh"),
    "fine-tune on retain": Arm("finetune", ["finetune.sets=[retain]", "finetune.epochs=1"]),
    "prune + fine-tune": Arm(
        "finetune", ["finetune.sets=[retain]", "finetune.epochs=1", "prune.method=rows"]
    ),
    "LoRA on retain": Arm("run", [*NO_RFA, "objective.weights.task=1"], epochs=1),
    "PruneLoRA": Arm("run", [*NO_RFA, "objective.weights.task=1", "prune.method=rows"], epochs=2),
    "RFA, one pass": Arm("run", []),
    "RFA, by gradient": Arm("run", [*OFF, "objective.weights.task=1"], epochs=0.5),
    "gradient ascent": Arm(
        "run", [*NO_RFA, "objective.weights.output=1", "objective.output=ascent"], epochs=0.15
    ),
    "random labels": Arm(
        "run", [*NO_RFA, *weights(task=1, output=1), "objective.output=random_label"], epochs=0.5
    ),
    "bad teacher": Arm(
        "run", [*NO_RFA, *weights(kl=1, output=1), "objective.output=bad_teacher"], epochs=0.5
    ),
    "SalUn": Arm(
        "finetune", ["finetune.sets=[retain]", "finetune.epochs=1", "finetune.salient=0.5"]
    ),
    "SCRUB": Arm(
        "run", [*NO_RFA, *weights(kl=1, task=1, output=0.1), "objective.output=scrub"], epochs=0.5
    ),
}
OF_CLASSIFIERS = ("random labels", "bad teacher", "SalUn")  # arms that a language model is spared


class Problem(NamedTuple):
    """A model, data, and what of it must go."""

    title: str
    preset: str
    model: str
    changes: list[str]
    arms: dict[str, list[str]]  # more changes of single arms, by name
    generates: bool = False  # text: no bounds, and other columns
    passes: float = 1.0  # times the arms' epochs: more where rows are few
    apart: float = 0.0  # points that the forget set's accuracy may lie from retraining's; 0 where a class must go
    under: float = 1.0  # points that RA and TA may lie under retraining's


def arms_of(lora: list[str], pruned: list[str]) -> dict[str, list[str]]:
    """What the paper's arms prune and adapt in a model; all others adapt what its preset says."""
    return {"LoRA on retain": lora, "PruneLoRA": [*lora, *pruned], "prune + fine-tune": pruned}


VIT_LORA = [
    "adapter.targets=[o_proj, classifier]", "adapter.rank=16", "adapter.alpha=32", "adapter.dropout=0.1",
    "train.learning_rate=0.001",
]  # fmt: skip
# A head's pruned rows are classes that could never be told again: merging fills them, as in the paper's own code.
# Fine-tuning would keep them pruned.
VIT_PRUNED = ["prune.targets=[layers.3.attention.o_proj, classifier]", "prune.keep_sparsity=false"]
VIT = {
    **arms_of(VIT_LORA, VIT_PRUNED),
    "prune + fine-tune": ["prune.targets=[layers.3.attention.o_proj]"],
}
LAST_STAGE = ", ".join(f"stages.2.layers.0.layer.{index}.convolution" for index in (0, 1))
CONVOLUTION_LORA = ["adapter.rank=8", "adapter.alpha=16", "train.learning_rate=0.01"]
STAGE_LORA = [f"adapter.targets=[{LAST_STAGE}, classifier.1]", *CONVOLUTION_LORA]
STAGE_PRUNED = [f"prune.targets=[{LAST_STAGE}]", "prune.keep_sparsity=false"]
RESNET = arms_of(
    STAGE_LORA, STAGE_PRUNED
)  # as the ViT: half of all filters is more than so small a ResNet can repair
ALL_LORA = ["adapter.targets=[convolution, classifier.1]", *CONVOLUTION_LORA]
ALL_PRUNED = ["prune.targets=[convolutions]", "prune.keep_sparsity=false"]
ENCODER_RATE = ["adapter.rank=8", "adapter.alpha=16", "train.learning_rate=0.002"]
ENCODER_LORA = ["adapter.targets=[output.dense, classifier]", *ENCODER_RATE]
ENCODER = {
    **arms_of(ENCODER_LORA, ["prune.targets=[output.dense]"]),
    "RFA, one pass": ["data.utility.share=[0.5, 1]", "data.utility.max_rows=2700"],
    "RFA, by gradient": [
        "adapter.targets=[output.dense, pooler.dense, classifier]",
        *ENCODER_RATE,
        "train.steps=84",
    ],
    "random labels": [
        "objective.weights.output=0.1"
    ],  # of two classes the other is the wrong one: 1 broke the model
}
# Without half of its rows a language model cannot be repaired in a few steps, and forgets nothing particular: the
# product's own way, Wanda with RFA's terms. Ninety kept texts make few steps, so these are long, and none warms up.
GENERATOR_PRUNED = ["prune.targets=[o_proj, down_proj]", "prune.method=wanda", "prune.sparsity=0.3"]
COLD = ["train.warmup_steps=0", "train.learning_rate=0.003"]
GENERATOR_SHIFT = [
    *COLD,
    "train.learning_rate=0.01",
    "train.steps=20",
    *weights(retain=1, forget=10, task=1),
]
GENERATOR = {
    "prune + fine-tune": GENERATOR_PRUNED,
    "LoRA on retain": COLD,
    "PruneLoRA": [*GENERATOR_PRUNED, *GENERATOR_SHIFT],
    "RFA, one pass": ["data.utility.max_rows=120"],
    "RFA, by gradient": GENERATOR_SHIFT,
    "gradient ascent": [*COLD, "train.steps=12"],
    "SCRUB": [*COLD, "train.steps=14", "objective.weights.output=1"],
}
HEAD_RATE = "train.learning_rate=0.02"  # of all that adapts a small classifier's head
BY_CLASS = [
    HEAD_RATE,
    "data.forget.max_rows=1200",
    "data.retain.max_rows=10800",
    "finetune.epochs=8",
]
WHOLE = [
    f"data.{name}.{change}"
    for name in ("forget", "retain", "general")
    for change in ("column=null", "values=[]")
]
BY_ROW = [
    *WHOLE, HEAD_RATE, "data.forget.share=[0, 0.05]", "data.retain.share=[0.05, 0.5]", "data.forget.max_rows=1000",
    "data.retain.max_rows=19000", "data.holdout.split=test", "data.holdout.max_rows=1000", "solve.strength=auto",
    "finetune.epochs=8",
]  # fmt: skip
HEAD = ["adapter.targets=[classifier.1]"]
# Single rows cannot be told apart in the head's inputs. By gradient, a shift of weight 1 or less forgets next to
# nothing (UA 4 %); shifted in all convolutions, kept rows are lost, too (RA 92 %); one pass over all broke the model.
# What the model says of unseen rows without their labels is held still, so that the shift is not theirs, too.
ROWS_RFA = [
    f"adapter.targets=[{LAST_STAGE}, classifier.1]", "data.utility.share=[0.5, 1]", "data.utility.max_rows=9500",
]  # fmt: skip
ROWS = {
    **arms_of(ALL_LORA, ALL_PRUNED),
    "PruneLoRA": [*ALL_LORA, *ALL_PRUNED, "train.steps=297"],  # 4 epochs
    "RFA, one pass": ROWS_RFA,
    "RFA, by gradient": [
        *ROWS_RFA, "adapter.rank=16", "adapter.alpha=32", "train.learning_rate=0.007",
        *weights(retain=0.1, forget=2.5, task=0, kl=1.5), "train.steps=222",  # 2 epochs
    ],
}  # fmt: skip
PROBLEMS = {
    "vit-class": Problem("Fashion-MNIST, a ViT forgets a class", "rfa_image", "vit", BY_CLASS, VIT),
    "resnet-class": Problem(
        "Fashion-MNIST, a ResNet forgets a class", "rfa_image", "resnet", [*BY_CLASS, *HEAD], RESNET
    ),
    "resnet-rows": Problem(
        "Fashion-MNIST, a ResNet forgets 5 % of its rows", "rfa_image", "resnet", [*BY_ROW, *HEAD],
        ROWS, apart=1.5,
    ),
    "reviews-rows": Problem(
        "Movie reviews, MiniLM forgets 10 % of rows", "rfa_text", "minilm",
        ["data.retain.max_rows=2700", "data.retain.share=[0.1, 0.5]", "data.forget.max_rows=300",
         "data.holdout.max_rows=300", "train.learning_rate=0.005", "finetune.epochs=3",
         "finetune.learning_rate=2.0e-4", "data.max_tokens=32", "data.general.split=train",
         "data.holdout.split=train", "evaluation.max_rows=1000"],
        ENCODER, apart=2.0, under=2.0,
    ),
    "fortunes-category": Problem(
        "Text generation: SmolLM2 forgets a category of short texts", "rfa_eli5", "smollm",
        ["data.columns={id: id, text: text, label: label}", "data.holdout.split=train", "data.general.split=train",
         *(f"data.{name}.column=label" for name in ("forget", "retain", "holdout", "general")),
         *(f"data.{name}.values=[food]" for name in ("forget", "holdout")),
         *(f"data.{name}.values=[law, education, literature]" for name in ("retain", "general")),
         "data.general.max_rows=60", "data.holdout.max_rows=30", "data.max_tokens=64", "finetune.epochs=5",
         "finetune.batch_size=16", "finetune.learning_rate=4.0e-4",
         "train.num_workers=1", "train.precision=bf16", "evaluation.quick=true", "objective.target=cluster_mean"],
        GENERATOR, generates=True, passes=2.0,
    ),
}  # fmt: skip

SLOWEST = ("smollm", "minilm", "vit", "resnet")  # by the minutes that a problem's arms take
