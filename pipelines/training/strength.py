"""The one-pass solver on a worker, and the search for the strength that unlearns and no more.

The right strength leaves the forget set as likely as text that the model has never seen. A lower
one leaves traces. A higher one makes forget rows conspicuously unlikely. Without a retrained
oracle, the holdout set shows how likely unseen text is. Two strengths whose gaps differ by less
than chance cannot be told apart with so few rows, and the lower one does less harm: so the search
aims half a standard deviation of chance above a gap of 0.

The statistics are collected once. A trial costs a solve, whose forward also gives the forget rows'
logits, and a forward over the holdout rows.

Shapes: N answer tokens, V vocabulary or classes.
"""

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pipelines.config.schema import SolveConfig
from pipelines.evaluation.metrics.forward import token_statistics
from pipelines.evaluation.metrics.likelihood import loss
from pipelines.evaluation.metrics.membership import chance_gap, min_k
from rfa import exchange
from rfa.adapters import dropout_off
from rfa.batch import UnlearnBatch
from rfa.objective import ResidualAlignment
from rfa.solver import OnePassSolver
from rfa.token_solver import Standing, TokenSolver

FIRST_STRENGTH = 2e-3
# By this much the log-odds of the gap commonly fall with the log of the strength. Measured slopes
# lie between 0.9 and 3.
PRIOR_SLOPE = 1.5
STEP_GROWTH = 1.5  # each step is longer by this factor, until two trials enclose the aim
MAX_STEP_FACTOR = 30.0  # a step multiplies the strength by at most this where the gap falls slowly
TRIALS = 6
MAX_INFORMATIVE_GAP = 0.49  # at the limits of 1/2, AUC no longer measures how far apart rows are
CLOSE_ENOUGH = 0.03  # a gap this near to the aim ends the search

ProgressCallback = Callable[[int, int, str], None]  # done, of, what


class Likelihood(NamedTuple):
    """One answer's mean loss, and minus the mean log-probability of its least likely tokens.

    Both are large where the answer is unlike training data.
    """

    loss: float
    min_k: float


class Trial(NamedTuple):
    """A strength and its gap, from -1/2 to 1/2.

    The gap is 0 where forget rows look like holdout rows, positive with traces left, and negative
    where they look less known than unseen text.
    """

    strength: float
    gap: float


def auc_gap(forget: list[Likelihood], holdout: list[Likelihood]) -> float:
    """Return AUC - 1/2, averaged over both scores.

    AUC is the probability that a holdout row looks less known than a forget row.
    """
    truth = [0] * len(forget) + [1] * len(holdout)
    aucs: list[float] = []
    for scores in zip(*(forget + holdout), strict=True):
        aucs.append(float(roc_auc_score(truth, scores)))
    return sum(aucs) / len(aucs) - 0.5


def search_strength(
    try_strength: Callable[[float], float],
    aim: float,
    trials: int = TRIALS,
    first: float = FIRST_STRENGTH,
) -> list[Trial]:
    """Find the strength whose AUC gap is closest to `aim`, and return all trials, the best last.

    Extrapolate from `first` with a prior slope, or the observed one where it is flatter, until two
    trials enclose the aim. Then interpolate. Both work on log-odds over the log of the strength,
    in which a logistic curve from 1/2 to -1/2 is a line. Of equally close gaps the lower strength
    is the better one.
    """
    done: list[Trial] = []
    strength = first
    reach = 1 / PRIOR_SLOPE
    while len(done) < trials:
        done.append(Trial(strength, try_strength(strength)))
        if abs(done[-1].gap - aim) <= CLOSE_ENOUGH:
            break
        # Trials compare by their strength: the strongest that leaves traces, and the weakest that
        # leaves none.
        weak = max((trial for trial in done if trial.gap > aim), default=None)
        strong = min((trial for trial in done if trial.gap <= aim), default=None)
        if weak is None or strong is None:
            strength *= math.exp(_extrapolated_step(done, aim, reach))
            reach *= STEP_GROWTH
        else:
            weak_odds = _half_log_odds(weak.gap)
            share = (weak_odds - _half_log_odds(aim)) / (weak_odds - _half_log_odds(strong.gap))
            # Well inside the interval, since a gap measured on few rows is noisy.
            share = min(max(share, 0.1), 0.9)
            strength = weak.strength * (strong.strength / weak.strength) ** share
    return sorted(done, key=lambda trial: (-abs(trial.gap - aim), -trial.strength))


def _extrapolated_step(done: list[Trial], aim: float, reach: float) -> float:
    """Return the change of the log-strength that should reach the aim from the last trial."""
    last = done[-1]
    distance = _half_log_odds(last.gap) - _half_log_odds(aim)
    step = reach * distance
    if len(done) < 2:
        return step
    before = done[-2]
    # A gap at its limit was cut off there, and gives no slope.
    if max(abs(last.gap), abs(before.gap)) >= MAX_INFORMATIVE_GAP:
        return step
    fall = _half_log_odds(before.gap) - _half_log_odds(last.gap)
    slope = fall / math.log(last.strength / before.strength)
    observed = min(abs(distance) / max(slope, 1e-9), math.log(MAX_STEP_FACTOR))
    return math.copysign(max(abs(step), observed), distance)


def _half_log_odds(gap: float) -> float:
    """Return half the log-odds of an AUC of 1/2 + gap, within the informative range."""
    return math.atanh(2 * min(max(gap, -MAX_INFORMATIVE_GAP), MAX_INFORMATIVE_GAP))


class WorkerSolver:
    """Solve an alignment's adapters from this worker's rows, together with the other workers.

    Args:
        cfg: the solver's configuration.
        alignment: the model with its adapters and features.
        write_adapter: sets lora_A and lora_B of the named module; None sets them directly.
        on_progress: receives done, total and a description, on every worker.
    """

    def __init__(
        self,
        cfg: SolveConfig,
        alignment: ResidualAlignment,
        write_adapter: Callable[[str, Tensor, Tensor], None] | None,
        on_progress: ProgressCallback,
    ) -> None:
        self.cfg = cfg
        self.alignment = alignment
        self.on_progress = on_progress
        self.one_pass = OnePassSolver(alignment, cfg.settings(), write_adapter)
        self.tokens = 0  # of this worker's retain and utility rows
        self.standings: list[Standing] = []  # of all rounds, in mode `per_token`

    def collect(self, batches: Iterator[tuple[UnlearnBatch, int]]) -> Iterator[int]:
        """Collect statistics of batches of retain and utility rows; yield how many were read.

        Each batch comes with the features a row to sample for the targets' clusters.
        """
        reads_targets = self.one_pass.settings.reads_targets
        for index, (batch, sample_tokens) in enumerate(batches):
            self.one_pass.collect(batch, sample_tokens if reads_targets else 0)
            self.tokens += int(batch.attention_BT.sum())
            yield index + 1

    def solve(
        self,
        forget: list[UnlearnBatch],
        holdout: list[UnlearnBatch],
        first: float = FIRST_STRENGTH,
        most: int = TRIALS,
    ) -> list[Trial]:
        """Solve at the configured strength, or search for it where it is `auto`.

        A search starts at `first` and makes at most `most` trials. Returns them, the chosen one
        last. The list is empty where the configuration gives the strength,
        and in mode `per_token`, which has none.
        """
        if self.cfg.mode == "per_token":
            self.standings = TokenSolver(self.one_pass, self.on_progress).solve(forget, holdout)
            return []
        if self.cfg.strength != "auto":
            self.one_pass.solve(forget, self.cfg.strength)
            return []
        tried: list[float] = []

        def try_strength(strength: float) -> float:
            self.on_progress(len(tried), most, f"strength {strength:.3g}")
            tried.append(strength)
            logits = self.one_pass.solve(forget, strength, with_logits=True)
            return auc_gap(self._likelihoods(forget, logits), self._likelihoods(holdout))

        aim = chance_gap(_row_count(forget), _row_count(holdout)) / 2
        trials = search_strength(try_strength, aim, most, first)
        if trials[-1].strength != tried[-1]:  # the model holds the last trial's adapter
            self.one_pass.solve(forget, trials[-1].strength)
        return trials

    @torch.no_grad()
    def _likelihoods(
        self, batches: list[UnlearnBatch], known: list[Tensor] | None = None
    ) -> list[Likelihood]:
        """Return the likelihoods of all workers' rows, from `known` logits [N, V] if given."""
        likelihoods: list[Likelihood] = []
        for index, batch in enumerate(batches):
            if known:
                logits_NV: Tensor | None = known[index]
            else:
                with dropout_off(self.alignment.model):
                    logits_NV = self.alignment.runner(batch, logits_at_BT=batch.answer_BT).logits_NV
            assert logits_NV is not None
            label_N = batch.expected(batch.answer_BT)
            lengths = [length for length in batch.answer_BT.sum(1).tolist() if length]
            for answer in token_statistics(logits_NV, label_N).split(lengths):
                if batch.classified:  # one class a row: there are no least likely tokens
                    least = loss(answer.log_probability)
                else:
                    least = min_k(answer.without_eos().log_probability)
                if least is not None:
                    likelihoods.append(Likelihood(loss(answer.log_probability), least))
        return list(chain.from_iterable(exchange.gather_all(likelihoods)))


def _row_count(batches: list[UnlearnBatch]) -> int:
    """Return the rows of all workers, without blank ones."""
    rows = sum(int(batch.attention_BT.any(1).sum()) for batch in batches)
    return sum(exchange.gather_all(rows))
