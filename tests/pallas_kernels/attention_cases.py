"""Cases of attention: features in all pairs, their inputs, and the rule for errors.

The rule is FlashAttention's: an implementation may err twice as much as the same computation in
plain XLA of the same precision does, both measured against float64, and a little.

Legend: B batch, T queries, S keys, H query heads, K key-value heads, D, V sizes of heads, 1 a
broadcast dimension.
"""

import itertools
import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled

from pallas_kernels.attention import attention, implementation
from pallas_kernels.attention.arguments import check_arguments

NO_GPU = pytest.mark.skipif(
    jax.default_backend() != 'gpu', reason='Mosaic GPU kernels run on a Hopper GPU only'
)
IMPLS = ('reference', 'xla', 'tpu', pytest.param('gpu', marks=NO_GPU))

# Of these, every pair of levels occurs in `covering`.
LEVELS: dict[str, tuple] = {
    'causal': (False, True),
    'window': (None, (9, None), (5, 2)),
    'heads': ((2, 2), (4, 2), (3, 1)),
    'segments': (False, True),
    'mask': (None, 'keys', 'full'),
    'bias': (None, 'keys', 'full'),
    'softcap': (None, 2.0),
    'sinks': (False, True),
    'dropout_rate': (0.0, 0.3),
    'lengths': ((24, 24), (17, 40), (40, 24)),
    'sizes': ((8, 8), (16, 24), (64, 64)),
    'dtype': ('float32', 'bfloat16'),
}
# And these are drawn only.
MORE = {'window': ((None, 4), (0, 0)), 'bias': ('heads',), 'lengths': ((1, 40), (33, 33))}
B, SEED = 2, 1234567
DIFFERENTIABLE = ('q', 'k', 'v', 'bias', 'sinks')


class Case(NamedTuple):
    """One level of every feature."""

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    heads: tuple[int, int] = (2, 2)
    segments: bool = False
    mask: str | None = None
    bias: str | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout_rate: float = 0.0
    lengths: tuple[int, int] = (24, 24)
    sizes: tuple[int, int] = (8, 8)
    dtype: str = 'float32'

    def pairs(self) -> set:
        """Returns every pair of features at the levels that they have here."""
        return set(itertools.combinations(zip(self._fields, self, strict=True), 2))


def covering() -> list[Case]:
    """Returns cases in which every pair of levels of any two features occurs, few of them."""
    draw = random.Random(0)
    features = [[(name, level) for level in levels] for name, levels in LEVELS.items()]
    left = {pair for two in itertools.combinations(features, 2) for pair in itertools.product(*two)}
    cases = []
    while left:
        tries = [Case(*(draw.choice(levels) for levels in LEVELS.values())) for _ in range(300)]
        # One at least has a pair that is left, so that this ends.
        tries[0] = tries[0]._replace(**dict(min(left, key=repr)))
        cases.append(max(tries, key=lambda case: len(case.pairs() & left)))
        left -= cases[-1].pairs()
    return cases


def arguments(case: Case, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a case's differentiable arrays, in its type, and its other keyword arguments."""
    draw = np.random.default_rng(seed)
    (H, K), (T, S), (D, V) = case.heads, case.lengths, case.sizes
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)  # noqa: E731
    arrays = {'q': 2 * normal(B, T, H, D), 'k': normal(B, S, K, D), 'v': normal(B, S, K, V)}
    shape = {'keys': (B, 1, 1, S), 'heads': (1, H, T, S), 'full': (B, H, T, S)}
    if case.bias:
        arrays['bias'] = normal(*shape[case.bias])
    if case.sinks:
        arrays['sinks'] = normal(H)
    arrays = {name: jnp.asarray(x, case.dtype) for name, x in arrays.items()}
    others: dict[str, Any] = {'causal': case.causal, 'window': case.window}
    others['softcap'] = case.softcap
    if case.segments:
        others['segment_ids'] = np.sort(draw.integers(0, 3, (B, T)), axis=1).astype(np.int32)
        others['kv_segment_ids'] = np.sort(draw.integers(0, 3, (B, S)), axis=1).astype(np.int32)
    if case.mask:
        others['mask'] = draw.random(shape[case.mask]) < 0.7
        others['mask'][0, :, min(3, others['mask'].shape[2] - 1)] = False
    if case.dropout_rate:
        others |= {'dropout_rate': case.dropout_rate, 'dropout_seed': np.int32(SEED)}
    return arrays, others


def cotangents(case: Case) -> tuple[jax.Array, jax.Array]:
    """Returns cotangents of o and lse."""
    draw = np.random.default_rng(99)
    (H, _), (T, _), (_, V) = case.heads, case.lengths, case.sizes
    do_BTHV, dlse_BHT = draw.normal(size=(B, T, H, V)), draw.normal(size=(B, H, T))
    return jnp.asarray(do_BTHV, case.dtype), jnp.asarray(dlse_BHT, jnp.float32)


def skip_refused(impl: str, arrays: dict[str, Any], others: dict[str, Any]) -> None:
    """Skips the test, with the reason, where the implementation does not take these arguments."""
    features = {name: x for name, x in arrays.items() if name not in 'qkv'}
    operands, spec = check_arguments(*(arrays[n] for n in 'qkv'), **features, **others)
    if reason := implementation(impl).refuses(operands, spec):
        pytest.skip(f'{impl}: {reason}')


def attend(impl: str, arrays: dict[str, Any], others: dict[str, Any], **more):
    """Returns o and lse."""
    features = {name: x for name, x in arrays.items() if name not in 'qkv'}
    qkv = (arrays[name] for name in 'qkv')
    return attention(*qkv, **features, **others, **{'return_lse': True, **more}, impl=impl)


def with_gradients(impl: str, function, arrays: dict[str, jax.Array], cotangents):
    """Returns a compiled function of nothing to o, lse and every gradient, by name."""

    def run(arrays, cotangents):
        (o, lse), vjp = jax.vjp(function, arrays)
        return {'o': o, 'lse': lse, **vjp(cotangents)[0]}

    return compiled(impl, run, arrays, cotangents)


def assert_close(case: Case, got, base, want) -> None:
    """Holds results, those of plain XLA and the oracle's against each other by the rule."""
    # A result is rounded to its type; sums in another order differ by some roundings. Those of a
    # gradient whose terms cancel (one key alone has none) are of the terms' size.
    eps = float(jnp.finfo(case.dtype).eps)
    terms = max(np.abs(want[name]).max() for name in 'qkv')
    for name, exact in want.items():
        rounding = 1e-6 if name == 'lse' else max(eps, 1e-6)
        finite = np.isfinite(exact)
        x, y = (np.asarray(out[name].astype(jnp.float32), np.float64) for out in (got, base))
        np.testing.assert_array_equal(x[~finite], exact[~finite], err_msg=name)
        if finite.any():
            error, limit = (np.abs(z[finite] - exact[finite]).max() for z in (x, y))
            limit = 2 * limit + rounding * max(1.0, np.abs(exact[finite]).max())
            limit += 0 if name in ('o', 'lse') else 5e-7 * terms
            assert error <= limit, f'{name}: error {error:.2e}, limit {limit:.2e} in {case}'
