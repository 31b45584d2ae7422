"""GPT-3: GPT-2's architecture at eight sizes, 125M to 175B parameters.

Brown et al. 2020, "Language models are few-shot learners", table 2.1 and appendix B: windows of
2,048 tokens, 300 B tokens in all, Adam with b2 = 0.95 and clip 1, decay 0.1, warm-up over 375 M
tokens, cosine to a tenth. Sequences a step (the table tells tokens: 0.5, 1, 2 and 3.2 M) and peak
rate by size:

    125M 256 6e-4   350M 256 3e-4   760M 256 2.5e-4   1.3B 512 2e-4
    2.7B 512 1.6e-4   6.7B 1024 1.2e-4   13B 1024 1e-4   175B 1568 0.6e-4

Not done as published: the batch does not grow over the first tokens; the cosine ends with the run,
not at 260 B tokens; every layer attends to everything before it, where the paper alternates with
"locally banded sparse" layers whose band it does not tell.

The defaults are for 125M; steps and warm-up go down as the batch goes up:

    python launch.py --experiment=gpt3 --size=175B --batch=1568 --steps=93400 --warmup=117 \
        --peak_lr=0.6e-4 --action=describe

A small one, on the text that every Python carries:

    python launch.py --experiment=gpt3 --depth=4 --width=128 --heads=4 --vocab=4096 --seq=64 \
        --batch=12 --steps=2000 --warmup=100 --peak_lr=2e-3

Measured on two CPU cores that two runs shared, one seed: 1.813 bits per byte on the whole
validation set in 3:51, GPT-2's own result with the same knobs.
"""

from typing import Literal

import jax.numpy as jnp

from bigjax.experiment import Experiment, Run, Sample
from bigjax.lora import LoRA
from bigjax.models import gpt
from bigjax.nn.attention import Implementation
from bigjax.nn.moe import Routing
from bigjax.optimizers import Optim
from bigjax.recipes.gpt import gpt_experiment
from bigjax.recipes.language import Text
from bigjax.recipes.sizes import override
from bigjax.strategy import Strategy


def experiment(
    *,
    size: Literal['125M', '350M', '760M', '1.3B', '2.7B', '6.7B', '13B', '175B'] = '125M',
    depth: int = 0,
    heads: int = 0,
    width: int = 0,
    bias: bool = True,
    dropout: float = 0.0,
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    attention: Implementation = 'auto',
    pretrained: str = '',
    text: Text = Text(vocab=50_257, seq=2048),
    routing: Routing = Routing(),
    strategy: Strategy = Strategy(),
    lora: LoRA = LoRA(),
    run: Run = Run(steps=572_000, batch=256, eval_every=2000, save_every=2000),
    optim: Optim = Optim(peak_lr=6e-4, end_lr=0.1, warmup=715, b2=0.95, weight_decay=0.1, clip=1.0),
    sample: Sample = Sample(prompt='def '),
) -> Experiment:
    """Builds the run.

    Args:
      size: published variant
      depth: transformer blocks; 0 takes the size's
      heads: attention heads, must divide the width; 0 takes the size's
      width: width of the residual stream; 0 takes the size's
      bias: whether dense layers and norms have biases
      dropout: share of activations zeroed in training
      dtype: type of the computation; parameters are float32
      attention: implementation of attention; auto takes the kernel of the chip, xla on a CPU
      pretrained: folder or .safetensors file to start from; empty starts at random
    """
    shape = override(gpt.GPT3_SIZES[size], depth=depth, heads=heads, width=width)
    options = {'attention_impl': attention, 'dtype': jnp.dtype(dtype), **strategy.fields()}
    return gpt_experiment(
        shape | options | {'bias': bias, 'dropout': dropout},
        text=text,
        routing=routing,
        lora=lora,
        strategy=strategy,
        run=run,
        optim=optim,
        sample=sample,
        pretrained=pretrained,
    )
