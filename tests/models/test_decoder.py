"""Decoder-only models alike: cached decoding, causality, scanned layers, rules, operations."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_flops import matrix_flops
from model_variables import check_rules

from bigjax.models import gpt, llama
from bigjax.nn.moe import Routing
from bigjax.nn.rotary import RotaryScaling
from bigjax.nn.stack import stack_layers

V, LENGTH = 11, 8
# Room for every token: what is dropped depends on the length, and a cache reads another one.
ROUTING = Routing(experts=4, experts_per_token=2, capacity_factor=2.0)
SHAPE = {'vocab_size': V, 'context_length': LENGTH, 'depth': 2, 'width': 16}
GPT = gpt.GPT(**SHAPE, heads=2, bias=True)
LLAMA = llama.Llama(
    **SHAPE, heads=4, kv_heads=2, hidden=24, tied=False, theta=100.0, scaling=RotaryScaling(8.0)
)
MODELS = {
    'gpt': GPT,
    'gpt scanned, of experts': GPT.clone(scan=True, routing=ROUTING),
    'llama': LLAMA,
    'llama scanned': LLAMA.clone(scan=True),
    'llama of experts': LLAMA.clone(routing=ROUTING),
}
SIZES = {'vocab': V, 'embed': 16, 'experts': 4}


@pytest.fixture(scope='module', params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.fixture(scope='module')
def tokens_BT():
    return jax.random.randint(jax.random.key(1), (2, LENGTH), 0, V)


def drawn(model):
    """Parameters of deviation 0.4 rather than 0.02, so that every layer matters; norms near 1."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))

    def leaf(path, shape):
        near = 1.0 if path[-1].key == 'scale' else 0.0
        return jnp.float32(near + draw.normal(size=shape.shape, scale=0.4 - 0.3 * near))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope='module')
def variables(model):
    return drawn(model)


@pytest.fixture(scope='module')
def whole(model):
    return jax.jit(model.apply)


@pytest.fixture(scope='module')
def decode(model):
    return jax.jit(lambda *arguments: model.apply(*arguments, method='decode'))


@pytest.fixture(scope='module')
def whole_BTV(whole, variables, tokens_BT):
    return whole(variables, tokens_BT)


def test_cached_decoding_equals_the_whole_model_token_for_token(
    model, variables, decode, tokens_BT, whole_BTV
):
    prompt_BTV, cache = decode(variables, tokens_BT[:, :3], model.init_cache(2))
    np.testing.assert_allclose(prompt_BTV, whole_BTV[:, :3], atol=2e-5)
    for t in range(3, LENGTH):
        logits_B1V, cache = decode(variables, tokens_BT[:, t : t + 1], cache)
        np.testing.assert_allclose(logits_B1V, whole_BTV[:, t : t + 1], atol=2e-5)
    np.testing.assert_array_equal(cache.length_B, [LENGTH, LENGTH])


def test_rows_of_unequal_length_decode_from_where_each_one_ends(
    model, variables, decode, tokens_BT, whole_BTV
):
    _, cache = decode(variables, tokens_BT[:, :3], model.init_cache(2))
    cache = cache._replace(length_B=jnp.array([3, 2]))
    following_BT = jnp.stack([tokens_BT[0, 3:6], tokens_BT[1, 2:5]])
    logits_BTV, _ = decode(variables, following_BT, cache)
    np.testing.assert_allclose(logits_BTV[0], whole_BTV[0, 3:6], atol=2e-5)
    np.testing.assert_allclose(logits_BTV[1], whole_BTV[1, 2:5], atol=2e-5)


@pytest.mark.parametrize('name', ['gpt scanned, of experts', 'llama of experts'])
def test_a_cache_drops_no_token(name, tokens_BT):
    wide, variables = MODELS[name], drawn(MODELS[name])
    tight = wide.clone(routing=dataclasses.replace(ROUTING, capacity_factor=0.1))
    want_BTV, logits_BTV = (
        jax.jit(lambda cache, m=m: m.apply(variables, tokens_BT, cache, method='decode')[0])(
            m.init_cache(2)
        )
        for m in (wide, tight)
    )
    np.testing.assert_allclose(logits_BTV, want_BTV, atol=2e-5)


def test_no_logit_depends_on_a_later_token(whole, variables, tokens_BT, whole_BTV):
    for t in (0, 4, LENGTH - 1):
        other_BT = tokens_BT.at[:, t].set((tokens_BT[:, t] + 1) % V)
        changed_BT = (np.abs(whole(variables, other_BT) - whole_BTV) > 1e-4).any(-1)
        assert not changed_BT[:, :t].any()
        assert changed_BT[:, t].all()


def test_every_parameter_has_a_rule_of_its_rank(model, variables):
    rules = gpt.RULES if isinstance(model, gpt.GPT) else llama.RULES
    sizes = SIZES | ({'heads': 2, 'mlp': 64} if rules is gpt.RULES else {'heads': 4, 'mlp': 24})
    for name, shape, axes in check_rules(variables['params'], rules):
        assert any(axes), name
        for axis, size in zip(axes, shape, strict=True):
            few = axis == 'heads' and re.search('key|value', name)
            assert axis in (None, 'layers') or size == (2 if few else sizes[axis]), name
        if name.startswith('blocks/'):
            assert axes[0] == 'layers'


@pytest.mark.parametrize('single', [GPT, LLAMA], ids=['gpt', 'llama'])
def test_scanned_layers_give_the_same_loss_and_gradient(single, tokens_BT):
    params = drawn(single)['params']

    def gradient(model, params):
        loss = lambda params: model.apply({'params': params}, tokens_BT).std()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    value, grads = gradient(single, params)
    scanned, scanned_grads = gradient(
        single.clone(scan=True, remat='dots_no_batch'), stack_layers(params)
    )
    np.testing.assert_allclose(scanned, value, rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    jax.tree.map(close, scanned_grads, stack_layers(grads))


@pytest.mark.parametrize('family', ['gpt', 'llama'])
def test_flops_follow_the_model(family):
    shape = {'vocab_size': 256, 'depth': 2, 'heads': 4, 'width': 64}
    if family == 'gpt':
        model, flops = gpt.GPT(context_length=64, **shape), gpt.forward_flops
        shape.pop('heads')
    else:
        shape |= {'kv_heads': 2, 'hidden': 128}
        model, flops = llama.Llama(context_length=64, **shape), llama.forward_flops
    tokens_BT = jnp.zeros((1, 64), int)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)
    assert flops(length=64, **shape) == matrix_flops(model.apply, variables, tokens_BT)


def test_experts_count_as_far_as_a_token_uses_them():
    shape = {'vocab_size': 256, 'length': 64, 'depth': 2, 'width': 64}
    one = Routing(experts=8, experts_per_token=1)
    router = 2 * 2 * 64 * 64 * 8
    assert gpt.forward_flops(**shape, routing=one) == gpt.forward_flops(**shape) + router


@pytest.mark.parametrize('name', ['gpt', 'llama'])
def test_too_many_positions_are_refused(name):
    with pytest.raises(ValueError, match='9 positions: the model sees 8'):
        MODELS[name].init(jax.random.key(0), jnp.zeros((1, 9), int))
    with pytest.raises(ValueError, match='9 positions: the model sees 8'):
        MODELS[name].init_cache(1, 9)
