"""`--action=manifest`: writes what starts a run on a cluster, and starts nothing itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigjax import experiment as experiments
from bigjax.identity import identity
from bigjax.manifest import gke, slurm, tpu_vm
from bigjax.manifest.job import Job, short
from bigjax.manifest.options import ManifestOptions
from bigjax.mesh import parse_mesh
from bigjax.plan.topology import parse


def write(
    experiment_name: str,
    values: Mapping[str, Any],
    options: ManifestOptions,
    workdir: Path,
    *,
    topology: str,
) -> list[Path]:
    """Writes the files for a target into `<workdir>/manifest/`.

    Args:
      experiment_name: name of a file in experiments/.
      values: its knobs; those at their default are left out of the command line.
      options: the target, and what only the user knows.
      workdir: where the run is kept; for gke and tpu-vm it has its name on the share.
      topology: name of the chips, see `bigjax.plan.topology.parse`.

    Returns:
      The files written.

    Raises:
      UsageError: a flag is missing or wrong, or the mesh does not fit the chips.
    """
    machine = parse(topology)
    run = identity(experiment_name, experiments.find(experiment_name), values)
    sizes = parse_mesh(run.knobs['mesh'], machine.devices)
    machine.between(run.knobs['dcn'], sizes)
    name = options.job or short(experiment_name)
    job = Job(run, machine, name, workdir.name, options.restarts)
    if options.target == 'slurm':
        files = {'train.sbatch': slurm.script(job, options, workdir)}
    elif options.target == 'gke':
        files = {'jobset.yaml': gke.manifest(job, options)}
    else:
        files = tpu_vm.scripts(job, options)
    folder = workdir / 'manifest'
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).write_text(text, encoding='utf-8')
    return [folder / file for file in files]
