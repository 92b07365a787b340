"""Reading residual features off a running model, and running only the blocks that are needed.

Two readings, two different losses: `local` is what each adapted module's LoRA adds, `drift` is how far a block's output
moved from the base model's. They agree exactly at the lowest adapted module.

Parts of the model are run through the model's *own* forward: blocks outside the wanted range are bypassed for the
call, so that masks, rotary embeddings and every architecture's particulars stay the model's business.

Shapes: B rows, T tokens, S places, D features, C channels, H height, W width, N chosen tokens, V vocabulary or classes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from rfa.adapters import ADAPTER, block_range, find_blocks, lora_layers
from rfa.batch import UnlearnBatch


class BlocksOutput(NamedTuple):
    """What a partial forward gives: hidden states after the last block run, and logits where they were asked for."""

    hidden_BTD: Tensor
    logits_NV: Tensor | None


class BlockRunner:
    """Runs blocks `start` to `stop` of a language model or a classifier through its own forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.backbone: nn.Module = getattr(model, str(model.base_model_prefix))
        self.blocks = find_blocks(model)[1]
        self._returns_tuple = False

    def __call__(
        self,
        batch: UnlearnBatch,
        *,
        start: int = 0,
        stop: int | None = None,
        hidden_BTD: Tensor | None = None,
        logits_at_BT: Tensor | None = None,
    ) -> BlocksOutput:
        """Run blocks `start` <= i < `stop`, from `hidden_BTD` when `start` is above 0.

        Logits are computed at the true positions of `logits_at_BT` alone, and only if it is given (then `stop` must be
        the depth): no vocabulary-sized tensor otherwise. Classified rows have one position each, their first.
        """
        stop = len(self.blocks) if stop is None else stop
        assert (start == 0) == (hidden_BTD is None)
        assert 0 <= start < stop <= len(self.blocks)
        assert logits_at_BT is None or stop == len(self.blocks)
        last: list[Tensor] = []

        def keep_output(_module: nn.Module, _args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)
            last.append(output[0] if self._returns_tuple else output)

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                if not start <= index < stop:
                    stack.enter_context(_replaced_forward(block, self._bypass))
            stack.enter_context(
                hook_scope(self.blocks[stop - 1].register_forward_hook(keep_output))
            )
            if hidden_BTD is not None:
                inject = _hidden_injector(hidden_BTD)
                stack.enter_context(
                    hook_scope(
                        self.blocks[start].register_forward_pre_hook(
                            inject, prepend=True, with_kwargs=True
                        )
                    )
                )
            inputs = batch.model_inputs(next(self.model.parameters()).dtype)
            if logits_at_BT is None:
                self.backbone(**inputs)
                return BlocksOutput(last[0], None)
            if batch.classified:
                logits_BV = self.model(**inputs).logits
                return BlocksOutput(last[0], logits_BV[logits_at_BT[:, 0]])
            head: Any = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]

            def choose(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
                return (
                    args[0][logits_at_BT.to(args[0].device)][None],
                )  # a spread model's head is elsewhere

            stack.enter_context(hook_scope(head.register_forward_pre_hook(choose)))
            logits_NV = self.model(**inputs).logits[0]
            return BlocksOutput(last[0], logits_NV)

    def _bypass(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states,) if self._returns_tuple else hidden_states


def _hidden_injector(hidden_BTD: Tensor) -> Callable[..., Any]:
    def inject(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden_BTD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_BTD}

    return inject


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


@contextmanager
def hook_scope(handle: Any) -> Iterator[None]:
    """A registered hook, within the block only."""
    try:
        yield
    finally:
        handle.remove()


def as_positions(feature: Tensor) -> Tensor:
    """Features [B, T, D], a feature map [B, C, H, W] or pooled ones [B, D] as features at places, [B, S, D]."""
    if feature.ndim == 4:
        return feature.flatten(2).transpose(1, 2)
    return feature[:, None] if feature.ndim == 2 else feature


class FeatureHooks:
    """Hooks at the aligned places: adapted modules (`local`) or the blocks that hold them (`drift`).

    The hooks only look; while nobody records (a teacher pass, a recomputation by activation checkpointing) they do
    nothing. `close` takes them off a model that lives on.
    """

    def __init__(self, model: nn.Module, residual: str) -> None:
        prefix, blocks = find_blocks(model)
        modules = lora_layers(model)
        holders = [block_range(model, name) for name, _ in modules]
        self.first_block, self.last_block = (
            min(first for first, _ in holders),
            max(last for _, last in holders),
        )
        self.reaches_head = self.last_block == len(
            blocks
        )  # what stands above all blocks runs with the logits
        self.last_block = min(self.last_block, len(blocks) - 1)
        self.residual = residual
        self._base: dict[str, Tensor] | None = None
        self._added: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        if residual == "local":
            self.names = [name for name, _ in modules]
            self._layers = dict(modules)
            for name, layer in modules:
                self._watch(layer.base_layer, name, is_residual=False)
                self._watch(layer.lora_B[ADAPTER], name, is_residual=True)
        else:
            self.names = [
                f"{prefix}.{index}" for index in range(self.first_block, self.last_block + 1)
            ]
            for name, index in zip(
                self.names, range(self.first_block, self.last_block + 1), strict=True
            ):
                self._watch(blocks[index], name, is_residual=False)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, name: str, *, is_residual: bool) -> None:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._base is not None:
                kept = output[0] if isinstance(output, tuple) else output
                (self._added if is_residual else self._base)[name] = as_positions(kept)

        self._hooks.append(module.register_forward_hook(record))

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Within: each place's output (`drift`) or its base layer's output (`local`), by name, once run: [B, S, D]."""
        self._base, self._added = {}, {}
        try:
            yield self._base
        finally:
            self._base = None

    def residuals(self) -> dict[str, Tensor]:
        """What LoRA added at each place in the last recording (`local` only)."""
        assert self.residual == "local"
        return {
            name: added * self._layers[name].scaling[ADAPTER] for name, added in self._added.items()
        }
