"""A model's blocks: finding them, and running only those that are needed.

Parts of the model are run through the model's *own* forward: blocks outside the wanted range are bypassed for the
call, so that masks, rotary embeddings and every architecture's particulars stay the model's business.

Shapes: B rows, T tokens, D features, N selected positions, V vocabulary or classes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from rfa.batch import UnlearnBatch


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a model's transformer blocks, or of a convolutional network's stages.

    It is the outermost `ModuleList` that is as long as the model's configuration says.

    Raises:
        ValueError: the model has no such list.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    depth = getattr(text, "num_hidden_layers", None) or len(getattr(text, "depths", ()))
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            lists.append((name, module))
    if not lists:
        raise ValueError(
            f"model: {type(model).__name__} has no list of {depth} blocks; "
            "choose a decoder or an encoder that is made of blocks"
        )
    return min(lists, key=lambda item: item[0].count("."))


def block_range(model: nn.Module, name: str) -> tuple[int, int]:
    """Return the first and the last block that must run to reach the module `name`.

    A module inside a block needs only that block. One below the blocks counts as block 0. One above them needs every
    block, so that `last` is the number of blocks.
    """
    prefix, blocks = find_blocks(model)
    if f"{prefix}." in name:
        index = int(name.split(f"{prefix}.", 1)[1].split(".", 1)[0])
        return index, index
    names = [other for other, _ in model.named_modules()]
    is_below = names.index(name) < names.index(prefix)
    return (0, 0) if is_below else (len(blocks) - 1, len(blocks))


class BlocksOutput(NamedTuple):
    """Hidden states after the last block that was run, and logits where they were asked for."""

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
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                if not start <= index < stop:
                    stack.enter_context(_replaced_forward(block, self._bypass))
            last = stack.enter_context(self._recorded_output(self.blocks[stop - 1]))
            if hidden_BTD is not None:
                inject = _hidden_injector(hidden_BTD)
                first: nn.Module = self.blocks[start]
                hook = first.register_forward_pre_hook(inject, prepend=True, with_kwargs=True)
                stack.enter_context(hook_scope(hook))
            logits_NV = self._run(batch, logits_at_BT)
        return BlocksOutput(last[0], logits_NV)

    def _run(self, batch: UnlearnBatch, logits_at_BT: Tensor | None) -> Tensor | None:
        """Call the model, or all of it below the head where no logits are wanted."""
        inputs = batch.model_inputs(next(self.model.parameters()).dtype)
        if logits_at_BT is None:
            self.backbone(**inputs)
            return None
        if batch.classified:
            return self.model(**inputs).logits[logits_at_BT[:, 0]]
        head: Any = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]

        def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            # The head of a spread model is on another device than the batch; a mask may be on the CPU for any.
            return (args[0][logits_at_BT.cpu()][None],)

        with hook_scope(head.register_forward_pre_hook(select)):
            return self.model(**inputs).logits[0]

    @contextmanager
    def _recorded_output(self, block: nn.Module) -> Iterator[list[Tensor]]:
        """Within the scope, append the hidden states that `block` returns."""
        outputs: list[Tensor] = []

        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)
            outputs.append(output[0] if self._returns_tuple else output)

        with hook_scope(block.register_forward_hook(record)):
            yield outputs

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
    """Remove a registered hook at the end of the block."""
    try:
        yield
    finally:
        handle.remove()
