"""Similarity of each patch's own embedding to the phrase (MaskCLIP, SCLIP, ClearCLIP)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matex_pl.arguments import check_choices
from matex_pl.attribution.core.capture import replaced_attention
from matex_pl.attribution.core.stream import Stream, set_forward
from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads
from matex_pl.clip.towers import block_norm, not_explained, original
from matex_pl.maps import full_precision

Variant = Literal["maskclip", "sclip", "clearclip", "patch"]


class DenseSimilarity(TwoTowerMethod):
    """Cosine of each patch with the phrase, from an embedding of each patch (MaskCLIP, SCLIP, ClearCLIP).

    CLIP trains the class token alone, and the attention of the last block mixes the patches. The variants replace this
    attention. With q, k and v by head, the last block gives each patch

    - `maskclip` (Zhou, Loy and Dai 2022): `Proj(v)`, without attention, residual and perceptron
    - `sclip` (Wang, Mei and Yuille 2024): the whole block with `softmax(q q^T / sqrt(d)) + softmax(k k^T / sqrt(d))`
      as its attention
    - `clearclip` (Lan et al. 2024): `Proj(softmax(q q^T / sqrt(d)) v)`, without residual and perceptron
    - `patch`: its token as deployed

    Proj is the output projection of the attention, with the block's scale if it has one. The tower's head then reads
    each patch alone: it replaces the class token, or is the only token to average or to attend to. An attention pool
    therefore gives its value path.

    A ResNet has one attention, that of its pool, without residual and perceptron. `maskclip`, `sclip` and `clearclip`
    replace it for every cell of the last map. `patch` needs a stream of tokens and refuses a ResNet.

    Released code differs:

    - MaskCLIP keeps the residual and the perceptron of a transformer. In a ResNet it leaves out the positions of the
      pool.
    - MaskCLIP smooths by the keys and drops unlikely classes; SCLIP and ClearCLIP slide over large images. The map of
      one phrase has no classes, and the image is the input of the model.

    Args:
        variant: `maskclip`, `sclip`, `clearclip` or `patch`.
        kwargs: `target` and `references` of `TwoTowerMethod`.
    """

    supports_text: ClassVar[bool] = False
    reads: ClassVar[Reads] = "blocks"
    cost: ClassVar[str] = "1 forward, the last block once more, and the tower's head once per patch"

    def __init__(self, variant: Variant = "clearclip", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choices(DenseSimilarity.__init__, locals())
        self.variant = variant

    def trace(self, tower: Tower) -> Trace:
        """Run one forward, with the last attention computed once more by the variant."""
        if tower.blocks or self.variant == "patch":
            embedding, read = self._read_patches(tower)
        else:
            embedding, read = self._read_cells(tower)
        return Trace(embedding, lambda direction: Relevance((read @ direction[..., None])[..., 0]))

    def _read_patches(self, tower: Tower) -> tuple[Tensor, Tensor]:
        """Embedding of a transformer `(B, D)`, and unit embeddings of its patches `(B, N, D)`."""
        stream = tower.stream()
        again: list[Tensor] = []
        with stream.capture(), ExitStack() as stack:
            if self.variant != "patch":
                again = stack.enter_context(self._last_block_again(tower, stream))
            embedding = tower.encode()
        tokens = again[0] if again else stream.behind[-1]
        patches = tower.tokens_of(tokens)
        others = tokens.shape[1] - patches.shape[1]
        # One copy for each token that is not a patch, and one more: every token that the head reads is the patch.
        alone = patches.flatten(0, 1)[:, None].expand(-1, others + 1, -1)
        with stream.resumed(len(tower.blocks) - 1, alone):
            read = full_precision(tower.encode_stream(1)).unflatten(0, patches.shape[:2])
        return embedding, read

    @contextmanager
    def _last_block_again(self, tower: Tower, stream: Stream) -> Iterator[list[Tensor]]:
        """Run the last block of the forward inside the context once more; the list then holds its tokens `(B, n, C)`.

        Raises:
            NotImplementedError: The block does not attend once over all patches, or has no attention to separate.
        """
        found: list[Tensor] = []

        def run_again(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            lengths: list[int] = []

            def attend(fused: Callable[..., Tensor], query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                lengths.append(query.shape[2])
                return self._attend(fused, query, *args, **kwargs)

            with replaced_attention(attend), ExitStack() as stack:
                if self.variant != "sclip":
                    args = (stack.enter_context(_attention_alone(tower, stream)), *args[1:])
                # The hooks of the block belong to the first run.
                tokens = module.forward(*args, **kwargs)
            if len(lengths) != 1 or lengths[0] < tower.keep.shape[1]:
                reason = f"its last block calls the fused attention {len(lengths)} times, not once over all patches"
                raise NotImplementedError(not_explained("image", original(tower.clip.model.visual), reason))
            found.append(tokens[0] if isinstance(tokens, tuple) else tokens)

        with tower.blocks[-1].register_forward_hook(run_again, with_kwargs=True):
            yield found

    def _attend(
        self, fused: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Output of the variant's attention, `(B, h, n, d)`."""
        if self.variant == "maskclip":
            return value
        output = fused(query, query, value, *args, **kwargs)
        return output if self.variant == "clearclip" else output + fused(key, key, value, *args, **kwargs)

    def _read_cells(self, tower: Tower) -> tuple[Tensor, Tensor]:
        """Embedding of a ResNet `(B, D)`, and unit embeddings of the cells of its last map `(B, N, D)`."""
        outputs: list[Tensor] = []

        def attend(fused: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            # The pool computes the queries of all cells, though it reads one.
            outputs.append(self._attend(fused, *args, **kwargs))
            return fused(*args, **kwargs)

        with replaced_attention(attend):
            embedding = tower.encode()
        projection = original(tower.clip.model.visual).attnpool.c_proj
        cells = F.linear(outputs[0].transpose(1, 2).flatten(2), projection.weight, projection.bias)
        return embedding, F.normalize(full_precision(cells[:, 1:]), dim=-1)


@contextmanager
def _attention_alone(tower: Tower, stream: Stream) -> Iterator[Tensor]:
    """Input `(B, n, C)` for which the last block returns what its attention added to the tokens of its first run.

    The residual is 0, the norm returns the norm of the tokens, and the perceptron returns 0.

    Raises:
        NotImplementedError: The block has no norm before its attention, or no perceptron of a known name.
    """
    block, visual = tower.blocks[-1], original(tower.clip.model.visual)
    norm, normed, perceptron = block_norm(block), stream.normed.get(len(tower.blocks) - 1), getattr(block, "mlp", None)
    refusal = NotImplementedError(
        not_explained("image", visual, f"the attention of its last block ({type(block).__name__}) cannot be separated")
    )
    if norm is None or normed is None or perceptron is None:
        raise refusal
    blank = torch.zeros_like(stream.before[-1])

    def pass_normed(entering: Tensor) -> Tensor:
        # A norm behind the attention.
        if entering is not blank:
            raise refusal
        return normed

    with ExitStack() as stack:
        for module, forward in ((norm, pass_normed), (perceptron, torch.zeros_like)):
            stack.callback(set_forward, module, vars(module).get("forward"))
            set_forward(module, forward)
        yield blank
