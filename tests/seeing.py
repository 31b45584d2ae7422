"""What the outputs of an encoder-decoder depend on, told by gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def dependence(model, variables, source_BS, target_BT):
    """Returns which output position depends on which input position, from the embeddings on.

    Two bool arrays [B, T, B, S] and [B, T, B, T]: row and position of the output, then of the
    source and of the target. The model reads the source first, by its method `_embed`.
    """

    def output(*added):
        rest = list(added)

        def add(run, args, kwargs, context):
            embedded = run(*args, **kwargs)
            if context.method_name != '_embed':
                return embedded
            extra = rest.pop(0)
            return embedded + (extra if extra.shape == embedded.shape else extra.swapaxes(0, 1))

        with nn.intercept_methods(add):
            logits_BTV = model.apply(variables, source_BS, target_BT)
        return jnp.sin(logits_BTV).sum(-1)

    C = variables['params']['embedding'].shape[1]
    zeros = (jnp.zeros((*source_BS.shape, C)), jnp.zeros((*target_BT.shape, C)))
    jacobians = jax.jit(jax.jacrev(output, (0, 1)))(*zeros)
    return tuple(np.abs(np.asarray(x)).sum(-1) > 0 for x in jacobians)


def check_dependence(model, variables, source_BS, target_BT):
    """Asserts that outputs see their source but its padding, and of their target only the past."""
    by_source, by_target = dependence(model, variables, source_BS, target_BT)
    B, T = target_BT.shape
    for row in range(B):
        for other in range(B):
            same = row == other
            expected = np.broadcast_to((source_BS[other] >= 0)[None] & same, by_source.shape[1::2])
            np.testing.assert_array_equal(by_source[row, :, other], expected)
            past_TT = np.tril(np.ones((T, T), bool)) & same
            np.testing.assert_array_equal(by_target[row, :, other], past_TT)


def decoded(model, variables, source_BS, target_BT):
    """Returns the logits [B, T, V] that decoding token by token gives."""

    @jax.jit
    def run(variables, target_TB):
        rows, length = target_BT.shape
        memory = model.apply(variables, source_BS, method='start')
        cache = model.apply(variables, rows, length, memory, method='init_cache')

        def step(cache, inputs):
            token_B, position = inputs
            logits_BV, cache = model.apply(
                variables, token_B, position, cache, memory, method='decode'
            )
            return cache, logits_BV

        return jax.lax.scan(step, cache, (target_TB, jnp.arange(length)))[1]

    return run(variables, target_BT.T).swapaxes(0, 1)


def widened(variables, key, deviation=0.3):
    """Returns variables with noise added, so that every path matters."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        x + deviation * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)
