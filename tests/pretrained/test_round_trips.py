"""Every family: all leaves are written and read back, on any mesh, scanned or not."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_families import FAMILIES, SCANNED, leaves

from bigjax.nn.stack import stack_layers
from bigjax.pretrained.layout import Layout, Rule, place, resolve
from bigjax.pretrained.pretrained import Pretrained
from bigjax.sharding import make_mesh
from bigjax.state import replaced

MESH = 'data=2,fsdp=2,tensor=2'


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize('name', FAMILIES)
def test_what_is_written_is_read_back_and_written_alike(name, tmp_path):
    tiny = FAMILIES[name]
    variables = tiny.random()
    tiny.save(tmp_path / 'a', variables)
    loaded = tiny.load(tmp_path / 'a', MESH)
    assert loaded.keys() == leaves(variables).keys()
    placed = leaves(tiny.shardings(MESH))
    for path, value in leaves(variables).items():
        assert np.array_equal(loaded[path], value), path
        assert loaded[path].sharding.is_equivalent_to(placed[path], value.ndim), path
    # Every leaf really is on several devices, some in parts.
    assert any(not x.sharding.is_fully_replicated for x in loaded.values())
    tiny.save(tmp_path / 'b', replaced(variables, loaded))
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


@pytest.mark.parametrize('name', SCANNED)
def test_scanned_layers_are_kept_as_single_ones(name, tmp_path):
    single, scanned = FAMILIES[name], SCANNED[name]
    variables = single.random()
    single.save(tmp_path / 'single', variables)
    loaded = scanned.load(tmp_path / 'single', MESH)
    stacked = leaves(stack_layers(variables))
    assert loaded.keys() == stacked.keys()
    for path, value in stacked.items():
        assert np.array_equal(loaded[path], value), path
    scanned.save(tmp_path / 'scanned', replaced(scanned.abstract(), loaded))
    assert contents(tmp_path / 'single') == contents(tmp_path / 'scanned')


@pytest.mark.parametrize('name', FAMILIES)
def test_every_layout_has_one_place_for_every_number(name):
    tiny = FAMILIES[name]
    shapes = {path: x.shape for path, x in leaves(tiny.abstract()).items()}
    for layout in tiny.pretrained(tiny.model).layouts:
        theirs, ours = {}, {path: np.zeros(shape, int) for path, shape in shapes.items()}
        for rule in resolve(layout.rules, shapes):
            if rule.ours not in shapes:
                continue
            placed = place(rule, shapes[rule.ours])
            count = theirs.setdefault(rule.theirs, np.zeros(placed.shape(), int))
            assert count.shape == placed.shape(), rule
            count.reshape(placed.sizes)[placed.wanted] += 1
            at = dict(rule.at)
            ours[rule.ours][
                tuple(at.get(a, slice(None)) for a in range(len(shapes[rule.ours])))
            ] += 1
        for path, count in (*theirs.items(), *ours.items()):
            assert (count == 1).all(), f'{layout.name}: {path}'


def test_files_are_as_large_as_wished_and_read_like_one(tmp_path):
    tiny = FAMILIES['gpt2']
    variables = tiny.random()
    tiny.save(tmp_path / 'one', variables)
    tiny.save(tmp_path / 'many', variables, max_bytes=9000)
    files = sorted((tmp_path / 'many').glob('*.safetensors'))
    assert len(files) > 3
    assert [f.name for f in files][:1] == [f'model-00001-of-{len(files):05}.safetensors']
    assert all(f.stat().st_size < 9000 + 4000 for f in files)  # and a header
    index = json.loads((tmp_path / 'many' / 'model.safetensors.index.json').read_text())
    total = sum(4 * x.size for x in jax.tree.leaves(variables))
    assert index['metadata']['total_size'] == total
    assert set(index['weight_map'].values()) == {f.name for f in files}
    one, many = tiny.load(tmp_path / 'one'), tiny.load(tmp_path / 'many')
    assert all(np.array_equal(one[path], many[path]) for path in one)


def test_torchvision_and_timm_layouts_read_what_they_write(tmp_path):
    for name in ('vit', 'resnet', 'vgg'):
        tiny = FAMILIES[name]
        both = tiny.pretrained(tiny.model)
        other = type(both)(both.layouts[1:])
        variables = tiny.random()
        other.save(tmp_path / name, variables, 10**9)
        loaded = tiny.load(tmp_path / name / 'model.safetensors')
        for path, value in leaves(variables).items():
            assert np.array_equal(loaded[path], value), path


@pytest.mark.parametrize('spec', [('fsdp',), (None, 'fsdp'), (('fsdp', 'tensor'),), ()])
def test_a_leaf_of_many_tensors_may_be_split_along_them(spec, tmp_path):
    rules = tuple(Rule('params/w', f'w{i}', ((1,), (2,)), ((0, i),)) for i in range(4))
    value = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    weights = Pretrained((Layout(name='rows', rules=rules, config={}),), str(tmp_path))
    weights.save(tmp_path, {'params': {'w': jax.numpy.asarray(value)}}, 10**9)
    sharding = NamedSharding(make_mesh(MESH), PartitionSpec(*spec))
    abstract = {'params': {'w': jax.ShapeDtypeStruct(value.shape, np.float32)}}
    loaded = weights.load(abstract, {'params': {'w': sharding}})['params/w']
    assert np.array_equal(loaded, value)
    assert loaded.sharding.is_equivalent_to(sharding, 3)
