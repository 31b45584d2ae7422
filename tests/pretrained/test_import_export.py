"""--action=import and export, and a run that starts from pretrained weights."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from safetensors.numpy import load_file, save_file

from bigjax import actions, experiment, state
from bigjax.checkpoint import Checkpoints
from bigjax.identity import identity
from bigjax.options import Kept
from bigjax.pretrained.layout import Layout, batch_norm, linear
from bigjax.pretrained.pretrained import Pretrained
from bigjax.run import UsageError

RULES = (*linear('hidden', 'a'), *batch_norm('norm', 'b'), *linear('head', 'c'))
LAYOUT = Layout(name='toys', rules=RULES, config={'model_type': 'toy'}, fresh='^params/head/')
KNOBS = {'steps': 1, 'mesh': 'data=2,fsdp=2,tensor=2'}


def build(path='', **knobs):
    """The toy with weights of another library, and its identity."""
    made = experiment.build(toy.toy, {**KNOBS, **knobs})
    made = dataclasses.replace(made, pretrained=Pretrained((LAYOUT,), str(path)))
    return made, identity('toy', toy.toy, {**KNOBS, **knobs})


@pytest.fixture
def file(tmp_path):
    draw = np.random.default_rng(3)
    shapes = {
        'a.weight': (32, 16), 'c.weight': (8, 32), 'c.bias': (8,),
        **{f'b.{name}': (32,) for name in ('weight', 'bias', 'running_mean')},
    }  # fmt: skip
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors['b.running_var'] = np.ones(32, np.float32)
    save_file(tensors, tmp_path / 'toy.safetensors')
    return tmp_path / 'toy.safetensors'


def test_the_first_state_has_the_files_values_wherever_they_are_used(file):
    made, _ = build(file)
    plan = state.setup(made)
    with jax.set_mesh(plan.mesh):
        first = state.first_state(made, plan)
        again = state.first_state(dataclasses.replace(made, pretrained=None), plan)
    tensors = load_file(file)
    assert np.array_equal(first.params['hidden']['kernel'], tensors['a.weight'].T)
    assert np.array_equal(first.extra['batch_stats']['norm']['mean'], tensors['b.running_mean'])
    placed = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), first, plan.shardings
    )
    assert all(jax.tree.leaves(placed))
    # The average of the weights starts at them, too.
    averages = [
        x for path, x in toy.leaves(first.opt_state).items() if path.endswith('hidden/kernel')
    ]
    assert any(np.array_equal(x, tensors['a.weight'].T) for x in averages)
    assert int(first.step) == 0
    assert not np.array_equal(again.params['hidden']['kernel'], tensors['a.weight'].T)


def test_what_the_file_lacks_is_drawn_as_without_it(file):
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if not k.startswith('c.')}, file)
    made, _ = build(file)
    plan = state.setup(made)
    with jax.set_mesh(plan.mesh):
        first = state.first_state(made, plan)
        random = state.first_state(dataclasses.replace(made, pretrained=None), plan)
    assert np.array_equal(first.params['head']['kernel'], random.params['head']['kernel'])


def test_import_then_export_gives_the_same_file(file, tmp_path, capsys):
    made, name = build(file)
    workdir, target = tmp_path / 'run', tmp_path / 'out'
    assert actions.run('import', made, name, workdir) == 0
    assert Checkpoints(workdir, keep=1).steps() == [0]
    file.unlink()  # From here on the checkpoint has it all.
    assert actions.run('export', made, name, workdir, Kept(export_dir=str(target))) == 0
    assert sorted(p.name for p in target.iterdir()) == ['config.json', 'model.safetensors']
    again, other = build(target / 'model.safetensors', seed=1)
    assert actions.run('import', again, other, tmp_path / 'run2') == 0
    assert (
        actions.run(
            'export',
            again,
            other,
            tmp_path / 'run2',
            Kept(checkpoint='0', export_dir=str(tmp_path / 'out2')),
        )
        == 0
    )
    for each in ('config.json', 'model.safetensors'):
        assert (target / each).read_bytes() == (tmp_path / 'out2' / each).read_bytes()
    assert json.loads((target / 'config.json').read_text()) == {'model_type': 'toy'}
    assert re.search(r'\d+ tensors, [\d.]+ KiB, in ', capsys.readouterr().err)
    # Training and evaluation go on from it.
    assert actions.run('train', made, name, workdir) == 0
    assert max(Checkpoints(workdir, keep=1).steps()) == 1
    assert actions.run('evaluate', made, name, workdir) == 0


def refused(message, action, made, name, *args):
    with pytest.raises(UsageError, match=f'^{re.escape(message)}'):
        actions.run(action, made, name, *args)


def test_what_cannot_be_imported_or_exported_is_refused(file, tmp_path):
    made, name = build(file)
    none = dataclasses.replace(made, pretrained=None)
    run = tmp_path / 'run'
    refused(
        '--action=import: no weights of another library fit toy; try --action=train',
        'import', none, name, run,
    )  # fmt: skip
    refused(
        '--pretrained=: is empty; name the folder or .safetensors file to import, such as '
        '--pretrained=model.safetensors', 'import', build()[0], name, run,
    )  # fmt: skip
    refused(
        '--action=export: toy has no form in another library; its checkpoints are in its workdir',
        'export', none, name, run, Kept(export_dir='x'),
    )  # fmt: skip
    refused(
        '--export_dir=: is empty; name a new folder: --export_dir=exported',
        'export', made, name, run,
    )  # fmt: skip
    refused(
        f'--export_dir={tmp_path}: is there already and not an empty folder; name a new one',
        'export', made, name, run, Kept(export_dir=str(tmp_path)),
    )  # fmt: skip
    refused(
        '--max_shard_size=5: must be a whole number with KB, MB or GB; try --max_shard_size=5GB',
        'export', made, name, run, Kept(export_dir='new', max_shard_size='5'),
    )  # fmt: skip
    assert not (run / 'run.json').exists(), 'nothing refused claims a workdir'


def test_weights_that_do_not_fit_leave_the_workdir_to_the_next_try(file, tmp_path):
    save_file({**load_file(file), 'a.weight': np.zeros((4, 16), np.float32)}, file)
    made, name = build(file)
    with pytest.raises(UsageError, match=r'a\.weight'):
        actions.run('train', made, name, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_second_import_into_a_run_is_refused(file, tmp_path):
    made, name = build(file)
    run = tmp_path / 'run'
    actions.run('import', made, name, run)
    refused(
        f'--workdir={run}: holds checkpoint 0 already; name another folder',
        'import', made, name, run,
    )  # fmt: skip


def test_a_leaf_without_a_place_is_not_exported(tmp_path):
    layout = dataclasses.replace(LAYOUT, rules=RULES[:-2])
    variables = {'params': {'head': {'kernel': jnp.zeros((2, 2))}}}
    with pytest.raises(
        UsageError, match=r'^--action=export: toys has no place for params/head/kern'
    ):
        Pretrained((layout,)).save(tmp_path, variables, 10**9)
