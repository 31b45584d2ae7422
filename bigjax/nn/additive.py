"""Additive attention (Bahdanau et al. 2015), and a recurrent unit that attends at every step.

Legend: B texts, Q queries of each, S source positions, T steps, A attention features, K features of
a value, H state features, G = 3H gate features in the order reset, update, candidate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def additive_attention(
    query_BQA: jax.Array,
    keys_BSA: jax.Array,
    values_BSK: jax.Array,
    score_A: jax.Array,
    real_BS: jax.Array,
) -> jax.Array:
    """Returns contexts [B, Q, K]: softmax over s of `score · tanh(query + key_s)`, times values.

    Queries and keys are projected already (Bahdanau et al. 2015, appendix A.1.2). A position where
    `real_BS` (bool) is False is not seen; a text without any has a context of no meaning, but
    finite. Scores and softmax are float32 at least.
    """
    sum_BQSA = jnp.tanh(query_BQA[:, :, None] + keys_BSA[:, None])
    score_BQS = jnp.einsum('bqsa,a->bqs', sum_BQSA, score_A)
    score_BQS = score_BQS.astype(jnp.promote_types(score_BQS.dtype, jnp.float32))
    lowest = jnp.finfo(score_BQS.dtype).min
    weight_BQS = jax.nn.softmax(jnp.where(real_BS[:, None], score_BQS, lowest), axis=-1)
    return jnp.einsum('bqs,bsk->bqk', weight_BQS.astype(values_BSK.dtype), values_BSK)


class AttendingWeights(NamedTuple):
    """Weights of a gated recurrent unit that attends: see `attending_gru`.

    Attributes:
      query_HA: state to query; None, as the next, where there is no attention.
      score_A: what scores a query with a key.
      context_KG: context to gates.
      recurrent_HG: state to gates.
      bias_H: of the candidate's recurrent product.
    """

    query_HA: Any
    score_A: Any
    context_KG: jax.Array
    recurrent_HG: jax.Array
    bias_H: jax.Array


def attending_gru(
    z_BG: jax.Array,
    h_BH: jax.Array,
    keys_BSA: jax.Array,
    values_BSK: jax.Array,
    real_BS: jax.Array,
    weights: AttendingWeights,
) -> tuple[jax.Array, jax.Array]:
    """One step: attends from the state before it, then reads the input and what was seen.

    `z_BG` is the input's share of the gates. Rows may be a multiple of the source's B, those of one
    text together. Returns the new state [B, H] and the context [B, K].
    """
    query_BQA = (h_BH @ weights.query_HA).reshape(keys_BSA.shape[0], -1, keys_BSA.shape[-1])
    context_BQK = additive_attention(query_BQA, keys_BSA, values_BSK, weights.score_A, real_BS)
    context_BK = context_BQK.reshape(h_BH.shape[0], -1)
    return gru_cell(z_BG + context_BK @ weights.context_KG, h_BH, weights), context_BK


def gru_cell(z_BG: jax.Array, h_BH: jax.Array, weights: AttendingWeights) -> jax.Array:
    """One step of `bigjax.nn.gru.gru_scan`, whose input's share `z_BG` has its bias in it."""
    H = h_BH.shape[-1]
    s_BG = h_BH @ weights.recurrent_HG
    r_BH, v_BH = jnp.split(jax.nn.sigmoid(z_BG[:, : 2 * H] + s_BG[:, : 2 * H]), 2, axis=-1)
    n_BH = jnp.tanh(z_BG[:, 2 * H :] + r_BH * (s_BG[:, 2 * H :] + weights.bias_H[None]))
    return n_BH + v_BH * (h_BH - n_BH)


def attending_gru_scan(
    z_TBG: jax.Array,
    h_BH: jax.Array,
    keys_BSA: jax.Array,
    values_BSK: jax.Array,
    real_BS: jax.Array,
    weights: AttendingWeights,
) -> tuple[jax.Array, jax.Array]:
    """Returns the states [T, B, H] and contexts [T, B, K] of `attending_gru` over all steps."""

    def step(h_BH, z_BG):
        h_BH, context_BK = attending_gru(z_BG, h_BH, keys_BSA, values_BSK, real_BS, weights)
        return h_BH, (h_BH, context_BK)

    return lax.scan(step, h_BH, z_TBG)[1]
