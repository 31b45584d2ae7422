"""Text to text from knobs: what translation and summarization share, whatever their model."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from flax import linen as nn

from bigjax.data.parallel import ParallelData, open_parallel
from bigjax.data.pipeline import Examples
from bigjax.experiment import Data, Experiment
from bigjax.optimizers import Optim, make_optimizer
from bigjax.predict import Predicted
from bigjax.pretrained.pretrained import Pretrained
from bigjax.run import Run, Search, need
from bigjax.scores import ngrams
from bigjax.sharding import Rule, readable
from bigjax.tasks.translation import make_search, translation

SCORES = {'bleu': ('bleu', 'chrf'), 'rouge': ('rouge_1', 'rouge_2', 'rouge_l')}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPairs:
    """Which texts are turned into which, and how that is scored.

    Attributes:
      dataset: catalogues:LANG (such as zh, de, fr: from English), csv:FILE or tfds:NAME
      source_column: CSV column or TFDS feature (for translations: language) of the source
      target_column: CSV column or TFDS feature (for translations: language) of the target
      test_file: CSV file to evaluate on; empty holds out a tenth of --dataset
      tokenizer: bytes, or one byte-level BPE trained on both sides of the data
      vocab: tokens of the BPE
      seq: tokens read and written of each text, its end included; longer texts are cut
      score: bleu (and chrF) for translations, rouge for summaries
      bleu_tokenizer: what BLEU counts; auto is zh for catalogues:zh, char where no spaces are, 13a
      label_smoothing: probability spread over all tokens in training
    """

    dataset: str = 'catalogues:zh'
    source_column: str = 'source'
    target_column: str = 'target'
    test_file: str = ''
    tokenizer: Literal['bytes', 'bpe'] = 'bpe'
    vocab: int = 3000
    seq: int = 32
    score: Literal['bleu', 'rouge'] = 'bleu'
    bleu_tokenizer: ngrams.BleuTokenizer = 'auto'
    label_smoothing: float = 0.1

    FREE: ClassVar[tuple[str, ...]] = ('score', 'bleu_tokenizer')

    def __post_init__(self) -> None:
        fits = 0 <= self.label_smoothing < 1
        need(fits, self, 'label_smoothing', 'must be at least 0 and below 1', 0.1)

    def open(self, data_dir: str) -> ParallelData:
        """Returns the data set.

        Raises:
          UsageError: there is no such data set, or it has no such columns.
        """
        return open_parallel(
            self.dataset,
            seq=self.seq,
            data_dir=data_dir,
            tokenizer=self.tokenizer,
            vocab=self.vocab,
            source_column=self.source_column,
            target_column=self.target_column,
            test_file=self.test_file,
        )

    def rate(self, texts: list[str], references: list[str]) -> dict[str, float]:
        """Returns the scores of a set, in percent."""
        if self.score == 'rouge':
            return ngrams.rouge(texts, references)
        kind, _, language = self.dataset.partition(':')
        tokenize: str = self.bleu_tokenizer
        if tokenize == 'auto':
            tokenize = ngrams.bleu_tokenizer(language if kind == 'catalogues' else '')
        return ngrams.bleu_and_chrf(texts, references, tokenize=tokenize)


def text_to_text(
    model: nn.Module,
    *,
    data: ParallelData,
    pairs: TextPairs,
    run: Run,
    optim: Optim,
    search: Search,
    rules: tuple[Rule, ...],
    forward_flops: int,
    pretrained: Pretrained | None = None,
) -> Experiment:
    """Returns the experiment of training `model` to turn sources into targets.

    Args:
      model: see `bigjax.tasks.translation`.
      data: what `pairs.open` gave.
      pairs: the knobs of the data and its scores.
      run: the knobs of the run.
      optim: the knobs of the optimizer.
      search: the knobs of the search.
      rules: sharding rules of the model.
      forward_flops: closed-form operations of one example's forward pass.
      pretrained: the model's names in other libraries, and the weights it starts from.
    """
    options: dict[str, Any] = {
        'length': pairs.seq,
        'begin': data.begin,
        'end': data.end,
        'search': search,
    }
    find = make_search(model, **options)

    def texts(outputs: Examples) -> list[str]:
        return [data.decode(tokens) for tokens in outputs['tokens']]

    def score(predicted: Iterator[Predicted]) -> dict[str, float]:
        found: list[str] = []
        references: list[str] = []
        for batch, outputs in predicted:
            found += texts(outputs)
            references += map(data.test.target.text, batch['row'].tolist())
        return pairs.rate(found, references)

    def show(batch: Examples, outputs: Examples) -> list[str]:
        return [
            f'source     {data.test.source.text(row)}\n'
            f'reference  {data.test.target.text(row)}\n'
            f'model      {text}'
            for row, text in zip(batch['row'].tolist(), texts(outputs), strict=True)
        ]

    def generate(params: Any, extra: Any) -> list[str]:
        del extra
        source_1S = data.encode([search.prompt])
        read = jax.jit(find, out_shardings=readable(params))
        found = read(params, source_1S, np.ones(1, bool))
        return texts({'tokens': np.asarray(found.tokens_BT)})

    optimizer, schedule = make_optimizer(optim, steps=run.steps)
    return Experiment(
        task=translation(
            model,
            token_bytes_V=np.append(data.tokenizer.token_bytes, [0, 0]),
            forward_flops=forward_flops,
            label_smoothing=pairs.label_smoothing,
            **options,
        ),
        optimizer=optimizer,
        schedule=schedule,
        nonfinite=optim.nonfinite,
        data=Data(train=data.train, evals={'test': data.test}, card=data.card),
        rules=rules,
        run=run,
        tokenizer=data.tokenizer,
        score=score,
        score_names=SCORES[pairs.score],
        show=show,
        generate=generate,
        pretrained=pretrained,
    )
