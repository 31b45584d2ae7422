"""Has a step compiled in a child process, and keeps what came of it.

Nothing else sees a TPU: libtpu is loaded in the child alone, which ends with its compile.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bigjax import experiment as experiments
from bigjax.experiment import Experiment
from bigjax.run import UsageError

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ('bigjax', 'experiments', 'pallas_kernels')
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',  # Only the compiler is wanted.
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
# A process with these would join a cluster, have other devices, or keep CPU programs.
REMOVED = ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES', 'JAX_COMPILATION_CACHE_DIR')


class CompileError(RuntimeError):
    """The compiler gave no program, for a reason that is not the user's; the message says which."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What determines a compiled step.

    Attributes:
      experiment: name of the file in experiments/.
      values: knobs that are not at their defaults.
      topology: name of the machine.
      flags: LIBTPU_INIT_ARGS.
    """

    experiment: str
    values: Mapping[str, Any]
    topology: str
    flags: str = ''

    def key(self) -> str:
        """Returns a name for all that the program depends on, this source code included."""
        asked = json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)
        versions = [metadata.version(name) for name in ('jax', 'jaxlib', 'libtpu')]
        digest = hashlib.sha256(f'{asked}{versions}'.encode())
        for folder in SOURCES:
            for file in sorted((ROOT / folder).rglob('*.py')):
                if 'plan' not in file.relative_to(ROOT).parts or file.name == 'compile.py':
                    digest.update(file.read_bytes())
        return digest.hexdigest()[:20]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Attributes:
      fits: whether the compiler found room for it in HBM.
      meta: costs of the compile, the mesh, and the compiler's message where it does not fit.
      memory: the compiler's account of its memory, and the state's bytes by sharding.
      text: the scheduled program; '' where it does not fit.
    """

    fits: bool
    meta: dict[str, Any]
    memory: dict[str, Any]
    text: str


def without_data(name: str, values: Mapping[str, Any]) -> Experiment:
    """Returns the experiment with some knobs set, and zeros for its texts.

    Images, tables and labelled texts are opened, for how many classes they have; blank:CLASSES
    tells that without them.

    Raises:
      UsageError: knobs that do not fit, or data that tells the number of classes and is not there.
    """
    known = experiments.knobs(experiments.find(name))
    dataset = values.get('dataset', known['dataset'].default) if 'dataset' in known else 'blank'
    if not dataset.startswith('blank'):
        try:
            return experiments.load(name, **{**values, 'dataset': 'blank'})
        except UsageError as error:
            if not str(error).startswith('--dataset=blank'):
                raise
    try:
        return experiments.load(name, **values)
    except UsageError as error:
        if not str(error).startswith(f'--dataset={dataset}') or not _told(name, values):
            raise
        raise UsageError(
            f'{error}; a plan takes no more from it than the number of classes, so also: try '
            '--dataset=blank:1000'
        ) from error


def _told(name: str, values: Mapping[str, Any]) -> bool:
    """Whether an experiment goes without its data where it is told the number of classes."""
    try:
        experiments.load(name, **{**values, 'dataset': 'blank:1000'})
    except UsageError:
        return False
    return True


def libtpu_missing() -> str:
    """Returns what to do if there is no libtpu; '' if there is one."""
    try:
        metadata.version('libtpu')
    except metadata.PackageNotFoundError:
        return (
            'libtpu is not installed, so nothing was compiled and this is the closed form; for the '
            f'compiled plan: pip install "jax[tpu]=={metadata.version("jax")}"'
        )
    return ''


def compile_step(request: Request, kept: Path, timeout: int) -> Compiled:
    """Returns a compiled step, from the folder `kept` if it was compiled before.

    Raises:
      UsageError: the experiment does not fit the machine: its mesh, its batch, its shapes.
      CompileError: no program, and not for lack of HBM; or it took more than `timeout` seconds.
    """
    folder = kept / request.key()
    if not (folder / 'meta.json').exists():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept, prefix='.incomplete-') as scratch:
            made = Path(scratch) / 'made'
            made.mkdir()
            _compile(request, made, timeout)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    meta = json.loads((folder / 'meta.json').read_text('utf-8'))
    memory = json.loads((folder / 'memory.json').read_text('utf-8'))
    program = folder / 'module.hlo.txt'
    return Compiled(meta['fits'], meta, memory, program.read_text('utf-8') if meta['fits'] else '')


def _compile(request: Request, folder: Path, timeout: int) -> None:
    """Runs the child; raises what it says of a failure."""
    asked = folder / 'request.json'
    asked.write_text(json.dumps(dataclasses.asdict(request), default=str), 'utf-8')
    environment = {k: v for k, v in os.environ.items() if k not in REMOVED}
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment |= {**ENVIRONMENT, 'PYTHONPATH': os.pathsep.join(paths)}
    if request.flags:
        environment['LIBTPU_INIT_ARGS'] = request.flags
    command = [sys.executable, '-m', 'bigjax.plan.program.compile', str(asked), str(folder)]
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise CompileError(
            f'the compiler took more than --compile_timeout={timeout} seconds'
        ) from None
    written = folder / 'meta.json'
    if child.returncode or not written.exists():
        raise CompileError(_reason(child.stderr) or f'the compiler ended with {child.returncode}')
    meta = json.loads(written.read_text('utf-8'))
    if 'usage' in meta:
        raise UsageError(meta['usage'])
    if 'error' in meta:
        raise CompileError(meta['error'].strip().partition('\n')[0][:600])


def _reason(stderr: str) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if 'Error' in line or 'FAILED' in line]
    return (errors or lines or [''])[-1][:600]
