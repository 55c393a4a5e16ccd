"""A Transformer over grids of tokens."""

import flax.linen as nn
import jax.numpy as jnp

from jaxcl.masked_prior import smallest_radix, to_digits
from jaxcl.nets.attention import dot_product_attention
from jaxcl.nets.layer_norm import LayerNorm
from jaxcl.typing import Array, bad_argument, check_rank

_INITIAL = nn.initializers.normal(1.0)  # of embeddings: as large as what layers add to them


class TokenTransformer(nn.Module):
    """A bidirectional Transformer (Vaswani et al. 2017) with normalisation first, for `masked_prior`: tokens to logits.

    Tokens [B, T] lie in [0, K], and K stands for one that is hidden; labels [B] in [0, classes], the last of which
    stands for no class. Logits are [B, T, K] of `digits=1`, else [B, T, F, radix] of the F digits of an index in the
    smallest radix that has room for K codes. The digits' embeddings are summed, and each has a head of its own, which
    sees the context and not the other digits (MAGVIT-v2, Yu et al. 2024, section 3.2; without its tied weights).
    Open-MAGVIT2's predict one digit after the other.

    A position's vector is the sum of what its token, its place and the class are embedded to; MaskGIT has the class as
    a token of its own. There is no dropout, and there are no convolutions: a compiled loop does not slow it down on
    CPU. T is that of the tokens given to `init`.
    """

    codebook_size: int  # K
    classes: int = 0
    width: int = 128  # D
    layers: int = 4
    heads: int = 4
    digits: int = 1  # F

    @nn.compact
    def __call__(self, tokens: Array, labels: Array) -> Array:
        """Logits [B, T, K] or [B, T, F, radix] of tokens [B, T] and labels [B]."""
        check_rank("tokens", tokens, 2)
        check_rank("labels", labels, 1)
        if self.width % self.heads:
            raise bad_argument("width", self.width, f"pass a multiple of heads, which are {self.heads}")
        radix = smallest_radix(self.codebook_size, self.digits)
        hidden = tokens == self.codebook_size
        x = self.param("mask", _INITIAL, (self.width,)) * hidden[..., None]
        parts = to_digits(tokens, radix, self.digits)
        for number in range(self.digits):
            part = _embed(radix, self.width, f"digit_{number}")(parts[..., number])
            x += jnp.where(hidden[..., None], 0, part)
        x += self.param("positions", _INITIAL, (tokens.shape[1], self.width))
        x += _embed(self.classes + 1, self.width, "class")(labels)[:, None]
        for _ in range(self.layers):
            x = _Block(self.heads)(x)
        logits = nn.Dense(self.digits * radix)(LayerNorm()(x))
        return logits if self.digits == 1 else logits.reshape(*tokens.shape, self.digits, radix)


class _Block(nn.Module):
    """Attention of all positions to all, then two layers at each; a way around both."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, length, width = x.shape
        projected = nn.Dense(3 * width)(LayerNorm()(x))
        query, key, value = jnp.moveaxis(projected.reshape(batch, length, 3, self.heads, -1), 2, 0)
        attended = dot_product_attention(query, key, value)
        x += nn.Dense(width)(attended.reshape(x.shape))
        inner = nn.gelu(nn.Dense(4 * width)(LayerNorm()(x)))
        return x + nn.Dense(width)(inner)


def _embed(entries: int, width: int, name: str) -> nn.Embed:
    return nn.Embed(entries, width, embedding_init=_INITIAL, name=name)
