"""Encoder-decoder Transformer: translation by default, from English into Chinese.

Vaswani et al. 2017, "Attention is all you need". The default data are the messages of Django and
JupyterLab with their translations; --size=base and --size=big are the paper's models (table 2: 27.3
and 28.4 BLEU on WMT14 English-German). The last command is the base model's recipe: some 25,000
tokens a side and step, 100,000 steps; big takes --dropout=0.3 --steps=300000 --peak_lr=4.9e-4. The
paper averages its last checkpoints. --action=export writes them as Marian.

    python launch.py --experiment=transformer_translation
    python launch.py --experiment=transformer_translation --dataset=catalogues:de
    python launch.py --experiment=transformer_translation --dataset=csv:news.csv \\
        --source_column=text --target_column=summary --score=rouge
    python launch.py --experiment=transformer_translation --size=base --norm=post --seq=128 \\
        --dataset=tfds:wmt14_translate/de-en --source_column=en --target_column=de --vocab=37000 \\
        --steps=100000 --batch=768 --schedule=rsqrt --warmup=4000 --peak_lr=7e-4 --eps=1e-9 --clip=0

Measured on two CPU cores that two runs shared, one seed, held-out messages, a beam of 4: 35.9
BLEU in 8:03. Bits per byte after 250, 500, 750 and 1,500 steps: 1.785, 1.412, 1.359, 1.368.
"""

from typing import Any, Literal

import jax.numpy as jnp

from bigjax.experiment import Experiment, Run
from bigjax.models import transformer
from bigjax.nn.attention import Implementation
from bigjax.optimizers import Optim
from bigjax.pretrained import marian
from bigjax.pretrained.files import open_weights
from bigjax.recipes.sizes import override
from bigjax.recipes.text_to_text import TextPairs, text_to_text
from bigjax.run import Search
from bigjax.strategy import Remat


def experiment(
    *,
    size: Literal['small', 'base', 'big'] = 'small',
    depth: int = 0,
    heads: int = 0,
    width: int = 0,
    hidden: int = 0,
    norm: Literal['post', 'pre'] = 'pre',
    activation: Literal['relu', 'swish', 'gelu'] = 'relu',
    dropout: float = 0.1,
    scan: bool = False,
    remat: Remat = 'none',
    attention: Implementation = 'auto',
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    pretrained: str = '',
    pairs: TextPairs = TextPairs(),
    run: Run = Run(steps=1500, batch=64, eval_batch=128, eval_every=250, monitor='test/loss'),
    optim: Optim = Optim(peak_lr=2e-3, warmup=200, end_lr=0.0, b2=0.98, clip=1.0),
    search: Search = Search(),
) -> Experiment:
    """Builds the run.

    Args:
      size: small (2 layers a side, width 128), or the paper's base and big
      depth: layers of the encoder and of the decoder; 0 takes the size's
      heads: attention heads, which must divide the width; 0 takes the size's
      width: width of the residual stream; 0 takes the size's
      hidden: width inside the feed-forward layers; 0 takes the size's
      norm: normalization after each residual sum (as published) or before each branch
      activation: of the feed-forward layers
      dropout: share of embeddings and residual branches zeroed in training
      scan: layers are compiled once and scanned
      remat: what is computed again for the gradient, to save memory
      attention: implementation of attention; auto takes the kernel of the chip, xla on a CPU
      dtype: type of the computation; parameters are float32
      pretrained: folder of Marian's layout to start from; its config.json tells the size
    """
    data = pairs.open(run.data_dir)
    shape: dict[str, Any] = {**transformer.SIZES[size], 'norm': norm, 'activation': activation}
    if pretrained and (config := open_weights(pretrained).config):
        shape |= marian.arguments(config)
    shape = override(shape, depth=depth, heads=heads, width=width, hidden=hidden)
    model = transformer.Transformer(
        vocab_size=data.vocab_size,
        dropout=dropout,
        logits_bias=True,
        scan=scan,
        remat=remat,
        attention_impl=attention,
        dtype=jnp.dtype(dtype),
        **shape,
    )
    special = {'pad_token_id': data.begin, 'decoder_start_token_id': data.begin}
    return text_to_text(
        model,
        data=data,
        pairs=pairs,
        run=run,
        optim=optim,
        search=search,
        rules=transformer.RULES,
        forward_flops=transformer.forward_flops(
            vocab_size=data.vocab_size,
            source_length=pairs.seq,
            target_length=pairs.seq,
            depth=shape['depth'],
            width=shape['width'],
            hidden=shape['hidden'],
        ),
        pretrained=marian.pretrained(
            model, pretrained, special={**special, 'eos_token_id': data.end}
        ),
    )
