"""Residual stream of a tower: tokens before and after each block, and forwards that start after a block."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from matex_pl.clip.towers import block_norm


class Stream:
    """Tokens `(B, n, C)` of one tower before and after each block, and after each block's first norm.

    Args:
        blocks: Transformer blocks, first block first.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.before: list[Tensor] = []
        self.behind: list[Tensor] = []
        self.normed: dict[int, Tensor] = {}
        self._packed = False

    @contextmanager
    def capture(self, cut: Collection[int] = ()) -> Iterator[None]:
        """Record the tokens of the single forward inside the context.

        Args:
            cut: Indices of the blocks whose input is detached, where a backward ends. Grad mode is on from the first of
                them until the context exits.
        """
        self.before, self.behind, self.normed = [], [], {}
        with ExitStack() as stack, torch.no_grad():
            for index, block in enumerate(self.blocks):
                stack.enter_context(block.register_forward_pre_hook(self._enter(index in cut)))
                stack.enter_context(block.register_forward_hook(self._leave))
                norm = block_norm(block)
                if norm is not None:
                    stack.enter_context(norm.register_forward_hook(partial(self._norm, index)))
            yield

    def _enter(self, cut: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens = args[0]
            if cut:
                torch.set_grad_enabled(True)
                tokens = tokens.detach().requires_grad_()
            self.before.append(tokens)
            return tokens, *args[1:]

        return hook

    def _norm(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.normed[index] = output

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # BERT's blocks returned a tuple until transformers 4.57.
        self._packed = isinstance(output, tuple)
        self.behind.append(output[0] if self._packed else output)

    @contextmanager
    def resumed(self, behind: int, tokens: Tensor) -> Iterator[None]:
        """Run the forwards inside the context from a block on; call it after `capture`.

        The blocks up to it return `tokens` for any input. The input of a forward needs the same number of samples only
        if the tower pools by its input (text).

        Args:
            behind: Index of the last block that does not run; -1 if all blocks run.
            tokens: `(B, n, C)` output of that block, or input of the first block, truncated to the length at which the
                tower runs.
        """

        def pass_on(entering: Tensor, *_: Any, **__: Any) -> Any:
            kept = tokens[:, : entering.shape[1]]
            return (kept,) if self._packed else kept

        with ExitStack() as stack:
            if behind < 0:
                stack.enter_context(
                    self.blocks[0].register_forward_pre_hook(lambda _, args: (pass_on(*args), *args[1:]))
                )
            for block in self.blocks[: behind + 1]:
                stack.callback(set_forward, block, vars(block).get("forward"))
                set_forward(block, pass_on)
            yield


@contextmanager
def output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Record the output of a layer, one tensor, in the single forward inside the context; a backward ends there.

    Grad mode is on from there until the context exits.
    """
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        torch.set_grad_enabled(True)
        is_packed = isinstance(output, tuple)
        outputs.append((output[0] if is_packed else output).detach().requires_grad_())
        return (outputs[-1], *output[1:]) if is_packed else outputs[-1]

    with torch.no_grad(), layer.register_forward_hook(hook):
        yield outputs


def set_forward(block: nn.Module, forward: Any) -> None:
    """Replace the forward of a block, or restore that of its class if `forward` is None."""
    if forward is None:
        del block.forward
    else:
        block.forward = forward
