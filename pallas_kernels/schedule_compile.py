"""Compiles one computation ahead of time for a TPU generation, in a process of its own.

`compiled` starts the process with the environment that libtpu reads at its start and returns
what the compiler wrote; the process itself is `python -m pallas_kernels.schedule_compile`.
"""

import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

from pallas_kernels import schedule_sources
from pallas_kernels.chip import Chip, named
from pallas_kernels.schedule_work import OURS

LIBTPU = '0.0.52'  # the version whose dumps this reader was written for
TIMEOUT_S = 1800
_BUNDLES = '-final_bundles.txt'
_SLOTS = 'final_hlo-static-per-bundle-utilization.txt'

_ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',  # the compiler is reached without a device
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
_FLAGS = (
    '--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
    '--xla_jf_dump_llo_pass_label_regex=final_(bundles|hlo-static).*'
)


class CompileError(RuntimeError):
    """The compiler, or the kernel before it, refused; the message says why."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler wrote.

    Attributes:
      module: the optimised module's text.
      temp_bytes: HBM that it needs besides arguments and results.
      seconds: how long the compiler took.
      dumps: for every instruction with bundles, the dumps of bundles and of utilisation.
      notes: remarks of the computation's builder (such as the block sizes it took).
    """

    module: str
    temp_bytes: int
    seconds: float
    dumps: dict[str, tuple[str, str]]
    notes: dict[str, Any]


def version_warning() -> str:
    """A remark if libtpu is missing or another than the reader was written for; '' if it is."""
    try:
        version = importlib.metadata.version('libtpu')
    except importlib.metadata.PackageNotFoundError:
        raise CompileError(
            f'libtpu is not installed: pip install libtpu=={LIBTPU} (its compiler needs no TPU)'
        ) from None
    if version != LIBTPU:
        return f'libtpu {version} is installed; the reader was written for the dumps of {LIBTPU}'
    return ''


def default_cache() -> pathlib.Path:
    """Where the compiler's dumps are kept between runs."""
    root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    return pathlib.Path(root) / 'pallas_schedule'


def compiled(
    request: dict[str, Any], cache: pathlib.Path | None = None, cached: bool = False
) -> Compiled:
    """Compiles `request` (see schedule_ops.build) in a child process.

    Args:
      request: what to compile.
      cache: folder that keeps the dumps of what was compiled before; None compiles again.
      cached: whether to raise rather than compile.

    Raises:
      CompileError: if it does not compile, with the line that says why, or if the compiler wrote
        no bundles.
    """
    kept = cache / f'{_key(request)}.zip' if cache else None
    with tempfile.TemporaryDirectory(prefix='schedule_') as folder:
        path = pathlib.Path(folder)
        if kept is not None and kept.exists():
            with zipfile.ZipFile(kept) as archive:
                archive.extractall(path)
        elif cached:
            raise CompileError('not compiled before')
        else:
            own = 'pallas_kernels.schedule_compile'
            run([sys.executable, '-m', own, json.dumps(request)], path)
            if kept is not None:
                _keep(path, kept)
        return read(path)


def _keep(folder: pathlib.Path, kept: pathlib.Path) -> None:
    """Packs the files that a prediction reads."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f'.{os.getpid()}')
    with zipfile.ZipFile(partial, 'w', zipfile.ZIP_DEFLATED) as archive:
        for file in _wanted(folder):
            archive.write(file, file.name)
    partial.replace(kept)


def read(folder: pathlib.Path, *, bare: bool = False) -> Compiled:
    """What the compiler and `into` wrote into a folder; `bare` does not miss the bundles.

    Raises:
      CompileError: if it did not compile, or if the compiler wrote no bundles.
    """
    facts = json.loads((folder / 'facts.json').read_text())
    if 'error' in facts:
        raise CompileError(facts['error'])
    dumps = {}
    for bundles in folder.glob('*' + _BUNDLES):
        # <time>-<instruction>-<pass>-final_bundles.txt
        name, _, number = bundles.name.removesuffix(_BUNDLES).rpartition('-')
        beside = glob.glob(str(folder / glob.escape(name)) + f'-*{_SLOTS}')
        if number.isdigit() and beside:
            texts = bundles.read_text(), pathlib.Path(beside[0]).read_text()
            dumps[name.partition('-')[2]] = texts
    if not dumps and not bare:
        raise CompileError(
            'the compiler wrote no bundles: its dump flags have changed '
            f'(written for libtpu {LIBTPU})'
        )
    return Compiled(
        (folder / 'module.txt').read_text(), facts['temp_bytes'], facts['seconds'], dumps,
        facts['notes'],
    )  # fmt: skip


def run(command: list[str], folder: pathlib.Path, *, dumps: bool = True) -> None:
    """Runs a command that compiles, as a child that reads its environment at its start.

    Args:
      command: ends with `into`.
      folder: where the compiler's dumps go; if the child fails, facts.json says why.
      dumps: whether the compiler writes its bundles.

    Raises:
      CompileError: if the child did not end by itself.
    """
    flags = _FLAGS.format(folder=folder) if dumps else ''
    environment = {**os.environ, **_ENVIRONMENT, 'LIBTPU_INIT_ARGS': flags}
    root = str(pathlib.Path(__file__).resolve().parents[1])
    environment['PYTHONPATH'] = os.pathsep.join(
        [root, *filter(None, [environment.get('PYTHONPATH')])]
    )
    try:
        child = subprocess.run(
            [*command, str(folder)], env=environment, capture_output=True, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CompileError(f'the compiler took more than {TIMEOUT_S} s') from None
    if child.returncode < 0:
        raise CompileError(f'the compiler was ended by signal {-child.returncode}')
    if child.returncode:
        (folder / 'facts.json').write_text(json.dumps({'error': _reason(child.stderr)}))


def _wanted(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that a prediction reads."""
    names = ('module.txt', 'facts.json')
    return sorted(
        file
        for file in folder.iterdir()
        if file.name in names
        or file.name.endswith(_SLOTS)
        or (file.name.endswith(_BUNDLES) and 'schedule-analysis' not in file.name)
    )


def _key(request: dict[str, Any]) -> str:
    """Names what the dumps of a request depend on: versions, and our sources if they are ours."""
    versions = [importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'libtpu')]
    digest = hashlib.sha256(json.dumps([request, versions], sort_keys=True).encode())
    if request['side'] == OURS:
        for path in schedule_sources.of(request['op'], request['case']):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _reason(stderr: str) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    for line in reversed(lines):
        if 'Error' in line or 'RESOURCE_EXHAUSTED' in line:
            return line.strip()[:600]
    return lines[-1].strip()[:600] if lines else 'the compiler stopped without a word'


def into(
    folder: pathlib.Path,
    built: Callable[[], tuple[Callable[..., Any], Any, dict[str, Any]]],
    chip: Chip,
    *,
    free: bool = False,
    **options: Any,
) -> None:
    """Compiles, in a child of `run`, and writes the module and facts.json.

    Args:
      folder: where to.
      built: returns the function, its arguments' shapes (a tuple) and notes; it is called where
        `current_chip` is `chip`.
      chip: what is compiled for.
      free: whether the compiler chooses the layouts of arguments and results.
      options: of `jax.jit`.
    """
    import time

    import jax
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    device = topologies.get_topology_desc(platform='tpu', topology_name=chip.topology).devices[0]
    sharding = SingleDeviceSharding(device)
    abstract = AbstractDevice(device.device_kind, device.num_cores, 'tpu')
    if free:
        layouts = Format(Layout.AUTO, sharding)
        options |= {'in_shardings': layouts, 'out_shardings': layouts}
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        function, arguments, notes = built()
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
        )
        traced = jax.jit(function, **options).trace(*arguments)
        lowered = traced.lower(lowering_platforms=('tpu',))
    start = time.monotonic()
    executable = lowered.compile()
    facts = {
        'seconds': time.monotonic() - start,
        'temp_bytes': executable.memory_analysis().temp_size_in_bytes,
        'notes': notes,
    }
    (folder / 'module.txt').write_text(_module(executable))
    (folder / 'facts.json').write_text(json.dumps(facts))


def _module(executable) -> str:
    """The module's text with all constants, or as JAX prints it if that is not to be had."""
    try:
        from jaxlib import _hlo  # not public: a missing one costs the long constants only

        options = _hlo.HloPrintOptions()
        options.print_large_constants = True
        return executable.runtime_executable().hlo_modules()[0].to_string(options)
    except (ImportError, AttributeError):
        return executable.as_text()


def _child(request: dict[str, Any], folder: pathlib.Path) -> None:
    from pallas_kernels import schedule_ops

    build = schedule_ops.module(request['op']).build
    free = request['case'].get('layouts') == 'free'
    into(folder, lambda: build(request), named(request['chip']), free=free)


if __name__ == '__main__':
    _child(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))
