"""Llama 2 and 3: rotary positions, RMSNorm, SwiGLU and grouped queries, 1B to 405B.

Grattafiori et al. 2024, "The Llama 3 herd of models" (arXiv:2407.21783), §3 and table 3: AdamW,
8,000 steps of warm-up, cosine to a hundredth over 1,200,000 steps, at first 4 M tokens a step in
windows of 4,096, later 8 M and 16 M in windows of 8,192; peak rates 3e-4 (8B), 1.5e-4 (70B), 8e-5
(405B). Decay, clip and b2 are Llama 2's (arXiv:2307.09288, §2.2; its eps is 1e-5). 1B and 3B (Llama
3.2) were pruned from 8B and distilled, which is not done here. The BPE is trained on the data.

    python launch.py --experiment=llama --size=405B --scan --peak_lr=8e-5 --action=describe
    python launch.py --experiment=llama --size=8B --rank=16 --dtype=bfloat16 --remat=dots_no_batch

A small one, on the text that every Python carries (one seed, two CPU cores: 1.760 bits per byte on
the whole validation set in 2:20):

    python launch.py --experiment=llama --depth=4 --width=128 --heads=4 --kv_heads=2 --vocab=4096 \
        --seq=64 --batch=12 --steps=2000 --warmup=100 --peak_lr=2e-3
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from bigjax.experiment import Experiment, Run, Sample
from bigjax.lora import LoRA
from bigjax.models import llama
from bigjax.nn.attention import Implementation
from bigjax.nn.moe import Routing
from bigjax.nn.rotary import RotaryScaling
from bigjax.optimizers import Optim
from bigjax.pretrained import llama as kept
from bigjax.recipes.language import Text, language_model
from bigjax.recipes.sizes import override
from bigjax.strategy import Strategy


def experiment(
    *,
    size: Literal['1B', '3B', '8B', '70B', '405B', '2-7B', '2-13B', '2-70B'] = '1B',
    depth: int = 0,
    heads: int = 0,
    kv_heads: int = 0,
    width: int = 0,
    hidden: int = 0,
    head_dim: int = 0,
    theta: float = 0.0,
    factor: float = 0.0,
    dtype: Literal['float32', 'bfloat16'] = 'float32',
    attention: Implementation = 'auto',
    pretrained: str = '',
    text: Text = Text(vocab=0, seq=4096),
    routing: Routing = Routing(),
    strategy: Strategy = Strategy(),
    lora: LoRA = LoRA(),
    run: Run = Run(steps=1_200_000, batch=1024, eval_every=2000, save_every=2000),
    optim: Optim = Optim(
        peak_lr=3e-4, end_lr=0.01, warmup=8000, b2=0.95, weight_decay=0.1, clip=1.0
    ),
    sample: Sample = Sample(prompt='def '),
) -> Experiment:
    """Builds the run.

    Args:
      size: published variant, 2-… of Llama 2, whose vocabulary --vocab=0 takes
      depth: transformer blocks; 0 takes the size's
      heads: query heads; 0 takes the size's
      kv_heads: key-value heads, must divide heads; 0 takes the size's, or fewer that divide
      width: width of the residual stream, an even multiple of heads; 0 takes the size's
      hidden: width of the MLP; 0 takes the size's multiple of the width
      head_dim: size of a head; 0 is width / heads
      theta: base of the rotary frequencies; 0 takes the size's
      factor: how much the context is extended by rotary scaling; 0 takes the size's, 1 is none
      dtype: type of the computation; parameters are float32
      attention: implementation of attention; auto takes the kernel of the chip, xla on a CPU
      pretrained: folder or .safetensors file to start from; empty starts at random
    """
    size_ = {'kv_heads': 8, 'theta': 500_000.0, 'vocab_size': 128_256, **llama.SIZES[size]}
    knobs = {'depth': depth, 'heads': heads, 'width': width, 'head_dim': head_dim, 'theta': theta}
    shape = override(size_, vocab_size=text.vocab, factor=factor, **knobs)
    text = dataclasses.replace(text, vocab=shape['vocab_size'])
    scaling, tied = RotaryScaling(shape.pop('factor')), shape.pop('tied')
    theta = shape.pop('theta')
    shape['kv_heads'] = kv_heads or math.gcd(shape['kv_heads'], shape['heads'])
    shape['hidden'] = hidden or size_['hidden'] * shape['width'] // size_['width']
    model = llama.Llama(
        context_length=text.seq,
        tied=tied,
        theta=theta,
        scaling=scaling,
        dtype=jnp.dtype(dtype),
        **strategy.fields(),
        attention_impl=attention,
        routing=routing,
        **shape,
    )
    return language_model(
        model,
        text.open(run.data_dir),
        seq=text.seq,
        z_loss=text.z_loss,
        forward_flops=llama.forward_flops(length=text.seq, routing=routing, **shape),
        rules=llama.RULES,
        strategy=strategy,
        run=run,
        optim=optim,
        sample=sample,
        lora=lora,
        pretrained=kept.pretrained(model, pretrained),
    )
