"""The LSTM against a plain scan in float64, and its exactness on padding, direction and state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from bigjax.nn.recurrent import LSTM, LSTMState, length_mask, lstm_scan

B, T, C, H = 3, 6, 5, 4


def plain_lstm(z_TBG, u_HG, b_G, h_BH, c_BH, mask_TB, reverse):
    """The textbook recurrence, differentiated by JAX."""

    def step(carry, inputs):
        h_BH, c_BH = carry
        z_BG, mask_B = inputs
        i, f, g, o = jnp.split(z_BG + h_BH @ u_HG + b_G[None], 4, axis=-1)
        new_c = jax.nn.sigmoid(f) * c_BH + jax.nn.sigmoid(i) * jnp.tanh(g)
        new_h = jax.nn.sigmoid(o) * jnp.tanh(new_c)
        keep = mask_B[:, None]
        h_BH, c_BH = jnp.where(keep, new_h, h_BH), jnp.where(keep, new_c, c_BH)
        return (h_BH, c_BH), h_BH

    mask_TB = jnp.ones(z_TBG.shape[:2], bool) if mask_TB is None else mask_TB
    (h_BH, c_BH), h_TBH = lax.scan(step, (h_BH, c_BH), (z_TBG, mask_TB), reverse=reverse)
    return h_TBH, h_BH, c_BH


def scan_arguments(dtype):
    rng = np.random.default_rng(0)
    shapes = [(T, B, 4 * H), (H, 4 * H), (4 * H,), (B, H), (B, H)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def ragged_mask():
    # Whole rows of padding, gaps inside a row and a full row.
    mask_TB = np.ones((T, B), bool)
    mask_TB[4:, 0] = False
    mask_TB[:, 1] = False
    mask_TB[2, 2] = False
    return jnp.asarray(mask_TB)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_scan_and_its_gradient_equal_the_plain_form_in_float64(reverse, masked):
    with jax.enable_x64(True):
        arguments = scan_arguments(jnp.float64)
        mask_TB = ragged_mask() if masked else None
        weights = [jnp.cos(jnp.arange(n, dtype=jnp.float64)) for n in (T * B * H, B * H, B * H)]

        def loss(run, *args):
            outputs = run(*args, mask_TB, reverse)
            # Different weights for every output, the last states too.
            return sum((w * y.reshape(-1)).sum() for w, y in zip(weights, outputs, strict=True))

        every = tuple(range(1, 6))
        value, gradients = jax.value_and_grad(loss, every)(lstm_scan, *arguments)
        expected, expected_gradients = jax.value_and_grad(loss, every)(plain_lstm, *arguments)
        np.testing.assert_allclose(value, expected, rtol=1e-13)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


def test_gradient_agrees_with_finite_differences():
    with jax.enable_x64(True):
        run = jax.jit(lambda *args: lstm_scan(*args, ragged_mask(), False))
        check_grads(run, scan_arguments(jnp.float64), order=1, modes=['rev'], atol=1e-6, rtol=1e-6)


def make(direction, **kwargs):
    layer = LSTM(H, direction=direction, **kwargs)
    x_BTC = np.random.default_rng(1).normal(size=(B, T, C)).astype(np.float32)
    params = layer.init(jax.random.key(0), x_BTC)
    # A bias of zero for the cell's own input would hide mistakes in the order of the gates.
    params = jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), params)
    return layer, params, x_BTC


@pytest.mark.parametrize('direction', ['forward', 'reverse', 'both'])
def test_padding_changes_nothing(direction):
    layer, params, x_BTC = make(direction)
    lengths = [T, 1, 0]
    mask_BT = length_mask(jnp.asarray(lengths), T)
    y_BTK, state = layer.apply(params, x_BTC, mask_BT=mask_BT)
    garbage = np.full((B, 3, C), 1e3, np.float32)
    longer = np.concatenate([np.where(mask_BT[:, :, None], x_BTC, 1e3), garbage], 1)
    y_longer, state_longer = layer.apply(
        params, longer, mask_BT=length_mask(jnp.asarray(lengths), T + 3)
    )
    np.testing.assert_array_equal(y_BTK, y_longer[:, :T])
    jax.tree.map(np.testing.assert_array_equal, state, state_longer)
    for row, length in enumerate(lengths):
        if length == 0:
            assert not state.h[row].any()
            assert not state.c[row].any()
            continue
        y, alone = layer.apply(params, x_BTC[row : row + 1, :length])
        np.testing.assert_allclose(y_BTK[row, :length], y[0], atol=1e-6)
        np.testing.assert_allclose(state.h[row], alone.h[0], atol=1e-6)
        np.testing.assert_allclose(state.c[row], alone.c[0], atol=1e-6)


def test_padding_gets_no_gradient():
    layer, params, x_BTC = make('both')
    mask_BT = length_mask(jnp.asarray([2, 0, T]), T)

    def loss(x_BTC):
        y_BTK, state = layer.apply(params, x_BTC, mask_BT=mask_BT)
        return (y_BTK**2).sum() + state.c.sum()

    touched = np.asarray(jnp.abs(jax.grad(loss)(jnp.asarray(x_BTC))).sum(-1) > 0)
    np.testing.assert_array_equal(touched, mask_BT)


def test_forward_is_causal_and_reverse_is_its_mirror():
    layer, params, x_BTC = make('forward')
    gradient = jax.grad(lambda x: layer.apply(params, x)[0][:, 2].sum())(jnp.asarray(x_BTC))
    seen = np.asarray(jnp.abs(gradient).sum((0, 2)) > 0)
    np.testing.assert_array_equal(seen, np.arange(T) <= 2)
    mirror = {k.replace('forward', 'reverse'): v for k, v in params['params'].items()}
    y_BTH, state = layer.apply(params, x_BTC)
    reverse = LSTM(H, direction='reverse')
    y_mirror, state_mirror = reverse.apply({'params': mirror}, x_BTC[:, ::-1])
    np.testing.assert_array_equal(y_BTH, y_mirror[:, ::-1])
    jax.tree.map(np.testing.assert_array_equal, state, state_mirror)


def test_both_directions_are_two_runs_side_by_side():
    layer, params, x_BTC = make('both')
    mask_BT = length_mask(jnp.asarray([T, 2, 0]), T)
    y_BTK, state = layer.apply(params, x_BTC, mask_BT=mask_BT)
    runs = []
    for name in ('forward', 'reverse'):
        own = {k: v for k, v in params['params'].items() if k.startswith(name)}
        runs.append(LSTM(H, direction=name).apply({'params': own}, x_BTC, mask_BT=mask_BT))
    np.testing.assert_array_equal(y_BTK, np.concatenate([y for y, _ in runs], -1))
    np.testing.assert_array_equal(state.h, np.concatenate([s.h for _, s in runs], -1))
    np.testing.assert_array_equal(state.c, np.concatenate([s.c for _, s in runs], -1))


def test_state_carries_a_sequence_across_calls():
    layer, params, x_BTC = make('forward')
    y_BTH, state = layer.apply(params, x_BTC)
    first, carried = layer.apply(params, x_BTC[:, :2])
    second, carried = layer.apply(params, x_BTC[:, 2:], state=carried)
    assert isinstance(carried, LSTMState)
    np.testing.assert_allclose(y_BTH, np.concatenate([first, second], 1), atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, carried)


@pytest.mark.parametrize('rows', [7, 40])
def test_tokens_and_a_table_equal_looking_them_up(rows):
    # 7 rows are fewer than the B·T tokens and are projected as a table; 40 are looked up first.
    layer, params, _ = make('both')
    rng = np.random.default_rng(2)
    table = jnp.asarray(rng.normal(size=(rows, C)), jnp.float32)
    tokens_BT = rng.integers(0, rows, (B, T))

    def loss(table, params, looked_up):
        if looked_up:
            y_BTK, _ = layer.apply(params, table[tokens_BT])
        else:
            y_BTK, _ = layer.apply(params, table, tokens_BT=tokens_BT)
        return (y_BTK**2).sum()

    ours, theirs = (jax.grad(loss, (0, 1))(table, params, x) for x in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_time_major_is_only_a_transpose():
    layer, params, x_BTC = make('both')
    mask_BT = length_mask(jnp.asarray([T, 2, 0]), T)
    y_BTK, state = layer.apply(params, x_BTC, mask_BT=mask_BT)
    turned = LSTM(H, direction='both', time_major=True)
    y_TBK, same = turned.apply(params, x_BTC.swapaxes(0, 1), mask_BT=mask_BT.T)
    np.testing.assert_array_equal(y_BTK, y_TBK.swapaxes(0, 1))
    jax.tree.map(np.testing.assert_array_equal, state, same)


def test_bfloat16_keeps_parameters_and_cell_state_in_float32():
    layer, params, x_BTC = make('both', dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    y_BTK, state = layer.apply(params, x_BTC)
    assert (y_BTK.dtype, state.h.dtype, state.c.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact, _ = LSTM(H, direction='both').apply(params, x_BTC)
    np.testing.assert_allclose(y_BTK.astype(jnp.float32), exact, atol=0.03)
    gradient = jax.grad(lambda p: layer.apply(p, x_BTC)[0].astype(jnp.float32).sum())(params)
    assert all(g.dtype == jnp.float32 and jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_lengths_are_data_so_jit_compiles_once():
    layer, params, x_BTC = make('both')
    run = jax.jit(lambda x, lengths: layer.apply(params, x, mask_BT=length_mask(lengths, T))[1].h)
    for lengths in ([T, 2, 0], [1, 1, 1], [0, 0, 0]):
        run(x_BTC, np.asarray(lengths, np.int32))
    assert run._cache_size() == 1


def test_initial_gates_remember():
    _, params, _ = make('forward')
    layer = LSTM(H)
    fresh = layer.init(jax.random.key(0), jnp.zeros((B, T, C)))['params']
    np.testing.assert_array_equal(fresh['forward_bias'].reshape(4, H).sum(1), [0, H, 0, 0])
    for u_HH in jnp.split(fresh['forward_recurrent_kernel'], 4, axis=-1):
        np.testing.assert_allclose(u_HH @ u_HH.T, np.eye(H), atol=1e-5)
    assert jax.tree.structure(fresh) == jax.tree.structure(params['params'])


def test_unknown_direction_is_an_error():
    with pytest.raises(ValueError, match="direction='backward': must be forward, reverse or both"):
        LSTM(H, direction='backward').init(jax.random.key(0), jnp.zeros((B, T, C)))
