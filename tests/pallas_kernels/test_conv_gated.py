"""WaveNet's gated unit: the equations, the kernel, derivatives, segments, state, errors."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chip as chips
from pallas_kernels.conv import gated_conv1d, wins
from pallas_kernels.conv.gated_arguments import GatedOperands
from pallas_kernels.conv.gated_plain import reference
from pallas_kernels.conv.tpu import gated as kernels
from pallas_kernels.conv.tpu import gated_plan

STRICT = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan'
)
# B, T, C, G, S, K, dilation, features
CASES = {
    # Several blocks, the last not full; channels that fill no lanes.
    'blocks': ((2, 600, 8, 8, 24, 2, 100), 'bias state segments'),
    'wide': ((1, 40, 128, 128, 128, 2, 16), 'bias segments'),
    'three taps': ((2, 33, 24, 20, 12, 3, 5), 'bias state segments'),
    'all around': ((1, 600, 8, 8, 8, 2, 256), ''),
    'short': ((2, 1, 16, 16, 16, 2, 4), 'state'),
    'one tap': ((2, 20, 16, 16, 16, 1, 4), 'state segments'),
}


def drawn(sizes, features='', dtype=jnp.float32):
    """Returns operands and cotangents of both outputs."""
    B, T, C, G, S, K, dilation = sizes
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(0.5 * draw.normal(size=shape), dtype)  # noqa: E731
    operands = GatedOperands(normal(B, T, C), normal(K, C, 2 * G), normal(G, C), normal(G, S))
    if 'bias' in features:
        biases = {'bias_F': 2 * G, 'bias_residual_C': C, 'bias_skip_S': S}
        operands = operands._replace(**{name: normal(n) for name, n in biases.items()})
    if 'state' in features:
        operands = operands._replace(state_BRC=normal(B, (K - 1) * dilation, C))
    if 'segments' in features:
        ids_BT = np.sort(draw.integers(0, 4, (B, T)), axis=1)
        operands = operands._replace(segment_ids_BT=jnp.asarray(ids_BT, jnp.int32))
    return operands, (normal(B, T, C), normal(B, T, S))


def exact(operands, dilation, cotangents=None):
    """Returns both outputs in float64 or, of cotangents, the gradients."""
    with jax.enable_x64(True):
        ids_BT = operands.segment_ids_BT
        wide, cotangents = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)),
            (operands._replace(segment_ids_BT=None), cotangents),
        )
        f = jax.jit(lambda x: reference(x._replace(segment_ids_BT=ids_BT), dilation))
        if cotangents is None:
            return jax.tree.map(np.asarray, f(wide))
        return jax.tree.map(np.asarray, jax.vjp(f, wide)[1](cotangents)[0])


def call(operands, dilation, **more):
    """`gated_conv1d` of operands."""
    x, w, w_residual, w_skip, bias, bias_residual, bias_skip, state, ids = operands
    return gated_conv1d(
        x,
        w,
        w_residual,
        w_skip,
        dilation=dilation,
        bias_F=bias,
        bias_residual_C=bias_residual,
        bias_skip_S=bias_skip,
        state=state,
        segment_ids=ids,
        **more,
    )


def assert_close(got, want, slack=3e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b, np.float64)
        atol = slack * np.abs(b).max(initial=1e-9)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2e-7, atol=atol)


@pytest.mark.parametrize('impl', ['reference', 'xla', 'tpu'])
def test_the_unit_is_that_of_the_paper(impl):
    (B, T, *_), G, K, dilation = sizes = (2, 9, 4, 3, 5, 3, 2), 3, 3, 2
    operands, _ = drawn(sizes[0], 'bias state segments')
    got = call(operands, dilation, impl=impl)
    x, w, w_residual, w_skip, bias, bias_residual, bias_skip, state, ids = map(np.asarray, operands)
    for b in range(B):
        for t in range(T):
            a_F = bias.astype(np.float64)
            for k in range(K):
                at = t - (K - 1 - k) * dilation
                if ids[b, max(at, 0)] == ids[b, t]:
                    a_F = a_F + (x[b, at] if at >= 0 else state[b, at]) @ w[k]
            z_G = np.tanh(a_F[:G]) / (1 + np.exp(-a_F[G:]))
            y_C = x[b, t] + z_G @ w_residual + bias_residual
            np.testing.assert_allclose(got[0][b, t], y_C, atol=1e-5)
            np.testing.assert_allclose(got[1][b, t], z_G @ w_skip + bias_skip, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_both_kernels_are_right_and_read_nothing_that_is_not_there(name, monkeypatch):
    sizes, features = CASES[name]
    monkeypatch.setattr(gated_plan, 'MIB', 2**17)  # blocks so short that there are several
    operands, cotangents = drawn(sizes, features)

    @jax.jit
    def both(operands, cotangents):
        made = kernels.forward(operands, sizes[6], interpret=STRICT)
        return made, kernels.backward(operands, sizes[6], *cotangents, interpret=STRICT)

    outputs, gradients = both(operands, cotangents)
    assert_close(outputs, exact(operands, sizes[6]))
    assert_close(gradients, exact(operands, sizes[6], cotangents))


def test_bfloat16_errs_as_little_as_its_own_rounding(monkeypatch):
    monkeypatch.setattr(gated_plan, 'MIB', 2**16)
    operands, cotangents = drawn((2, 530, 24, 20, 12, 2, 3), 'bias', jnp.bfloat16)
    operands = operands._replace(bias_F=operands.bias_F.astype(jnp.float32))

    @functools.partial(jax.jit, static_argnums=2)
    def both(operands, cotangents, impl):
        outputs, vjp = jax.vjp(lambda o: call(o, 3, impl=impl), operands)
        return outputs, vjp(cotangents)[0]

    made = {impl: both(operands, cotangents, impl) for impl in ('xla', 'tpu')}
    want = exact(operands, 3), exact(operands, 3, cotangents)
    error = {
        impl: [
            np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
            for a, b in zip(jax.tree.leaves(made[impl]), jax.tree.leaves(want), strict=True)
        ]
        for impl in made
    }
    assert all(
        x.dtype == y.dtype for x, y in zip(*map(jax.tree.leaves, made.values()), strict=True)
    )
    for kernel, plain in zip(error['tpu'], error['xla'], strict=True):
        assert kernel <= 2 * plain + 2**-9


def test_two_cores_share_the_batch_without_a_race():
    operands, cotangents = drawn((2, 20, 8, 8, 8, 2, 2), 'bias')
    two = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    device = jax.sharding.AbstractDevice(chips.named('v5p').kind, 1, 'tpu')
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        gradients = jax.jit(
            lambda o, d: kernels.backward(o, 2, *d, interpret=two)
        ).lower(operands, cotangents).compile()(operands, cotangents)  # fmt: skip
    assert_close(gradients, exact(operands, 2, cotangents))


def test_second_derivatives_are_those_of_the_specification():
    operands, _ = drawn((1, 12, 8, 8, 8, 2, 2), 'bias')
    direction = jax.tree.map(lambda x: jnp.cos(7 * x), operands)

    def curvature(impl):
        def loss(operands):
            y, skip = call(operands, 2, impl=impl)
            return jnp.sum(jnp.sin(y)) + jnp.sum(skip**2)

        def along(operands):
            gradient = jax.grad(loss)(operands)
            return sum(
                jnp.vdot(a, b) for a, b in zip(gradient, direction, strict=True) if a is not None
            )

        return jax.jit(jax.grad(along))(operands)

    assert_close(curvature('tpu'), curvature('reference'), slack=1e-5)


def test_vmap_over_arrays_and_weights():
    operands, _ = drawn((2, 20, 8, 8, 8, 2, 4), 'state')
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), operands)

    def loss(operands):
        y, skip = call(operands, 4, impl='tpu')
        return jnp.sum(y**2) + jnp.sum(skip**2)

    got = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked)
    one = jax.jit(jax.value_and_grad(loss))
    for n in range(3):
        want = one(jax.tree.map(lambda x, n=n: x[n], stacked))
        assert_close(jax.tree.map(lambda x, n=n: x[n], got), want)


@pytest.mark.parametrize('impl', ['xla', 'tpu'])
def test_packed_segments_equal_separate_sequences(impl):
    operands, (dy_BTC, dskip_BTS) = drawn((1, 40, 8, 8, 8, 3, 4))
    ends = [0, 7, 30, 40]
    ids_BT = np.repeat([3, 1, 3], np.diff(ends))[None]

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(operands, packed):
        def run(o):
            if packed:
                return call(o._replace(segment_ids_BT=ids_BT), 4, impl=impl)
            parts = [
                call(o._replace(x_BTC=o.x_BTC[:, a:b]), 4, impl='reference')
                for a, b in itertools.pairwise(ends)
            ]
            return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *parts)

        made, vjp = jax.vjp(run, operands)
        return made, vjp((dy_BTC, dskip_BTS))[0]

    assert_close(gradients(operands, True), gradients(operands, False))


@pytest.mark.parametrize('pieces', [[1] * 9, [4, 1, 4]])
def test_going_on_from_a_state_gives_the_same_bits(pieces):
    operands, _ = drawn((2, 9, 24, 20, 12, 2, 4), 'bias segments')
    run = jax.jit(functools.partial(call, dilation=4, return_state=True, impl='tpu'))
    *whole, last = run(operands._replace(state_BRC=jnp.zeros((2, 4, 24))))
    state, made, at = jnp.zeros((2, 4, 24)), [], 0
    for n in pieces:
        x, ids = operands.x_BTC[:, at : at + n], operands.segment_ids_BT[:, at : at + n]
        here = operands._replace(x_BTC=x, segment_ids_BT=ids, state_BRC=state)
        if at:  # a state's rows are of the segment of the first position after it
            other = operands.segment_ids_BT[:, at - 1] != ids[:, 0]
            here = here._replace(state_BRC=jnp.where(other[:, None, None], 0, state))
        *outputs, state = run(here)
        made.append(outputs)
        at += n
    for got, want in zip(zip(*made, strict=True), whole, strict=True):
        np.testing.assert_array_equal(jnp.concatenate(got, 1), want)
    np.testing.assert_array_equal(state, last)


def test_the_kernel_is_taken_on_a_tpu_where_it_is_predicted_to_win_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(wins, 'RATIOS', {'gated': {'v6e': 0.9, 'v5e': 1.0}})

    def taken(chip, dtype=jnp.bfloat16, length=1 << 16):
        operands = jax.eval_shape(lambda: drawn((1, 20, 8, 8, 8, 2, 4), dtype=dtype)[0])
        operands = operands._replace(x_BTC=jax.ShapeDtypeStruct((1, length, 8), dtype))
        device = chip and jax.sharding.AbstractDevice(chips.named(chip).kind, 1, 'tpu')
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return 'gated_conv1d_forward' in str(jax.make_jaxpr(lambda o: call(o, 4))(operands))

    assert taken('v6e')
    # No TPU, no faster, not known, not bfloat16, too small to tell, more than its memory.
    assert not taken(None)
    assert not taken('v5e')
    assert not taken('v5p')
    assert not taken('v6e', dtype=jnp.float32)
    assert not taken('v6e', length=1 << 15)
    monkeypatch.setattr(kernels, 'refuses', lambda *_: 'is too large')
    assert not taken('v6e')


def test_what_does_not_fit_into_memory_is_refused():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
    operands = GatedOperands(
        shape(1, 10**6, 512), shape(2, 512, 1024), shape(512, 512), shape(512, 512)
    )
    assert '50000 positions before an output' in kernels.refuses(operands, 50_000)
    assert kernels.refuses(operands, 512) is None


WRONG = {
    'x_BTC=float32[20, 8]: must have 3 dimensions': {'x_BTC': jnp.zeros((20, 8))},
    'x_BTC=int32[1, 20, 8]: must be one of': {'x_BTC': jnp.zeros((1, 20, 8), jnp.int32)},
    'w_KCF=float32[2, 4, 16]: must be [K, C = 8, F]': {'w_KCF': jnp.zeros((2, 4, 16))},
    'w_KCF=float32[2, 8, 15]: must be [K, C = 8, F]': {'w_KCF': jnp.zeros((2, 8, 15))},
    'w_residual_GC=float32[8, 9]: must be [G, C], G = 8': {'w_residual_GC': jnp.zeros((8, 9))},
    'w_skip_GS=float32[9, 8]: must be [G, S], G = 8': {'w_skip_GS': jnp.zeros((9, 8))},
    'w_skip_GS=bfloat16[8, 8]: must have the type': {'w_skip_GS': jnp.zeros((8, 8), jnp.bfloat16)},
    'bias_F=float32[8]: must be None or float of shape [16]': {'bias_F': jnp.zeros(8)},
    'state=float32[1, 3, 8]: must be the (K - 1)': {'state_BRC': jnp.zeros((1, 3, 8))},
    'segment_ids=int32[20]: must be integers': {'segment_ids_BT': jnp.zeros(20, jnp.int32)},
}


@pytest.mark.parametrize('message', WRONG)
def test_what_does_not_fit_is_named_with_what_would(message):
    operands, _ = drawn((1, 20, 8, 8, 8, 2, 4))
    with pytest.raises(ValueError, match=f'^{re.escape(message)}.*; try '):
        call(operands._replace(**WRONG[message]), 4)


def test_an_implementation_that_there_is_not_is_named():
    operands, _ = drawn((1, 20, 8, 8, 8, 2, 4))
    with pytest.raises(ValueError, match="impl='cuda': must be 'reference'"):
        call(operands, 4, impl='cuda')
    with pytest.raises(ValueError, match=r"impl='gpu': has no kernel .*; try impl='xla'"):
        call(operands, 4, impl='gpu')
    with pytest.raises(
        ValueError, match="impl='tpu': takes bfloat16 and float32, and x is float16"
    ):
        call(jax.tree.map(lambda x: x.astype(jnp.float16), operands), 4, impl='tpu')
    with pytest.raises(ValueError, match='dilation=0: must be a Python int >= 1'):
        call(operands, 0)
