"""Llama as Hugging Face keeps it: `LlamaForCausalLM`."""

from collections.abc import Iterator, Mapping
from typing import Any

from bigjax.models.llama import Llama
from bigjax.pretrained.layout import Layout, Rule, linear, norm
from bigjax.pretrained.pretrained import Pretrained

# What LlamaConfig takes where config.json leaves a key out.
DEFAULTS = {
    'attention_bias': False,
    'hidden_act': 'silu',
    'hidden_size': 4096,
    'intermediate_size': 11008,
    'mlp_bias': False,
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'rms_norm_eps': 1e-6,
    'rope_scaling': None,
    'rope_theta': 10000.0,
    'tie_word_embeddings': False,
    'vocab_size': 32000,
}
_SCALING = {
    'factor': 'factor',
    'low': 'low_freq_factor',
    'high': 'high_freq_factor',
    'original': 'original_max_position_embeddings',
}


def pretrained(model: Llama, path: str = '') -> Pretrained:
    """Returns how a Llama is kept elsewhere, with the folder or file it starts from, if any."""
    return Pretrained((hugging_face(model),), path)


def hugging_face(model: Llama) -> Layout:
    """Returns the layout of `transformers.LlamaForCausalLM`."""
    own = model.scaling
    scaling = (
        own and own.factor != 1 and {key: getattr(own, name) for name, key in _SCALING.items()}
    )
    return Layout(
        name='Llama of Hugging Face',
        rules=tuple(_rules(model)),
        config={
            **DEFAULTS,
            'architectures': ['LlamaForCausalLM'],
            'head_dim': model.head_dim or model.width // model.heads,
            'hidden_size': model.width,
            'intermediate_size': model.hidden,
            'max_position_embeddings': model.context_length,
            'model_type': 'llama',
            'num_attention_heads': model.heads,
            'num_hidden_layers': model.depth,
            'num_key_value_heads': model.kv_heads,
            'rms_norm_eps': model.epsilon,
            'rope_scaling': {'rope_type': 'llama3', **scaling} if scaling else None,
            'rope_theta': model.theta,
            'tie_word_embeddings': model.tied,
            'vocab_size': model.vocab_size,
        },
        defaults=DEFAULTS,
        told=('architectures', 'max_position_embeddings'),
        normal=normal,
        arguments=_flags,
        # A copy of the embedding, which some files have, and the frequencies.
        buffers=r'rotary_emb\.inv_freq$' + (r'|^lm_head\.weight$' if model.tied else ''),
    )


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json as transformers 4 writes it; 5 has the rotation in one entry."""
    config = {**DEFAULTS, **config}
    rope = dict(config.pop('rope_parameters', None) or config['rope_scaling'] or {})
    config['rope_theta'] = rope.pop('rope_theta', config['rope_theta'])
    kind = rope.pop('type', 'default')
    kind = rope.pop('rope_type', kind)
    config['rope_scaling'] = None if kind == 'default' else {'rope_type': kind, **rope}
    heads, width = config['num_attention_heads'], config['hidden_size']
    config['num_key_value_heads'] = config.get('num_key_value_heads') or heads
    config['head_dim'] = config.get('head_dim') or width // heads
    return config


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the knobs of a Llama that a config.json describes."""
    config = normal(config)
    names = {
        'depth': 'num_hidden_layers',
        'heads': 'num_attention_heads',
        'kv_heads': 'num_key_value_heads',
        'width': 'hidden_size',
        'hidden': 'intermediate_size',
        'theta': 'rope_theta',
    }
    knobs = {knob: config[key] for knob, key in names.items()}
    if config['head_dim'] * knobs['heads'] != knobs['width']:
        knobs['head_dim'] = config['head_dim']
    return {**knobs, 'factor': (config['rope_scaling'] or {}).get('factor', 1.0)}


def _flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `--help` of the experiment calls them, the vocabulary with them."""
    return {**arguments(config), 'vocab': normal(config)['vocab_size']}


def _rules(model: Llama) -> Iterator[Rule]:
    yield Rule('params/embedding', 'model.embed_tokens.weight')
    for i in range(model.depth):
        ours, theirs = f'block_{i}', f'model.layers.{i}'
        yield from norm(f'{ours}/attention_norm', f'{theirs}.input_layernorm')
        for name in ('query', 'key', 'value'):
            projection = f'{theirs}.self_attn.{name[0]}_proj'
            yield from linear(f'{ours}/attention/{name}', projection, outputs=2)
        yield from linear(f'{ours}/attention/out', f'{theirs}.self_attn.o_proj', inputs=2)
        yield from norm(f'{ours}/mlp_norm', f'{theirs}.post_attention_layernorm')
        for name in ('gate', 'up', 'down'):
            yield from linear(f'{ours}/mlp/{name}', f'{theirs}.mlp.{name}_proj')
    yield from norm('norm', 'model.norm')
    yield Rule('params/output_embedding', 'lm_head.weight')
