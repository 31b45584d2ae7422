"""What actions ask for beside an experiment's knobs: each field of these groups is a flag."""

import dataclasses

from bigjax.manifest.options import ManifestOptions
from bigjax.plan.options import PlanOptions

ACTIONS = (
    'train', 'evaluate', 'generate', 'describe', 'import', 'export', 'plan', 'manifest',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """Which weights are read, and where others can read them.

    Attributes:
      checkpoint: for all but train: latest, best or a step
      export_dir: for export: the folder to write
      max_shard_size: for export: the most that one file holds
    """

    checkpoint: str = 'latest'
    export_dir: str = ''
    max_shard_size: str = '5GB'


LATEST = Kept()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every action.

    Attributes:
      kept: of those that read a checkpoint.
      plan: of plan, and in part of manifest.
      manifest: of manifest.
    """

    kept: Kept
    plan: PlanOptions
    manifest: ManifestOptions


def options(
    *,
    kept: Kept = LATEST,
    plan: PlanOptions = PlanOptions(),  # noqa: B008  (frozen, as an experiment's knobs)
    manifest: ManifestOptions = ManifestOptions(),  # noqa: B008
) -> Options:
    """Returns the options as `bigjax.experiment.build` puts them together from flags."""
    return Options(kept=kept, plan=plan, manifest=manifest)
