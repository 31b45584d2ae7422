"""Starts bigjax: `python launch.py --experiment=NAME`. Alone, it lists the experiments."""

import sys

if sys.version_info < (3, 12):  # noqa: UP036  (an older Python must reach this line to be told)
    sys.exit(
        'launch.py: needs Python 3.12 or newer, this is {}.{}; make an environment with one, such '
        'as: python3.12 -m venv .venv && .venv/bin/pip install -r requirements.txt'.format(
            *sys.version_info[:2]
        )
    )

import argparse
import ctypes
import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

try:
    from absl import app, flags
except ImportError:
    sys.exit(
        'launch.py: its packages are missing; '
        f'try: {sys.executable} -m pip install -r requirements.txt'
    )

from bigjax import experiment as experiments
from bigjax import identity as identities
from bigjax.options import ACTIONS, options

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parent
flags.DEFINE_string(
    'experiment', None, 'name of a file in experiments/; without it, they are listed'
)
flags.DEFINE_enum('action', 'train', ACTIONS, 'what to do with the experiment')
flags.DEFINE_string('workdir', None, 'where the run is kept; default: runs/NAME-AND-KNOBS')
flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where nothing announces it')
flags.DEFINE_integer('processes', None, 'number of processes, with --coordinator')
flags.DEFINE_integer('process_id', None, 'number of this process, with --coordinator')
DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_boolean}


def parse(argv):
    """Returns the arguments left over once every knob of --experiment has become a flag."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument('--experiment', '-experiment')
    name = finder.parse_known_args(argv[1:])[0].experiment
    try:
        for function in (options, experiments.find(name)) if name else (options,):
            for knob_name, knob in experiments.knobs(function).items():
                choices = [knob.type] if isinstance(knob.type, tuple) else []
                define = DEFINE.get(knob.type, flags.DEFINE_string)
                define = flags.DEFINE_enum if choices else define
                define(knob_name, knob.default, *choices, help=knob.help, module_name=argv[0])
        rest = FLAGS(argv)
    except (flags.Error, experiments.UsageError) as error:
        sys.exit(f'launch.py: {error}\nsee python launch.py --experiment={name or "NAME"} --help')
    if FLAGS['verbosity'].using_default_value:
        FLAGS.verbosity = -1  # absl would make it 0: every library's notes between our lines.
    return rest


def prepare_process():
    """Settings that must come before the first array; all others live in knobs."""
    jaxlib = metadata.version('jaxlib')
    chips = [*Path('/dev').glob('accel*'), *Path('/dev').glob('vfio/*')]
    accelerator = (find_spec('libtpu') and chips) or find_spec('jax_cuda13_plugin')
    if sys.platform == 'linux' and not accelerator:
        # XLA:CPU takes scratch memory from malloc at every step; kept, it is not faulted in anew.
        libc, (arena_max, mmap_max, trim, top_pad) = ctypes.CDLL(None), (-8, -4, -1, -2)
        for option, value in {arena_max: 1, mmap_max: 0, trim: 2**31 - 1, top_pad: 2**26}.items():
            getattr(libc, 'mallopt', lambda *_: 0)(option, value)
        # Gradients of convolutions are three times as fast outside YNN. Another jaxlib may not
        # know this flag, and ends the process over a flag that it does not know.
        if jaxlib == '0.12.0.1':
            ynn = '--xla_cpu_experimental_ynn_fusion_type=individual_dot,reduce'
            os.environ['XLA_FLAGS'] = f'{ynn} {os.environ.get("XLA_FLAGS", "")}'
    import jax

    if find_spec('libtpu') and not (accelerator or jax.config.jax_platforms):
        jax.config.update('jax_platforms', 'cpu')  # Tests install libtpu, which misses its TPU.
    cache = Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser() / 'bigjax'
    jax.config.update('jax_compilation_cache_dir', str(cache / jaxlib))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def main(argv):
    """Builds the experiment and does what --action says."""
    if len(argv) > 1:
        sys.exit(f'launch.py: {argv[1]!r} is not a flag; flags look like --steps=100')
    if not FLAGS.experiment:
        for name, line in experiments.names().items():
            print(f'{name:24} {line}')
        return print('\nstart one with --experiment=NAME; --experiment=NAME --help tells its knobs')
    prepare_process()
    from bigjax import actions, ahead, distributed
    from bigjax.checkpoint import SaveError

    function = experiments.find(FLAGS.experiment)
    values, asked = (
        {name: FLAGS[name].value for name in experiments.knobs(f)} for f in (function, options)
    )
    identity = identities.identity(FLAGS.experiment, function, values)
    folder = FLAGS.workdir or ROOT / 'runs' / identity.folder()
    workdir = Path(folder).expanduser().absolute()
    try:
        wanted = experiments.build(options, asked)
        if FLAGS.action in ('plan', 'manifest'):  # They take a machine that is not this one.
            return ahead.run(FLAGS.action, FLAGS.experiment, values, wanted, workdir)
        distributed.join(FLAGS.coordinator, FLAGS.processes, FLAGS.process_id, os.environ)
        experiment = experiments.build(function, values)
        return actions.run(FLAGS.action, experiment, identity, workdir, wanted.kept)
    except (experiments.UsageError, SaveError, FloatingPointError) as error:
        sys.exit(f'launch.py: {error}')


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
