"""WaveNet on bytes: by default, those of the source of the Python standard library.

Van den Oord et al. 2016, "WaveNet: a generative model for raw audio": gated causal convolutions of
dilations 1, 2, 4, and so on. A window of text starts from nothing; generation carries what the
convolutions have read on for as long as it draws, one position at a time.

    python launch.py --experiment=wavenet
    python launch.py --experiment=wavenet --depth=10 --blocks=3 --seq=4096 --dtype=bfloat16

Measured on two CPU cores, one seed, the first command: after 2,000 steps 2.048 bits per byte of the
whole validation set, in 2:16 from start to the sampled text. The second was not run.
"""

from typing import Any, Literal

import jax.numpy as jnp

from bigjax.data.text import open_language
from bigjax.experiment import Experiment, Run, Sample
from bigjax.models import wavenet
from bigjax.nn.implementation import Implementation
from bigjax.optimizers import Optim
from bigjax.recipes.language import language_model

# States hold what the convolutions reach back to: generation never starts a window anew.
ENDLESS = 2**31 - 1


def experiment(
    *,
    depth: int = 6,
    blocks: int = 2,
    width: int = 64,
    gates: int = 64,
    skip: int = 128,
    kernel: int = 2,
    seq: int = 128,
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    conv: Implementation = 'auto',
    dataset: str = 'stdlib',
    tokenizer: Literal['bytes', 'bpe'] = 'bytes',
    vocab: int = 4096,
    z_loss: float = 0.0,
    run: Run = Run(steps=2000, batch=16, eval_batch=96, eval_every=500, save_every=500),
    optim: Optim = Optim(peak_lr=2e-3, end_lr=0.0, warmup=100, clip=1.0),
    sample: Sample = Sample(prompt='def '),
) -> Experiment:
    """Builds the run.

    Args:
      depth: units of a block: dilations 1, 2, 4, ..., 2^(depth - 1)
      blocks: how often the dilations begin anew
      width: residual channels
      gates: channels of each unit's gate
      skip: channels that all units add to the output
      kernel: positions that a convolution reads
      seq: tokens of each window
      dtype: type of the computation; parameters are float32
      conv: implementation of the convolutions; auto takes the kernel of the chip, xla on a CPU
      dataset: stdlib, files:GLOB or tfds:NAME
      tokenizer: bytes, or a byte-level BPE trained on the data
      vocab: tokens of the BPE
      z_loss: weight of the squared log-partition in the loss
    """
    data = open_language(dataset, seq=seq, data_dir=run.data_dir, tokenizer=tokenizer, vocab=vocab)
    sizes: dict[str, Any] = {'vocab_size': data.tokenizer.vocab_size, 'width': width}
    sizes |= {'gates': gates, 'skip': skip, 'depth': depth, 'blocks': blocks}
    sizes['kernel_size'] = kernel
    model = wavenet.WaveNet(**sizes, dtype=jnp.dtype(dtype), impl=conv)
    return language_model(
        model,
        data,
        seq=seq,
        forward_flops=wavenet.forward_flops(**sizes, length=seq),
        rules=wavenet.RULES,
        run=run,
        optim=optim,
        sample=sample,
        z_loss=z_loss,
        max_length=ENDLESS,
    )
