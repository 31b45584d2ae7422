"""Files: any block of a tensor by pieces, little memory, and what is wrong with a folder."""

import json
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from bigjax.pretrained import files
from bigjax.pretrained.files import open_weights, pieces
from bigjax.run import UsageError


@st.composite
def blocks(draw):
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    starts = [draw(st.integers(0, n - 1)) for n in sizes]
    wanted = tuple(
        slice(a, draw(st.integers(a + 1, n))) for a, n in zip(starts, sizes, strict=True)
    )
    groups, left = [], len(sizes)
    while left:
        groups.append(draw(st.integers(1, left)))
        left -= groups[-1]
    return sizes, wanted, groups, draw(st.integers(1, 200))


@settings(deadline=None, max_examples=300)
@given(blocks())
def test_pieces_make_any_block_of_a_tensor_with_joined_axes(case):
    sizes, wanted, groups, limit = case
    whole = np.arange(np.prod(sizes)).reshape(sizes)
    ends = np.cumsum(groups)
    stored = whole.reshape([np.prod(sizes[e - g : e]) for g, e in zip(groups, ends, strict=True)])
    found = np.full(sizes, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, 'PIECE', limit)
        for index, block in pieces(sizes, wanted, groups, 4):
            value = stored[index]
            assert (found[block] == -1).all(), 'nothing is read twice'
            found[block] = value.reshape(found[block].shape)
            span = np.ptp(whole[block]) + 1  # elements of the file from the first to the last
            assert 4 * span <= max(limit, 4)
    inside = np.zeros(sizes, bool)
    inside[wanted] = True
    assert (found[inside] == whole[inside]).all()
    assert (found[~inside] == -1).all()


def test_half_precision_is_widened_exactly(tmp_path):
    value = np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16)
    save_file({'w': value, 'half': value.astype(np.float16)}, tmp_path / 'w.safetensors')
    weights = open_weights(str(tmp_path / 'w.safetensors'))
    assert weights.tensors['w'].dtype == 'BF16'
    wide = np.empty((2, 3), np.float32)
    wide[...] = weights.read('w', (slice(1, 3), slice(2, 5)))
    assert np.array_equal(wide, value[1:3, 2:5].astype(np.float32))


def refused(path, message):
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        open_weights(str(path))


def test_what_is_no_folder_of_weights_is_refused(tmp_path):
    absent = tmp_path / 'absent'
    refused(
        absent,
        f'--pretrained={absent}: there is no such folder or file; where a model is not on this '
        f'machine yet, try: hf download NAME --local-dir {absent}',
    )
    (tmp_path / 'pytorch_model.bin').touch()
    refused(
        tmp_path,
        f'--pretrained={tmp_path}: holds neither model.safetensors nor '
        f'model.safetensors.index.json (but pytorch_model.bin); other formats are not read: load '
        f'it with transformers and write it with save_pretrained',
    )
    index = {'weight_map': {'a': 'model-1.safetensors', 'b': 'model-2.safetensors'}}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    save_file({'a': np.zeros(1)}, tmp_path / 'model-1.safetensors')
    refused(
        tmp_path,
        f'--pretrained={tmp_path}: model.safetensors.index.json names model-2.safetensors, which '
        f'is not there; fetch the folder again',
    )
    save_file({'b': np.zeros(1)}, tmp_path / 'model-2.safetensors')
    refused(
        tmp_path,
        f'--pretrained={tmp_path}: its config.json is not there; fetch the folder again, or give '
        f'the .safetensors file itself',
    )


def test_damage_is_named_by_file(tmp_path):
    file = tmp_path / 'model.safetensors'
    save_file({'a': np.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r'model\.safetensors is no safetensors file or is damage'):
        open_weights(str(file))
    save_file({'a': np.zeros(1)}, file)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(UsageError, match=r'its config\.json is damaged: Expecting property name'):
        open_weights(str(tmp_path))


MEMORY = """
import sys
import jax, numpy as np, psutil
from bigjax.pretrained.files import open_weights
from bigjax.pretrained.layout import Layout, Rule
from bigjax.pretrained.pretrained import Pretrained
from bigjax.sharding import make_mesh
from jax.sharding import NamedSharding, PartitionSpec

def peak():
    # Not ru_maxrss, which starts with what the process had that this one was forked from.
    with open('/proc/self/status') as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM'))

layers, rows, columns = map(int, sys.argv[2:5])
# Half of the layers transposed: then a shard is a column of theirs.
axes = (None, ((1,), (0,)))
rules = tuple(Rule(f'params/w{i}', f'w{i}', axes[i % 2]) for i in range(layers))
shapes = {f'w{i}': (rows, columns)[:: -1 if i % 2 else 1] for i in range(layers)}
abstract = {'params': {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in shapes.items()}}
mesh = make_mesh(sys.argv[5])
spec = PartitionSpec('fsdp', 'tensor')
shardings = jax.tree.map(lambda _: NamedSharding(mesh, spec), abstract)
jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[-1]))
before = psutil.Process().memory_info().rss
loaded = Pretrained((Layout(name='test', rules=rules, config={}),), sys.argv[1]).load(
    abstract, shardings)
jax.block_until_ready(loaded)
print(peak() - before)
"""


# On one device a shard is a whole tensor.
@pytest.mark.parametrize('mesh', ['data=1', 'data=1,fsdp=2,tensor=4'])
def test_memory_while_loading_is_that_of_the_devices_and_little_more(mesh, tmp_path):
    layers, rows, columns = 3, 8192, 2048  # 64 MiB each
    draw = np.random.default_rng(0)
    for i in range(layers):
        value = draw.standard_normal((rows, columns), np.float32)
        save_file({f'w{i}': value}, tmp_path / f'model-{i}.safetensors')
    index = {'weight_map': {f'w{i}': f'model-{i}.safetensors' for i in range(layers)}}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    (tmp_path / 'config.json').write_text('{}')
    run = subprocess.run(
        [sys.executable, '-c', MEMORY, str(tmp_path), *map(str, (layers, rows, columns)), mesh],
        cwd=Path(__file__).parents[2],
        env={'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '8' if 'fsdp' in mesh else '1'},
        capture_output=True,
        text=True,
        check=True,
    )
    tensor = rows * columns * 4
    held = layers * tensor  # by the devices, whose memory is the host's here
    print(mesh, int(run.stdout) / tensor, 'tensors')
    assert int(run.stdout) <= held + 1.2 * tensor
