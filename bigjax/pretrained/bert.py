"""BERT and RoBERTa as Hugging Face keeps them, with each of their heads."""

from collections.abc import Iterator, Mapping
from typing import Any

from bigjax.models.bert import BERT
from bigjax.models.bert_heads import MaskedLM, SequenceClassifier, TokenClassifier
from bigjax.pretrained.layout import Layout, Rule, attention, labels, linear, norm
from bigjax.pretrained.pretrained import Pretrained

# What BertConfig and RobertaConfig take where config.json leaves a key out.
DEFAULTS = {
    'hidden_act': 'gelu',
    'hidden_size': 768,
    'intermediate_size': 3072,
    'layer_norm_eps': 1e-12,
    'max_position_embeddings': 512,
    'num_attention_heads': 12,
    'num_hidden_layers': 12,
    'position_embedding_type': 'absolute',
    'tie_word_embeddings': True,
    'type_vocab_size': 2,
    'vocab_size': 30522,
}
_VOCABULARIES = {'bert': 30522, 'roberta': 50265}
_NAMES = {'bert': 'BERT', 'roberta': 'RoBERTa'}
_KNOBS = {
    'depth': 'num_hidden_layers',
    'heads': 'num_attention_heads',
    'width': 'hidden_size',
    'hidden': 'intermediate_size',
}


def pretrained(
    model: BERT | MaskedLM | SequenceClassifier | TokenClassifier, path: str = ''
) -> Pretrained:
    """Returns how an encoder, alone or with a head, is kept elsewhere.

    It is a RoBERTa where positions do not start at 0.

    Args:
      model: the encoder or what reads it.
      path: folder or file it starts from; empty for a random start.
    """
    encoder = model if isinstance(model, BERT) else model.encoder
    family = 'roberta' if encoder.first_position else 'bert'
    ours = '' if isinstance(model, BERT) else 'encoder/'
    layout = Layout(
        name=f'{_NAMES[family]} of Hugging Face',
        rules=(*_encoder_rules(encoder, ours, family), *_head_rules(model, family)),
        config=_config(model, encoder, family),
        defaults={**DEFAULTS, 'vocab_size': _VOCABULARIES[family]},
        # Fewer positions than there are may be used.
        told=('architectures', 'id2label', 'label2id', 'max_position_embeddings', 'pad_token_id'),
        arguments=arguments,
        prefix=f'{family}.',
        aliases=(('LayerNorm.weight', 'LayerNorm.gamma'), ('LayerNorm.bias', 'LayerNorm.beta')),
        fresh='(?!)' if isinstance(model, BERT) else r'^params/(?!encoder/)',
        unused=r'^(cls|classifier|qa_outputs|lm_head)\.|(^|\.)pooler\.',
        buffers=r'position_ids$',
    )
    return Pretrained((layout,), path)


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the knobs of an encoder that a config.json describes."""
    return {knob: config.get(key, DEFAULTS[key]) for knob, key in _KNOBS.items()}


def _config(model: Any, encoder: BERT, family: str) -> dict[str, Any]:
    heads = {
        'BERT': 'Model',
        'MaskedLM': 'ForPreTraining' if getattr(model, 'next_sentence', False) else 'ForMaskedLM',
        'SequenceClassifier': 'ForSequenceClassification',
        'TokenClassifier': 'ForTokenClassification',
    }
    head = heads[type(model).__name__]
    if getattr(model, 'head', '') == 'span':
        head = 'ForQuestionAnswering'
    return {
        **DEFAULTS,
        **(labels(model.classes) if hasattr(model, 'classes') else {}),
        'architectures': [f'{family.title()}{head}'],
        'hidden_size': encoder.width,
        'intermediate_size': encoder.hidden,
        'layer_norm_eps': encoder.epsilon,
        'max_position_embeddings': encoder.positions + encoder.first_position,
        'model_type': family,
        'num_attention_heads': encoder.heads,
        'num_hidden_layers': encoder.depth,
        'pad_token_id': max(encoder.first_position - 1, 0),
        'type_vocab_size': encoder.types,
        'vocab_size': encoder.vocab_size,
    }


def _encoder_rules(encoder: BERT, ours: str, family: str) -> Iterator[Rule]:
    embeddings = f'{family}.embeddings'
    yield Rule(f'params/{ours}embedding', f'{embeddings}.word_embeddings.weight')
    yield Rule(f'params/{ours}position', f'{embeddings}.position_embeddings.weight', first=True)
    yield Rule(f'params/{ours}type', f'{embeddings}.token_type_embeddings.weight')
    yield from norm(f'{ours}norm', f'{embeddings}.LayerNorm')
    for i in range(encoder.depth):
        own, theirs = f'{ours}block_{i}', f'{family}.encoder.layer.{i}'
        inner = f'{theirs}.attention.self'
        names = (f'{inner}.query', f'{inner}.key', f'{inner}.value')
        yield from attention(f'{own}/attention', (*names, f'{theirs}.attention.output.dense'))
        yield from norm(f'{own}/attention_norm', f'{theirs}.attention.output.LayerNorm')
        yield from linear(f'{own}/mlp/up', f'{theirs}.intermediate.dense')
        yield from linear(f'{own}/mlp/down', f'{theirs}.output.dense')
        yield from norm(f'{own}/mlp_norm', f'{theirs}.output.LayerNorm')


def _head_rules(model: Any, family: str) -> Iterator[Rule]:
    if isinstance(model, MaskedLM):
        names = ('cls.predictions.transform.dense', 'cls.predictions.transform.LayerNorm')
        bias = 'cls.predictions.bias'
        if family == 'roberta':
            names, bias = ('lm_head.dense', 'lm_head.layer_norm'), 'lm_head.bias'
        yield from linear('transform', names[0])
        yield from norm('norm', names[1])
        yield Rule('params/output_bias', bias)
        yield from linear('pooler', f'{family}.pooler.dense')
        yield from linear('next', 'cls.seq_relationship')
    elif isinstance(model, SequenceClassifier) and family == 'roberta' and model.pool == 'first':
        # What its head calls a dense layer is BERT's pooler.
        yield from linear('pooler', 'classifier.dense')
        yield from linear('classifier', 'classifier.out_proj')
    elif isinstance(model, SequenceClassifier):
        yield from linear('pooler', f'{family}.pooler.dense')
        yield from linear('classifier', 'classifier')
    elif isinstance(model, TokenClassifier):
        yield from linear(model.head, 'qa_outputs' if model.head == 'span' else 'classifier')
