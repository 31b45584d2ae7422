"""GPT-2 and GPT-3 from knobs: one architecture, published at many sizes."""

from typing import Any

from bigjax.experiment import Experiment
from bigjax.models import gpt
from bigjax.nn.moe import Routing
from bigjax.optimizers import Optim
from bigjax.pretrained import gpt2
from bigjax.recipes.language import Text, language_model
from bigjax.run import Run, Sample


def gpt_experiment(
    shape: dict[str, Any],
    *,
    text: Text,
    routing: Routing,
    run: Run,
    optim: Optim,
    sample: Sample,
    pretrained: str,
    **options: Any,
) -> Experiment:
    """Returns the experiment of training a GPT.

    Args:
      shape: depth, heads and width, and what else of `bigjax.models.gpt.GPT` is not its default.
      text: knobs of what it reads.
      routing: knobs of a mixture of experts, if any.
      run: knobs of the run.
      optim: knobs of the optimizer.
      sample: knobs of the text it generates.
      pretrained: folder or file of weights to start from; empty starts at random.
      options: further arguments of `bigjax.recipes.language.language_model`.
    """
    model = gpt.GPT(vocab_size=text.vocab, context_length=text.seq, routing=routing, **shape)
    flops = gpt.forward_flops(
        vocab_size=text.vocab,
        length=text.seq,
        depth=model.depth,
        width=model.width,
        routing=routing,
    )
    return language_model(
        model,
        text.open(run.data_dir),
        seq=text.seq,
        z_loss=text.z_loss,
        forward_flops=flops,
        rules=gpt.ODD_VOCAB_RULES,
        run=run,
        optim=optim,
        sample=sample,
        pretrained=gpt2.pretrained(model, pretrained),
        **options,
    )
