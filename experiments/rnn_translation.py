"""Recurrent encoder and decoder with additive attention: translation, English into Chinese.

Bahdanau et al. 2015, "Neural machine translation by jointly learning to align and translate"; with
--noattention the fixed vector of Cho et al. 2014. The default data are the messages of Django and
JupyterLab with their translations. --size=rnnsearch has the paper's widths (620 and 1,000); its
RNNsearch-50 reaches 26.75 BLEU on WMT14 English-French (table 1: 30,000 words a side, 80 sentences
a step, Adadelta, which is not offered here).

    python launch.py --experiment=rnn_translation
    python launch.py --experiment=rnn_translation --noattention
    python launch.py --experiment=rnn_translation --dataset=csv:news.csv \\
        --source_column=text --target_column=summary --score=rouge

Measured on two CPU cores that two runs shared, held-out messages, a beam of 4: with attention 25.1
BLEU (seeds 0, 1, 2: 25.2, 24.8, 25.3) in 7:01, without it 20.1 (19.9, 20.8, 19.7) in 4:20. Bits
per byte after 250, 500, 1,000 and 1,500 steps, seed 0: 2.062, 1.669, 1.406, 1.378; without it
2.062, 1.710, 1.509, 1.487.
"""

from typing import Literal

import jax.numpy as jnp

from bigjax.experiment import Experiment, Run
from bigjax.models import rnn_seq2seq
from bigjax.optimizers import Optim
from bigjax.recipes.sizes import override
from bigjax.recipes.text_to_text import TextPairs, text_to_text
from bigjax.run import Search


def experiment(
    *,
    size: Literal['small', 'rnnsearch'] = 'small',
    depth: int = 0,
    embed: int = 0,
    width: int = 0,
    attention: bool = True,
    dropout: float = 0.2,
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    pairs: TextPairs = TextPairs(),
    run: Run = Run(steps=1500, batch=64, eval_batch=128, eval_every=250, monitor='test/loss'),
    optim: Optim = Optim(peak_lr=2e-3, warmup=100, end_lr=0.0, clip=1.0),
    search: Search = Search(),
) -> Experiment:
    """Builds the run.

    Args:
      size: small (one layer, width 128), or Bahdanau et al.'s model
      depth: layers of the encoder; 0 takes the size's
      embed: width of the embedding; 0 takes the size's
      width: units of the decoder and of each direction of the encoder; 0 takes the size's
      attention: whether the decoder attends to the source, or reads one vector of it
      dropout: share of embeddings, encoder outputs and readouts zeroed in training
      dtype: type of the computation; parameters are float32
    """
    data = pairs.open(run.data_dir)
    shape = override(rnn_seq2seq.SIZES[size], depth=depth, embed=embed, width=width)
    model = rnn_seq2seq.RecurrentSeq2Seq(
        vocab_size=data.vocab_size,
        attention=attention,
        dropout=dropout,
        dtype=jnp.dtype(dtype),
        **shape,
    )
    return text_to_text(
        model,
        data=data,
        pairs=pairs,
        run=run,
        optim=optim,
        search=search,
        rules=rnn_seq2seq.RULES,
        forward_flops=rnn_seq2seq.forward_flops(
            vocab_size=data.vocab_size,
            source_length=pairs.seq,
            target_length=pairs.seq,
            attention=attention,
            **shape,
        ),
    )
