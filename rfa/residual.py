"""Reading residual features off a running model, and running only the blocks that are needed.

Two readings, two different losses: `local` is what each adapted module's LoRA adds, `drift` is how far a block's output
moved from the base model's. They agree exactly at the lowest adapted module.

Parts of the model are run through the model's *own* forward: blocks outside the wanted range are bypassed for the
call, so that masks, rotary embeddings and every architecture's particulars stay the model's business.

Shapes: B rows, T tokens, D features, N chosen tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from rfa.adapters import ADAPTER, find_blocks, lora_layers


class BlocksOutput(NamedTuple):
    """What a partial forward gives: hidden states after the last block run, and logits where they were asked for."""

    hidden_BTD: Tensor
    logits_NV: Tensor | None


class BlockRunner:
    """Runs blocks `start` to `stop` of a causal language model through its own forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.backbone: nn.Module = getattr(model, str(model.base_model_prefix))
        self.blocks = find_blocks(model)[1]
        self._returns_tuple = False

    def __call__(
        self,
        input_ids_BT: Tensor,
        attention_BT: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        hidden_BTD: Tensor | None = None,
        logits_at_BT: Tensor | None = None,
    ) -> BlocksOutput:
        """Run blocks `start` <= i < `stop`, from `hidden_BTD` when `start` is above 0.

        Logits are computed at the true positions of `logits_at_BT` alone, and only if it is given (then `stop` must be
        the depth): no vocabulary-sized tensor otherwise.
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
            stack.enter_context(removed(self.blocks[stop - 1].register_forward_hook(keep_output)))
            if hidden_BTD is not None:
                inject = _hidden_injector(hidden_BTD)
                stack.enter_context(
                    removed(self.blocks[start].register_forward_pre_hook(inject, prepend=True, with_kwargs=True))
                )
            arguments = {"input_ids": input_ids_BT, "attention_mask": attention_BT.long(), "use_cache": False}
            if logits_at_BT is None:
                self.backbone(**arguments)
                return BlocksOutput(last[0], None)
            head: Any = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
            stack.enter_context(
                removed(head.register_forward_pre_hook(lambda _m, args: (args[0][logits_at_BT][None],)))
            )
            logits_NV = self.model(**arguments).logits[0]
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
def removed(handle: Any) -> Iterator[None]:
    """A registered hook, within the block only."""
    try:
        yield
    finally:
        handle.remove()


class Taps:
    """Hooks at the aligned places: adapted modules (`local`) or the blocks that hold them (`drift`).

    The hooks only look; while nobody records (a teacher pass, a recomputation by activation checkpointing) they do
    nothing. `close` takes them off a model that lives on.
    """

    def __init__(self, model: nn.Module, residual: str) -> None:
        prefix, blocks = find_blocks(model)
        modules = lora_layers(model)
        holders = sorted({int(name.split(f"{prefix}.", 1)[1].split(".", 1)[0]) for name, _ in modules})
        self.first_block, self.last_block = holders[0], holders[-1]
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
            self.names = [f"{prefix}.{index}" for index in range(self.first_block, self.last_block + 1)]
            for name, index in zip(self.names, range(self.first_block, self.last_block + 1), strict=True):
                self._watch(blocks[index], name, is_residual=False)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, name: str, *, is_residual: bool) -> None:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._base is not None:
                kept = output[0] if isinstance(output, tuple) else output
                (self._added if is_residual else self._base)[name] = kept

        self._hooks.append(module.register_forward_hook(record))

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Within: each place's output (`drift`) or its base layer's output (`local`), by name, once run."""
        self._base, self._added = {}, {}
        try:
            yield self._base
        finally:
            self._base = None

    def residuals(self) -> dict[str, Tensor]:
        """What LoRA added at each place in the last recording (`local` only)."""
        assert self.residual == "local"
        return {name: added * self._layers[name].scaling[ADAPTER] for name, added in self._added.items()}
