"""The one-pass solver on a worker: statistics of its rows, adapters from everybody's, and the strength that fits.

The right strength leaves the forget set as likely as text that the model has never seen: less leaves traces, more is a
tell-tale. Without a retrained oracle the holdout set says how likely that is: the strength is chosen at which forget
rows stand half a standard deviation of chance on the side of text that is known, since of two strengths that so few
rows cannot tell apart the weaker does less harm. The statistics are collected once, so each strength that is tried
costs a solve, whose forward tells the forget rows' likelihood too, and a forward over the holdout rows.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pipelines.config.schema import SolveConfig
from pipelines.evaluation.metrics.forward import token_statistics
from pipelines.evaluation.metrics.likelihood import loss
from pipelines.evaluation.metrics.membership import chance_gap, min_k
from rfa.batch import UnlearnBatch
from rfa.objective import ResidualAlignment
from rfa.solver import OnePassSolver

FIRST_STRENGTH = 2e-3
SLOPE = (
    1.5  # by which the gap's odds commonly fall with the strength's logarithm; measured: 0.9 to 3
)
LONGER = 1.5  # how much further each step goes, until the right strength lies between two that were tried
FARTHEST = (
    30.0  # by which a step multiplies the strength at most where the gap falls slower than that
)
TRIALS = 6
CERTAIN = 0.49  # a gap from here on could be anything beyond
CLOSE_ENOUGH = 0.03  # a gap this near to the aim ends the search

Say = Callable[[int, int, str], None]  # done, of, what


class Likelihood(NamedTuple):
    """Of one row's answer: mean loss, and minus the mean of its least likely tokens. Large: unlike training data."""

    loss: float
    min_k: float


class Trial(NamedTuple):
    """A strength and its gap: 0 where forget rows look like holdout rows, up to 0.5 with traces left, down to -0.5
    where they look less known than text never seen."""

    strength: float
    gap: float


def gap(forget: list[Likelihood], holdout: list[Likelihood]) -> float:
    """AUC - 1/2, averaged over both scores; AUC is the chance that a holdout row looks less known than a forget row."""
    truth = [0] * len(forget) + [1] * len(holdout)
    columns = zip(*(forget + holdout), strict=True)
    aucs = [float(roc_auc_score(truth, column)) for column in columns]
    return sum(aucs) / len(aucs) - 0.5


def search_strength(
    try_strength: Callable[[float], float],
    aim: float,
    trials: int = TRIALS,
    first: float = FIRST_STRENGTH,
) -> list[Trial]:
    """All trials, the one whose gap is nearest to `aim` last: from the `first` guess to where a common slope meets the
    aim, or the slope of the trials themselves if it is gentler, until it lies between two trials, then in between.

    The gap falls with the strength as a logistic curve does, from 1/2 to -1/2: its odds are steps in the strength's
    logarithm. Where two gaps are equally near the weaker strength is the better one.
    """
    done: list[Trial] = []
    strength, reach = first, 1 / SLOPE
    while len(done) < trials:
        done.append(Trial(strength, try_strength(strength)))
        if abs(done[-1].gap - aim) <= CLOSE_ENOUGH:
            break
        weak = max((trial for trial in done if trial.gap > aim), default=None)
        strong = min((trial for trial in done if trial.gap <= aim), default=None)
        if weak is None or strong is None:
            strength *= math.exp(_step(done, aim, reach))
            reach *= LONGER
        else:  # where a line through both meets the aim, but well inside
            share = (_odds(weak.gap) - _odds(aim)) / (_odds(weak.gap) - _odds(strong.gap))
            strength = weak.strength * (strong.strength / weak.strength) ** min(
                max(share, 0.1), 0.9
            )
    return sorted(done, key=lambda trial: (-abs(trial.gap - aim), -trial.strength))


def _step(done: list[Trial], aim: float, reach: float) -> float:
    """How far to go in the strength's logarithm; farther where the last two trials have seen a gentler slope."""
    last, left = done[-1], _odds(done[-1].gap) - _odds(aim)
    step = reach * left
    if len(done) > 1 and max(abs(trial.gap) for trial in done[-2:]) < CERTAIN:
        slope = (_odds(done[-2].gap) - _odds(last.gap)) / math.log(
            last.strength / done[-2].strength
        )
        seen = abs(left) / max(slope, 1e-9)
        step = math.copysign(max(abs(step), min(seen, math.log(FARTHEST))), left)
    return step


def _odds(gap: float) -> float:
    """Half the logarithm of the odds of an AUC of 1/2 + gap."""
    return math.atanh(2 * min(max(gap, -CERTAIN), CERTAIN))


class WorkerSolver:
    """Solves an alignment's adapters from this worker's rows, together with the other workers.

    Args:
        place: puts lora_A and lora_B of the module of that name into the model; without it they are set directly.
        say: told of progress, on every worker.
    """

    def __init__(
        self,
        cfg: SolveConfig,
        alignment: ResidualAlignment,
        place: Callable[[str, Tensor, Tensor], None] | None,
        say: Say,
    ) -> None:
        self.cfg, self.alignment, self.say = cfg, alignment, say
        self.one_pass = OnePassSolver(alignment, cfg.settings(), place)
        self.tokens = 0  # of this worker's kept rows

    def collect(self, kept: Iterator[tuple[UnlearnBatch, int]], number: int) -> None:
        """Statistics of `number` batches of kept rows, each with the features a row to keep for clustering."""
        for index, (batch, sample_tokens) in enumerate(kept):
            self.one_pass.collect(batch, sample_tokens)
            self.tokens += int(batch.attention_BT.sum())
            self.say(index + 1, number, "statistics")
        self.one_pass.reduce()

    def solve(
        self,
        forget: list[UnlearnBatch],
        holdout: list[UnlearnBatch],
        first: float = FIRST_STRENGTH,
        most: int = TRIALS,
    ) -> list[Trial]:
        """Solve at the configured strength, or at the one that fits, found from a `first` guess on in at `most` so many
        trials: then these, the chosen one last."""
        if self.cfg.strength != "auto":
            self.one_pass.solve(forget, self.cfg.strength)
            return []

        def try_strength(strength: float) -> float:
            self.say(len(tried), most, f"strength {strength:.3g}")
            tried.append(strength)
            likely = self._likelihoods(
                forget, self.one_pass.solve(forget, strength, with_logits=True)
            )
            return gap(likely, self._likelihoods(holdout))

        tried: list[float] = []
        aim = chance_gap(self._count(forget), self._count(holdout)) / 2
        trials = search_strength(try_strength, aim, most, first)
        if trials[-1].strength != tried[-1]:
            self.one_pass.solve(forget, trials[-1].strength)
        return trials

    def _count(self, batches: list[UnlearnBatch]) -> int:
        """Rows of all workers."""
        return len(
            _of_all_workers(
                [None for batch in batches for real in batch.attention_BT.any(1).tolist() if real]
            )
        )

    @torch.no_grad()
    def _likelihoods(
        self, batches: list[UnlearnBatch], known: list[Tensor] | None = None
    ) -> list[Likelihood]:
        """Of all workers' rows, from their logits where these are known."""
        found: list[Likelihood] = []
        for index, batch in enumerate(batches):
            logits_NV = (
                known[index]
                if known
                else self.alignment.runner(batch, logits_at_BT=batch.answer_BT).logits_NV
            )
            assert logits_NV is not None
            label_N = batch.expected(batch.answer_BT)
            lengths = [length for length in batch.answer_BT.sum(1).tolist() if length]
            for own in token_statistics(logits_NV, label_N).split(lengths):
                if batch.classified:  # one class a row: nothing to choose the least likely of
                    found.append(Likelihood(loss(own.log_probability), loss(own.log_probability)))
                    continue
                least = min_k(own.without_eos().log_probability)
                if least is not None:
                    found.append(Likelihood(loss(own.log_probability), least))
        return _of_all_workers(found)


def _of_all_workers(own: list[Any]) -> list[Any]:
    if not dist.is_initialized():
        return own
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return [row for part in everyone for row in part]
