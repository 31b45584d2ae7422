"""Attention's complaints, word for word: the argument, its value, the rule, a value that works."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, reference
from pallas_kernels.attention.arguments import Spec, check_arguments
from pallas_kernels.block_sizes import BlockSizes


def x(*shape, dtype='float32'):
    return jnp.zeros(shape, dtype)


GOOD = {'q': x(2, 6, 4, 8), 'k': x(2, 5, 2, 8), 'v': x(2, 5, 2, 16)}
IDS = x(2, 6, dtype='int32')
MESSAGES = [
    (
        {'q': x(2, 6, 8)},
        'q=float32[2, 6, 8]: must have four dimensions [B, T, H, D], none of them 0; try '
        'q=float32[2, 16, 4, 64]',
    ),
    (
        {'k': x(2, 0, 2, 8)},
        'k=float32[2, 0, 2, 8]: must have four dimensions [B, S, K, D], none of them 0; '
        'try k=float32[2, 16, 4, 64]',
    ),
    (
        {'q': x(2, 6, 4, 8, dtype='int32')},
        'q=int32[2, 6, 4, 8]: must be one of bfloat16, float16, float32, float64; try '
        "q=q.astype('float32')",
    ),
    (
        {'k': x(2, 5, 2, 8, dtype='bfloat16')},
        'k=bfloat16[2, 5, 2, 8]: must have the type of q, float32; try k=float32[2, 5, 2, 8]',
    ),
    (
        {'k': x(2, 5, 2, 16)},
        'k=float32[2, 5, 2, 16]: must have batch and head size of q; try k=float32[2, 5, 2, 8]',
    ),
    (
        {'v': x(2, 6, 2, 8)},
        'v=float32[2, 6, 2, 8]: must have batch, length and heads of k; try v=float32[2, 5, 2, 8]',
    ),
    (
        {'k': x(2, 5, 3, 8), 'v': x(2, 5, 3, 8)},
        'k=float32[2, 5, 3, 8]: its 3 heads must divide the 4 heads of q; try '
        'k=float32[2, 5, 2, 8]',
    ),
    (
        {'causal': 1},
        'causal=1: must be True or False, for it is compiled in; try causal=True',
    ),
    (
        {'window': -1},
        'window=-1: must be None, a Python int >= 0, or a pair (left, right) of these; '
        'try window=(128, 0)',
    ),
    (
        {'window': (3, -1)},
        'window=(3, -1): must be None, a Python int >= 0, or a pair (left, right) of '
        'these; try window=(128, 0)',
    ),
    (
        {'window': (1, 2, 3)},
        'window=(1, 2, 3): must be None, a Python int >= 0, or a pair (left, right) of '
        'these; try window=(128, 0)',
    ),
    (
        {'segment_ids': IDS},
        'kv_segment_ids=None: must be given with segment_ids, as q has length 6 and k 5; '
        'try kv_segment_ids=int32[2, 5]',
    ),
    (
        {'kv_segment_ids': x(2, 5, dtype='int32')},
        'segment_ids=None: must be given with kv_segment_ids; try segment_ids=int32[2, 6]',
    ),
    (
        {'segment_ids': x(2, 6), 'kv_segment_ids': x(2, 5, dtype='int32')},
        'segment_ids=float32[2, 6]: must be integers of shape [B, T]; try segment_ids=int32[2, 6]',
    ),
    (
        {'segment_ids': IDS, 'kv_segment_ids': IDS},
        'kv_segment_ids=int32[2, 6]: must be integers of shape [B, S]; try '
        'kv_segment_ids=int32[2, 5]',
    ),
    (
        {'mask': x(2, 1, 6, 5)},
        'mask=float32[2, 1, 6, 5]: must be bool with dimensions [B, H, T, S], each full '
        'or 1; try mask=bool[2, 4, 6, 5]',
    ),
    (
        {'mask': x(6, 5, dtype='bool')},
        'mask=bool[6, 5]: must be bool with dimensions [B, H, T, S], each full or 1; try '
        'mask=bool[2, 4, 6, 5]',
    ),
    (
        {'bias': x(2, 4, 5, 6)},
        'bias=float32[2, 4, 5, 6]: must be float with dimensions [B, H, T, S], each full '
        'or 1; try bias=float32[2, 4, 6, 5]',
    ),
    (
        {'bias': x(1, 1, 1, 1, dtype='int32')},
        'bias=int32[1, 1, 1, 1]: must be float with dimensions [B, H, T, S], each full '
        'or 1; try bias=float32[2, 4, 6, 5]',
    ),
    (
        {'softcap': 0.0},
        'softcap=0.0: must be > 0, or None for no cap; try softcap=50.0',
    ),
    (
        {'softcap': float('nan')},
        'softcap=nan: must be a finite Python number, for it is compiled in; try softcap=50.0',
    ),
    (
        {'sinks': x(2)},
        'sinks=float32[2]: must be float of shape [H]; try sinks=float32[4]',
    ),
    (
        {'dropout_rate': 1.0},
        'dropout_rate=1.0: must be in [0, 1); try dropout_rate=0.1',
    ),
    (
        {'dropout_rate': 0.1},
        'dropout_seed=None: dropout_rate=0.1 needs an int32 scalar, another one at every '
        "step and layer; try dropout_seed=jax.random.bits(key, (), 'uint32')",
    ),
    (
        {'dropout_rate': 0.1, 'dropout_seed': x(2, dtype='uint32')},
        'dropout_seed=uint32[2]: must be an int, or a scalar of int32 or uint32; try '
        "dropout_seed=jax.random.bits(key, (), 'uint32')",
    ),
    (
        {'scale': x()},
        'scale=float32[]: must be a finite Python number, for it is compiled in; try scale=None',
    ),
    (
        {'block_sizes': 128},
        'block_sizes=128: must be a BlockSizes or None; try block_sizes=None',
    ),
    (
        {'block_sizes': BlockSizes(128, 0, 128, 128)},
        'block_sizes.kv=0: must be a Python int >= 1; try block_sizes.kv=512',
    ),
    (
        {'block_sizes': BlockSizes(128, 128, 128, 128, heads=True)},
        'block_sizes.heads=True: must be a Python int >= 1 or None; try block_sizes.heads=None',
    ),
    (
        {'block_sizes': BlockSizes(128, 128, 128, 192), 'impl': 'tpu'},
        'block_sizes.chunk=192: must be a positive multiple of 128; try block_sizes.chunk=256',
    ),
    (
        {
            'block_sizes': BlockSizes(*[128] * 4, None, BlockSizes(256, 512, 384, 256)),
            'impl': 'tpu',
        },
        'block_sizes.backward.sub=384: must divide block_sizes.backward.kv=512; try '
        'block_sizes.backward.sub=256',
    ),
    (
        {'impl': 'cuda'},
        "impl='cuda': must be 'reference', 'xla', 'tpu', 'gpu' or None; try impl='xla'",
    ),
]


@pytest.mark.parametrize(('change', 'message'), MESSAGES)
def test_a_bad_argument_is_named_with_the_rule_and_a_value_that_works(change, message):
    features = {**GOOD, **change}
    qkv = [features.pop(name) for name in 'qkv']
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared as a whole
        attention(*qkv, **features)
    assert str(error.value) == message


def test_an_implementation_that_refuses_says_why_and_what_else_there_is(monkeypatch):
    refuses = lambda operands, spec: 'takes no softcap' if spec.softcap else None  # noqa: E731
    monkeypatch.setattr(reference, 'refuses', refuses)
    jax.eval_shape(lambda: attention(*GOOD.values(), impl='reference'))
    with pytest.raises(ValueError, match=r"^impl='reference': takes no softcap; try impl='xla'$"):
        attention(*GOOD.values(), softcap=3.0, impl='reference')


def test_what_the_arguments_come_to():
    operands, spec = check_arguments(*GOOD.values(), causal=True, window=7, scale=2)
    assert spec == Spec(True, (7, 7), None, 0.0, 2.0, -1)
    assert (spec.left, spec.right) == (7, 0)
    # No position is as far away, and int32 holds no sums of such.
    assert check_arguments(*GOOD.values(), window=(2**40, 2**30 - 1))[1].window == (None, 2**30 - 1)
    ids = np.zeros((2, 6), np.uint8)
    q = GOOD['q']
    operands, _ = check_arguments(
        q, q, q, segment_ids=ids, dropout_rate=0.5, dropout_seed=jnp.uint32(2**32 - 1)
    )
    assert operands.kv_segment_ids_BS.dtype == operands.segment_ids_BT.dtype == jnp.int32
    assert operands.dropout_seed == -1


@pytest.mark.parametrize('backward', [False, True])
def test_block_sizes_beyond_the_vmem_of_the_chip_are_refused(backward):
    small, large = BlockSizes(*[128] * 4), BlockSizes(4096, 4096, 2048, 2048)
    sizes = dataclasses.replace(small, backward=large) if backward else large
    q = jax.ShapeDtypeStruct((1, 8192, 2, 128), 'float32')

    def call(q):
        return attention(q, q, q, block_sizes=sizes, impl='tpu').sum()

    device = jax.sharding.AbstractDevice('TPU7x', 1, 'tpu')
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    name = 'block_sizes.backward' if backward else 'block_sizes'
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match=rf'^{name}=BlockSizes\(q=4096.*try {name}=BlockSizes\('),
    ):
        jax.eval_shape(jax.grad(call), q)
