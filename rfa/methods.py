"""The field's gradient methods by name, each a preset of the objective's settings.

`objective.method` chooses one. Weights are those of the methods' papers, or of open-unlearning
(Dorna et al. 2025, arXiv 2506.12618) where these give none. Steps and learning rate are left to the
user, and so are the layers that are adapted.

Torch is not imported here, for the same reason as in `rfa.forget_losses`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rfa.settings import Weights


class Method(NamedTuple):
    """What a method minimises. `settings` are those of `Objective` that differ from its defaults."""

    help: str
    weights: Weights
    settings: Mapping[str, Any]


def _on_answers(loss: str, output: float = 1.0, task: float = 1.0, **settings: Any) -> Method:
    """Return the method of a loss in `FORGET_LOSSES`, beside the retain set's cross-entropy."""
    help_text = "forget answers alone"
    if task:
        help_text = "forget answers, and the retain set's cross-entropy"
    weights = Weights(retain=0, forget=0, task=task, output=output)
    return Method(f"{loss} on {help_text}", weights, {"output": loss, **settings})


METHODS: dict[str, Method] = {
    "gradient_ascent": _on_answers("ascent", task=0),
    "gradient_difference": _on_answers("ascent"),
    "npo": _on_answers("npo"),
    "idk_dpo": _on_answers("dpo"),
    "simnpo": _on_answers("simnpo", output=0.125),
    "undial": _on_answers("undial", task=0),
    "ceu": _on_answers("ceu", task=0),
    "masc": _on_answers("masc", task=0, stop_at=0.475),
    "wga": _on_answers("wga"),
    "satimp": _on_answers("satimp", output=0.1),
    # Ilharco et al. 2023 (arXiv 2212.04089) choose the factor between 0 and 1 on held-out data.
    "task_vector": _on_answers("descent", task=0, negate=1.0),
    # As Li et al. 2024 (arXiv 2403.03218) trained Zephyr 7B.
    "rmu": Method(
        "the last adapted block's output to one random vector, the retain set's held",
        Weights(retain=1200, forget=1),
        {"residual": "last_drift", "target": "steering", "steering": 6.5},
    ),
    # Zou et al. 2024 (arXiv 2406.04313). They multiply both weights by 10 for Llama 3, on which
    # AdamW's steps hardly depend.
    "circuit_breakers": Method(
        "the adapted blocks' outputs to right angles with the base model's, the retain set's held",
        Weights(retain=1, forget=1),
        {"residual": "drift", "target": "reroute", "distance": "norm", "schedule": "crossfade"},
    ),
}


def describe_methods() -> str:
    """List every method with what it asks for, for help texts."""
    return "; ".join(f"{name}: {method.help}" for name, method in METHODS.items())
