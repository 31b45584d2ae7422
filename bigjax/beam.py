"""Greedy and beam search over any model that gives the next token's logits (Wu et al. 2016, §7).

Legend: B texts, K beams, N = B·K rows with the beams of a text together, T positions, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# (token_N, position, cache) -> (logits_NV, cache): reads the token at `position` of each row.
Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Found(NamedTuple):
    """The best text found for each row.

    Attributes:
      tokens_BT: int32, what follows the first token, the end included; -1 behind the end.
      score_B: float32, log-probability over the length penalty.
    """

    tokens_BT: jax.Array
    score_B: jax.Array


def length_penalty(length: jax.typing.ArrayLike, alpha: float) -> jax.Array:
    """((5 + n) / 6)^alpha for n tokens, the end included (Wu et al. 2016, eq. 14)."""
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def greedy_search(
    step: Step,
    cache: Any,
    *,
    rows: int,
    max_length: int,
    begin: int,
    end: int,
    alpha: float = 0.0,
    real_B: jax.Array | None = None,
) -> Found:
    """Takes the likeliest token each time until every row has ended.

    Arguments are those of `beam_search`; `alpha` only scales the scores.
    """

    def go_on(carry) -> jax.Array:
        position, _, done_B, *_ = carry
        return (position < max_length) & ~jnp.all(done_B)

    def extend(carry):
        position, token_B, done_B, tokens_BT, logp_B, length_B, cache = carry
        logits_BV, cache = step(token_B, position, cache)
        logp_BV = _next_log_probability(logits_BV, position, max_length, end)
        token_B = jnp.argmax(logp_BV, axis=-1).astype(jnp.int32)
        best_B = jnp.max(logp_BV, axis=-1)
        tokens_BT = tokens_BT.at[:, position].set(jnp.where(done_B, -1, token_B))
        logp_B = logp_B + jnp.where(done_B, 0.0, best_B)
        length_B = length_B + jnp.where(done_B, 0, 1)
        return position + 1, token_B, done_B | (token_B == end), tokens_BT, logp_B, length_B, cache

    carry = (
        jnp.int32(0),
        jnp.full((rows,), begin, jnp.int32),
        jnp.zeros((rows,), bool) if real_B is None else ~real_B,
        jnp.full((rows, max_length), -1, jnp.int32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows,), jnp.int32),
        cache,
    )
    _, _, _, tokens_BT, logp_B, length_B, _ = lax.while_loop(go_on, extend, carry)
    return Found(tokens_BT, logp_B / length_penalty(length_B, alpha))


class _Beams(NamedTuple):
    """What the loop of `beam_search` carries: open texts, and the best one that has ended."""

    position: jax.Array
    open_BKT: jax.Array
    logp_BK: jax.Array
    ended: Found
    cache: Any


def beam_search(
    step: Step,
    cache: Any,
    *,
    rows: int,
    beam: int,
    max_length: int,
    begin: int,
    end: int,
    alpha: float = 0.6,
    cache_axis: int = 0,
    real_B: jax.Array | None = None,
    early: bool = True,
) -> Found:
    """Returns the text with the highest log P(text) / ((5 + n) / 6)^alpha that the search meets.

    Of all extensions of the K open texts the best K count: those that end are rated, and the K
    best that do not end stay open. Every text ends: at the last position the end is all there is
    to choose. With as many beams as there are texts the search is exhaustive.

    Args:
      step: gives the next token's logits.
      cache: what `step` reads and returns, of rows * beam rows, for a text that is empty so far.
      rows: B, texts.
      beam: K, open texts of each.
      max_length: most tokens of a text, the end included.
      begin: the token every text starts from.
      end: the token that ends it.
      alpha: exponent of the length penalty; 0 prefers short texts, 1 is near the mean.
      cache_axis: axis of the cache's arrays that counts rows.
      real_B: bool; a row where it is False is not waited for. None is all True.
      early: stops as soon as no open text can become better than the best ended one; changes the
        time, not the result.
    """
    B, K, T = rows, beam, max_length
    # An open text can only lose probability, and its penalty is at most that of T tokens.
    most = length_penalty(T if alpha >= 0 else 1, alpha)

    def go_on(beams: _Beams) -> jax.Array:
        settled_B = beams.ended.score_B >= jnp.max(beams.logp_BK, axis=1) / most
        if not early:
            settled_B = jnp.zeros_like(settled_B)
        if real_B is not None:
            settled_B |= ~real_B
        return (beams.position < T) & ~jnp.all(settled_B)

    def extend(beams: _Beams) -> _Beams:
        position = beams.position
        before_BK = lax.dynamic_index_in_dim(beams.open_BKT, position, 2, keepdims=False)
        logits_NV, cache = step(before_BK.reshape(-1), position, beams.cache)
        logp_NV = _next_log_probability(logits_NV, position, T, end)
        V = logp_NV.shape[-1]
        total_BKV = beams.logp_BK[..., None] + logp_NV.reshape(B, K, V)
        # Each beam has one extension that ends: among the best 2K there are K that do not.
        best_BX, index_BX = lax.top_k(total_BKV.reshape(B, K * V), min(2 * K, K * V))
        beam_BX, token_BX = index_BX // V, (index_BX % V).astype(jnp.int32)
        ends_BX = token_BX == end

        rated_BK = jnp.where(ends_BX, best_BX, -jnp.inf)[:, :K]
        winner_B1 = jnp.argmax(rated_BK, axis=1)[:, None]
        score_B = _pick(rated_BK, winner_B1)[:, 0] / length_penalty(position + 1, alpha)
        text_BT = _pick(beams.open_BKT, _pick(beam_BX, winner_B1))[:, 0, 1:]
        text_BT = text_BT.at[:, position].set(end)
        better_B = score_B > beams.ended.score_B
        ended = Found(
            jnp.where(better_B[:, None], text_BT, beams.ended.tokens_BT),
            jnp.where(better_B, score_B, beams.ended.score_B),
        )

        logp_BK, chosen_BK = lax.top_k(jnp.where(ends_BX, -jnp.inf, best_BX), K)
        beam_BK = _pick(beam_BX, chosen_BK)
        open_BKT = _pick(beams.open_BKT, beam_BK)
        open_BKT = open_BKT.at[:, :, position + 1].set(_pick(token_BX, chosen_BK))
        cache = jax.tree.map(lambda x: _reorder(x, beam_BK, cache_axis), cache)
        return _Beams(position + 1, open_BKT, logp_BK, ended, cache)

    empty_BT = jnp.full((B, T), -1, jnp.int32)
    beams = _Beams(
        jnp.int32(0),
        # The first token, and those after it.
        jnp.full((B, K, T + 1), -1, jnp.int32).at[:, :, 0].set(begin),
        # The empty text is there once.
        jnp.full((B, K), -jnp.inf).at[:, 0].set(0.0),
        Found(empty_BT, jnp.full((B,), -jnp.inf)),
        cache,
    )
    return lax.while_loop(go_on, extend, beams).ended


def _next_log_probability(logits_NV: jax.Array, position, max_length: int, end: int) -> jax.Array:
    """Log-probabilities of the next token; at the last position, of nothing but the end."""
    logp_NV = jax.nn.log_softmax(logits_NV.astype(jnp.float32), axis=-1)
    is_end_V = jnp.arange(logits_NV.shape[-1]) == end
    return jnp.where((position < max_length - 1) | is_end_V[None], logp_NV, -jnp.inf)


def _pick(x: jax.Array, index_BK: jax.Array) -> jax.Array:
    """Returns x[b, index[b, k]] for x [B, J, …]."""
    index = index_BK.reshape(*index_BK.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _reorder(x: jax.Array, beam_BK: jax.Array, axis: int) -> jax.Array:
    """Moves the rows of a cache array to the beams that took them over."""
    x = jnp.moveaxis(x, axis, 0)
    moved = _pick(x.reshape(*beam_BK.shape, *x.shape[1:]), beam_BK).reshape(x.shape)
    return jnp.moveaxis(moved, 0, axis)
