"""Recurrent language model: by default, an LSTM on the source of the Python standard library.

Mikolov et al. 2010, "Recurrent neural network based language model" (`--cell=elman`); Zaremba et
al. 2014, "Recurrent neural network regularization" (LSTM, dropout between layers). Every window of
text starts from an empty state; generation carries the state on for as long as it draws.

    python launch.py --experiment=rnn_lm
    python launch.py --experiment=rnn_lm --dataset=files:'books/*.txt' --tokenizer=bpe --dropout=0.3

Measured on two shared CPU cores, one seed: 1.509 nats (2.178 bits) per byte on the whole validation
set in 5:42.
"""

from typing import Any, Literal

import jax.numpy as jnp

from bigjax.data.text import open_language
from bigjax.experiment import Experiment, Run, Sample
from bigjax.models import rnn_lm
from bigjax.optimizers import Optim
from bigjax.recipes.language import language_model

# A state has room for any text: generation never starts a window anew.
ENDLESS = 2**31 - 1


def experiment(
    *,
    cell: Literal['elman', 'lstm', 'gru'] = 'lstm',
    depth: int = 1,
    width: int = 256,
    embed: int = 64,
    tied: bool = False,
    seq: int = 96,
    dropout: float = 0.0,
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    dataset: str = 'stdlib',
    tokenizer: Literal['bytes', 'bpe'] = 'bytes',
    vocab: int = 4096,
    z_loss: float = 0.0,
    run: Run = Run(steps=2000, batch=24, eval_batch=96, eval_every=500, save_every=500),
    optim: Optim = Optim(peak_lr=4e-3, end_lr=0.0, warmup=100, clip=1.0),
    sample: Sample = Sample(prompt='def '),
) -> Experiment:
    """Builds the run.

    Args:
      cell: Elman's network, long short-term memory, or the gated recurrent unit
      depth: recurrent layers
      width: units of each layer
      embed: width of the embedding
      tied: whether the output layer is the embedding, transposed; needs --embed equal to --width
      seq: tokens read of each window
      dropout: share of what goes into each layer and the output zeroed in training
      dtype: type of the computation; parameters are float32
      dataset: stdlib, files:GLOB or tfds:NAME
      tokenizer: bytes, or a byte-level BPE trained on the data
      vocab: tokens of the BPE
      z_loss: weight of the squared log-partition in the loss
    """
    data = open_language(dataset, seq=seq, data_dir=run.data_dir, tokenizer=tokenizer, vocab=vocab)
    vocab_size = data.tokenizer.vocab_size
    sizes: dict[str, Any] = {'vocab_size': vocab_size, 'embed': embed, 'features': width}
    sizes |= {'layers': depth, 'cell': cell}
    model = rnn_lm.RecurrentLM(**sizes, tied=tied, dropout=dropout, dtype=jnp.dtype(dtype))
    return language_model(
        model,
        data,
        seq=seq,
        forward_flops=rnn_lm.forward_flops(**sizes, length=seq),
        rules=rnn_lm.RULES,
        run=run,
        optim=optim,
        sample=sample,
        z_loss=z_loss,
        max_length=ENDLESS,
    )
