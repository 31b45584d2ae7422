"""Context parallelism trains the same model, and its devices exchange no more than is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import collectives, gradient_text
from same_model import TINY, same_losses

from bigjax import experiment as experiments
from bigjax import sharding
from bigjax.experiment import Sample
from bigjax.generate import generate_tokens
from bigjax.models.decoder import positions
from bigjax.models.gpt import GPT
from bigjax.nn.attention import attention
from bigjax.nn.context import laid_out, sequence_order
from bigjax.run import UsageError
from bigjax.state import setup
from bigjax.task import Decoder
from bigjax.tasks.causal_lm import cached_decoder, causal_lm

slow = pytest.mark.slow


@pytest.mark.parametrize(
    'knobs',
    [
        {'mesh': 'data=2,context=2,tensor=2', 'context': 'ring', 'kv_heads': 2},
        {'mesh': 'data=2,context=4', 'context': 'gather', 'kv_heads': 2},
        pytest.param({'mesh': 'context=8', 'context': 'ring', 'kv_heads': 2}, marks=slow),
        pytest.param(
            {
                'mesh': 'fsdp=4,context=2',
                'context': 'gather',
                'kv_heads': 2,
                'scan': True,
                'remat': 'full',
                'accumulate': 2,
            },
            marks=slow,
        ),
        # Learned positions, which are put in the order of the ring; biases.
        pytest.param(
            {'name': 'gpt2', 'mesh': 'data=2,context=2,tensor=2', 'dropout': 0.0}, marks=slow
        ),
    ],
    ids=lambda knobs: '-'.join(map(str, knobs.values())),
)
def test_it_trains_the_same_model(knobs):
    same_losses(**knobs)


def mesh(text):
    return jax.set_mesh(sharding.make_mesh(text))


def tiny_gpt():
    model = GPT(vocab_size=32, context_length=16, depth=1, heads=2, width=16)
    tokens_BT = np.random.default_rng(0).integers(0, 32, (4, 17)).astype(np.int32)
    tokens_BT[1, 11:] = -1  # padding
    params = model.init(jax.random.key(0), tokens_BT[:, :-1])['params']
    return model, params, tokens_BT


@pytest.mark.parametrize('train', [True, False], ids=['gradient', 'evaluation'])
def test_learned_positions_and_padding(train):
    model, params, tokens_BT = tiny_gpt()
    task = causal_lm(
        model,
        length=16,
        token_bytes_V=np.arange(32),
        forward_flops=0,
        decoder=cached_decoder(model, 16),
        z_loss=0.1,
    )

    def run(params):
        loss = functools.partial(task.loss, train=train)
        value, (_, metrics) = loss(params, {}, {'tokens': tokens_BT}, jax.random.key(0))
        return value, metrics

    run = jax.value_and_grad(run, has_aux=True) if train else run
    want = jax.jit(run)(params)
    with mesh('data=2,context=4'):
        got = jax.jit(run)(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-5), got, want)


def test_generation_goes_on_without_a_split():
    model, params, _ = tiny_gpt()
    decoder: Decoder = cached_decoder(model, 16)
    prompt_BT = np.arange(8, dtype=np.int32).reshape(1, 8)
    sample = Sample(length=12, temperature=0.0)
    want = generate_tokens(decoder, params, prompt_BT, sample)
    with mesh('context=4,tensor=2'):
        placed = jax.device_put(
            params, sharding.replicated(sharding.make_mesh('context=4,tensor=2'))
        )
        got = generate_tokens(decoder, placed, prompt_BT, sample)
    np.testing.assert_array_equal(got, want)


def test_order_of_positions():
    assert sequence_order(7) is None
    x_BT = jnp.arange(16)[None]
    assert laid_out(x_BT) is x_BT
    with mesh('data=4,context=2'):
        want = [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]
        assert sequence_order(16).tolist() == want
        assert laid_out(x_BT)[0].tolist() == positions(x_BT, None)[0].tolist() == want


def test_a_ring_only_hands_keys_and_values_on():
    found = collectives(gradient_text(mesh='data=2,context=4', kv_heads=2))
    # 8 rows of 4 positions of 2 heads of 8, float32. Forward, keys and values in a loop; backward,
    # both before a loop, they and their gradients in it, and these once more behind it.
    assert found.pop(('collective-permute', 8 * 4 * 2 * 8 * 4)) == 2 + 2 + 4 + 2
    assert {kind for kind, _ in found} == {'all-reduce'}


def test_gathering_brings_keys_and_values_twice_and_their_gradients_back():
    found = collectives(gradient_text(mesh='data=2,context=4', kv_heads=2, context='gather'))
    assert found.pop(('all-gather', 8 * 16 * 2 * 8 * 4)) == 4
    assert found.pop(('reduce-scatter', 8 * 4 * 2 * 8 * 4)) == 2
    assert {kind for kind, _ in found} == {'all-reduce'}


@pytest.mark.parametrize(
    ('name', 'knobs', 'message'),
    [
        (
            'llama',
            TINY | {'seq': 20, 'mesh': 'data=2,context=4'},
            '--seq=20: must be a multiple of 8, two chunks for each of the 4 parts of a sequence '
            'on --mesh=data=2,context=4; try --seq=16',
        ),
        (
            'llama',
            TINY | {'seq': 3, 'mesh': 'context=8'},
            '--seq=3: must be a multiple of 16, two chunks for each of the 8 parts of a sequence '
            'on --mesh=context=8; try --seq=16',
        ),
        (
            'bert',
            {'mesh': 'data=4,context=2', 'batch': 8, 'dataset': TINY['dataset']},
            '--mesh=data=4,context=2: only decoder-only transformers split positions over context; '
            'try --mesh=data=-1',
        ),
        (
            'rnn_lm',  # It would read its text in the order of a ring.
            {'mesh': 'fsdp=4,context=2', 'batch': 8, 'dataset': TINY['dataset']},
            '--mesh=fsdp=4,context=2: only decoder-only transformers split positions over context; '
            'try --mesh=data=-1,fsdp=4',
        ),
    ],
    ids=['length', 'short', 'encoder', 'recurrent'],
)
def test_what_does_not_fit_is_refused_before_anything_is_compiled(name, knobs, message):
    with pytest.raises(UsageError) as error:
        setup(experiments.load(name, **knobs))
    assert str(error.value) == message


def test_a_kernel_that_is_named_and_refuses():
    q_BTHD = jnp.zeros((1, 16, 2, 8), jnp.float16)
    with mesh('data=4,context=2'), pytest.raises(UsageError) as error:
        attention(q_BTHD, q_BTHD, q_BTHD, causal=True, impl='tpu', context='ring')
    assert str(error.value) == (
        '--attention=tpu: takes bfloat16 and float32, and q is float16; try --attention=xla'
    )
