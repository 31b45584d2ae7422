"""launch.py as a person meets it: what it lists, refuses, saves and goes on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from bigjax import experiment as experiments
from bigjax.mesh import AXES
from bigjax.metrics import read_metrics

ROOT = Path(__file__).parent.parent
SEE = 'see python launch.py --experiment={} --help\n'
# A text of 9 kB and a tiny model: what is tested here is the way, not the model.
GPT = ('--experiment=gpt_stdlib', '--depth=1', '--heads=2', '--width=16', '--seq=16', '--batch=8',
       '--eval_batch=64', '--warmup=0', '--length=8', '--schedule=constant')  # fmt: skip


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Launcher:
    """Runs launch.py in forks of one process; see forked_launch.py."""

    def __init__(self, folder: Path, environ: dict[str, str]):
        self.folder, self.count = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / 'tests' / 'forked_launch.py')],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            text=True,
        )

    def __call__(self, *args, cwd: Path = ROOT, kill: tuple[int, str] | None = None) -> Done:
        """Runs it to the end; `kill=(signal, text)` sends a signal when stderr holds the text."""
        self.count += 1
        out, err = (self.folder / f'{self.count}.{name}' for name in ('out', 'err'))
        err.touch()
        request = {'args': args, 'out': str(out), 'err': str(err), 'cwd': str(cwd)}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        pid = int(self.server.stdout.readline().split()[1])
        while kill and kill[1] not in err.read_text():
            time.sleep(0.02)
        if kill:
            os.kill(pid, kill[0])
        code = int(self.server.stdout.readline().split()[1])
        return Done(code, out.read_text(), err.read_text())


@pytest.fixture(scope='module')
def environ(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp('cache'))
    settings = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '8', 'XDG_CACHE_HOME': cache}
    return {**os.environ, **settings}


@pytest.fixture(scope='module')
def launch(tmp_path_factory, environ):
    launcher = Launcher(tmp_path_factory.mktemp('output'), environ)
    with launcher.server:
        yield launcher


@pytest.fixture(scope='module')
def gpt(tmp_path_factory):
    """Flags of a very small language model on a text of its own."""
    folder = tmp_path_factory.mktemp('text')
    (folder / 'text.txt').write_text(''.join(f'line {i} of a text\n' for i in range(500)))
    return (*GPT, f'--dataset=files:{folder / "text.txt"}', f'--data_dir={folder / "data"}')


def test_alone_it_lists_the_experiments(launch):
    done = launch()
    assert done.code == 0
    assert done.err == ''
    lines = done.out.splitlines()
    names = experiments.names()
    assert lines[: len(names)] == [f'{name:24} {line}' for name, line in names.items()]
    assert lines[len(names) :] == [
        '',
        'start one with --experiment=NAME; --experiment=NAME --help tells its knobs',
    ]


def test_help_shows_every_knob_with_its_default(launch):
    out = launch('--experiment=gpt_stdlib', '--help').out
    words = ' '.join(out.split())
    for name, knob in experiments.knobs(experiments.find('gpt_stdlib')).items():
        if not isinstance(knob.type, tuple):
            assert f'--{"[no]" if knob.type is bool else ""}{name}: {knob.help}' in words, name
        if knob.type in (int, float):
            assert f'(default: {str(knob.default)!r}' in words.partition(f'--{name}: ')[2]
    assert '--dtype: <float32|bfloat16>: type of the computation' in words


KNOBS = 'gpt_stdlib'
MISTAKES = {
    'misspelt flag': (
        ('--experiment=gpt_stdlib', '--detph=4'),
        "launch.py: Unknown command line flag 'detph'. Did you mean: depth ?\n" + SEE.format(KNOBS),
    ),
    'wrong type': (
        ('--experiment=gpt_stdlib', '--depth=four'),
        "launch.py: flag --depth=four: invalid literal for int() with base 10: 'four'\n"
        + SEE.format(KNOBS),
    ),
    'wrong choice': (
        ('--experiment=gpt_stdlib', '--dtype=float8'),
        'launch.py: flag --dtype=float8: value should be one of <float32|bfloat16>\n'
        + SEE.format(KNOBS),
    ),
    'wrong action': (
        ('--experiment=cnn', '--action=trian'),
        'launch.py: flag --action=trian: value should be one of '
        '<train|evaluate|generate|describe|import|export|plan|manifest>\n' + SEE.format('cnn'),
    ),
    'unknown experiment': (
        ('--experiment=gpt_stlib',),
        'launch.py: --experiment=gpt_stlib: there is no experiments/gpt_stlib.py; '
        'try --experiment=gpt_stdlib\n' + SEE.format('gpt_stlib'),
    ),
    'stray argument': (
        ('--experiment=cnn', 'train'),
        "launch.py: 'train' is not a flag; flags look like --steps=100\n",
    ),
    'knob out of range': (
        ('--experiment=cnn', '--steps=0'),
        'launch.py: --steps=0: must be at least 1; try --steps=1\n',
    ),
    'batch not divisible by the mesh': (
        ('--experiment=cnn', '--batch=12'),
        'launch.py: --batch=12: must be a positive multiple of 8, the 8 batch shards of the mesh; '
        'try --batch=16\n',
    ),
    'mesh of too many devices': (
        ('--experiment=cnn', '--mesh=data=16'),
        'launch.py: --mesh=data=16: the sizes multiply to 16, which is not the number of devices, '
        '8; try --mesh=data=-1\n',
    ),
    'heads not divisible by tensor': (
        ('GPT', '--mesh=data=2,tensor=4', '--batch=8'),
        'launch.py: --mesh=data=2,tensor=4: tensor=4 does not divide the 2 heads of parameter '
        "'block_0/attention/out/kernel'; try --mesh=data=-1,tensor=2\n",
    ),
    'heads not a divisor of the width': (
        ('GPT', '--heads=3'),
        'launch.py: --heads=3: width 16 must be a multiple of heads; try --heads=2\n',
    ),
    'no such source of images': (
        ('--experiment=cnn', '--dataset=digit'),
        'launch.py: --dataset=digit: no such source of images; there are digits, tfds:NAME, '
        'idx:DIR and images:DIR; try --dataset=digits\n',
    ),
    'missing files': (
        ('--experiment=gpt_stdlib', '--dataset=files:/no/such/*.txt'),
        'launch.py: --dataset=files:/no/such/*.txt: no file matches; try a pattern such as '
        '--dataset="files:texts/**/*.txt"\n',
    ),
    'metric that is not there': (
        ('--experiment=cnn', '--monitor=test/acc'),
        'launch.py: --monitor=test/acc: must be one of test/accuracy, test/macro_f1, test/loss; '
        'try --monitor=test/accuracy\n',
    ),
    'nothing to evaluate': (
        ('--experiment=cnn', '--action=evaluate', '--workdir=/no/such/run'),
        'launch.py: --workdir=/no/such/run: holds no run; train first: --action=train with the '
        'same knobs\n',
    ),
    'nothing to generate': (
        ('--experiment=cnn', '--action=generate'),
        'launch.py: --action=generate: cnn is no language model; try --action=evaluate\n',
    ),
    'half a coordinator': (
        ('--experiment=cnn', '--processes=2'),
        'launch.py: --coordinator, --processes and --process_id: must be given together; try '
        '--coordinator=localhost:9876 --processes=2 --process_id=0\n',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistake_is_told_word_for_word(mistake, launch, gpt, tmp_path):
    args, message = MISTAKES[mistake]
    args = (*gpt, *args[1:]) if args[0] == 'GPT' else args
    if not any(arg.startswith('--workdir') for arg in args):
        args = (*args, f'--workdir={tmp_path / "run"}')
    assert launch(*args) == Done(1, '', message)
    assert not (tmp_path / 'run').exists()


def test_workdir_that_cannot_be_written(launch, tmp_path):
    (tmp_path / 'file').touch()
    workdir = tmp_path / 'file' / 'run'
    assert launch('--experiment=cnn', f'--workdir={workdir}') == Done(
        1,
        '',
        f'launch.py: --workdir={workdir}: cannot be written (Not a directory); '
        'try a folder of your own, such as --workdir=/tmp/cnn\n',
    )


def test_training_that_diverges_is_told_without_a_traceback(launch, tmp_path):
    flags = ('--experiment=mlp', '--optimizer=sgd', '--schedule=constant', '--weight_decay=0')
    done = launch(*flags, '--peak_lr=1e30', '--warmup=0', f'--workdir={tmp_path / "run"}')
    assert done.code == 1, done.err
    last = done.err.splitlines()[-1]
    assert last.startswith('launch.py: step ')
    assert 'not finite' in last
    assert last.endswith('Try a lower --peak_lr, --clip=1, or --nonfinite=skip.')
    assert 'Traceback' not in done.err


def test_data_set_that_is_not_prepared(launch, tmp_path):
    flags = (f'--data_dir={tmp_path}', f'--workdir={tmp_path / "run"}')
    assert launch('--experiment=cnn', '--dataset=tfds:fashion_mnist', *flags) == Done(
        1,
        '',
        f'launch.py: --dataset=tfds:fashion_mnist: not prepared under --data_dir={tmp_path}; on a '
        'machine with a network, and TensorFlow if the set asks for it, run\n'
        "  python -c \"import tensorflow_datasets as tfds; tfds.builder('fashion_mnist', "
        "data_dir='DIR', file_format='array_record').download_and_prepare()\"\n"
        f'and copy DIR/fashion_mnist to {tmp_path}/fashion_mnist\n',
    )
    assert launch('--experiment=cnn', '--dataset=tfds:no_such_set', *flags) == Done(
        1,
        '',
        'launch.py: --dataset=tfds:no_such_set: TFDS has no set of this name and none is prepared '
        f'under --data_dir={tmp_path}; its sets are listed on tensorflow.org/datasets/catalog\n',
    )


def test_describe_prints_one_object_and_does_nothing(launch, gpt, tmp_path):
    done = launch(*gpt, '--action=describe', f'--workdir={tmp_path / "run"}')
    assert (done.code, done.err) == (0, '')
    told = json.loads(done.out)
    assert told['experiment'] == 'gpt_stdlib'
    assert told['parameters'] == sum(told['parameters_by_module'].values())
    assert told['mesh'] == {**dict.fromkeys(AXES, 1), 'data': 8}
    assert told['tokens_per_step'] == 8 * 16
    assert told['knobs']['width'] == 16
    assert told['flops_per_step'] > 6 * 8 * 16 * told['parameters_by_module']['block_0']
    # Adam: three numbers a parameter, and some counters.
    assert 0 <= told['state_bytes_per_device'] - 3 * 4 * told['parameters'] < 100
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_run_is_interrupted_resumed_evaluated_and_sampled(launch, gpt, tmp_path):
    workdir = tmp_path / 'run'
    args = (*gpt, '--steps=4000', '--save_every=1000', '--log_every=1', f'--workdir={workdir}')

    def last_step():
        return max(r['step'] for r in read_metrics(workdir / 'metrics.jsonl'))

    reached = 0
    for number, name in ((signal.SIGTERM, 'SIGTERM'), (signal.SIGINT, 'SIGINT')):
        done = launch(*args, kill=(number, f'step {reached + 5}/4000'))
        assert done.code == 128 + number, done.err
        assert done.out == ''
        message = done.err[done.err.index('stopped by') :].splitlines()
        reached, before = last_step(), reached
        assert message[0] == (f'stopped by {name} at step {reached} of 4000; saved. Go on with:'), (
            done.err
        )
        assert reached >= before + 5
        python, script, *_ = message[1].split()
        assert (ROOT / python).samefile(sys.executable)
        assert script == f'{ROOT}/launch.py'
        assert message[1].endswith(f' --workdir={workdir}')
    assert f'going on from step {before}\n' in done.err

    # The number of steps may change; the rest of the command is what the message said to type.
    command = [arg for arg in message[1].split()[2:] if not arg.startswith('--steps')]
    last = reached + 3
    done = launch(*command, f'--steps={last}', cwd=tmp_path)
    assert done.code == 0, done.err
    assert f'going on from step {reached}\n' in done.err
    assert 'sample' in done.err
    assert '--action=generate' in done.err.splitlines()[-1]
    assert done.out == ''
    assert [r['step'] for r in read_metrics(workdir / 'metrics.jsonl') if 'set' not in r] == [
        *range(1, last + 1)
    ]
    assert (workdir / 'learning_curves.png').stat().st_size > 1000

    done = launch(*args, '--action=evaluate')
    assert (done.code, done.out) == (0, '')
    recorded = [r for r in read_metrics(workdir / 'metrics.jsonl') if 'set' in r][-1]
    assert f'validation after step {last}\n' in done.err
    assert f'{recorded["bits_per_byte"]:.4f} bits per byte' in done.err

    texts = [launch(*args, '--action=generate', f'--sample_seed={seed}') for seed in (0, 0, 1)]
    assert [done.code for done in texts] == [0, 0, 0], texts
    assert texts[0].out == texts[1].out != texts[2].out
    assert texts[0].out.startswith(f'{"-" * 20} sample {"-" * 20}\ndef ')

    done = launch(*args, '--checkpoint=7', '--action=evaluate')
    assert done.code == 1
    assert done.err.startswith('launch.py: --checkpoint=7: must be latest, best or one of ')

    done = launch(*args, '--depth=2')
    assert done.code == 1
    assert done.err.startswith(
        f'launch.py: --workdir={workdir}: holds a run with other knobs: --depth=2 (there: 1); '
        'name another folder, or change only remat, microbatches, context, steps, eval_batch, '
    )
    done = launch('--experiment=cnn', f'--workdir={workdir}')
    assert done == Done(
        1,
        '',
        f'launch.py: --workdir={workdir}: holds a run of gpt_stdlib, not of cnn; name another '
        'folder or leave --workdir out\n',
    )


def test_from_another_folder_without_the_fork(environ, tmp_path):
    command = [sys.executable, str(ROOT / 'launch.py'), '--experiment=cnn', '--action=describe']
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert json.loads(done.stdout)['workdir'] == str(ROOT / 'runs' / 'cnn')
    assert list(tmp_path.iterdir()) == []


def older_pythons():
    """Returns interpreters on this machine that are too old, from those that can parse the file."""
    places = [Path('/usr/bin'), Path('/usr/local/bin')]
    places += Path('~/.pyenv/versions').expanduser().glob('3.*/bin')
    names = ('python3.8', 'python3.9', 'python3.10', 'python3.11')
    return [place / name for place in places for name in names if (place / name).exists()]


@pytest.mark.skipif(not older_pythons(), reason='no Python older than 3.12 on this machine')
def test_an_older_python_is_told_so():
    for python in older_pythons():
        version = python.name.removeprefix('python')
        done = subprocess.run([python, ROOT / 'launch.py'], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, '')
        assert done.stderr == (
            f'launch.py: needs Python 3.12 or newer, this is {version}; make an environment with '
            'one, such as: python3.12 -m venv .venv && .venv/bin/pip install -r requirements.txt\n'
        )
