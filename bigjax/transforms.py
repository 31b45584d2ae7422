"""Our own optax transformations, and ordered regex rules over parameter paths to steer them."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigjax.experiment import UsageError

# (regex over 'a/b/c' parameter paths, is it decayed?); the first that matches decides.
DECAY_RULES = (
    (r'(^|/)(\w*bias|b|scale|gamma|beta)$', False),
    (r'(^|/)(\w*kernel|\w*embeddings?|\w*token|position|type)$', True),
)

# (regex, role of each dimension); the first whose regex and number of dimensions match decides.
# i = input of the matrix, o = output, b = a batch of matrices; None = not a matrix for Muon, nor
# is whatever no rule covers. Embeddings and heads are looked up or read by row: not Muon's.
_MUON_RULES = (
    (r'(^|/)(lm_)?(head|logits|classifier)/', None),
    (r'experts/\w+/kernel$', 'bio'),
    (r'q?kv/kernel$', 'iobo'),  # [C, H, 3, D]: queries, keys and values are three matrices
    (r'(^|/)(out|o|proj|o_proj|out_proj)/kernel$', 'iio'),  # [H, D, C]
    (r'kernel$', 'io'),
    (r'(attention|attn)/\w+/kernel$', 'ioo'),  # [C, H, D]
    (r'kernel$', 'iio'),  # convolutions: every filter is one column
    (r'kernel$', 'iiio'),
    (r'kernel$', 'iiiio'),
)
# Scanned layers (bigjax.nn.stack) are a batch of matrices in front.
MUON_RULES = (
    *((f'blocks(?=/).*{pattern}', roles and f'b{roles}') for pattern, roles in _MUON_RULES),
    *_MUON_RULES,
)


def parameter_path(path: tuple) -> str:
    """'a/b/c' for a key path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def decay_mask(params: optax.Params, rules: tuple = DECAY_RULES) -> optax.Params:
    """Which parameters are decayed: a tree of bools shaped like params, by ordered regex.

    Raises:
        UsageError: naming every parameter that no rule covers.
    """
    missed = []

    def decayed(path, _):
        name = parameter_path(path)
        for pattern, decision in rules:
            if re.search(pattern, name):
                return decision
        missed.append(name)
        return False

    mask = jax.tree_util.tree_map_with_path(decayed, params)
    if missed:
        raise UsageError(
            f'decay_rules: no rule covers {", ".join(missed)}; every parameter needs one: add '
            f"(r'{re.escape(missed[0])}$', True) to decay it or False not to"
        )
    return mask


def _muon_axes(path: tuple, x: jax.Array, rules: tuple):
    name = parameter_path(path)
    for pattern, roles in rules:
        if not re.search(pattern, name):
            continue
        if roles is None:
            return None
        if len(roles) == x.ndim:
            axes = {r: tuple(i for i, role in enumerate(roles) if role == r) for r in 'io'}
            return optax.contrib.MuonDimensionNumbers(axes['i'], axes['o'])
    return None


def muon_dimensions(params: optax.Params, rules: tuple = MUON_RULES) -> optax.Params:
    """Which dimensions of each parameter Muon sees as a matrix; None for those left to the rest."""
    return jax.tree_util.tree_map_with_path(lambda path, x: _muon_axes(path, x, rules), params)


def scale_by_muon(
    momentum: float, *, rest: optax.GradientTransformation, rules: tuple = MUON_RULES
) -> optax.GradientTransformation:
    """Muon's direction for matrices (Jordan 2024, Nesterov momentum), `rest` for everything else.

    The update of an [I, O] matrix is scaled by 0.2 sqrt(max(I, O)), which gives it AdamW's RMS:
    AdamW's learning rate and weight decay carry over (Liu et al. 2025, arXiv:2502.16982, §2.2).
    """

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: 'rest' if _muon_axes(path, x, rules) is None else 'muon', params
        )

    def match_rms(updates, params):
        def scale(path, x):
            axes = _muon_axes(path, x, rules)
            fans = (math.prod(x.shape[i] for i in side) for side in axes)
            return 0.2 * math.sqrt(max(fans)) * x

        return jax.tree_util.tree_map_with_path(scale, updates)

    orthogonal = optax.contrib.scale_by_muon(
        beta=momentum, weight_dimension_numbers=lambda updates: muon_dimensions(updates, rules)
    )
    muon = optax.chain(orthogonal, optax.stateless(match_rms))
    return optax.partition({'muon': muon, 'rest': rest}, labels)


def add_penalties(l1: float, l2: float, mask: Callable) -> optax.GradientTransformation:
    """Adds the gradient of l1 |p| + l2/2 p² wherever mask(params) is True."""

    def add(grads, params):
        def one(grad, param, decayed):
            return grad + l1 * jnp.sign(param) + l2 * param if decayed else grad

        return jax.tree.map(one, grads, params, mask(params))

    return optax.stateless(add)


class AverageState(NamedTuple):
    """State of `average_weights`; `average` has the structure and dtypes of params."""

    count: jax.Array  # type: ignore[assignment]  # optax's name for it; hides tuple.count
    average: optax.Params
    inner: optax.OptState


def average_weights(
    inner: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters that `inner` produces.

    After n updates the average is sum_k d^(n-k) p_k / sum_k d^(n-k) over k = 1 .. n: Adam's bias
    correction (Kingma & Ba 2015, §3) folded into the update, so that the state itself is unbiased
    at every step and the initial parameters carry no weight. Before the first update it is them.
    """

    def init(params):
        # A copy: a donated state may not hold one buffer twice.
        return AverageState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), inner.init(params)
        )

    def update(grads, state, params):
        updates, inner_state = inner.update(grads, state.inner, params)
        count = optax.safe_increment(state.count)
        # expm1 because 1 - d^n loses its digits in float32 while d^n is near 1.
        weight = (decay - 1) / jnp.expm1(count * math.log(decay))

        def mix(average, param, step):
            return average + (weight * (param + step - average)).astype(average.dtype)

        average = jax.tree.map(mix, state.average, params, updates)
        return updates, AverageState(count, average, inner_state)

    return optax.GradientTransformation(init, update)
