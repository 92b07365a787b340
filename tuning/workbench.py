"""One process's workbench: the model, the data and the solver's statistics, shared by all trials that run on it.

A process loads the model once. A trial puts its own adapter on it, finds it (in closed form, by gradient, or both),
is scored by likelihoods alone, and takes the adapter off again. What trials have in common is computed once: the kept
sets' statistics (a share by each of the search's workers, then summed), their factors as long as the solver's weights
stay the same, and targets as long as their settings do.
"""

import functools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from pipelines.config.load import changed_keys
from pipelines.config.schema import UnlearnConfig
from pipelines.encoding.labelled import build_encoder
from pipelines.evaluation.metrics import Sample, summarise
from pipelines.evaluation.text_scorer import Scorer
from pipelines.model.load import build_alignment, load_base
from pipelines.training.job import Job
from pipelines.training.loop import kept_tokens
from pipelines.training.strength import FIRST_STRENGTH, TRIALS, WorkerSolver, solve_settings
from rfa.adapters import lora_layers
from rfa.batch import UnlearnBatch, collate
from rfa.closed_form import InverseMoments
from rfa.moments import InputMoments
from rfa.objective import ResidualAlignment
from rfa.solver import KEPT, OnePassSolver, kept_inverse
from rfa.targets import FeatureSums, Targets
from tuning.contracts import RUNGS, Measured, Shared

TRIALS_NEAR_BY = 2  # of a strength, where a similar trial says where to begin: as near as telling trials apart needs


@dataclass
class Collected:
    """The kept sets' statistics: `sums[set][module]`, and by kind of tokens the features that targets are fitted on."""

    sums: dict[str, dict[str, InputMoments]]
    features: dict[str, dict[str, FeatureSums]]

    def merge(self, other: "Collected") -> None:
        """Add another worker's."""
        for kind, modules in other.sums.items():
            for name, own in modules.items():
                self.sums[kind][name].merge(own)
        for tokens, modules in other.features.items():
            for name, own in modules.items():
                self.features[tokens][name].merge(own)


class Workbench:
    """The model and the data of one process."""

    def __init__(self, shared: Shared) -> None:
        cfg = shared.cfg
        self.shared, self.cfg = shared, cfg
        self.device = "cuda" if cfg.train.gpus_per_worker else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(max(1, int(cfg.train.cpus_per_worker)))
        self.base = load_base(cfg.model, cfg.train.precision).eval()
        self.base.to(self.device)  # pyright: ignore[reportArgumentType]
        self._scorer = Scorer(cfg, {})
        self._scorer.hold("trial", self.base)
        self._encoder = build_encoder(cfg)
        self._kept_inverses: tuple[tuple[float, ...], dict[str, InverseMoments]] = ((), {})
        self._targets: dict[str, Targets] = {}
        self._strengths: list[tuple[UnlearnConfig, float]] = []  # that trials have found here

    def collect(self, rank: int, world_size: int) -> Collected:
        """Statistics of every `world_size`-th batch of kept rows, for every module that a trial may adapt."""
        cfg = self.shared.widest
        kinds = self.shared.token_kinds
        batches = self._rows(self.shared.kept)
        with self.adapted(cfg) as alignment:
            one_pass = OnePassSolver(alignment, solve_settings(cfg.solve))
            others = {kind: {name: FeatureSums() for name in one_pass.layers} for kind in kinds[1:]}
            for index in range(rank, len(batches), world_size):
                batch, keep_tokens = (
                    self._batch(batches[index], []),
                    kept_tokens(cfg, index, len(batches)),
                )
                alignment.objective = alignment.objective._replace(tokens=kinds[0])
                one_pass.collect(batch, keep_tokens)
                for kind in kinds[1:] if keep_tokens else ():
                    alignment.objective = alignment.objective._replace(tokens=kind)
                    for name, sums in alignment.feature_sums(batch, keep_tokens).items():
                        others[kind][name].merge(sums)
            return Collected(one_pass.sums, {kinds[0]: one_pass.features, **others})

    def save_adapter(self, cfg: UnlearnConfig, folder: Path) -> None:
        """Find the adapter of one configuration and write it in PEFT's format."""
        with self.adapted(cfg) as alignment:
            for _ in self.work(cfg, alignment):
                pass
            alignment.model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card

    def trial(self, cfg: UnlearnConfig) -> Iterator[Measured]:
        """Find a configuration's adapter and score it: once, or with gradient steps `RUNGS` times on the way."""
        with self.adapted(cfg) as alignment:
            seconds, started = 0.0, time.monotonic()
            for strengths in self.work(cfg, alignment):
                seconds += time.monotonic() - started
                yield Measured(self._scores(), seconds, strengths)
                started = time.monotonic()

    @contextmanager
    def adapted(self, cfg: UnlearnConfig) -> Iterator[ResidualAlignment]:
        """The model with a configuration's adapter, which is taken off in the end."""
        torch.manual_seed(cfg.seed)
        alignment = build_alignment(cfg, self.base)
        try:
            yield alignment
        finally:
            alignment.taps.close()
            alignment.model.unload()  # pyright: ignore[reportCallIssue]

    def work(
        self, cfg: UnlearnConfig, alignment: ResidualAlignment
    ) -> Iterator[list[dict[str, float]]]:
        """Solve, then train; gives the strengths tried whenever the adapter is worth scoring."""
        alignment.targets = self._fitted(cfg, alignment)
        strengths: list[dict[str, float]] = []
        if cfg.solve.mode != "off":
            strengths = self._solve(cfg, alignment)
        if cfg.train.steps == 0:
            yield strengths
            return
        for _ in self._train(cfg, alignment):
            yield strengths

    def _solve(self, cfg: UnlearnConfig, alignment: ResidualAlignment) -> list[dict[str, float]]:
        solver = WorkerSolver(cfg.solve, alignment, None, lambda *_: None)
        solver.one_pass.adopt(self._factored(cfg, lora_layers(alignment.model)))
        forget = self._batch([], [row for rows in self._rows(self.shared.forget) for row in rows])
        holdout = [row for rows in self._rows(self.shared.holdout) for row in rows]
        first, most = (
            (self._first_strength(cfg), TRIALS_NEAR_BY)
            if self._strengths
            else (FIRST_STRENGTH, TRIALS)
        )
        found = solver.solve([forget], [self._batch([], holdout)], first, most)
        self._strengths += [(cfg, trial.strength) for trial in found[-1:]]
        return [trial._asdict() for trial in found]

    def _first_strength(self, cfg: UnlearnConfig) -> float:
        """Where the search for the strength begins: what the most similar trial here has found, the last of equals."""

        def apart(known: tuple[UnlearnConfig, float]) -> int:
            return len(changed_keys(known[0].model_dump(), cfg.model_dump()))

        return min(reversed(self._strengths), key=apart)[1]

    def _train(self, cfg: UnlearnConfig, alignment: ResidualAlignment) -> Iterator[None]:
        """The run's gradient steps in this process; pauses at each of `RUNGS` equal parts."""
        parameters = [
            parameter for parameter in alignment.model.parameters() if parameter.requires_grad
        ]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
        kept, forget = self._rows(self.shared.kept), self._rows(self.shared.forget)
        job = Job(cfg, "unlearn", cfg.train.steps, cfg.train.learning_rate, 0.0, {}, 0, None)
        pauses = {cfg.train.steps * part // RUNGS for part in range(1, RUNGS + 1)}
        for step in range(cfg.train.steps):
            loss = alignment(self._batch(kept[step % len(kept)], forget[step % len(forget)])).total
            loss.backward()
            if cfg.train.clip_norm:
                torch.nn.utils.clip_grad_norm_(parameters, cfg.train.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = job.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step + 1 in pauses:
                yield

    def _factored(
        self, cfg: UnlearnConfig, layers: list[tuple[str, Any]]
    ) -> dict[str, InverseMoments]:
        """Each module's factors, made where this process has not made them at these weights."""
        key = (cfg.solve.utility_weight, cfg.solve.ridge)
        if self._kept_inverses[0] != key:
            self._kept_inverses = (key, {})
        known, sums = self._kept_inverses[1], self._collected.sums
        for name, _ in layers:
            if name not in known:
                known[name] = kept_inverse(
                    {kind: sums[kind][name] for kind in KEPT}, solve_settings(cfg.solve)
                )
        return {name: known[name] for name, _ in layers}

    def _fitted(self, cfg: UnlearnConfig, alignment: ResidualAlignment) -> Targets:
        """Targets at the modules of a trial, fitted where this process has not fitted them with these settings."""
        if (
            alignment.objective.residual != "local"
        ):  # whole blocks are aligned, of which nothing has been collected
            alignment.fit(self._block_features(cfg, alignment))
            assert alignment.targets is not None
            return alignment.targets
        key = json.dumps(
            [cfg.objective.target, cfg.objective.clusters, cfg.objective.tokens, cfg.seed]
        )
        known = self._targets.setdefault(key, Targets(cfg.objective.target, {}, cfg.seed))
        missing = [name for name in alignment.taps.names if name not in known.places]
        if missing:
            features = self._collected.features[cfg.objective.tokens]
            names, alignment.taps.names = alignment.taps.names, missing
            alignment.fit(features)
            alignment.taps.names = names
            assert alignment.targets is not None
            known.places.update(alignment.targets.places)
        return known

    def _block_features(
        self, cfg: UnlearnConfig, alignment: ResidualAlignment
    ) -> dict[str, FeatureSums]:
        total = {name: FeatureSums() for name in alignment.taps.names}
        batches = self._rows(self.shared.kept)
        for index, rows in enumerate(batches):
            keep_tokens = kept_tokens(cfg, index, len(batches))
            for name, sums in (
                alignment.feature_sums(self._batch(rows, []), keep_tokens).items()
                if keep_tokens
                else ()
            ):
                total[name].merge(sums)
        return total

    def _scores(self) -> dict[str, float | None]:
        found = [
            row
            for table in self.shared.scored
            for row in self._scorer.score("trial", ray.get(table))
        ]
        found.sort(key=lambda row: (row[0], row[1]))
        return summarise([Sample(**fields) for _, _, fields in found])

    @functools.cached_property
    def _collected(self) -> Collected:
        return ray.get(self.shared.collected)

    def _rows(self, table: Any) -> list[list[Any]]:
        """Tokenised rows, batch by batch."""
        rows: Any = ray.get(table) if table is not None else None
        batches: dict[int, list[Any]] = {}
        for record in rows.to_pylist() if rows is not None else ():
            batches.setdefault(record["batch"], []).append(record)
        return [self._encoder.rows(records) for records in batches.values()]

    def _batch(self, kept: list[Any], forget: list[Any]) -> UnlearnBatch:
        return collate(kept, forget, self._encoder.pad_token_id).to(self.device)
