"""Dense layers in int8 and fp8: their products, gradients and types; and what a model learns."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from bigjax import sharding
from bigjax.data.text import open_language
from bigjax.models import gpt
from bigjax.models.gpt import GPT
from bigjax.models.llama import Llama
from bigjax.nn.linear import Dense
from bigjax.nn.moe import Routing
from bigjax.nn.quantized import quantized_matmul
from bigjax.nn.stack import stack_layers
from bigjax.tasks.causal_lm import causal_lm

# Relative errors of one product of normal numbers: forward, and of gradients.
STEPS = 120
ERRORS = {'int8': (0.012, 0.012), 'fp8': (0.045, 0.07)}


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def error(x, exact):
    exact = np.asarray(exact, np.float64)
    return np.linalg.norm(np.asarray(x, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('how', ['int8', 'fp8'])
def test_product_and_gradients_are_near_the_exact_ones(how, dtype):
    x, w_IO, g = (
        normal(i, *s, dtype=dtype) for i, s in enumerate([(4, 16, 96), (96, 32), (4, 16, 32)])
    )
    y, pull = jax.vjp(lambda x, w: quantized_matmul(x, w, how), x, w_IO)
    exact, exact_pull = jax.vjp(jnp.matmul, *(a.astype(jnp.float32) for a in (x, w_IO)))
    forward, backward = ERRORS[how]
    assert y.dtype == jnp.dtype(dtype)
    # Neither more nor less: what is exact is not rounded.
    assert forward / 3 < error(y, exact) < forward
    for found, wanted in zip(pull(g), exact_pull(g.astype(jnp.float32)), strict=True):
        assert found.dtype == jnp.dtype(dtype)
        assert backward / 3 < error(found, wanted) < backward


def test_int8_by_hand():
    # Scales are 127.5 parts of the largest: of a row 2 and 4, of a column 1 and 3.
    x = jnp.array([[2.0, -1.0, 0.5], [4.0, 1.0, -0.3]])
    w = jnp.array([[1.0, -0.2], [0.4, 3.0], [-0.1, 0.0]])
    rounded_x = np.round(np.array(x) * 127.5 / np.array([[2], [4]])).clip(-127, 127)
    rounded_w = np.round(np.array(w) * 127.5 / np.array([[1, 3]])).clip(-127, 127)
    expected = rounded_x @ rounded_w * np.array([[2], [4]]) * np.array([[1, 3]]) / 127.5**2
    np.testing.assert_allclose(quantized_matmul(x, w, 'int8'), expected, rtol=1e-5)


@pytest.mark.parametrize('how', ['int8', 'fp8'])
def test_rows_and_columns_have_scales_of_their_own(how):
    x, w_IO = normal(0, 8, 32), normal(1, 32, 16)
    x_scale, w_scale = 10.0 ** jnp.arange(-4, 4)[:, None], 10.0 ** jnp.arange(-8, 8)[None]
    scaled = quantized_matmul(x * x_scale, w_IO * w_scale, how)
    plain = quantized_matmul(x, w_IO, how)
    np.testing.assert_allclose(scaled / (x_scale * w_scale), plain, rtol=2e-2, atol=2e-1)
    assert not quantized_matmul(0 * x, w_IO, how).any()


E4M3, E5M2 = 'float8_e4m3fn', 'float8_e5m2'


@pytest.mark.parametrize(
    ('how', 'types'),
    [
        ('int8', [('int8', 'int8')] * 3),
        # The gradient that comes in has the range of e5m2, in both products it takes part in.
        ('fp8', [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)]),
    ],
)
def test_all_three_products_of_a_layer_are_of_small_numbers(how, types):
    layer = Dense(16, matmul=how, dtype=jnp.bfloat16)
    x = normal(0, 2, 4, 8)
    params = layer.init(jax.random.key(0), x)['params']
    program = jax.make_jaxpr(jax.grad(lambda p, x: layer.apply({'params': p}, x).sum(), (0, 1)))(
        params, x
    )
    found = [e for e in equations(program.jaxpr) if e.primitive.name == 'dot_general']
    assert sorted(tuple(str(v.aval.dtype) for v in e.invars) for e in found) == types
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def equations(jaxpr):
    """Returns all equations of a program, those of its parts included."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
        ):
            inner = getattr(part, 'jaxpr', part)
            if hasattr(inner, 'eqns'):
                yield from equations(inner)


# ---- Models ----

SMALL = {'vocab_size': 32, 'context_length': 8, 'depth': 2, 'heads': 2, 'width': 16}
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 8), np.int32)
LLAMA = {'kv_heads': 1, 'hidden': 32}


@pytest.mark.parametrize(
    ('make', 'how', 'layers'),
    [
        (functools.partial(GPT, **SMALL), 'int8', 4),
        (functools.partial(Llama, **LLAMA, **SMALL), 'fp8', 7),
        (functools.partial(Llama, **LLAMA, **SMALL, routing=Routing(4)), 'int8', 7),
    ],
)
def test_every_dense_layer_is_rounded_and_parameters_are_the_same(make, how, layers):
    def variables(matmul):
        model = make(matmul=matmul)
        return jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS))

    assert variables(how) == variables('default')
    model = make(matmul=how)
    program = jax.make_jaxpr(lambda v: model.apply(v, TOKENS))(variables(how))
    products = [e for e in equations(program.jaxpr) if e.primitive.name == 'dot_general']
    small = [e for e in products if e.invars[0].aval.dtype.itemsize == 1]
    assert len(small) == layers * SMALL['depth']


@functools.cache
def loss_and_gradient(**options):
    """Returns the function of parameters and tokens, compiled once for each shape and mesh."""
    model = GPT(matmul='int8', **SMALL, **options)

    def loss(params, tokens):
        return jnp.square(model.apply({'params': params}, tokens, train=True)).mean()

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope='module')
def alone():
    """Returns parameters, and the loss and gradient of a decoder in int8 on one device."""
    model = GPT(**SMALL)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)['params']
    return params, *loss_and_gradient()(params, TOKENS)


def check_same(found, wanted):
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-3)
    # Sums in another order may fall on the other side of a half before they are rounded.
    errors = jax.tree.map(error, found[1], wanted[1])
    assert max(jax.tree.leaves(errors)) < 0.01, errors


def test_scanned_and_recomputed_is_the_same(alone):
    params, loss, gradient = alone
    other = loss_and_gradient(scan=True, remat='full')(stack_layers(params), TOKENS)
    check_same(other, (loss, stack_layers(gradient)))


def on_a_mesh(text, params, **options):
    mesh = sharding.make_mesh(text)
    paths = jax.tree_util.tree_map_with_path(lambda path, _: sharding.path_string(path), params)
    specs = jax.tree.map(lambda p, x: sharding.spec_for(p, x.shape, gpt.RULES, mesh), paths, params)
    where = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh):
        return loss_and_gradient(**options)(jax.device_put(params, where), TOKENS)


def test_on_a_mesh_it_is_the_same(alone):
    params, *wanted = alone
    check_same(on_a_mesh('data=2,fsdp=2,tensor=2', params), wanted)


def test_in_a_pipeline_each_microbatch_has_scales_of_its_own(alone):
    params, *_ = alone
    parts = [loss_and_gradient()(params, TOKENS[m::2]) for m in range(2)]
    loss, gradient = jax.tree.map(lambda *x: sum(x) / 2, *parts)
    found = on_a_mesh('stage=2,data=4', stack_layers(params), scan=True)
    check_same(found, (loss, stack_layers(gradient)))


@pytest.fixture(scope='module')
def stdlib(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('data'))
    return open_language('stdlib', seq=32, data_dir=folder, tokenizer='bytes', vocab=256).train


def curve(records, matmul):
    """Returns the losses of a tiny decoder on the source of the standard library."""
    model = GPT(vocab_size=256, context_length=32, depth=1, heads=2, width=32, matmul=matmul)
    task = causal_lm(model, length=32, token_bytes_V=np.ones(256), forward_flops=0, decoder=None)
    optimizer = optax.adamw(2e-3)
    params = task.init(jax.random.key(0))['params']
    state = params, optimizer.init(params)

    @jax.jit
    def step(state, batch):
        params, moments = state
        gradient = jax.value_and_grad(task.loss, has_aux=True)
        (loss, _), grads = gradient(params, {}, batch, jax.random.key(0), True)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    losses = []
    for n in range(STEPS):
        state, loss = step(state, records.take(np.arange(n * 16, (n + 1) * 16)))
        losses.append(loss)
    return np.asarray(losses)


def test_losses_stay_near_those_of_floats(stdlib):
    exact = curve(stdlib, 'default')
    assert exact[-20:].mean() < exact[:20].mean() - 1
    for how in ('int8', 'fp8'):
        more = curve(stdlib, how) - exact
        assert np.abs(more).max() > 1e-4, 'nothing is rounded'
        assert np.abs(more).mean() < 0.05, how
        assert np.abs(more[-20:].mean()) < 0.1, how
