"""Drawing text from a language model, token by token, with a key-value cache.

Legend: B texts, T tokens so far, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigjax.experiment import Sample, UsageError
from bigjax.sharding import readable
from bigjax.task import Decoder


def filter_logits(
    logits_BV: jax.Array, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> jax.Array:
    """Returns logits with the tokens that may not be drawn at -inf; the likeliest always may.

    Args:
      logits_BV: float32, already divided by the temperature.
      top_k: keep the k likeliest tokens; 0 is off. Ties with the k-th are kept.
      top_p: keep the likeliest tokens until their probability reaches this (Holtzman et al. 2020).
      min_p: keep tokens with at least this share of the likeliest one's probability (Nguyen et
        al. 2024).
    """
    kept_BV = logits_BV
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        kept_BV = jnp.where(kept_BV < kth_B1, -jnp.inf, kept_BV)
    if top_p < 1.0:
        descending_BV = -jnp.sort(-kept_BV, axis=-1)
        probability_BV = jax.nn.softmax(descending_BV, axis=-1)
        # A token stays if those before it have not yet reached top_p: the first always does.
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        lowest_B1 = jnp.min(
            jnp.where(before_BV < top_p, descending_BV, jnp.inf), axis=-1, keepdims=True
        )
        kept_BV = jnp.where(kept_BV < lowest_B1, -jnp.inf, kept_BV)
    if min_p > 0.0:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p)
        kept_BV = jnp.where(logits_BV < floor_B1, -jnp.inf, kept_BV)
    return kept_BV


def draw(key: jax.Array, logits_BV: jax.Array, sample: Sample) -> jax.Array:
    """Returns one token int32 [B] a row; temperature 0 takes the likeliest."""
    logits_BV = logits_BV.astype(jnp.float32)
    if sample.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    kept_BV = filter_logits(
        logits_BV / sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        min_p=sample.min_p,
    )
    return jax.random.categorical(key, kept_BV).astype(jnp.int32)


def windows(prompt: int, length: int, limit: int) -> list[tuple[int, int]]:
    """Returns the (context, new) tokens of each stretch that one cache can hold.

    Learned positions cannot slide. When the cache is full, the last half of the text is read anew
    into an empty one, so a model of `limit` positions goes on for ever with `limit // 2` or more
    tokens in view. The last stretch may draw more than is wanted: equal stretches compile once.

    Args:
      prompt: tokens given.
      length: tokens to generate.
      limit: positions the model has, at least 2.
    """
    context = prompt if prompt < limit else limit // 2
    # The token drawn from the last position is not read any more: one more than fits is new.
    stretches = [(context, min(length, limit - context + 1))]
    left = length - stretches[0][1]
    full = limit - limit // 2 + 1
    return stretches + [(limit // 2, full)] * -(-left // full)


@functools.partial(jax.jit, static_argnames=('decoder', 'sample', 'new', 'placed'))
def _stretch(
    params: Any,
    context_BT: jax.Array,
    key: jax.Array,
    offset: jax.Array,
    *,
    decoder: Decoder,
    sample: Sample,
    new: int,
    placed: jax.sharding.Sharding | None,
) -> jax.Array:
    """Reads the context into an empty cache and draws `new` tokens [B, new], put as `placed`."""
    logits_BTV, cache = decoder.step(params, context_BT, decoder.init_cache(context_BT.shape[0]))

    def step(carry, i):
        logits_BV, cache = carry
        token_B = draw(jax.random.fold_in(key, offset + i), logits_BV, sample)
        logits_B1V, cache = decoder.step(params, token_B[:, None], cache)
        return (logits_B1V[:, 0], cache), token_B

    # The last token needs no step of the model after it.
    (logits_BV, _), tokens_NB = jax.lax.scan(step, (logits_BTV[:, -1], cache), jnp.arange(new - 1))
    last_B = draw(jax.random.fold_in(key, offset + new - 1), logits_BV, sample)
    tokens_BN = jnp.concatenate([tokens_NB, last_B[None]]).T
    return tokens_BN if placed is None else jax.lax.with_sharding_constraint(tokens_BN, placed)


def generate_tokens(
    decoder: Decoder, params: Any, prompt_BT: np.ndarray, sample: Sample
) -> np.ndarray:
    """Returns the prompt with `sample.length` tokens after it, int32 [B, T + length].

    The draw of token n depends on the seed and n alone, so a longer text begins like a shorter one.

    Args:
      decoder: how the model runs; see `bigjax.task.Decoder`.
      params: the model's parameters.
      prompt_BT: int32 tokens, at least one a row.
      sample: length, temperature, filters and seed.
    """
    text_BT = np.asarray(prompt_BT, np.int32)
    end = text_BT.shape[1] + sample.length
    # Only what shapes the compiled program may be part of its identity.
    filters = dataclasses.replace(sample, prompt='', length=1, samples=1, sample_seed=0)
    key, offset = jax.random.key(sample.sample_seed), 0
    placed = readable(params)
    for context, new in windows(text_BT.shape[1], sample.length, decoder.max_length):
        drawn = _stretch(params, text_BT[:, -context:], key, jnp.int32(offset),
                         decoder=decoder, sample=filters, new=new, placed=placed)  # fmt: skip
        text_BT = np.concatenate([text_BT, np.asarray(drawn)], axis=1)
        offset += new
    return text_BT[:, :end]


def generate_text(decoder: Decoder, tokenizer: Any, params: Any, sample: Sample) -> list[str]:
    """Returns `sample.samples` texts, each the prompt and what the model says after it.

    Raises:
      UsageError: the prompt is empty.
    """
    prompt = list(tokenizer.encode(sample.prompt))
    if not prompt:
        raise UsageError('--prompt=: must hold at least one character; try --prompt="import "')
    prompt_BT = np.tile(np.asarray(prompt, np.int32), (sample.samples, 1))
    return [tokenizer.decode(row) for row in generate_tokens(decoder, params, prompt_BT, sample)]
