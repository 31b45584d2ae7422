"""Attention differentiated twice, mapped over, and with what a derivative must not cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import IMPLS, Case, arguments, skip_refused
from attention_cases import attend as attend_by_name
from attention_oracle import plain
from compiling import compiled

from pallas_kernels.attention import attention, reference
from pallas_kernels.attention.arguments import check_arguments
from pallas_kernels.attention.differentiable import attend

CASE = Case(causal=True, heads=(4, 2), softcap=2.0, bias='keys', sinks=True, mask='keys')


def assert_near(got, want, tolerance):
    for name, x in want.items():
        atol = tolerance * float(jnp.abs(x).max())
        np.testing.assert_allclose(got[name], x, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('mode', ['reverse', 'forward'])
def test_a_second_derivative_is_that_of_plain_operations(impl, mode):
    arrays, others = arguments(CASE)
    skip_refused(impl, arrays, others)
    directions = {n: jnp.cos(jnp.arange(x.size)).reshape(x.shape) for n, x in arrays.items()}

    def second(function):
        def loss(arrays):
            o, lse = function(arrays)
            return (o**3).sum() + (lse**2).sum()

        def slope(arrays):
            return sum((g * directions[n]).sum() for n, g in jax.grad(loss)(arrays).items())

        if mode == 'reverse':
            return compiled('', jax.grad(slope), arrays)()
        return compiled('', lambda x: jax.jvp(jax.grad(loss), (x,), (directions,))[1], arrays)()

    got = second(lambda arrays: attend_by_name(impl, arrays, others))
    assert_near(got, second(lambda arrays: plain(CASE, arrays, others)), 1e-4)


@pytest.mark.parametrize(
    'impl', ['reference', 'xla', pytest.param('tpu', marks=pytest.mark.slow), IMPLS[-1]]
)
def test_vmap_is_the_call_of_each_value_and_gradient(impl):
    case = CASE._replace(dropout_rate=0.3, segments=True)
    both = [arguments(case, seed) for seed in (0, 1)]
    skip_refused(impl, *both[0])
    # Of the mapped operands, some are, and some are not: bias, mask and dropout's seed.
    arrays = {n: jnp.stack([x[n] for x, _ in both]) for n in ('q', 'k', 'v', 'sinks')}
    bias = both[0][0]['bias']
    ids = {n: jnp.stack([x[n] for _, x in both]) for n in ('segment_ids', 'kv_segment_ids')}

    def run(arrays, bias, ids):
        def function(arrays, bias):
            o, lse = attend_by_name(impl, {**arrays, 'bias': bias}, {**both[0][1], **ids})
            return (o**2).sum() + lse.sum(), o

        (_, o), grads = jax.value_and_grad(function, (0, 1), has_aux=True)(arrays, bias)
        return {'o': o, **grads[0], 'bias': grads[1]}

    got = compiled(impl, jax.vmap(run, in_axes=(0, None, 0)), arrays, bias, ids)()
    first = lambda group: {name: x[0] for name, x in group.items()}  # noqa: E731
    single = compiled(impl, run, first(arrays), bias, first(ids)).func
    for i in range(2):
        one = [{n: x[i] for n, x in group.items()} for group in (arrays, ids)]
        want = single(one[0], bias, one[1])
        assert_near({name: x[i] for name, x in got.items()}, want, 1e-5)


class Spy:
    """The specification, noting what it is asked for."""

    def __init__(self):
        self.bias_gradients, self.lse_gradients = [], []

    def forward(self, *args):
        return reference.forward(*args)

    def backward(self, operands, spec, sizes, o_BTHV, lse_BHT, do_BTHV, dlse_BHT):
        self.bias_gradients.append(spec.bias_gradient)
        self.lse_gradients.append(dlse_BHT is not None)
        return reference.backward(operands, spec, sizes, o_BTHV, lse_BHT, do_BTHV, dlse_BHT)


def test_a_gradient_is_computed_only_of_what_varies_and_reaches_the_loss():
    q, bias = jnp.ones((1, 4, 1, 8)), jnp.ones((1, 1, 4, 4))
    spy = Spy()

    def loss(with_lse, q, bias):
        operands, spec = check_arguments(q, q, q, bias=bias)
        o, lse = attend(spy, operands, spec, with_lse=True)
        return o.sum() + (lse.sum() if with_lse else 0)

    for argnums, with_lse in ((0, False), ((0, 1), True)):
        jax.eval_shape(jax.grad(functools.partial(loss, with_lse), argnums), q, bias)
    assert (spy.bias_gradients, spy.lse_gradients) == ([False, True], [False, True])


@pytest.mark.parametrize('impl', IMPLS)
def test_integers_and_booleans_have_gradients_of_no_type(impl):
    arrays, others = arguments(Case(segments=True, mask='full', dropout_rate=0.3))
    skip_refused(impl, arrays, others)
    varied = {n: others.pop(n) for n in ('mask', 'segment_ids', 'dropout_seed')}
    function = lambda varied: attend_by_name(impl, arrays, {**others, **varied})[0].sum()  # noqa: E731
    grads = jax.grad(function, allow_int=True)(varied)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jax.dtypes.float0}


def test_a_checkpointed_scan_over_layers_has_the_gradient_of_a_loop():
    x = jax.random.normal(jax.random.key(0), (2, 16, 2, 8))
    scales = jnp.array([0.5, 1.0, 2.0])
    layer = lambda x, scale: x + attention(scale * x, x, x, causal=True, impl='xla')  # noqa: E731

    def scanned(x):
        return jax.lax.scan(lambda x, s: (jax.checkpoint(layer)(x, s), None), x, scales)[0].sum()

    def looped(x):
        for scale in scales:
            x = layer(x, scale)
        return x.sum()

    got, want = (jax.jit(jax.grad(f))(x) for f in (scanned, looped))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
