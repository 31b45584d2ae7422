"""The README tells the truth where a test can see it."""

import re
import types
from pathlib import Path

import pytest

from bigjax import experiment, identity, train

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text('utf-8')


def test_the_example_experiment_trains(tmp_path):
    module = types.ModuleType('example')
    code = re.search(r'```python\n(.*?)```', README, re.DOTALL)[1]
    exec(compile(code, 'README.md', 'exec'), module.__dict__)
    knobs = {'steps': 4, 'warmup': 1, 'width': 8}
    run = identity.identity('example', module.experiment, knobs)
    outcome = train.train(experiment.build(module.experiment, knobs), run, tmp_path)
    assert outcome.step == 4
    assert 0 <= outcome.scores['test']['accuracy'] <= 1


@pytest.mark.parametrize('which', ['run', 'test'])
def test_each_command_is_one_line_that_ci_finds(which):
    block = re.search(rf'<!-- {which} -->\n```\n(.*?)\n```', README, re.DOTALL)[1]
    assert block.startswith('python3.12 -m venv .venv && ')
    assert '\n' not in block


def test_the_tree_names_every_file():
    tree = re.search(r'## The tree.*?```\n(.*?)```', README, re.DOTALL)[1]
    folders = (
        'bigjax',
        'bigjax/data',
        'bigjax/manifest',
        'bigjax/models',
        'bigjax/nn',
        'bigjax/plan',
        'bigjax/plan/arithmetic',
        'bigjax/plan/program',
        'bigjax/plan/report',
        'bigjax/pretrained',
        'bigjax/recipes',
        'bigjax/scores',
        'bigjax/tasks',
        'experiments',
        'pallas_kernels',
        'pallas_kernels/attention',
        'pallas_kernels/attention/gpu',
        'pallas_kernels/attention/tpu',
        'pallas_kernels/conv',
        'pallas_kernels/conv/gpu',
        'pallas_kernels/conv/tpu',
    )
    files = [f for folder in folders for f in (ROOT / folder).glob('[a-z]*.py')]
    missing = [str(f.relative_to(ROOT)) for f in files if f.name not in tree]
    assert not missing


def test_every_experiment_stands_in_the_table():
    rows = re.findall(r'^\| (`.*?) \|', README, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r'`(\w+)', row)}
    assert not set(experiment.names()) - named
