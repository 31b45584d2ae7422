"""Experiments with an encoder such as BERT: pretraining, and three ways to use it, from knobs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bigjax.data.augment import chain
from bigjax.data.classification import open_classification
from bigjax.data.masking import Fixed, Masking
from bigjax.data.passages import NextSentence, open_passages
from bigjax.data.questions import SCORE_NAMES, open_questions
from bigjax.data.token_labels import open_token_labels
from bigjax.experiment import Data, Experiment
from bigjax.models import bert
from bigjax.models.bert_heads import MaskedLM, SequenceClassifier, TokenClassifier
from bigjax.optimizers import Optim, make_optimizer
from bigjax.pretrained import bert as kept
from bigjax.pretrained.files import open_weights
from bigjax.recipes.sizes import override
from bigjax.run import Run, UsageError, need
from bigjax.tasks.classification import classification
from bigjax.tasks.masked_lm import masked_lm
from bigjax.tasks.question_answering import question_answering
from bigjax.tasks.token_classification import token_classification

Objective = Literal['mlm', 'classify', 'tokens', 'answers']

# Where --monitor is left at this default, other objectives have one of their own.
PRETRAINING_MONITOR = 'validation/loss'
# What reads data that pretraining does not, by how --dataset begins.
READERS: dict[str, Objective] = {
    'csv': 'classify', 'docstrings': 'classify', 'catalogues': 'classify',
    'conll': 'tokens', 'jsonl': 'tokens', 'squad': 'answers',
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What an encoder reads, and to what end.

    Attributes:
      objective: mlm (pretraining), classify (texts), tokens (label words) or answers (find them)
      dataset: stdlib, files:, tfds:; docstrings, catalogues, csv:, tfds:; conll:, jsonl:; squad:
      test_file: file of held-out examples, where --dataset is a file; empty holds out a tenth
      text_column: column of a CSV file that holds the text
      pair_column: column (TFDS: feature) that holds a second text; empty reads single texts
      label_column: column of a CSV file that holds the class
      tokenizer: wordpiece, wordpiece_cased, masked_bpe (trained on the data) or a model's folder
      vocab: tokens of a tokenizer that is trained
      seq: tokens of a row, special ones included
      mask_rate: share of tokens that mlm hides and predicts
      whole_words: whether mlm hides the tokens of a word together
      overlap: tokens that neighbouring windows of a text share (answers); 0 is a third of seq
      longest_answer: tokens of the longest answer that is given
      label_smoothing: probability spread over all classes in training (classify)
      pool: what classes are read from: the first token through the pooler, or all tokens' mean
    """

    objective: Objective = 'mlm'
    dataset: str = 'stdlib'
    test_file: str = ''
    text_column: str = 'text'
    pair_column: str = ''
    label_column: str = 'label'
    tokenizer: str = ''
    vocab: int = 4096
    seq: int = 64
    mask_rate: float = 0.15
    whole_words: bool = False
    overlap: int = 0
    longest_answer: int = 30
    label_smoothing: float = 0.0
    pool: Literal['first', 'mean'] = 'first'

    def __post_init__(self) -> None:
        fits = 0 < self.mask_rate < 1
        need(fits, self, 'mask_rate', 'must be above 0 and below 1', 0.15)
        need(self.longest_answer >= 1, self, 'longest_answer', 'must be at least 1', 30)

    def source(self, run: Run) -> dict[str, Any]:
        """Returns the arguments that every kind of data takes."""
        return {
            'seq': self.seq,
            'data_dir': run.data_dir,
            'tokenizer': self.tokenizer,
            'vocab': self.vocab,
        }


@dataclasses.dataclass(frozen=True)
class Aim:
    """What an objective makes of data and knobs.

    Attributes:
      tokenizer: how texts became tokens.
      fields: the fields of Experiment that it decides, but for the task.
      head: encoder -> model.
      task: (model, FLOPs of the encoder) -> task.
      predictions: tokens of a row that are predicted over the vocabulary.
    """

    tokenizer: Any
    fields: dict[str, Any]
    head: Callable[[bert.BERT], Any]
    task: Callable[[Any, int], Any]
    predictions: int = 0


def encoder_experiment(
    shape: dict[str, Any],
    *,
    reading: Reading,
    tokenizer: str,
    run: Run,
    optim: Optim,
    next_sentence: bool = False,
    pretrained: str = '',
) -> Experiment:
    """Returns the experiment of an encoder with the head that the objective needs.

    Args:
      shape: arguments of the encoder; without `vocab_size`, it is the tokenizer's.
      reading: knobs of what it reads.
      tokenizer: what an empty --tokenizer means where there are no weights to start from.
      run: knobs of the run.
      optim: knobs of the optimizer.
      next_sentence: whether pretraining predicts it, too.
      pretrained: folder or file of weights to start from; empty starts at random.
    """
    if not reading.tokenizer:
        folder = Path(pretrained)
        own = str(folder.parent if folder.suffix == '.safetensors' else folder)
        reading = dataclasses.replace(reading, tokenizer=own if pretrained else tokenizer)
    aims = {'mlm': _masked, 'classify': _classes, 'tokens': _labels, 'answers': _answers}
    aim = aims[reading.objective](reading, run, next_sentence)
    template = getattr(aim.tokenizer, 'template', None)
    if template is None:
        raise UsageError(
            f'--tokenizer={reading.tokenizer}: has no tokens for begin and end; '
            'try --tokenizer=wordpiece'
        )
    shape = {'vocab_size': aim.tokenizer.vocab_size, **shape}
    encoder = bert.BERT(separator=template.end, **shape)
    if encoder.vocab_size < aim.tokenizer.vocab_size:
        raise UsageError(
            f'--tokenizer={reading.tokenizer}: has {aim.tokenizer.vocab_size} tokens, the weights '
            f'in --pretrained={pretrained} know {encoder.vocab_size}; '
            f'try --tokenizer={pretrained}'
        )
    if encoder.positions < reading.seq:
        raise UsageError(
            f'--seq={reading.seq}: the model sees {encoder.positions} tokens; '
            f'try --seq={encoder.positions}'
        )
    model = aim.head(encoder)
    flops = bert.forward_flops(
        length=reading.seq,
        depth=encoder.depth,
        width=encoder.width,
        hidden=encoder.hidden,
        vocab_size=encoder.vocab_size,
        predictions=aim.predictions,
    )
    optimizer, schedule = make_optimizer(optim, steps=run.steps)
    if run.monitor == PRETRAINING_MONITOR and reading.objective != 'mlm':
        best = 'f1' if 'f1' in aim.fields.get('score_names', ()) else 'accuracy'
        run = dataclasses.replace(run, monitor=f'test/{best}')
    odd = encoder.vocab_size % 2
    return Experiment(
        task=aim.task(model, flops),
        optimizer=optimizer,
        schedule=schedule,
        nonfinite=optim.nonfinite,
        rules=bert.ODD_VOCAB_RULES if odd else bert.RULES,
        run=run,
        tokenizer=aim.tokenizer,
        pretrained=kept.pretrained(model, pretrained),
        **aim.fields,
    )


def _masked(reading: Reading, run: Run, next_sentence: bool) -> Aim:
    reader = READERS.get(reading.dataset.partition(':')[0])
    rule = f'does not read --dataset={reading.dataset}'
    need(reader is None, reading, 'objective', rule, reader)
    data = open_passages(reading.dataset, pair=next_sentence, **reading.source(run))
    masking = Masking(
        data.tokenizer,
        length=reading.seq,
        rate=reading.mask_rate,
        whole_words=reading.whole_words,
    )
    train, validation = (
        chain(NextSentence(passages), masking) if next_sentence else masking
        for passages in (data.train, data.validation)
    )
    fixed = Fixed(data.validation, validation)
    return Aim(
        data.tokenizer,
        {
            'data': Data(train=data.train, evals={'validation': fixed}, card=data.card),
            'augment': train,
        },
        lambda encoder: MaskedLM(encoder, next_sentence=next_sentence),
        lambda model, flops: masked_lm(
            model, length=reading.seq, predictions=masking.predictions, forward_flops=flops
        ),
        masking.predictions,
    )


def _classes(reading: Reading, run: Run, next_sentence: bool) -> Aim:
    data = open_classification(
        reading.dataset,
        text_column=reading.text_column,
        label_column=reading.label_column,
        pair_column=reading.pair_column,
        test_file=reading.test_file,
        **reading.source(run),
    )
    return Aim(
        data.tokenizer,
        {'data': Data(train=data.train, evals={'test': data.test}, card=data.card)},
        lambda encoder: SequenceClassifier(encoder, data.num_classes, reading.pool),
        lambda model, flops: classification(
            model,
            inputs='tokens',
            example=jax.ShapeDtypeStruct((reading.seq,), jnp.int32),
            class_names=data.class_names,
            forward_flops=flops,
            unit='tokens',
            units_per_example=reading.seq,
            label_smoothing=reading.label_smoothing,
        ),
    )


def _labels(reading: Reading, run: Run, next_sentence: bool) -> Aim:
    data = open_token_labels(reading.dataset, test_file=reading.test_file, **reading.source(run))
    return Aim(
        data.tokenizer,
        {
            'data': Data(train=data.train, evals={'test': data.test}, card=data.card),
            **({'score': data.score, 'score_names': data.score_names} if data.types else {}),
        },
        lambda encoder: TokenClassifier(encoder, len(data.class_names)),
        lambda model, flops: token_classification(model, length=reading.seq, forward_flops=flops),
    )


def _answers(reading: Reading, run: Run, next_sentence: bool) -> Aim:
    data = open_questions(
        reading.dataset,
        test_file=reading.test_file,
        overlap=reading.overlap,
        **reading.source(run),
    )
    return Aim(
        data.tokenizer,
        {
            'data': Data(train=data.train, evals={'test': data.test}, card=data.card),
            'score': data.score,
            'score_names': SCORE_NAMES,
            'show': data.show,
        },
        lambda encoder: TokenClassifier(encoder, 2, 'span'),
        lambda model, flops: question_answering(
            model, length=reading.seq, longest=reading.longest_answer, forward_flops=flops
        ),
    )


def encoder_shape(
    published: dict[str, Any], size: str, pretrained: str, **knobs: int
) -> dict[str, Any]:
    """Returns the arguments of an encoder; `vocab_size` only where weights tell it.

    Args:
      published: what all sizes of the family share.
      size: a key of `bert.SIZES`.
      pretrained: folder of weights whose config.json tells the architecture; '' takes `size`.
      knobs: depth, heads, width and hidden, in place of the size's where they are not 0.
    """
    shape = {**published, **bert.SIZES[size]}
    if not pretrained:
        del shape['vocab_size']
    config = open_weights(pretrained).config if pretrained else {}
    if config:
        shape |= kept.arguments(config)
        own = {'vocab_size': 'vocab_size', 'types': 'type_vocab_size', 'epsilon': 'layer_norm_eps'}
        for ours, theirs in own.items():
            shape[ours] = config.get(theirs, shape[ours])
        first = published.get('first_position', 0)
        shape['positions'] = config.get('max_position_embeddings', 512 + first) - first
    return override(shape, **knobs)
