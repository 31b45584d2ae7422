"""What tests of models share: variables without compiling an init, and a check of the rules."""

import re

import jax
import jax.numpy as jnp
import numpy as np


def shapes_of(model, size):
    """Shapes of the variables of a model of images [H, W, C]."""
    return jax.eval_shape(
        lambda k: model.init(k, jnp.zeros((1, *size)), train=False), jax.random.key(0)
    )


def drawn(shapes):
    """Random variables: compiling an init takes long. Variances are positive."""
    draw = np.random.default_rng(1).standard_normal
    drawn = jax.tree.map(lambda leaf: draw(leaf.shape, np.float32), shapes)
    stats = {k: jax.tree.map(np.abs, v) for k, v in drawn.items() if k != 'params'}
    return {**drawn, **stats}


def check_rules(params, rules):
    """Name, shape and axes of every parameter, each of which has to have a rule of its rank."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        axes = next(axes for pattern, axes in rules if re.search(pattern, name))
        assert len(axes) == leaf.ndim, name
        found.append((name, leaf.shape, axes))
    assert found
    return found
