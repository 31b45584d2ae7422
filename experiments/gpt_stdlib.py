"""Byte-level GPT on the source of the Python standard library that runs it.

The shape of nanoGPT's smallest recipe (github.com/karpathy/nanoGPT, README:
"I only have a macbook") at twice its peak learning rate, decayed to zero, on text that every Python
carries. Validation is the last tenth of the files, all of it.

    python launch.py --experiment=gpt_stdlib

Measured on two CPU cores with Python 3.12.1: after 2,000 steps 1.663 nats (2.399 bits) per byte,
one seed, in 2:40 from start to the sampled text.
"""

from typing import Literal

import jax.numpy as jnp

from bigjax.data.text import open_language
from bigjax.experiment import Experiment, Run, Sample
from bigjax.models import gpt
from bigjax.nn.attention import Implementation
from bigjax.optimizers import Optim
from bigjax.recipes.language import language_model
from bigjax.strategy import Strategy


def experiment(
    *,
    depth: int = 4,
    heads: int = 4,
    width: int = 128,
    seq: int = 64,
    bias: bool = False,
    dropout: float = 0.0,
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    attention: Implementation = 'auto',
    dataset: str = 'stdlib',
    tokenizer: Literal['bytes', 'bpe'] = 'bytes',
    vocab: int = 4096,
    z_loss: float = 0.0,
    strategy: Strategy = Strategy(),
    run: Run = Run(steps=2000, batch=12, eval_batch=96, eval_every=500, save_every=500),
    optim: Optim = Optim(peak_lr=2e-3, end_lr=0.0, warmup=100, b2=0.99, weight_decay=0.1, clip=1.0),
    sample: Sample = Sample(prompt='def '),
) -> Experiment:
    """Builds the run.

    Args:
      depth: transformer blocks
      heads: attention heads; must divide the width
      width: width of the residual stream
      seq: tokens of context
      bias: whether dense layers and norms have biases
      dropout: share of activations zeroed in training
      dtype: type of the computation; parameters are float32
      attention: implementation of attention; auto takes the kernel of the chip, xla on a CPU
      dataset: stdlib, files:GLOB or tfds:NAME
      tokenizer: bytes, or a byte-level BPE trained on the data
      vocab: tokens of the BPE
      z_loss: weight of the squared log-partition in the loss
    """
    data = open_language(dataset, seq=seq, data_dir=run.data_dir, tokenizer=tokenizer, vocab=vocab)
    vocab_size = data.tokenizer.vocab_size
    model = gpt.GPT(
        vocab_size=vocab_size,
        context_length=seq,
        depth=depth,
        heads=heads,
        width=width,
        bias=bias,
        dropout=dropout,
        dtype=jnp.dtype(dtype),
        attention_impl=attention,
        **strategy.fields(),
    )
    flops = gpt.forward_flops(vocab_size=vocab_size, length=seq, depth=depth, width=width)
    return language_model(
        model,
        data,
        seq=seq,
        forward_flops=flops,
        rules=gpt.RULES,
        strategy=strategy,
        run=run,
        optim=optim,
        sample=sample,
        z_loss=z_loss,
    )
