"""GPT-2: a decoder-only transformer with learned positions, 124M to 1.5B parameters.

Radford et al. 2019, "Language models are unsupervised multitask learners": windows of 1,024 tokens,
batches of 512, a byte-level BPE of 50,257 tokens. The paper does not tell its optimizer; the
defaults are those of nanoGPT's reproduction (github.com/karpathy/nanoGPT, config/train_gpt2.py):
491,520 tokens a step, AdamW, 6e-4 after 2,000 steps, cosine to 6e-5 at 600,000; it reports about
2.85 nats per token on OpenWebText for 124M, without biases (--nobias). The BPE is trained on the
data.

    python launch.py --experiment=gpt2 --size=1.5B --action=describe
    python launch.py --experiment=gpt2 --dataset=files:'books/*.txt' --batch=8 --rank=8

A small one, on the text that every Python carries:

    python launch.py --experiment=gpt2 --depth=4 --width=128 --heads=4 --vocab=4096 --seq=64 \
        --batch=12 --steps=2000 --warmup=100 --peak_lr=2e-3

Measured on two CPU cores that two runs shared, one seed: 1.813 bits per byte on the whole
validation set in 3:42.
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
    size: Literal['124M', '355M', '774M', '1.5B'] = '124M',
    depth: int = 0,
    heads: int = 0,
    width: int = 0,
    bias: bool = True,
    dropout: float = 0.0,
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    attention: Implementation = 'auto',
    pretrained: str = '',
    text: Text = Text(vocab=50_257, seq=1024),
    routing: Routing = Routing(),
    strategy: Strategy = Strategy(),
    lora: LoRA = LoRA(),
    run: Run = Run(steps=600_000, batch=480, eval_every=2000, save_every=2000),
    optim: Optim = Optim(
        peak_lr=6e-4, end_lr=0.1, warmup=2000, b2=0.95, weight_decay=0.1, clip=1.0
    ),
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
    shape = override(gpt.GPT2_SIZES[size], depth=depth, heads=heads, width=width)
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
