"""Schedules, optimizers, decay masks, weight averages and what happens to NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax.experiment import UsageError
from bigjax.nn.stack import stack_layers
from bigjax.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    Optim,
    evaluation_params,
    make_optimizer,
    make_schedule,
)
from bigjax.transforms import decay_mask, muon_dimensions, parameter_path

# Constant from the first step, and nothing else.
PLAIN = Optim(optimizer='sgd', schedule='constant', peak_lr=0.1, warmup=0, momentum=0.0)


def plain(**knobs) -> Optim:
    return dataclasses.replace(PLAIN, **knobs)


def small_params():
    """One parameter of every kind that a rule tells apart."""
    key = jax.random.key(1)
    shapes = {
        'embed': {'embedding': (8, 4)},
        'attention': {
            'qkv': {'kernel': (4, 2, 3, 2), 'bias': (2, 3, 2)},
            'query': {'kernel': (4, 2, 2)},
            'out': {'kernel': (2, 2, 4)},
        },
        'conv': {'kernel': (3, 3, 2, 4), 'bias': (4,)},
        'norm': {'scale': (4,)},
        'head': {'kernel': (4, 8)},
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True))


def run(optim, params, gradient, steps):
    """Updates with gradient(step, params); returns the parameters after each step and the state."""
    optimizer, _ = make_optimizer(optim, steps=steps)
    state = optimizer.init(params)
    seen = []
    for step in range(steps):
        updates, state = optimizer.update(gradient(step, params), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_schedule_end_points(schedule):
    peak, warmup, steps = 3e-3, 10, 200
    optim = Optim(schedule=schedule, peak_lr=peak, warmup=warmup, end_lr=0.1, decay=0.25)
    optim = dataclasses.replace(optim, decay_every=100, decay_factor=0.1)
    rates = np.asarray(make_schedule(optim, steps)(jnp.arange(steps + 1)))
    np.testing.assert_allclose(rates[:11], peak * np.arange(1, 12) / 11, rtol=1e-6)
    assert rates[:steps].min() > 0
    assert rates.argmax() == warmup
    last = {'constant': peak, 'rsqrt': peak * np.sqrt(11 / 201)}.get(schedule, 0.1 * peak)
    np.testing.assert_allclose(rates[steps], last, rtol=1e-5)
    assert (np.diff(rates[warmup:]) <= 0).all()
    middle = {'warmup_cosine': 0.55, 'warmup_linear': 0.55, 'rsqrt': np.sqrt(11 / 106)}
    np.testing.assert_allclose(rates[105], peak * middle.get(schedule, 1.0), rtol=1e-5)
    if schedule == 'wsd':
        np.testing.assert_allclose(rates[warmup:151], peak, rtol=1e-6)
        np.testing.assert_allclose(rates[175], peak * 0.55, rtol=1e-6)


@pytest.mark.parametrize(('factor', 'every', 'warmup'), [(0.1, 30, 0), (0.94, 7, 10), (0.5, 1, 3)])
def test_step_schedule_is_a_staircase_from_the_end_of_warmup(factor, every, warmup):
    knobs = {'peak_lr': 0.5, 'warmup': warmup, 'decay_every': every, 'decay_factor': factor}
    rates = make_schedule(Optim(schedule='step', **knobs), 95)(jnp.arange(95))
    expected = [0.5 * (n + 1) / (warmup + 1) for n in range(warmup)] + [0.5]
    for past in range(1, 95 - warmup):
        expected.append(expected[-1] * (factor if past % every == 0 else 1))
    np.testing.assert_allclose(rates, expected, rtol=2e-5)


def test_step_schedule_falls_exactly_at_its_multiples():
    # Every boundary of a long run, compiled, where a quotient of floats misses some.
    optim = Optim(schedule='step', peak_lr=1.0, warmup=7, decay_every=41, decay_factor=0.999)
    falls = 7 + 41 * np.arange(1, 2000)
    rates = jax.jit(make_schedule(optim, 100_000))(np.stack([falls - 1, falls]))
    levels = np.round(np.log(np.asarray(rates, np.float64)) / np.log(0.999))
    np.testing.assert_array_equal(levels, [np.arange(1999), np.arange(1, 2000)])


@pytest.mark.parametrize('momentum', [0.0, 0.9])
@pytest.mark.parametrize(('b2', 'eps'), [(0.9, 1.0), (0.99, 1e-8)])
def test_rmsprop_is_that_of_tensorflow(momentum, b2, eps):
    knobs = {'b2': b2, 'eps': eps, 'momentum': momentum, 'weight_decay': 0.1}
    kernel = np.array([[1.0, -2.0], [0.5, 3.0]])
    gradient = lambda step, x: (step + 1) * x - 0.25  # noqa: E731
    seen, _ = run(
        plain(optimizer='rmsprop', **knobs),
        {'kernel': jnp.asarray(kernel, jnp.float32)},
        lambda step, p: jax.tree.map(lambda x: gradient(step, x), p),
        6,
    )
    mean_square, summed = np.ones_like(kernel), np.zeros_like(kernel)
    for step in range(6):
        grad = gradient(step, kernel)
        mean_square = b2 * mean_square + (1 - b2) * grad**2
        summed = momentum * summed + grad / np.sqrt(mean_square + eps)
        kernel = kernel - 0.1 * (summed + 0.1 * kernel)
        np.testing.assert_allclose(seen[step]['kernel'], kernel, rtol=1e-5)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_optimizer_reduces_a_quadratic(optimizer):
    rate = {'sgd': 0.1, 'adafactor': 0.1, 'muon': 0.1}.get(optimizer, 0.02)
    knobs = {'peak_lr': rate, 'warmup': 5, 'end_lr': 0.0, 'momentum': 0.9}
    optim = Optim(optimizer=optimizer, schedule='warmup_linear', **knobs)
    optimizer, _ = make_optimizer(optim, steps=150)
    # Away from zero: Adafactor's steps are relative to the parameter.
    params = jax.tree.map(lambda x: 1 + 0.5 * x, small_params())

    def loss(params):
        return sum(jnp.sum(jnp.square(x - 0.5)) for x in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, before = optimizer.init(params), loss(params)
    for _ in range(150):
        params, state = step(params, state)
    assert loss(params) < 0.05 * before


@pytest.mark.parametrize('optimizer', ['adamw', 'lion', 'sgd'])
def test_equals_the_optimizer_in_optax(optimizer):
    optim = Optim(optimizer=optimizer, schedule='constant', warmup=0, weight_decay=0.1, clip=0.0)
    theirs = {
        'adamw': lambda: optax.adamw(1e-3, 0.9, 0.99, 1e-8, weight_decay=0.1, mask=decay_mask),
        'lion': lambda: optax.lion(1e-3, 0.9, 0.99, weight_decay=0.1, mask=decay_mask),
        'sgd': lambda: optax.chain(
            optax.trace(0.9), optax.add_decayed_weights(0.1, decay_mask), optax.scale(-1e-3)
        ),
    }[optimizer]()
    params = small_params()
    grads = jax.tree.map(jnp.cos, params)
    ours, _ = make_optimizer(optim, steps=3)
    state, their_state = ours.init(params), theirs.init(params)
    for _ in range(3):
        updates, state = ours.update(grads, state, params)
        expected, their_state = theirs.update(grads, their_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


def test_decay_reaches_kernels_and_embeddings_only():
    params = jax.tree.map(jnp.ones_like, small_params())
    (after,), _ = run(
        plain(weight_decay=0.5), params, lambda _, p: jax.tree.map(jnp.zeros_like, p), 1
    )
    for path, value in jax.tree_util.tree_leaves_with_path(after):
        decayed = parameter_path(path).endswith(('kernel', 'embedding'))
        np.testing.assert_allclose(value, 0.95 if decayed else 1.0, rtol=1e-6)


def test_first_matching_rule_decides():
    params = {'head': {'kernel': jnp.ones(1)}, 'body': {'kernel': jnp.ones(1)}}
    rules = (('head', False), ('kernel', True))
    assert decay_mask(params, rules) == {'head': {'kernel': False}, 'body': {'kernel': True}}
    assert decay_mask(params, rules[::-1])['head']['kernel'] is True


def test_uncovered_parameters_are_named():
    optimizer, _ = make_optimizer(plain(weight_decay=0.1), steps=1)
    with pytest.raises(UsageError, match='no rule covers layer/alpha, layer/mystery; every'):
        optimizer.init({'layer': {'kernel': 1.0, 'alpha': 1.0, 'mystery': 1.0}})


def test_penalties_join_the_gradient_before_clipping():
    params = {'kernel': jnp.array([[3.0, -4.0]]), 'bias': jnp.array([2.0])}
    zero = jax.tree.map(jnp.zeros_like, params)
    (after,), _ = run(plain(l1=0.5, l2=0.1), params, lambda *_: zero, 1)
    np.testing.assert_allclose(after['kernel'], [[3 - 0.1 * 0.8, -4 + 0.1 * 0.9]], rtol=1e-6)
    np.testing.assert_allclose(after['bias'], 2.0)
    (after,), _ = run(plain(l1=0.5, l2=0.1, clip=0.01), params, lambda *_: zero, 1)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, after, params))
    np.testing.assert_allclose(moved, 0.1 * 0.01, rtol=1e-3)


def test_clip_bounds_the_global_norm_and_leaves_small_gradients_alone():
    params = small_params()
    for norm, moved in ((10.0, 1.0), (0.5, 0.5)):
        scale = norm / optax.tree.norm(params)
        (after,), _ = run(plain(clip=1.0), params, lambda _, p: optax.tree.scale(scale, p), 1)  # noqa: B023
        step = optax.tree.norm(jax.tree.map(jnp.subtract, after, params))
        np.testing.assert_allclose(step, 0.1 * moved, rtol=1e-5)


@pytest.mark.parametrize('decay', [0.5, 0.9999])
def test_average_equals_its_formula(decay):
    params = {'kernel': jnp.array([[1.0, 2.0]]), 'bias': jnp.array([-1.0])}
    noise = lambda step, p: jax.tree.map(lambda x: jnp.cos(x + step), p)  # noqa: E731
    seen, state = run(plain(ema=decay), params, noise, 12)
    average = evaluation_params(seen[-1], state)
    weights = decay ** np.arange(11, -1, -1.0)
    for name in params:
        history = np.stack([np.asarray(p[name], np.float64) for p in seen])
        expected = np.tensordot(weights / weights.sum(), history, 1)
        np.testing.assert_allclose(average[name], expected, rtol=2e-6)


def test_evaluation_params():
    params = small_params()
    assert evaluation_params(params, make_optimizer(plain(), steps=1)[0].init(params)) is params
    for nonfinite in ('stop', 'skip'):
        optim = plain(ema=0.9, nonfinite=nonfinite)
        state = make_optimizer(optim, steps=1)[0].init(params)
        average = evaluation_params(None, state)
        jax.tree.map(np.testing.assert_array_equal, average, params)


def test_averaged_state_can_be_donated():
    optimizer, _ = make_optimizer(plain(ema=0.9), steps=2)
    init = jax.jit(lambda: (p := jax.tree.map(jnp.ones_like, small_params()), optimizer.init(p)))

    def step(carry):
        params, state = carry
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    jax.block_until_ready(jax.jit(step, donate_argnums=0)(init()))


def test_muon_takes_matrices_and_leaves_the_rest():
    axes = {
        parameter_path(path): value and tuple(value)
        for path, value in jax.tree_util.tree_leaves_with_path(
            muon_dimensions(small_params()),
            is_leaf=lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers),
        )
    }
    assert axes == {
        'embed/embedding': None,
        'attention/qkv/kernel': ((0,), (1, 3)),
        'attention/qkv/bias': None,
        'attention/query/kernel': ((0,), (1, 2)),
        'attention/out/kernel': ((0, 1), (2,)),
        'conv/kernel': ((0, 1, 2), (3,)),
        'conv/bias': None,
        'norm/scale': None,
        'head/kernel': None,
    }


def test_muon_orthogonalises_each_of_query_key_and_value():
    params = {'qkv': {'kernel': jax.random.normal(jax.random.key(0), (16, 2, 3, 8))}}
    # Columns of very different lengths, which Adam would keep in its own way and Muon evens out.
    scales = jnp.array([1.0, 1e-2, 1e2])[None, None, :, None]
    optim = plain(optimizer='muon', momentum=0.9, peak_lr=1.0)
    optimizer, _ = make_optimizer(optim, steps=1)
    grads = jax.tree.map(lambda x: x * scales, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for i in range(3):
        matrix = np.asarray(updates['qkv']['kernel'][:, :, i]).reshape(16, 16)
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(16))
        # Newton-Schulz with Jordan's coefficients ends between 0.7 and 1.2, not at 1.
        assert np.median(singular) == pytest.approx(1.0, abs=0.35)
        assert singular.max() < 1.3


def test_muon_moves_scanned_layers_and_experts_matrix_by_matrix(key):
    kernels = {'qkv': (4, 2, 3, 2), 'query': (4, 2, 2), 'out': (2, 2, 4)}
    block = {'attention': {name: {'kernel': shape} for name, shape in kernels.items()}}
    block |= {'mlp': {'up': {'kernel': (4, 8)}}, 'moe': {'experts': {'up': {'kernel': (2, 4, 8)}}}}
    shapes = {'block_0': block, 'block_1': block}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    params = tree.unflatten(
        [jax.random.normal(jax.random.fold_in(key, i), x) for i, x in enumerate(leaves)]
    )
    optimizer, _ = make_optimizer(plain(optimizer='muon', momentum=0.9, peak_lr=1.0), steps=10)

    def move(params):
        return optimizer.update(params, optimizer.init(params), params)[0]

    single, stacked = jax.jit(move)(params), jax.jit(move)(stack_layers(params))
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4)  # noqa: E731
    jax.tree.map(close, stacked, stack_layers(single))
    # An expert's matrix moves as if it were alone.
    up_ECM = params['block_0']['moe']['experts']['up']['kernel']
    alone = jax.jit(move)({'block_0': {'mlp': {'up': {'kernel': up_ECM[1]}}}})
    own_CM = single['block_0']['moe']['experts']['up']['kernel'][1]
    close(own_CM, alone['block_0']['mlp']['up']['kernel'])


def test_muon_moves_the_rest_as_adamw_does():
    params = small_params()
    grads = jax.tree.map(jnp.sin, params)
    moved = {}
    for name in ('muon', 'adamw'):
        optimizer, _ = make_optimizer(plain(optimizer=name, momentum=0.9), steps=1)
        moved[name], _ = optimizer.update(grads, optimizer.init(params), params)
    for path in (('embed', 'embedding'), ('norm', 'scale'), ('head', 'kernel')):
        ours, adamw = (moved[name][path[0]][path[1]] for name in ('muon', 'adamw'))
        np.testing.assert_allclose(ours, adamw, rtol=1e-6)
    assert not np.allclose(moved['muon']['conv']['kernel'], moved['adamw']['conv']['kernel'])


def test_skip_leaves_everything_as_it_was():
    params = small_params()
    optim = plain(optimizer='adamw', ema=0.9, clip=1.0, weight_decay=0.1, nonfinite='skip')
    optimizer, _ = make_optimizer(optim, steps=100)
    update = jax.jit(optimizer.update)
    updates, state = update(params, optimizer.init(params), params)
    good = optax.apply_updates(params, updates)
    kept = state.inner_state
    bad = jax.tree.map(jnp.copy, params)
    for value in (jnp.nan, jnp.inf) * 4:
        bad['norm']['scale'] = bad['norm']['scale'].at[1].set(value)
        updates, state = update(bad, state, good)
        jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(good, updates), good)
        jax.tree.map(np.testing.assert_array_equal, state.inner_state, kept)
    assert state.total_notfinite == 8
    updates, state = update(params, state, good)
    assert optax.tree.norm(updates) > 0


@pytest.mark.parametrize('optimizer', sorted(set(OPTIMIZERS) - {'adafactor'}))
def test_state_leaves_end_in_their_parameters_path(optimizer):
    params = small_params()
    optim = plain(optimizer=optimizer, momentum=0.9, ema=0.9, nonfinite='skip', clip=1.0)
    shapes = jax.eval_shape(make_optimizer(optim, steps=1)[0].init, params)
    known = {parameter_path(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(params)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        owners = [name for name in known if parameter_path(path).endswith('/' + name)]
        if owners:
            assert leaf.shape == known[max(owners, key=len)]
        else:
            assert leaf.ndim == 0 or parameter_path(path).endswith('ns_coeffs')


@pytest.mark.parametrize(
    ('knobs', 'message'),
    [
        (
            {'optimizer': 'adamwx'},
            '--optimizer=adamwx: must be one of sgd, rmsprop, adam, adamw, adafactor, lion, muon; '
            'try --optimizer=adamw',
        ),
        (
            {'schedule': 'cosine'},
            '--schedule=cosine: must be one of constant, step, warmup_cosine, warmup_linear, '
            'rsqrt, wsd; try --schedule=warmup_cosine',
        ),
        ({'nonfinite': 'x'}, '--nonfinite=x: must be one of stop, skip; try --nonfinite=stop'),
        ({'warmup': 100}, '--warmup=100: must be smaller than --steps=100; try --warmup=10'),
        ({'warmup': -1}, '--warmup=-1: must be at least 0; try --warmup=0'),
        ({'peak_lr': -1.0}, '--peak_lr=-1.0: must be positive and finite; try --peak_lr=1e-3'),
        ({'clip': -1.0}, '--clip=-1.0: must be at least 0 and finite; try --clip=0'),
        ({'b2': 1.0}, '--b2=1.0: must be at least 0 and below 1; try --b2=0.99'),
        (
            {'schedule': 'wsd', 'warmup': 90, 'decay': 0.2},
            '--decay=0.2: must be at most 0.1, what --warmup=90 leaves of --steps=100; '
            'try --decay=0.05',
        ),
        (
            {'schedule': 'step'},
            '--decay_every=0: must be at least 1 with --schedule=step; try --decay_every=33',
        ),
        (
            {'schedule': 'step', 'decay_every': 30, 'decay_factor': 0.0},
            '--decay_factor=0.0: must be above 0 and at most 1 with --schedule=step; '
            'try --decay_factor=0.1',
        ),
        (
            {'schedule': 'step', 'decay_every': 30, 'decay_factor': 10.0},
            '--decay_factor=10.0: must be above 0 and at most 1 with --schedule=step; '
            'try --decay_factor=0.1',
        ),
        (
            {'optimizer': 'adam', 'weight_decay': 0.1},
            '--weight_decay=0.1: must be 0 with --optimizer=adam, which has none '
            '(--optimizer=adamw has, --l2 is a penalty); try --weight_decay=0',
        ),
    ],
)
def test_wrong_knobs_are_refused(knobs, message):
    with pytest.raises(UsageError) as error:
        make_optimizer(Optim(**{'warmup': 10, **knobs}), steps=100)
    assert str(error.value) == message
    flag, value = message.rsplit('--', 1)[1].split('=')
    fixed = {'warmup': 10, **knobs, flag: type(getattr(Optim(), flag))(value)}
    make_optimizer(Optim(**fixed), steps=100)
