"""Language models of text: the knobs they share, and the experiment that they become."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from flax import linen as nn

from bigjax.data.text import open_language
from bigjax.experiment import Data, Experiment, Run, Sample
from bigjax.lora import LoRA, with_lora
from bigjax.optimizers import Optim, make_optimizer
from bigjax.sharding import Rule
from bigjax.tasks.causal_lm import cached_decoder, causal_lm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """What a language model reads.

    Attributes:
      dataset: stdlib, files:GLOB or tfds:NAME
      tokenizer: bytes, or a byte-level BPE trained on the data
      vocab: rows of the model's embedding; the BPE is trained to have as many tokens
      seq: tokens of context
      z_loss: weight of the squared log-partition in the loss
    """

    dataset: str = 'stdlib'
    tokenizer: Literal['bytes', 'bpe'] = 'bpe'
    vocab: int = 4096
    seq: int = 64
    z_loss: float = 0.0


def language_model(
    model: nn.Module,
    *,
    text: Text,
    forward_flops: int,
    rules: Sequence[Rule],
    run: Run,
    optim: Optim,
    sample: Sample,
    lora: LoRA,
    **more: Any,
) -> Experiment:
    """Returns the experiment of training a decoder-only model, its adapters alone if so wanted.

    Args:
      model: of `text.vocab` tokens and `text.seq` positions, with `init_cache` and `decode`.
      text: what it reads.
      forward_flops: closed-form operations of one example's forward pass.
      rules: sharding rules of the model.
      run: how the run goes.
      optim: how parameters are updated.
      sample: how text is generated.
      lora: low-rank adapters, if any.
      more: further fields of Experiment, such as `pretrained`.
    """
    data = open_language(
        text.dataset,
        seq=text.seq,
        data_dir=run.data_dir,
        tokenizer=text.tokenizer,
        vocab=text.vocab,
    )
    optimizer, schedule = make_optimizer(optim, steps=run.steps)
    experiment = Experiment(
        task=causal_lm(
            model,
            length=text.seq,
            token_bytes_V=data.tokenizer.token_bytes,
            forward_flops=forward_flops,
            decoder=cached_decoder(model, text.seq, data.tokenizer.vocab_size),
            z_loss=text.z_loss,
        ),
        optimizer=optimizer,
        schedule=schedule,
        nonfinite=optim.nonfinite,
        data=Data(train=data.train, evals={'validation': data.validation}, card=data.card),
        rules=rules,
        run=run,
        sample=sample,
        tokenizer=data.tokenizer,
        **more,
    )
    return with_lora(experiment, lora)


def override(published: dict[str, Any], **knobs: Any) -> dict[str, Any]:
    """Returns a published variant with those knobs in place of its own that are not 0."""
    return {**published, **{name: value for name, value in knobs.items() if value}}
