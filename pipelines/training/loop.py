"""The training loop of a worker: build, resume, step, checkpoint, report."""

import resource
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol

import ray.train
import torch
from ray.train import Checkpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.config.schema import TrainConfig, UnlearnConfig
from pipelines.encoding.batches import batches_of
from pipelines.encoding.encoder import Encoder, build_encoder
from pipelines.model.answers import build_answer_training, salient_weights
from pipelines.model.engine import Engine, EngineState, deepspeed_settings, zero3_loading
from pipelines.model.load import build_alignment, load_base
from pipelines.model.pruning import Masks, held_rows, input_norms, prune_base
from pipelines.training.job import Job
from pipelines.training.resume_point import ResumePoint, read_norms, read_point, report_point
from pipelines.training.strength import WorkerSolver
from rfa.adapters import ADAPTER
from rfa.batch import Row, TokenCounts, UnlearnBatch, collate
from rfa.objective import ResidualAlignment
from rfa.solver import merged_features
from rfa.targets import SAMPLE_TOKENS, FeatureSums

TOKENS_AT_ONCE = 16384  # a worker's share of a small set that is one batch


class Loss(Protocol):
    """A named tuple of scalars: the objective's total and its terms."""

    total: Tensor

    def _asdict(self) -> dict[str, Tensor]: ...


class StepRows(NamedTuple):
    """This worker's rows of one step."""

    retain: list[Row]
    forget: list[Row]


def run_worker(job: Job) -> None:
    """Build the model, resume, train, report."""
    train = job.cfg.train
    world_size = ray.train.get_context().get_world_size()
    if train.gpus_per_worker == 0:
        torch.set_num_threads(max(1, int(train.cpus_per_worker)))
    torch.manual_seed(job.cfg.seed)
    deepspeed = deepspeed_settings(train, job.stage, full=job.kind == "finetune")
    keep_alive = zero3_loading(deepspeed)
    encoder = build_encoder(job.cfg)
    base = load_base(
        job.cfg.model, train.precision if job.kind == "unlearn" else "fp32", task=job.cfg.task
    )
    norms = read_norms(ray.train.get_checkpoint())
    norms = norms or input_norms(job.cfg, base, _calibration(job, encoder), _device(train))
    masks = prune_base(job.cfg, base, norms)
    if job.kind == "unlearn":
        module: nn.Module = build_alignment(job.cfg, base, masks)
    else:
        module = build_answer_training(job.cfg, base, _trained_weights(job, encoder, base, masks))
    if train.activation_checkpointing:
        _checkpoint_activations(module)
    engine = Engine(module, deepspeed, world_size)
    loop = _Loop(job, engine, module, encoder, Pruned(norms, held_rows(base, masks)))
    loop.run()
    del keep_alive


def _trained_weights(job: Job, encoder: Encoder, base: PreTrainedModel, masks: Masks) -> Masks:
    """What fine-tuning may change: what is not pruned, and for SalUn the salient weights of that."""
    share = job.cfg.finetune.salient
    if share is None:
        return masks
    salient = salient_weights(share, base, _once(job, encoder, "forget"), _device(job.cfg.train))
    return {name: mask & masks.get(name, mask).to(mask.device) for name, mask in salient.items()}


def _rows_of(job: Job, encoder: Encoder, name: str, start: int = 0) -> Iterator[list[Row]]:
    """This worker's rows of a stream, batch after batch."""
    share = ray.train.get_dataset_shard(name)
    assert share is not None
    return (encoder.rows(records) for records in batches_of(share, job.batches[name], start))


def _calibration(job: Job, encoder: Encoder) -> Iterator[UnlearnBatch]:
    """This worker's first retain rows, as many as the targets are fitted on."""
    return _once(
        job, encoder, "retain", -(-job.cfg.objective.target_rows // job.cfg.train.retain_batch_size)
    )


def _once(job: Job, encoder: Encoder, name: str, most: int | None = None) -> Iterator[UnlearnBatch]:
    """This worker's rows of a stream, each once, in at most so many batches."""
    number, blank = job.batches[name], encoder.blank()
    for rows in islice(_rows_of(job, encoder, name), number if most is None else min(most, number)):
        yield collate(rows, [], encoder.pad_token_id, blank)


def _device(train: TrainConfig) -> torch.device:
    return torch.device("cuda" if train.gpus_per_worker else "cpu")


class Pruned(NamedTuple):
    """What of the base model is pruned: the norms that it took, and by weight the outputs that are kept, if whole ones
    are pruned."""

    norms: Mapping[str, Tensor] | None
    kept_rows: dict[str, Tensor]


def sampled_tokens(cfg: UnlearnConfig, index: int, batches: int) -> int:
    """How many features of each row of a kept batch serve the targets; 0 once there are enough rows."""
    rows_a_batch = cfg.train.retain_batch_size
    limit = min(cfg.objective.target_rows, batches * rows_a_batch)
    return max(1, SAMPLE_TOKENS // limit) if index * rows_a_batch < limit else 0


def _checkpoint_activations(module: nn.Module) -> None:
    model: Any = module.model
    base = model.get_base_model() if isinstance(module, ResidualAlignment) else model
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _add(totals: dict[str, float], values: Mapping[str, Any]) -> None:
    """Add numbers or scalars to totals of the same names."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + float(value)


class _Loop:
    """The steps of one worker."""

    def __init__(
        self,
        job: Job,
        engine: Engine,
        module: nn.Module,
        encoder: Encoder,
        pruned: Pruned,
    ) -> None:
        self.job, self.engine, self.module, self.encoder, self.pruned = (
            job,
            engine,
            module,
            encoder,
            pruned,
        )
        self.rank, self.world_size = (
            torch.distributed.get_rank(),
            torch.distributed.get_world_size(),
        )
        self._blank: Row | None = None
        self.seconds = 0.0
        self.tokens = 0
        self.solve_s = 0.0
        self.trials: list[
            dict[str, float]
        ] = []  # of the solver's strength; the chosen one is the last

    def run(self) -> None:
        """All steps from the last resume point on."""
        checkpoint = ray.train.get_checkpoint()
        if isinstance(self.module, ResidualAlignment):
            if self.job.cfg.solve.mode != "off" and checkpoint is None:
                self._solve(self.module)
            elif self.job.steps > 0 and self.module.objective.aligns:
                self.module.fit(merged_features(self._retain_sums(self.module)))
        step = 0 if checkpoint is None else self._resume(checkpoint)
        started = time.monotonic()
        stream = self._stream(step)
        while step < self.job.steps:
            began = time.monotonic()
            metrics = self._step(next(stream), self.job.rate(step))
            if self.rank == 0:
                metrics["tokens_per_s"] = metrics.pop("tokens") / max(
                    time.monotonic() - began, 1e-9
                )
                self.job.messages.put(
                    {"step": step, **metrics, "learning_rate": self.job.rate(step)}
                )
            step += 1
            self.seconds += time.monotonic() - started
            started = time.monotonic()
            if step % self.job.cfg.train.checkpoint_every == 0 and step < self.job.steps:
                self._report(step, final=False)
        self._report(step, final=True)

    def _stream(self, step: int) -> Iterator[StepRows]:
        reads_forget = (
            self.job.kind == "finetune" or self.job.cfg.objective.settings().reads_forget_set
        )
        unread = {"holdout"} if reads_forget else {"holdout", "forget"}
        sources = {
            name: self._rows_of(name, step) for name in self.job.batches if name not in unread
        }
        while True:
            rows = {name: next(source) for name, source in sources.items()}
            yield StepRows(rows["retain"], rows.get("forget", []))

    def _rows_of(self, name: str, start: int = 0) -> Iterator[list[Row]]:
        return _rows_of(self.job, self.encoder, name, start)

    def _batch(self, retain: list[Row], forget: list[Row]) -> UnlearnBatch:
        if self._blank is None and not retain and not forget:
            self._blank = self.encoder.blank()
        return collate(retain, forget, self.encoder.pad_token_id, self._blank).to(
            self.engine.device
        )

    def _micro_batches(self, rows: StepRows) -> list[UnlearnBatch]:
        parts = self.job.cfg.train.accumulation
        return [
            self._batch(rows.retain[part::parts], rows.forget[part::parts]) for part in range(parts)
        ]

    def _step(self, rows: StepRows, rate: float) -> dict[str, float]:
        """One optimizer step; returns the terms of the whole step's loss, and its tokens over all workers."""
        batches = self._micro_batches(rows)
        tokens = float(sum(int(batch.attention_BT.sum()) for batch in batches))
        sums = {"tokens": tokens}
        for batch in batches:
            _add(sums, batch.counts(self.job.cfg.objective.tokens)._asdict())
        totals = self._all_reduce(sums)
        step_tokens = totals.pop("tokens")
        counts = TokenCounts(**totals)
        terms: dict[str, float] = {}
        for batch in batches:
            loss: Loss = self.engine(batch, counts)
            self.engine.backward(loss.total)
            self.engine.step(rate)
            _add(terms, {name: term.detach() for name, term in loss._asdict().items()})
        values = self._all_reduce(terms)
        self.tokens += int(step_tokens)
        return {"loss": values.pop("total"), **values, "tokens": step_tokens}

    def _all_reduce(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the totals over workers, by name, on every worker."""
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(tensor)
        return dict(zip(values, tensor.tolist(), strict=True))

    def _kept_batches(self) -> Iterator[tuple[UnlearnBatch, int]]:
        """This worker's retain and utility rows once, and how many features of a row may be kept for clustering."""
        number = self.job.batches["retain"]
        for index, rows in enumerate(islice(self._rows_of("retain"), number)):
            batch = self._batch(rows, [])
            yield batch, sampled_tokens(self.job.cfg, index, number)

    def _retain_sums(self, module: ResidualAlignment) -> dict[str, FeatureSums]:
        """Base features of this worker's first retain rows, for targets and units."""
        total = {name: FeatureSums() for name in module.hooks.names}
        for batch, sample_tokens in self._kept_batches():
            if not sample_tokens:
                break
            for name, sums in module.feature_sums(batch, sample_tokens).items():
                total[name].merge(sums)
        return total

    def _small_set(self, name: str) -> list[UnlearnBatch]:
        """All of this worker's rows of the forget or the holdout set; as many batches on every worker, and a single one
        where it fits: the solver then needs one forward."""
        number = self.job.batches.get(name, 0)
        rows = list(islice(self._rows_of(name), number)) if number else []
        tokens = sum(row.size for own in rows for row in own)
        fits = self._all_reduce({"tokens": tokens})["tokens"] <= TOKENS_AT_ONCE * self.world_size
        if fits and self.job.stage < 3:
            rows = [[row for own in rows for row in own]]
        return [self._batch([], own) for own in rows]

    def _solve(self, module: ResidualAlignment) -> None:
        """Find the adapter in closed form; with training to come, a resume point keeps it."""
        started = time.monotonic()

        def say(done: int, total: int, what: str) -> None:
            if self.rank == 0:
                self.job.messages.put({"done": done, "of": total, "what": what})

        solver = WorkerSolver(self.job.cfg.solve, module, self._place, say)
        solver.collect(self._kept_batches(), self.job.batches["retain"])
        forget, holdout = self._small_set("forget"), self._small_set("holdout")
        self.trials = [trial._asdict() for trial in solver.solve(forget, holdout)]
        self.tokens = int(self._all_reduce({"tokens": solver.tokens})["tokens"])
        self.seconds = self.solve_s = time.monotonic() - started
        if self.job.steps > 0:
            self._report(0, final=False)

    def _place(self, name: str, a_KD: Tensor, b_OK: Tensor) -> None:
        keep_O = self.pruned.kept_rows.get(name.removeprefix("base_model.model.") + ".weight")
        if keep_O is not None and self.job.cfg.prune.keep_sparsity:
            b_OK = b_OK.clone()
            b_OK[~keep_O] = 0
        self.engine.place(
            {
                f"model.{name}.lora_A.{ADAPTER}.weight": a_KD,
                f"model.{name}.lora_B.{ADAPTER}.weight": b_OK,
            }
        )

    def _resume(self, checkpoint: Checkpoint) -> int:
        """Load a resume point, or the end of a run that was not exported; returns the step to go on from."""
        point = read_point(checkpoint)
        step = int(point.progress["step"])
        if point.moments is None:  # nothing has been trained yet, or all has
            self.engine.place(point.parameters)
        else:
            rng = point.moments.pop("rng")
            # One step at learning rate 0 makes the optimizer's states; its moments are then replaced.
            self._step(next(self._stream(step)), rate=0.0)
            self.engine.load(EngineState(point.parameters, point.moments), step)
            torch.set_rng_state(rng)
        self.seconds, self.tokens = point.progress["seconds"], point.progress["tokens"]
        self.solve_s, self.trials = point.progress["solve_s"], point.progress["trials"]
        return step

    def _report(self, step: int, *, final: bool) -> None:
        """A resume point from rank 0; every worker reports. Before the first step and after the last one there are no
        moments to keep."""
        with_moments = step > 0 and not final
        state = self.engine.state(with_moments=with_moments)
        progress = {
            "step": step,
            "seconds": self.seconds,
            "solve_s": self.solve_s,
            "trials": self.trials,
            "tokens": self.tokens,
            "peak_memory_bytes": self._peak_memory(),
            "num_workers": self.world_size,
        }
        if self.rank == 0:
            moments = {**state.moments, "rng": torch.get_rng_state()} if with_moments else None
            point = ResumePoint(progress, state.parameters, moments, self.pruned.norms)
            report_point(point, self.job.cfg.output_dir)
        else:
            ray.train.report(progress, checkpoint=None)

    def _peak_memory(self) -> int:
        """Most memory any worker has held: GPU memory, or the process's resident memory on CPUs."""
        device = self.engine.device
        if device.type == "cuda":
            own = torch.cuda.max_memory_allocated(device)
        else:
            own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        largest = torch.tensor(float(own), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return int(largest)
