"""What is done ahead of a run: its plan, and what starts it on a cluster. Nothing here trains."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigjax.manifest.write import write
from bigjax.options import Options
from bigjax.plan import plan


def run(
    action: str, experiment: str, values: Mapping[str, Any], options: Options, workdir: Path
) -> int:
    """Does `'plan'` or `'manifest'` and returns the exit status.

    Args:
      action: which of them.
      experiment: name of a file in experiments/.
      values: its knobs.
      options: the machine, and what else the action asks for.
      workdir: where the plan, or the files that start the run, are written.

    Raises:
      UsageError: something the user asked for does not fit.
    """
    if action == 'plan':
        return plan.run(experiment, values, options.plan, workdir)
    files = write(experiment, values, options.manifest, workdir, topology=options.plan.topology)
    for file in files:
        print(file, file=sys.stderr)
    return 0
