"""Where a run goes: what `--action=manifest` must be told, because nobody else can know it."""

import dataclasses
import re
from typing import Literal

from bigjax.run import UsageError, need

Target = Literal['slurm', 'gke', 'tpu-vm']
# Names end up in host names, which the Kubernetes API and DNS allow no more than 63 letters.
_NAME, _LONGEST = r'[a-z]([-a-z0-9]*[a-z0-9])?', 40
_WORD = r'[\w.:/@+-]+'  # nothing that a shell, a comment of sbatch or YAML could read otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifestOptions:
    """The flags of `--action=manifest`.

    Attributes:
      target: what starts the processes: slurm (GPUs), gke (TPUs, GPUs) or tpu-vm (TPUs)
      job: name of the job; empty takes the experiment's
      restarts: how often a job that failed is started again; it goes on from its last checkpoint
      code: for slurm, folder of this code on the cluster; empty takes this one
      python: for slurm, Python with its packages on the cluster; empty takes this one
      partition: for slurm, where the job is queued; empty leaves it to the cluster
      account: for slurm, who pays; empty leaves it to the cluster
      time_limit: for slurm, such as 2-00:00:00; the run is saved before; empty leaves it out
      share: for gke and tpu-vm, SERVER:/PATH of an NFS share where all hosts keep the run
      image: for gke, container image that starts in this code's folder, with its packages
      namespace: for gke, the namespace of the job
      project: for tpu-vm, the Google Cloud project that pays
      zone: for tpu-vm, where the chips are, such as us-east5-a
      repository: for tpu-vm, URL of a git repository with this code that its hosts can clone
      revision: for tpu-vm, branch, tag or commit of it; empty takes its main branch
      spot: for tpu-vm and gke, cheaper chips that can be taken away at any time
    """

    target: Target = 'slurm'
    job: str = ''
    restarts: int = 10
    code: str = ''
    python: str = ''
    partition: str = ''
    account: str = ''
    time_limit: str = ''
    share: str = ''
    image: str = ''
    namespace: str = 'default'
    project: str = ''
    zone: str = ''
    repository: str = ''
    revision: str = ''
    spot: bool = False

    def __post_init__(self) -> None:
        need(self.restarts >= 0, self, 'restarts', 'must not be negative', 10)
        for flag, works in {'job': 'llama-70b', 'namespace': 'default'}.items():
            text = getattr(self, flag)
            fits = re.fullmatch(_NAME, text) and len(text) <= _LONGEST
            rule = f'must be small letters, digits and -, a letter first, at most {_LONGEST}'
            need(bool(fits or not text), self, flag, rule, works)
        for flag, works in {
            'partition': 'gpu', 'account': 'research', 'time_limit': '2-00:00:00',
            'image': 'REGISTRY/PROJECT/bigjax:1', 'project': 'my-project',
            'zone': 'us-east5-a', 'revision': 'main',
        }.items():  # fmt: skip
            text = getattr(self, flag)
            fits = re.fullmatch(_WORD, text) and not text.startswith('-')
            need(bool(fits or not text), self, flag, 'has letters that no such name has', works)
        share = re.fullmatch(r'[\w.-]+:/(?!/)[\w./-]*', self.share)
        need(bool(share or not self.share), self, 'share', 'must be SERVER:/PATH', '10.0.0.2:/runs')

    def require(self, **examples: str) -> None:
        """Raises UsageError for the first of these flags that is empty; the values are examples."""
        for flag, works in examples.items():
            if not getattr(self, flag):
                raise UsageError(
                    f'--{flag}=: --target={self.target} cannot do without it; try --{flag}={works}'
                )
