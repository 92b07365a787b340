"""Find a model's blocks, and run only those that are needed.

Parts of the model are run through the model's *own* forward, with the blocks outside the range
bypassed for the call. So masks, rotary embeddings and every architecture's particulars stay the
model's business.

Shapes: B rows, T tokens, D features, N selected positions, V vocabulary or classes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from rfa.batch import UnlearnBatch


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a model's blocks (a convolutional network's stages).

    It is the outermost `ModuleList` whose length is the depth in the model's configuration.

    Raises:
        ValueError: the model has no such list.
    """
    config = getattr(model, "config", None)
    # A model of several parts has the depth in the configuration of its text part.
    text = None if config is None else config.get_text_config()
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

    A module inside a block needs only that block. One below the blocks counts as block 0. One above
    them needs every block, so that `last` is the number of blocks.
    """
    prefix, blocks = find_blocks(model)
    if f"{prefix}." in name:
        index = int(name.split(f"{prefix}.", 1)[1].split(".", 1)[0])
        return index, index
    names = [other for other, _ in model.named_modules()]
    # The modules' order is that of their registration, in these models also that of their calls.
    if names.index(name) < names.index(prefix):
        return 0, 0
    return len(blocks) - 1, len(blocks)


class BlocksOutput(NamedTuple):
    """Hidden states after the last block that was run, and logits if they were asked for."""

    hidden_BTD: Tensor
    logits_NV: Tensor | None


class BlockRunner:
    """Run a range of blocks of a language model or a classifier through its own forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        prefix, self.blocks = find_blocks(model)
        # Some models lack the part that they name as their backbone (Llama 4): it has the blocks.
        backbone = getattr(model, str(model.base_model_prefix), None)
        if backbone is None:
            backbone = model.get_submodule(prefix.partition(".")[0])
        self.backbone: nn.Module = backbone
        self._num_outputs: int | None = None

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

        Logits are computed only if `logits_at_BT` is given, and only at its true positions, as a
        tensor of all tokens times the vocabulary may not fit in memory. Then `stop` must be the
        depth. Classified rows have one position each, their first.
        """
        stop = len(self.blocks) if stop is None else stop
        assert (start == 0) == (hidden_BTD is None)
        assert 0 <= start < stop <= len(self.blocks)
        assert logits_at_BT is None or stop == len(self.blocks)
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                if not start <= index < stop:
                    stack.enter_context(_replaced_forward(block, self._bypass))
            outputs: list[Tensor] = []
            record = partial(self._record, outputs)
            stack.enter_context(hook_scope(self.blocks[stop - 1].register_forward_hook(record)))
            if hidden_BTD is not None:
                first: nn.Module = self.blocks[start]
                inject = partial(_inject, hidden_BTD)
                hook = first.register_forward_pre_hook(inject, prepend=True, with_kwargs=True)
                stack.enter_context(hook_scope(hook))
            logits_NV = self._run(batch, logits_at_BT)
        return BlocksOutput(outputs[0], logits_NV)

    def _run(self, batch: UnlearnBatch, logits_at_BT: Tensor | None) -> Tensor | None:
        """Call the model, or without logits only the part below its head."""
        inputs = batch.model_inputs(next(self.model.parameters()).dtype)
        if logits_at_BT is None:
            self.backbone(**inputs)
            return None
        if batch.classified:
            return self.model(**inputs).logits[logits_at_BT[:, 0]]
        head: Any = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]

        def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            # The head of a model spread over devices may be on another one than the batch. A mask
            # on the CPU selects from a tensor on any device.
            return (args[0][logits_at_BT.cpu()][None],)

        with hook_scope(head.register_forward_pre_hook(select)):
            return self.model(**inputs).logits[0]

    def _record(self, outputs: list[Tensor], _module: nn.Module, _args: Any, output: Any) -> None:
        """Append the hidden states that a block returns. This is a forward hook."""
        # Architectures differ in whether a block returns a tuple, and `_bypass` must do the same.
        is_tuple = isinstance(output, tuple)
        self._num_outputs = len(output) if is_tuple else None
        outputs.append(output[0] if is_tuple else output)

    def _bypass(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """Return a block's input as its output. This stands in for the block's forward."""
        if self._num_outputs is None:
            return hidden_states
        return (hidden_states, *[None] * (self._num_outputs - 1))


def _inject(
    hidden_BTD: Tensor, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the hidden states that a block is called with. This is a forward pre-hook."""
    if args:
        return (hidden_BTD, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden_BTD}


def set_recomputing(block: Any, mode: bool) -> None:
    """Set a block's training flag where it recomputes activations, and unset it elsewhere.

    transformers recomputes where the flag is set. Some blocks also drop features out by it, as
    OPT's do, and then student and teacher would differ. So the block runs as in evaluation.
    """
    block.training = mode and getattr(block, "gradient_checkpointing", False)
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)
    if block.training and checkpoint is not None and not isinstance(checkpoint, _Recomputation):
        block._gradient_checkpointing_func = _Recomputation(block, checkpoint)


class _Recomputation:
    """Checkpoint a block whose own forward runs as in evaluation, at first and again."""

    def __init__(self, block: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.block, self.checkpoint = block, checkpoint

    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        return self.checkpoint(partial(self._evaluate, forward), *args)

    def _evaluate(self, forward: Callable[..., Any], *args: Any) -> Any:
        self.block.training = False
        try:
            return forward(*args)
        finally:
            self.block.training = True


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another function as its forward within the scope."""
    # Accelerate sets an attribute `forward` on modules that it spreads over devices. It must
    # return.
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
    """Remove a registered hook at the end of the scope."""
    try:
        yield
    finally:
        handle.remove()


def call_order(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> list[str]:
    """Return the names of the modules in the order in which `run` first calls them.

    A model may declare its modules in another order than its forward pass has.
    """
    called: dict[str, None] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
            stack.enter_context(hook_scope(hook))
        run()
    return list(called)
