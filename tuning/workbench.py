"""A process's workbench: the model, the data and the solver's statistics that its trials share.

A process loads the model once. A trial puts its own adapter on it, computes it (in closed form, by
gradient, or both), is scored by likelihoods alone, and takes the adapter off again. The statistics
of the retain and utility sets are collected once, a share by each of the search's workers, and then
summed. They are factored once for each pair of the solver's weights, and each target is fitted once
for its settings.
"""

import functools
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import ray
import torch

from pipelines.config.load import changed_keys
from pipelines.config.schema import UnlearnConfig
from pipelines.encoding.encoder import build_encoder
from pipelines.evaluation.metrics import summarise
from pipelines.evaluation.scored_model import ScoredModel
from pipelines.evaluation.scorer import Samples
from pipelines.evaluation.text_scorer import TextScorer
from pipelines.model.load import build_alignment, load_base
from pipelines.training.job import learning_rate_at
from pipelines.training.strength import FIRST_STRENGTH, TRIALS, WorkerSolver
from pipelines.training.worker_rows import sampled_tokens
from rfa.adapters import adapters_scaled, lora_layers, scale_adapters_
from rfa.batch import UnlearnBatch, collate, refusals_of
from rfa.closed_form import InverseMoments
from rfa.moments import InputMoments
from rfa.objective import ResidualAlignment
from rfa.settings import STOP_EVERY, STOP_ROWS
from rfa.solver import OnePassSolver, inverse_of
from rfa.stopping import has_forgotten
from rfa.targets import FeatureSums, ModuleTarget, Targets, fit_target
from tuning.contracts import RUNGS, Measured, Shared

TRIAL = ScoredModel("trial")
# Number of strengths that a trial tries when it begins at that of a similar trial. It is enough to
# tell trials apart.
TRIALS_NEAR_BY = 2

ModuleSums = dict[str, FeatureSums]


@dataclass
class Statistics:
    """Statistics of the sets that are held.

    `moments` are the inputs' moments by set and module. `features` are the feature sums that
    targets are fitted to, by kind of tokens and module.
    """

    moments: dict[str, dict[str, InputMoments]]
    features: dict[str, ModuleSums]

    def merge(self, other: "Statistics") -> None:
        """Add another worker's statistics."""
        for set_name, modules in other.moments.items():
            own = self.moments[set_name]
            for module, moments in modules.items():
                if module in own:
                    own[module].merge(moments)
                else:  # none of this worker's rows were of that set
                    own[module] = moments
        for tokens, modules in other.features.items():
            _add(self.features[tokens], modules)


class Workbench:
    """The model and the data of one process."""

    def __init__(self, shared: Shared) -> None:
        cfg = shared.cfg
        self.shared = shared
        self.device = "cuda" if cfg.train.gpus_per_worker else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(max(1, int(cfg.train.cpus_per_worker)))
        self.base = load_base(cfg.model, cfg.train.precision).eval()
        self.base.to(self.device)  # pyright: ignore[reportArgumentType]
        self._scorer = TextScorer(cfg, {})
        self._scorer.hold(TRIAL, self.base)
        self._encoder = build_encoder(cfg)
        # Configurations of this process's trials with the strengths that they found.
        self._strengths: list[tuple[UnlearnConfig, float]] = []
        # A module's factor takes as much memory as its moments, so only the factors of one pair of
        # weights are cached.
        self._factors = functools.lru_cache(maxsize=1)(self._factors_at)
        # By all that a module's target depends on: k-means would be run again for every trial.
        self._fitted: dict[tuple[Any, ...], ModuleTarget] = {}

    def collect(self, rank: int, world_size: int) -> Statistics:
        """Collect statistics of every `world_size`-th batch of retain and utility rows.

        They cover every module that a trial may adapt.
        """
        cfg = self.shared.covering
        first_kind, *other_kinds = self.shared.token_kinds
        batches = self._rows(self.shared.kept_rows)
        with self.adapted(cfg) as alignment:
            one_pass = OnePassSolver(alignment, cfg.solve.settings())
            # Workers share the batches out, yet each row's sample must be that of a single worker.
            seen = _retain_rows_before(batches)
            features = {first_kind: one_pass.features}
            for kind in other_kinds:
                features[kind] = {module: FeatureSums() for module in one_pass.layers}
            for index in range(rank, len(batches), world_size):
                batch = self._batch(batches[index], [])
                sample_tokens = sampled_tokens(cfg, seen[index], len(batches))
                one_pass.collect(batch, sample_tokens)
                if sample_tokens:
                    for kind in other_kinds:
                        sums = alignment.feature_sums(batch, sample_tokens, tokens=kind)
                        _add(features[kind], sums)
            return Statistics(one_pass.sums, features)

    def save_adapter(self, cfg: UnlearnConfig, folder: Path) -> None:
        """Compute the adapter of one configuration and write it in PEFT's format."""
        with self.adapted(cfg) as alignment:
            for _ in self.work(cfg, alignment):
                pass
            scale_adapters_(alignment.model, alignment.objective.adapter_scale)
            alignment.model.save_pretrained(str(folder))
        # PEFT writes an empty model card.
        (folder / "README.md").unlink(missing_ok=True)

    def trial(self, cfg: UnlearnConfig) -> Generator[tuple[Measured, bool]]:
        """Compute a configuration's adapter and score it.

        It is scored once, or with gradient steps at each of `_pauses`. Yields the measurements,
        and whether they are the last.
        """
        rungs = len(_pauses(cfg.train.steps)) or 1
        with self.adapted(cfg) as alignment:
            seconds = 0.0
            started = time.monotonic()
            for rung, strengths in enumerate(self.work(cfg, alignment), start=1):
                seconds += time.monotonic() - started
                with adapters_scaled(alignment.model, alignment.objective.adapter_scale):
                    scores = self._scores()
                yield Measured(scores, seconds, strengths), rung == rungs
                started = time.monotonic()

    @contextmanager
    def adapted(self, cfg: UnlearnConfig) -> Iterator[ResidualAlignment]:
        """Put a configuration's adapter on the model within the scope."""
        # LoRA's A and dropout draw from it. A trial does not depend on those before it.
        torch.manual_seed(cfg.seed)
        alignment = build_alignment(cfg, self.base)
        try:
            yield alignment
        finally:
            # A hook that stays would record, and hold in memory, the features of later trials.
            alignment.hooks.close()
            alignment.model.unload()  # pyright: ignore[reportCallIssue]

    def work(
        self, cfg: UnlearnConfig, alignment: ResidualAlignment
    ) -> Iterator[list[dict[str, float]]]:
        """Solve, then train. Yield the strengths tried whenever the adapter is to be scored."""
        if alignment.objective.residual == "local":
            alignment.targets = self._targets(cfg, alignment)
        else:
            # The collected statistics are those of modules, and here blocks are aligned.
            alignment.fit(self._block_features(cfg, alignment))
        strengths: list[dict[str, float]] = []
        if cfg.solve.mode != "off":
            strengths = self._solve(cfg, alignment)
        if cfg.train.steps == 0:
            yield strengths
            return
        for _ in self._train(cfg, alignment):
            yield strengths

    def _solve(self, cfg: UnlearnConfig, alignment: ResidualAlignment) -> list[dict[str, float]]:
        """Solve the adapter in closed form, and return the strengths tried with their scores."""
        factor = self._factors(cfg.solve.utility_weight, cfg.solve.ridge)
        solver = WorkerSolver(cfg.solve, alignment, None, lambda *_: None)
        solver.one_pass.adopt({name: factor(name) for name, _ in lora_layers(alignment.model)})
        forget = self._rows(self.shared.forget_rows)
        holdout = self._rows(self.shared.holdout_rows)
        if cfg.solve.settings().reads_targets:
            # All rows are one batch, so that one forward solves every module on the way.
            forget = [list(itertools.chain.from_iterable(forget))]
            holdout = [list(itertools.chain.from_iterable(holdout))]
        first, most = FIRST_STRENGTH, TRIALS
        if self._strengths:
            first, most = self._first_strength(cfg), TRIALS_NEAR_BY
        trials = solver.solve(
            [self._batch([], rows) for rows in forget],
            [self._batch([], rows) for rows in holdout],
            first,
            most,
        )
        # There are none if the configuration gives the strength.
        if trials:
            self._strengths.append((cfg, trials[-1].strength))
        return [trial._asdict() for trial in trials]

    def _first_strength(self, cfg: UnlearnConfig) -> float:
        """Return the strength found by the most similar trial, of equally similar ones the last."""

        def differences(known: tuple[UnlearnConfig, float]) -> int:
            return len(changed_keys(known[0].model_dump(), cfg.model_dump()))

        return min(reversed(self._strengths), key=differences)[1]

    def _train(self, cfg: UnlearnConfig, alignment: ResidualAlignment) -> Iterator[None]:
        """Take a run's gradient steps in this process. Yield at each of `_pauses`."""
        train = cfg.train
        parameters = [value for value in alignment.model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
        kept = itertools.cycle(self._rows(self.shared.kept_rows))
        forget = itertools.cycle(self._rows(self.shared.forget_rows))
        watched = self._watched(cfg)
        pauses = _pauses(train.steps)
        has_stopped = False
        for step in range(train.steps):
            if not has_stopped:
                alignment.progress = (step + 1) / train.steps
                rows = next(forget)
                refusals = refusals_of(rows, alignment.objective)
                alignment(self._batch(next(kept), rows, refusals)).total.backward()
                if train.clip_norm:
                    torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
                rate = learning_rate_at(
                    step,
                    steps=train.steps,
                    peak=train.learning_rate,
                    warmup_steps=train.warmup_steps,
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if watched and (step + 1) % STOP_EVERY == 0:
                has_stopped = has_stopped or has_forgotten(alignment, watched)
            if step + 1 in pauses:
                yield

    def _watched(self, cfg: UnlearnConfig) -> list[UnlearnBatch]:
        """Return the rows by which steps may end early, and none where they may not."""
        if cfg.objective.stop_at is None:
            return []
        batches = -(-STOP_ROWS // cfg.train.forget_batch_size)
        return [self._batch([], rows) for rows in self._rows(self.shared.forget_rows)[:batches]]

    def _factors_at(self, utility_weight: float, ridge: float) -> Callable[[str], InverseMoments]:
        """Return a function that factors a module's moments at these weights, each module once."""
        settings = self.shared.cfg.solve.settings()
        settings = settings._replace(utility_weight=utility_weight, ridge=ridge)

        @functools.cache
        def factor(module: str) -> InverseMoments:
            by_kind = self._statistics.moments.items()
            return inverse_of({kind: sums[module] for kind, sums in by_kind if sums}, settings)

        return factor

    def _targets(self, cfg: UnlearnConfig, alignment: ResidualAlignment) -> Targets:
        """Return the targets at a trial's modules, each fitted once for its settings."""
        settings = cfg.objective
        module_targets: dict[str, ModuleTarget] = {}
        for name in alignment.hooks.names:
            key = name, settings.target, settings.clusters, settings.steering, settings.tokens
            if key not in self._fitted:
                sums = self._statistics.features[settings.tokens][name]
                # The seed is the search's, as no trial changes it.
                seed = self.shared.cfg.seed
                self._fitted[key] = fit_target(settings.settings(), sums, seed=seed)
            module_targets[name] = self._fitted[key]
        return Targets(settings.target, module_targets, cfg.seed)

    def _block_features(self, cfg: UnlearnConfig, alignment: ResidualAlignment) -> ModuleSums:
        """Sum the features of the aligned blocks over the retain and utility sets."""
        total = {block: FeatureSums() for block in alignment.hooks.names}
        batches = self._rows(self.shared.kept_rows)
        for rows, seen in zip(batches, _retain_rows_before(batches), strict=True):
            sample_tokens = sampled_tokens(cfg, seen, len(batches))
            if sample_tokens:
                _add(total, alignment.feature_sums(self._batch(rows, []), sample_tokens))
        return total

    def _scores(self) -> dict[str, float | None]:
        """Score the model with its current adapter."""
        samples: Samples = {}
        for table in self.shared.scored_rows:
            samples |= self._scorer.score(TRIAL, ray.get(table))
        return summarise([samples[row] for row in sorted(samples)])

    @functools.cached_property
    def _statistics(self) -> Statistics:
        # Fetched at first use, as the workbench that collects them is made without any.
        return ray.get(self.shared.statistics)

    def _rows(self, tables: list[Any]) -> list[list[Any]]:
        """Return the tables' rows for the model, batch by batch."""
        batches: dict[int, list[Any]] = {}
        for table in tables:
            rows: Any = ray.get(table)
            for record in rows.to_pylist():
                batches.setdefault(record["batch"], []).append(record)
        return [self._encoder.rows(records) for records in batches.values()]

    def _batch(
        self, retained: list[Any], forget: list[Any], refusals: Sequence[Any] = ()
    ) -> UnlearnBatch:
        batch = collate(retained, forget, self._encoder.pad_token_id, refusals=refusals)
        return batch.to(self.device)


def _pauses(steps: int) -> set[int]:
    """Return after which gradient steps a trial is scored: `RUNGS` times, if it takes as many."""
    return {steps * part // RUNGS for part in range(1, RUNGS + 1)} - {0}


def _retain_rows_before(batches: list[list[Any]]) -> list[int]:
    """Return how many rows of the retain set stand before each batch of rows that are held."""
    counts = [sum(not (row.utility or row.earlier) for row in rows) for rows in batches]
    return [0, *accumulate(counts)][: len(batches)]


def _add(total: ModuleSums, sums: ModuleSums) -> None:
    """Add sums to a total, module by module."""
    for module, module_sums in sums.items():
        total[module].merge(module_sums)
