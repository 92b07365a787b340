"""From data to a solved adapter: one forward over the retained sets, then the forget rows alone.

`collect` streams the retained sets' rows once, for the targets and for their second moments.
`solve` needs the forget rows only, so that another strength costs no further pass over what is
retained. Two modes:

    one_pass   all modules are solved from the base model's features
    blockwise  module by module from the lowest block up, each from what it sees with the residuals
               below in place. A forget set of one batch is solved in passing, in a single forward.
               A larger one is carried from block to block by its hidden states

Where torch.distributed runs, every worker brings its own rows, and each module has one worker that
adds up and solves.

Shapes: B rows, T tokens, S positions of a module, N selected positions, D input features, O output
features, K rank.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rfa import exchange
from rfa.adapters import ADAPTER, dropout_off, full_shape, input_width, lora_layers, output_width
from rfa.batch import UnlearnBatch
from rfa.blocks import block_range, call_order, hook_scope
from rfa.closed_form import InverseMoments, LowRankUpdate, solve
from rfa.features import as_positions, input_positions
from rfa.moments import ForgetRows, InputMoments
from rfa.objective import ResidualAlignment
from rfa.settings import SolveSettings
from rfa.targets import SAMPLE_TOKENS, FeatureSums

# The sets whose behaviour the solver holds. What was forgotten before stays so.
RETAINED_SETS = ("retain", "utility", "earlier")


class OnePassSolver:
    """Solves the adapters of one alignment.

    Use: `collect` every retained batch, `reduce`, then `solve` as often as wanted.

    Args:
        alignment: the model with its adapters (B = 0) and objective, whose residuals are `local`.
        write: writes lora_A [K, D] and lora_B [O, K] of the module of that name into the model.
            Every worker calls it. None writes them in place.
    """

    def __init__(
        self,
        alignment: ResidualAlignment,
        settings: SolveSettings,
        write: Callable[[str, Tensor, Tensor], None] | None = None,
    ) -> None:
        assert alignment.objective.residual == "local", "the closed form is that of local residuals"
        self.alignment = alignment
        self.settings = settings
        self.layers: dict[str, Any] = dict(lora_layers(alignment.model))
        self._write = write
        self.features = {name: FeatureSums() for name in self.layers}
        self.sums: dict[str, dict[str, InputMoments]] = {kind: {} for kind in RETAINED_SETS}
        self.inverses: Mapping[str, InverseMoments] = {}
        # Each module has one worker. Modules of one width go round, so that memory and work are
        # shared evenly.
        self._owner: dict[str, int] = {}
        seen: Counter[int] = Counter()
        for name, layer in self.layers.items():
            width = input_width(layer)
            self._owner[name] = seen[width] % exchange.world_size()
            seen[width] += 1

    @torch.no_grad()
    def collect(self, batch: UnlearnBatch, sample_tokens: int = SAMPLE_TOKENS) -> None:
        """Add a batch of rows of the retained sets.

        Its retain rows serve the targets, too, unless `sample_tokens` is 0. `cluster_mean` samples
        that many tokens of each row.
        """
        tokens_BT = batch.retain_tokens_BT()
        rows = {"retain": batch.retain_B, "utility": batch.utility_B, "earlier": batch.earlier_B}
        masks = {kind: tokens_BT & rows_B[:, None] for kind, rows_B in rows.items()}

        def add_input(name: str, input_BSD: Tensor, _output_BSO: Tensor) -> None:
            for kind, mask_BT in masks.items():
                if mask_BT.any():
                    selected = batch.select(input_BSD, mask_BT)
                    # The objective weighs tokens alike, and of classified rows the rows.
                    weight_N = selected.weight_N if batch.classified else None
                    self.sums_of(kind, name).add(selected.feature_ND, weight_N)

        with self._observing(self.layers, add_input):
            features = self.alignment.feature_sums(batch, sample_tokens)
        if sample_tokens:
            for name, sums in features.items():
                self.features[name].merge(sums)

    def sums_of(self, kind: str, name: str) -> InputMoments:
        """Return a set's sums at a module, which take memory from the set's first token on."""
        if name not in self.sums[kind]:
            width, settings = input_width(self.layers[name]), self.settings
            columns = width if width <= settings.exact_width else settings.sketch_columns
            device = self.layers[name].lora_A[ADAPTER].weight.device
            self.sums[kind][name] = InputMoments.empty(name, width, columns, device)
        return self.sums[kind][name]

    def reduce(self) -> None:
        """Add up all workers' sums. Each module's owner factors its moments.

        The targets are fitted, too, if the solver reads them.
        """
        if self.settings.reads_targets:
            self.alignment.fit(exchange.merged_features(self.features))
        self.settle()
        inverses: dict[str, InverseMoments] = {}
        for name, owner in self._owner.items():
            if owner == exchange.rank():
                # Popped: a worker keeps the moments of its own modules only, and those factored.
                moments = {kind: sums.pop(name) for kind, sums in self.sums.items() if sums}
                inverses[name] = inverse_of(moments, self.settings)
        self.inverses = inverses

    def settle(self) -> None:
        """Add up each module's sums on its owner. The other workers begin anew."""
        # Also those sets of which only other workers have rows.
        own_kinds = [kind for kind, sums in self.sums.items() if sums]
        kinds = dict.fromkeys(chain(*exchange.gather_all(own_kinds)))
        # A reduction needs every worker, so all of them take the modules in this one order.
        for name, owner in self._owner.items():
            for kind in kinds:
                exchange.sum_on(owner, self.sums_of(kind, name))
                if owner != exchange.rank():
                    del self.sums[kind][name]

    def adopt(self, inverses: Mapping[str, InverseMoments]) -> None:
        """Use what other solvers of this model have collected, instead of `collect` and `reduce`.

        The alignment's targets must be fitted already.
        """
        self.inverses = inverses

    @torch.no_grad()
    def solve(
        self, batches: Sequence[UnlearnBatch], strength: float, *, with_logits: bool = False
    ) -> list[Tensor] | None:
        """Solve and write all adapters, from this worker's forget rows and the other workers'.

        Returns, with `with_logits`, what the solved model then predicts of each batch's answers,
        [N, V], where the same forward computes it, else None.
        """
        # A solution starts from the base model, without the last one's residuals.
        for name in self.layers:
            self._write_solution(name, None)
        if self.settings.mode == "blockwise" and len(batches) == 1:
            logits_NV = self._solve_in_passing(batches[0], strength, with_logits=with_logits)
            return None if logits_NV is None else [logits_NV]
        first_block = self.alignment.hooks.first_block
        hidden: list[Tensor | None] = [None] * len(batches)
        if first_block > 0:
            self._advance(batches, hidden, 0, first_block)
        start = first_block
        for stage in self._stages(batches[0]):
            # A worker without forget rows brings empty ones, as all workers gather.
            rows = self.empty_rows(stage.names)
            for batch, hidden_BTD in zip(batches, hidden, strict=True):
                with self._observing(stage.names, partial(self._add_forget, rows, batch)):
                    self._run(batch, hidden_BTD, start, stage.stop)
            self._solve_together(rows, strength)
            if stage.advances:
                self._advance(batches, hidden, start, stage.stop)
                start = stage.stop
        return None

    def _solve_in_passing(
        self, batch: UnlearnBatch, strength: float, *, with_logits: bool
    ) -> Tensor | None:
        """Solve each module when the rows reach it: its base layer has run, its adapter has not."""

        def solve_here(name: str, input_BSD: Tensor, output_BSO: Tensor) -> None:
            rows = self.empty_rows([name])
            self._add_forget(rows, batch, name, input_BSD, output_BSO)
            self._solve_together(rows, strength)

        with self._observing(self.layers, solve_here):
            if with_logits:
                return self.alignment.runner(batch, logits_at_BT=batch.answer_BT).logits_NV
            self._run(batch, None, 0, self.alignment.hooks.last_block + 1)
            return None

    def _stages(self, batch: UnlearnBatch) -> list["_Stage"]:
        """Return which modules are solved at once, in the order in which a batch reaches them."""
        last_block = self.alignment.hooks.last_block
        if self.settings.mode == "one_pass":
            return [_Stage(list(self.layers), last_block + 1, advances=False)]
        modules = {name: layer.base_layer for name, layer in self.layers.items()}
        order = call_order(modules, lambda: self._run(batch, None, 0, last_block + 1))
        block_of = {name: block_range(self.alignment.model, name)[0] for name in order}
        last_of_block = {block: name for name, block in block_of.items()}
        stages: list[_Stage] = []
        for name, block in block_of.items():
            advances = last_of_block[block] == name and block < last_block
            stages.append(_Stage([name], block + 1, advances))
        return stages

    def _run(self, batch: UnlearnBatch, hidden_BTD: Tensor | None, start: int, stop: int) -> Tensor:
        with dropout_off(self.alignment.model):
            return self.alignment.run(batch, hidden_BTD, start, stop).hidden_BTD

    def _advance(
        self, batches: Sequence[UnlearnBatch], hidden: list[Tensor | None], start: int, stop: int
    ) -> None:
        """Carry the forget rows' hidden states from block `start` to block `stop`."""
        for index, batch in enumerate(batches):
            hidden[index] = self._run(batch, hidden[index], start, stop)

    def empty_rows(self, names: Iterable[str]) -> dict[str, ForgetRows]:
        """Return no tokens yet of some modules, to which this worker's are added."""
        rows: dict[str, ForgetRows] = {}
        for name in names:
            layer = self.layers[name]
            rows[name] = ForgetRows.of(
                torch.empty(0, input_width(layer)), torch.empty(0, output_width(layer))
            )
        return rows

    def _add_forget(
        self,
        rows: dict[str, ForgetRows],
        batch: UnlearnBatch,
        name: str,
        input_BSD: Tensor,
        output_BSO: Tensor,
    ) -> None:
        targets = self.alignment.targets
        assert targets is not None
        tokens_BT = batch.forget_tokens_BT(self.alignment.objective.tokens)
        output = batch.select(output_BSO, tokens_BT)
        feature_NO, index_N = output.feature_ND.float(), output.index_N
        target_NO = targets(name, feature_NO, batch.row_B[index_N], batch.label_B[index_N])
        input_ND = batch.select(input_BSD, tokens_BT).feature_ND
        weight_N = output.weight_N.cpu()
        # A classified row has one label and no words, so that no token carries more of a fact.
        if not batch.classified:
            weight_N[batch.fact_BT[tokens_BT].cpu()] = self.settings.fact_weight
        added = ForgetRows.of(input_ND.cpu(), (target_NO - feature_NO).cpu(), weight_N)
        rows[name] = rows[name].merged(added)

    def _solve_together(self, rows: dict[str, ForgetRows], strength: float) -> None:
        """Solve modules on their owners, from all workers' rows, and write them on every worker."""
        solutions: dict[str, LowRankUpdate] = {}
        for name, merged in self.gathered(rows).items():
            solutions[name] = self.solve_module(name, merged, strength)
        self.write(rows, solutions)

    def gathered(self, rows: dict[str, ForgetRows]) -> dict[str, ForgetRows]:
        """Return all workers' rows of the modules that this worker owns."""
        merged: dict[str, ForgetRows] = {}
        for name, worker_rows in rows.items():
            parts = exchange.gather_on(self._owner[name], worker_rows)
            if parts:
                merged[name] = reduce(ForgetRows.merged, parts)
        return merged

    def solve_module(self, name: str, rows: ForgetRows, strength: float) -> LowRankUpdate:
        """Return the solution of a module that this worker owns."""
        layer = self.layers[name]
        return solve(
            rows,
            self.inverses[name],
            rank=layer.r[ADAPTER],
            strength=strength,
            scaling=layer.scaling[ADAPTER],
        )

    @torch.no_grad()
    def write(self, names: Iterable[str], solutions: Mapping[str, LowRankUpdate]) -> None:
        """Write solutions that only their modules' owners know into every worker's adapters."""
        for name in names:
            solution = exchange.broadcast_from(self._owner[name], solutions.get(name))
            self._write_solution(name, solution)

    def _write_solution(self, name: str, solution: LowRankUpdate | None) -> None:
        """Write a solution into an adapter.

        Unused rank gets B = 0 and a random A, so that gradient steps can still use it.
        """
        layer = self.layers[name]
        rank, width = layer.r[ADAPTER], input_width(layer)
        # The same on every worker, which each draw it for themselves.
        generator = torch.Generator().manual_seed(0)
        a_KD = torch.empty(rank, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
        b_OK = torch.zeros(output_width(layer), rank)
        if solution is not None:
            used = len(solution.a_KD)
            a_KD[:used], b_OK[:, :used] = solution.a_KD, solution.b_OK
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        # A convolution's LoRA holds [K, C, h, w] and [O, K, 1, 1].
        new_a, new_b = a_KD.view(full_shape(a)), b_OK.view(full_shape(b))
        if self._write is None:
            a.copy_(new_a)
            b.copy_(new_b)
        else:
            self._write(name, new_a, new_b)

    @contextmanager
    def _observing(
        self, names: Iterable[str], observe: Callable[[str, Tensor, Tensor], None]
    ) -> Iterator[None]:
        """Call `observe(name, input, output)` when one of these base layers runs within the block.

        Input and output are [B, S, D] and [B, S, O].
        """

        def call(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            observe(name, input_positions(module, inputs[0]), as_positions(output))

        with ExitStack() as stack:
            stack.enter_context(dropout_off(self.alignment.model))
            for name in names:
                hook = self.layers[name].base_layer.register_forward_hook(partial(call, name))
                stack.enter_context(hook_scope(hook))
            yield


def inverse_of(moments: Mapping[str, InputMoments], settings: SolveSettings) -> InverseMoments:
    """Factor the weighted second moments of one module's inputs over the retained sets."""
    weights = {"retain": 1.0, "utility": settings.utility_weight, "earlier": 1.0}
    weighted = [(weights[kind], sums) for kind, sums in moments.items()]
    return InverseMoments(weighted, settings.ridge)


class _Stage(NamedTuple):
    """Modules that are solved from one pass of the blocks below `stop`.

    If the stage advances, the hidden states then move on to `stop`.
    """

    names: list[str]
    stop: int
    advances: bool
