"""Experiments: knobs out of a signature, and the identity that a workdir is held by."""

import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Literal

import pytest

from bigjax import experiment
from bigjax import identity as identities
from bigjax.experiment import Run, Sample, UsageError
from bigjax.identity import Identity


@dataclasses.dataclass(frozen=True)
class Group:
    """Knobs that belong together.

    Attributes:
        rate: how fast: a number
            which a second line explains
        kind: one or the other
    """

    rate: float = 0.5
    kind: Literal['a', 'b'] = 'a'


def toy(
    *,
    depth: int = 2,
    bias: bool = True,
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    group: Group = Group(rate=0.25),
    run: Run = Run(steps=10, batch=8),  # noqa: B008
    sample: Sample = Sample(),  # noqa: B008
):
    """A toy.

    Args:
      depth: layers
      bias: whether there are biases
      dtype: type of the computation
    """
    return {'depth': depth, 'bias': bias, 'dtype': dtype, 'group': group, 'run': run}


def identity(**values) -> Identity:
    return identities.identity('toy', toy, values)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty experiments/."""
    monkeypatch.setattr(experiment, 'EXPERIMENTS', tmp_path)
    package = types.ModuleType('experiments')
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, 'experiments', package)
    importlib.invalidate_caches()
    return tmp_path


# ---- Knobs ----


def test_knobs_come_in_the_order_of_the_signature():
    names = list(experiment.knobs(toy))
    assert names[:5] == ['depth', 'bias', 'dtype', 'rate', 'kind']
    assert names[5:] == [f.name for kind in (Run, Sample) for f in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    ('name', 'default', 'kind', 'line', 'group', 'free'),
    [
        ('depth', 2, int, 'layers', 'depth', False),
        ('bias', True, bool, 'whether there are biases', 'bias', False),
        ('dtype', 'float32', ('float32', 'bfloat16'), 'type of the computation', 'dtype', False),
        # The default is the one in the signature, not the one of the class.
        ('rate', 0.25, float, 'how fast: a number', 'group', False),
        ('kind', 'a', ('a', 'b'), 'one or the other', 'group', False),
        ('batch', 8, int, 'examples of one step, over all devices and hosts', 'run', False),
        ('steps', 10, int, 'optimizer steps in all', 'run', True),
        ('top_k', 0, int, 'draw from the k likeliest tokens only; 0 is off', 'sample', True),
    ],
)
def test_knob(name, default, kind, line, group, free):
    assert experiment.knobs(toy)[name] == experiment.Knob(default, kind, line, group, free)


def test_every_free_name_is_a_field():
    for group in (Run, Sample):
        assert set(group.FREE) <= {field.name for field in dataclasses.fields(group)}


def without_help(*, depth: int = 1): ...
def without_type(*, depth=1): ...
def without_default(*, depth: int): ...
def with_clash(*, batch: int = 1, run: Run = Run(steps=1, batch=1)): ...  # noqa: B008


for function in (without_type, without_default, with_clash):
    function.__doc__ = 'A toy.\n\nArgs:\n  depth: layers\n  batch: rows\n'


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (
            without_help,
            'a line "depth: what it is" in the docstring of without_help',
        ),
        (without_type, 'a type annotation'),
        (without_default, 'a default'),
        (with_clash, 'a name of its own: batch has it'),
    ],
)
def test_an_incomplete_knob_is_named(function, message):
    with pytest.raises(TypeError) as error:
        experiment.knobs(function)
    name = 'batch' if function is with_clash else 'depth'
    assert str(error.value) == f'knob {name!r} of {__name__} needs {message}'


def test_build_puts_groups_together_again():
    built = experiment.build(toy, {'depth': 3, 'kind': 'b', 'batch': 4})
    assert built['depth'] == 3
    assert built['group'] == Group(rate=0.25, kind='b')
    assert built['run'] == Run(steps=10, batch=4)


# ---- Finding experiments ----

SOURCE = '''"""{doc}

More.
"""

def experiment(*, depth: int = 1):
    """Builds.

    Args:
      depth: layers
    """
    return {value}, depth
'''


def test_names_are_the_files_with_their_first_line(folder):
    (folder / 'one.py').write_text(SOURCE.format(doc='The first.', value=1))
    (folder / 'two.py').write_text('x = 1\n')
    (folder / '_shared.py').write_text('')
    assert experiment.names() == {'one': 'The first.', 'two': ''}


def test_load_sets_knobs(folder):
    (folder / 'one.py').write_text(SOURCE.format(doc='', value=7))
    assert experiment.load('one', depth=5) == (7, 5)


def test_a_broken_experiment_stops_no_other(folder):
    (folder / 'one.py').write_text(SOURCE.format(doc='', value=7))
    (folder / 'half_written.py').write_text('def (')
    assert experiment.load('one') == (7, 1)


def test_unknown_experiment(folder):
    (folder / 'gpt.py').write_text('')
    (folder / 'resnet.py').write_text('')
    with pytest.raises(UsageError) as error:
        experiment.find('resnt')
    assert str(error.value) == (
        '--experiment=resnt: there is no experiments/resnt.py; try --experiment=resnet'
    )


def test_unknown_knob(folder):
    (folder / 'one.py').write_text(SOURCE.format(doc='', value=7))
    with pytest.raises(UsageError) as error:
        experiment.load('one', dept=5)
    assert str(error.value) == '--dept: one has no such knob; try --depth'


# ---- Knobs that cannot be ----


@pytest.mark.parametrize(
    ('knob', 'value', 'message'),
    [
        ('steps', 0, 'must be at least 1; try --steps=1'),
        ('seed', -1, 'must be at least 0; try --seed=0'),
        ('keep', 0, 'must be at least 1; try --keep=1'),
        ('accumulate', 0, 'must be at least 1; try --accumulate=1'),
        ('profile_steps', '10', 'must be FIRST:LAST, the first below the last; '
                                'try --profile_steps=10:13'),
        ('profile_steps', '13:10', 'must be FIRST:LAST, the first below the last; '
                                   'try --profile_steps=10:13'),
    ],
)  # fmt: skip
def test_run_refuses(knob, value, message):
    with pytest.raises(UsageError) as error:
        Run(**{'steps': 10, 'batch': 8, knob: value})
    assert str(error.value) == f'--{knob}={value}: {message}'


@pytest.mark.parametrize(('steps', 'good'), [(1, 4), (10, 8), (11, 12)])
def test_steps_are_whole_calls(steps, good):
    with pytest.raises(UsageError) as error:
        Run(steps=steps, batch=8, steps_per_call=4)
    assert str(error.value) == (
        f'--steps={steps}: must be a multiple of --steps_per_call=4; try --steps={good}'
    )
    Run(steps=good, batch=8, steps_per_call=4)


@pytest.mark.parametrize(
    ('knob', 'value', 'message'),
    [
        ('length', 0, 'must be at least 1; try --length=400'),
        ('samples', 0, 'must be at least 1; try --samples=1'),
        ('temperature', -0.1, 'must not be negative; try --temperature=0.8'),
        ('temperature', float('nan'), 'must not be negative; try --temperature=0.8'),
        ('top_k', -1, 'must not be negative; try --top_k=0'),
        ('top_p', 0.0, 'must be above 0 and at most 1; try --top_p=1.0'),
        ('min_p', 1.0, 'must be at least 0 and below 1; try --min_p=0.0'),
    ],
)
def test_sample_refuses(knob, value, message):
    with pytest.raises(UsageError) as error:
        Sample(**{knob: value})
    assert str(error.value) == f'--{knob}={value}: {message}'


# ---- Identity ----


def test_identity_knows_what_was_changed():
    run = identity(depth=3, bias=True, steps=20)
    assert run.experiment == 'toy'
    assert run.changed == ('depth', 'steps')
    assert run.knobs['depth'] == 3
    assert run.knobs['rate'] == 0.25
    assert set(run.free) == {*Run.FREE, *Sample.FREE}


@pytest.mark.parametrize(
    ('values', 'name'),
    [
        ({}, 'toy'),
        ({'depth': 3, 'rate': 1e-4}, 'toy-depth=3-rate=0.0001'),
        # Other samples, devices or evaluations are the same run; another length is not.
        ({'prompt': 'x', 'mesh': 'fsdp=8', 'eval_every': 5}, 'toy'),
        ({'steps': 20}, 'toy-steps=20'),
    ],
)
def test_folder(values, name):
    assert identity(**values).folder() == name


def test_folders_of_different_knobs_differ():
    values = ['a/b', 'a_b', 'a b', 'ä', 'ö', 'x' * 300, 'x' * 301, '漢' * 300, '../..']
    folders = [identity(dtype=value).folder() for value in values]
    assert len(set(folders)) == len(values)
    for folder in folders:
        assert len(folder.encode()) < 128
        assert '/' not in folder


def test_the_same_command_claims_again(tmp_path):
    identity(depth=3).claim(tmp_path / 'a' / 'b')
    identity(depth=3).claim(tmp_path / 'a' / 'b')
    assert [file.name for file in (tmp_path / 'a' / 'b').iterdir()] == ['run.json']
    held = json.loads((tmp_path / 'a' / 'b' / 'run.json').read_text())
    assert held['experiment'] == 'toy'
    assert held['knobs']['depth'] == 3


def test_free_knobs_may_change(tmp_path):
    identity().claim(tmp_path)
    identity(steps=20, mesh='fsdp=8', prompt='x', log_every=1).claim(tmp_path)


def test_a_run_older_than_a_knob_goes_on_where_the_knob_is_at_its_default(tmp_path):
    identity().claim(tmp_path)
    file = tmp_path / 'run.json'
    held = json.loads(file.read_text())
    del held['knobs']['depth']
    file.write_text(json.dumps(held))
    identity().claim(tmp_path)
    with pytest.raises(UsageError, match=r'--depth=3 \(there: None\)'):
        identity(depth=3).claim(tmp_path)


def test_other_knobs_are_refused_by_name(tmp_path):
    identity().claim(tmp_path)
    with pytest.raises(UsageError) as error:
        identity(depth=3, kind='b', steps=20).claim(tmp_path)
    free = (
        'steps, eval_batch, eval_every, save_every, log_every, keep, monitor, patience, '
        'steps_per_call, mesh, dcn, offload, workers, data_dir, profile_steps, prompt, length, '
        'samples, temperature, top_k, top_p, min_p, sample_seed'
    )
    assert str(error.value) == (
        f'--workdir={tmp_path}: holds a run with other knobs: --depth=3 (there: 2), '
        f'--kind=b (there: a); name another folder, or change only {free}'
    )


def test_another_experiments_workdir(tmp_path):
    identity().claim(tmp_path)
    with pytest.raises(UsageError) as error:
        dataclasses.replace(identity(), experiment='other').claim(tmp_path)
    assert str(error.value) == (
        f'--workdir={tmp_path}: holds a run of toy, not of other; '
        f'name another folder or leave --workdir out'
    )


def test_workdir_below_a_file(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UsageError) as error:
        identity().claim(tmp_path / 'file' / 'run')
    assert str(error.value) == (
        f'--workdir={tmp_path}/file/run: cannot be written (Not a directory); '
        f'try a folder of your own, such as --workdir=/tmp/toy'
    )


@pytest.mark.skipif(not Path('/proc').exists(), reason='needs /proc')
def test_workdir_that_cannot_be_written():
    with pytest.raises(UsageError, match=r'^--workdir=/proc/run: cannot be written \(.+\); try a'):
        identity().claim(Path('/proc/run'))


def test_a_damaged_run_file_is_named(tmp_path):
    (tmp_path / 'run.json').write_text('{"experiment": ')
    with pytest.raises(UsageError) as error:
        identity().claim(tmp_path)
    assert str(error.value).startswith(f'--workdir={tmp_path}: its run.json is damaged (')
    assert str(error.value).endswith('); name another folder')
