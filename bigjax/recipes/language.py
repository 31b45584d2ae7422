"""Language models of text: the knobs they share, and the experiment that they become."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from flax import linen as nn

from bigjax.data.text import LanguageData, open_language
from bigjax.experiment import Data, Experiment, Run, Sample
from bigjax.lora import LoRA, with_lora
from bigjax.optimizers import Optim, make_optimizer
from bigjax.sharding import Rule
from bigjax.tasks.causal_lm import cached_decoder, causal_lm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """What a language model reads.

    Attributes:
      dataset: stdlib, files:GLOB, tfds:NAME, or blank (zeros, to measure speed)
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

    def open(self, data_dir: str) -> LanguageData:
        """Returns the data set, its tokenizer trained; UsageError where there is no such data."""
        return open_language(
            self.dataset,
            seq=self.seq,
            data_dir=data_dir,
            tokenizer=self.tokenizer,
            vocab=self.vocab,
        )


def language_model(
    model: nn.Module,
    data: LanguageData,
    *,
    seq: int,
    forward_flops: int,
    rules: Sequence[Rule],
    run: Run,
    optim: Optim,
    sample: Sample,
    z_loss: float = 0.0,
    max_length: int = 0,
    lora: LoRA | None = None,
    **more: Any,
) -> Experiment:
    """Returns the experiment of training a decoder-only model, its adapters alone if so wanted.

    Args:
      model: called with tokens; with `init_cache` and `decode`. It may know more tokens than the
        data has.
      data: what it reads.
      seq: tokens of an example.
      forward_flops: closed-form operations of one example's forward pass.
      rules: sharding rules of the model.
      run: how the run goes.
      optim: how parameters are updated.
      sample: how text is generated.
      z_loss: weight of the squared log-partition in the loss.
      max_length: positions that the model can hold when it generates; 0 is `seq`.
      lora: low-rank adapters, if any.
      more: further fields of Experiment, such as `pretrained`.
    """
    optimizer, schedule = make_optimizer(optim, steps=run.steps)
    experiment = Experiment(
        task=causal_lm(
            model,
            length=seq,
            token_bytes_V=data.tokenizer.token_bytes,
            forward_flops=forward_flops,
            decoder=cached_decoder(model, max_length or seq, data.tokenizer.vocab_size),
            z_loss=z_loss,
        ),
        optimizer=optimizer,
        schedule=schedule,
        nonfinite=optim.nonfinite,
        data=Data(train=data.train, evals={'validation': data.validation}, card=data.card),
        rules=rules,
        run=run,
        sample=sample,
        tokenizer=data.tokenizer,
        model=None if lora and lora.rank else model,
        **more,
    )
    return with_lora(experiment, lora) if lora else experiment
