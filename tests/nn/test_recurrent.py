"""Recurrent layers: exact on padding, direction, state and tables, for every cell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.nn.recurrent import (
    GATES,
    Recurrent,
    RecurrentStack,
    RecurrentState,
    length_mask,
    zero_state,
)

B, T, C, H = 3, 6, 5, 4
CELLS = list(GATES)
every_cell = pytest.mark.parametrize('cell', CELLS)


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def run(layer, params, *args, **kwargs):
    """One compiled call of a layer; uncompiled, every operation is compiled by itself."""
    return layer.apply(params, *args, **kwargs)


def close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def make(direction, cell='lstm', **kwargs):
    layer = Recurrent(H, cell=cell, direction=direction, **kwargs)
    x_BTC = np.random.default_rng(1).normal(size=(B, T, C)).astype(np.float32)
    params = jax.jit(layer.init)(jax.random.key(0), x_BTC)
    # A bias of zero for the cell's own input would hide mistakes in the order of the gates.
    params = jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), params)
    return layer, params, x_BTC


@pytest.mark.parametrize('direction', ['forward', 'reverse', 'both'])
@every_cell
def test_padding_changes_nothing(cell, direction):
    layer, params, x_BTC = make(direction, cell)
    lengths = [T, 1, 0]
    mask_BT = length_mask(jnp.asarray(lengths), T)
    y_BTK, state = run(layer, params, x_BTC, mask_BT=mask_BT)
    garbage = np.full((B, 3, C), 1e3, np.float32)
    longer = np.concatenate([np.where(mask_BT[:, :, None], x_BTC, 1e3), garbage], 1)
    longer_mask_BT = length_mask(jnp.asarray(lengths), T + 3)
    y_longer, state_longer = run(layer, params, longer, mask_BT=longer_mask_BT)
    np.testing.assert_allclose(y_BTK, y_longer[:, :T], atol=1e-6)
    close(state, state_longer)
    for row, length in enumerate(lengths):
        if length == 0:
            assert not any(s[row].any() for s in jax.tree.leaves(state))
            continue
        y, alone = run(layer, params, x_BTC[row : row + 1, :length])
        np.testing.assert_allclose(y_BTK[row, :length], y[0], atol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(ours[row], theirs[0], atol=1e-6)


def test_padding_gets_no_gradient():
    layer, params, x_BTC = make('both')
    mask_BT = length_mask(jnp.asarray([2, 0, T]), T)

    def loss(x_BTC):
        y_BTK, state = run(layer, params, x_BTC, mask_BT=mask_BT)
        return (y_BTK**2).sum() + state.c.sum()

    touched = np.asarray(jnp.abs(jax.jit(jax.grad(loss))(x_BTC)).sum(-1) > 0)
    np.testing.assert_array_equal(touched, mask_BT)


@every_cell
def test_forward_is_causal_and_reverse_is_its_mirror(cell):
    layer, params, x_BTC = make('forward', cell)
    gradient = jax.jit(jax.grad(lambda x: run(layer, params, x)[0][:, 2].sum()))(x_BTC)
    seen = np.asarray(jnp.abs(gradient).sum((0, 2)) > 0)
    np.testing.assert_array_equal(seen, np.arange(T) <= 2)
    mirror = {k.replace('forward', 'reverse'): v for k, v in params['params'].items()}
    y_BTH, state = run(layer, params, x_BTC)
    reverse = Recurrent(H, cell=cell, direction='reverse')
    y_mirror, state_mirror = run(reverse, {'params': mirror}, x_BTC[:, ::-1])
    close(y_BTH, y_mirror[:, ::-1])
    close(state, state_mirror)


@every_cell
def test_both_directions_are_two_runs_side_by_side(cell):
    layer, params, x_BTC = make('both', cell)
    mask_BT = length_mask(jnp.asarray([T, 2, 0]), T)
    y_BTK, state = run(layer, params, x_BTC, mask_BT=mask_BT)
    runs = []
    for name in ('forward', 'reverse'):
        own = {k: v for k, v in params['params'].items() if k.startswith(name)}
        alone = Recurrent(H, cell=cell, direction=name)
        runs.append(run(alone, {'params': own}, x_BTC, mask_BT=mask_BT))
    close(y_BTK, np.concatenate([y for y, _ in runs], -1))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts, -1), *[s for _, s in runs])
    close(state, joined)
    # Each direction goes on from its own half of a state.
    y_BTK, _ = run(layer, params, x_BTC, state=state)
    for half, (name, (_, own_state)) in enumerate(zip(('forward', 'reverse'), runs, strict=True)):
        own = {k: v for k, v in params['params'].items() if k.startswith(name)}
        alone = Recurrent(H, cell=cell, direction=name)
        y_BTH, _ = run(alone, {'params': own}, x_BTC, state=own_state)
        close(y_BTK[..., half * H :][..., :H], y_BTH)


@every_cell
def test_state_carries_a_sequence_across_calls(cell):
    layer, params, x_BTC = make('forward', cell)
    y_BTH, state = run(layer, params, x_BTC)
    first, carried = run(layer, params, x_BTC[:, :2])
    second, carried = run(layer, params, x_BTC[:, 2:], state=carried)
    assert isinstance(carried, RecurrentState)
    assert (carried.c is None) == (cell != 'lstm')
    np.testing.assert_allclose(y_BTH, np.concatenate([first, second], 1), atol=1e-6)
    close(state, carried)


@pytest.mark.parametrize('rows', [7, 40])
def test_tokens_and_a_table_equal_looking_them_up(rows):
    # 7 rows are fewer than the B·T tokens and are projected as a table; 40 are looked up first.
    layer, params, _ = make('both')
    rng = np.random.default_rng(2)
    table = jnp.asarray(rng.normal(size=(rows, C)), jnp.float32)
    tokens_BT = rng.integers(0, rows, (B, T))

    def loss(table, params, looked_up):
        if looked_up:
            y_BTK, _ = run(layer, params, table[tokens_BT])
        else:
            y_BTK, _ = run(layer, params, table, tokens_BT=tokens_BT)
        return (y_BTK**2).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    ours, theirs = (gradient(table, params, x) for x in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_time_major_is_only_a_transpose():
    layer, params, x_BTC = make('both')
    mask_BT = length_mask(jnp.asarray([T, 2, 0]), T)
    y_BTK, state = run(layer, params, x_BTC, mask_BT=mask_BT)
    turned = Recurrent(H, direction='both', time_major=True)
    y_TBK, same = run(turned, params, x_BTC.swapaxes(0, 1), mask_BT=mask_BT.T)
    close(y_BTK, y_TBK.swapaxes(0, 1))
    close(state, same)


@every_cell
def test_bfloat16_keeps_parameters_and_an_lstms_cell_state_in_float32(cell):
    layer, params, x_BTC = make('both', cell, dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    y_BTK, state = run(layer, params, x_BTC)
    assert y_BTK.dtype == state.h.dtype == jnp.bfloat16
    assert state.c is None or state.c.dtype == jnp.float32
    start = zero_state(B, 2 * H, cell=cell, dtype=jnp.bfloat16)
    assert [x.dtype for x in jax.tree.leaves(start)] == [x.dtype for x in jax.tree.leaves(state)]
    exact, _ = run(Recurrent(H, cell=cell, direction='both'), params, x_BTC)
    np.testing.assert_allclose(y_BTK.astype(jnp.float32), exact, atol=0.03)
    gradient = jax.jit(jax.grad(lambda p: run(layer, p, x_BTC)[0].astype(jnp.float32).sum()))(
        params
    )
    assert all(g.dtype == jnp.float32 and jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_lengths_are_data_so_jit_compiles_once():
    layer, params, x_BTC = make('both')
    last = jax.jit(lambda x, lengths: layer.apply(params, x, mask_BT=length_mask(lengths, T))[1].h)
    for lengths in ([T, 2, 0], [1, 1, 1], [0, 0, 0]):
        last(x_BTC, np.asarray(lengths, np.int32))
    assert last._cache_size() == 1


@every_cell
def test_recurrent_kernels_start_orthogonal_and_forget_gates_open(cell):
    init = jax.jit(Recurrent(H, cell=cell).init)
    fresh = init(jax.random.key(0), jnp.zeros((B, T, C)))['params']
    expected = [0, H, 0, 0] if cell == 'lstm' else [0] * GATES[cell]
    np.testing.assert_array_equal(fresh['forward_bias'].reshape(-1, H).sum(1), expected)
    assert fresh['forward_kernel'].shape == (C, GATES[cell] * H)
    for u_HH in jnp.split(fresh['forward_recurrent_kernel'], GATES[cell], axis=-1):
        np.testing.assert_allclose(u_HH @ u_HH.T, np.eye(H), atol=1e-5)


@pytest.mark.parametrize(
    ('knobs', 'message'),
    [
        ({'direction': 'backward'}, "direction='backward': must be forward, reverse or both"),
        ({'cell': 'rnn'}, "cell='rnn': must be elman, lstm or gru; try elman"),
    ],
)
def test_unknown_cells_and_directions_are_errors(knobs, message):
    with pytest.raises(ValueError, match=message):
        Recurrent(H, **knobs).init(jax.random.key(0), jnp.zeros((B, T, C)))


def make_stack(**kwargs):
    stack = RecurrentStack(H, layers=2, direction='both', **kwargs)
    x_BTC = np.random.default_rng(1).normal(size=(B, T, C)).astype(np.float32)
    return stack, jax.jit(stack.init)(jax.random.key(0), x_BTC), x_BTC


def test_a_stack_feeds_each_layer_to_the_next_and_returns_all_states():
    stack, params, x_BTC = make_stack()
    mask_BT = length_mask(jnp.asarray([T, 2, 0]), T)
    start = tuple(zero_state(B, 2 * H)._replace(h=jnp.full((B, 2 * H), x)) for x in (0.1, 0.2))
    y_BTK, states = run(stack, params, x_BTC, mask_BT=mask_BT, states=start)
    layer, y = Recurrent(H, direction='both'), x_BTC
    for n in range(2):
        own = {'params': params['params'][f'layer_{n}']}
        y, state = run(layer, own, y, mask_BT=mask_BT, state=start[n])
        close(states[n], state)
    close(y_BTK, y)


def test_a_stack_drops_out_between_layers_only():
    stack, params, x_BTC = make_stack(dropout=0.5)
    drawn = lambda seed, train: run(  # noqa: E731
        stack, params, x_BTC, train=train, rngs={'dropout': jax.random.key(seed)}
    )
    same = drawn(0, False)
    jax.tree.map(np.testing.assert_array_equal, same, drawn(1, False))
    (_, (first, second)), (y_BTK, (first_train, second_train)) = same, drawn(0, True)
    # The first layer reads its input whole; the second does not; its outputs are whole.
    np.testing.assert_allclose(first.h, first_train.h, atol=1e-6)
    assert not np.allclose(second.h, second_train.h)
    assert np.all(np.asarray(y_BTK) != 0)
