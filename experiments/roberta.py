"""RoBERTa: BERT without next sentences, with bytes for letters, pretrained longer; fine-tuned.

Liu et al. 2019, "RoBERTa: a robustly optimized BERT pretraining approach". Masks are drawn anew at
every step; a row is of one document, where the paper's go on into the next. The small default reads
the source of the Python standard library:

    python launch.py --experiment=roberta

The paper's recipe for RoBERTa-large (table 9: 8K rows of at most 512 tokens a step, 500,000 steps,
no clipping; over 160 GB of text; 90.2 % on MNLI and 94.6 F1 on SQuAD 1.1, both development sets):

    python launch.py --experiment=roberta --size=large --dataset=files:'text/*' --vocab=50265
        --seq=512 --batch=8192 --steps=500000 --warmup=30000 --peak_lr=4e-4 --b2=0.98 --eps=1e-6
        --clip=0 --weight_decay=0.01 --schedule=warmup_linear --dropout=0.1 --dtype=bfloat16

Fine-tuning a folder of weights, its tokenizer and architecture included, on your own data:

    python launch.py --experiment=roberta --objective=classify --dataset=csv:reviews.csv --seq=128
        --pretrained=DIR --peak_lr=2e-5 --batch=32 --steps=2000 --dropout=0.1
    python launch.py --experiment=roberta --objective=tokens --dataset=conll:train.txt
        --pretrained=DIR
    python launch.py --experiment=roberta --objective=answers --dataset=squad:train.json
        --test_file=dev.json --seq=384 --overlap=128 --pretrained=DIR

Measured on two CPU cores that two runs shared, one seed, the first command: after 500, 1,000 and
2,000 steps 11.2 %, 12.9 % and 13.4 % of the validation set's masked tokens are found, in 4:12.
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
    size: Literal['tiny', 'mini', 'small', 'medium', 'base', 'large'] = 'tiny',
    depth: int = 0,
    heads: int = 0,
    width: int = 0,
    hidden: int = 0,
    dropout: float = 0.0,
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    scan: bool = False,
    remat: Remat = 'none',
    attention: Implementation = 'auto',
    pretrained: str = '',
    reading: Reading = Reading(),
    run: Run = Run(steps=2000, batch=32, eval_every=500, save_every=500),
    optim: Optim = Optim(
        peak_lr=1e-3, warmup=100, end_lr=0.0, b2=0.98, weight_decay=0.01, clip=1.0
    ),
) -> Experiment:
    """Builds the run.

    Args:
      size: published variant (base and large), or as small as BERT's
      depth: layers; 0 is the size's
      heads: attention heads, must divide the width; 0 is the size's
      width: width of the residual stream; 0 is the size's
      hidden: width of the MLPs' hidden layer; 0 is the size's
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
        encoder_shape(bert.ROBERTA, size, pretrained, **sizes) | options,
        reading=reading,
        tokenizer='masked_bpe',
        run=run,
        optim=optim,
        pretrained=pretrained,
    )
