"""The encoder-decoder Transformer as Hugging Face keeps Marian's: `MarianMTModel`."""

from collections.abc import Iterator, Mapping
from typing import Any

from bigjax.models.transformer import Transformer
from bigjax.pretrained.layout import Layout, Rule, attention, linear, norm, one
from bigjax.pretrained.pretrained import Pretrained

# What MarianConfig takes where config.json leaves a key out.
DEFAULTS = {
    'activation_function': 'gelu',
    'd_model': 1024,
    'decoder_attention_heads': 16,
    'decoder_ffn_dim': 4096,
    'decoder_layers': 12,
    'decoder_vocab_size': None,
    'encoder_attention_heads': 16,
    'encoder_ffn_dim': 4096,
    'encoder_layers': 12,
    'is_encoder_decoder': True,
    'normalize_before': False,
    'scale_embedding': False,
    'share_encoder_decoder_embeddings': True,
    'tie_word_embeddings': True,
    'vocab_size': 58101,
}


def pretrained(
    model: Transformer, path: str = '', *, special: Mapping[str, int] | None = None
) -> Pretrained:
    """Returns how a Transformer is kept elsewhere, with what it starts from, if any.

    Args:
      model: the network; Marian's has `norm='post'` and `logits_bias`.
      path: folder or file; empty for a random start.
      special: tokens that config.json names for generation: `pad_token_id`, `eos_token_id` and
        `decoder_start_token_id`.
    """
    return Pretrained((hugging_face(model, special or {}),), path)


def hugging_face(model: Transformer, special: Mapping[str, int]) -> Layout:
    """Returns the layout of `transformers.MarianMTModel`."""
    sides = {'encoder': model.depth, 'decoder': model.decoder_depth or model.depth}
    config = {
        **DEFAULTS,
        'activation_function': model.activation,
        'architectures': ['MarianMTModel'],
        'd_model': model.width,
        'decoder_vocab_size': model.vocab_size,
        'max_position_embeddings': 512,
        'model_type': 'marian',
        'normalize_before': model.norm == 'pre',
        'scale_embedding': True,
        'vocab_size': model.vocab_size,
        **special,
    }
    for side, depth in sides.items():
        config |= {
            f'{side}_attention_heads': model.heads,
            f'{side}_ffn_dim': model.hidden,
            f'{side}_layers': depth,
        }
    return Layout(
        name='Marian of Hugging Face',
        rules=(*_rules(sides), *_shared()),
        config=config,
        defaults=DEFAULTS,
        same={'activation_function': ('silu',) if model.activation == 'swish' else ()},
        told=('architectures', 'max_position_embeddings', *special),
        normal=normal,
        arguments=arguments,
        # Positions are computed, and both sides' embeddings and the output's are one.
        buffers=r'embed_(positions|tokens)\.weight$|^lm_head\.weight$',
    )


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json with what follows from the rest of it."""
    config = {**DEFAULTS, **config}
    # Older versions write null, newer ones may leave it out.
    config['decoder_vocab_size'] = config['decoder_vocab_size'] or config['vocab_size']
    return config


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the knobs of a Transformer that a config.json describes."""
    config = normal(config)
    activation = config['activation_function']
    return {
        'depth': config['encoder_layers'],
        'heads': config['encoder_attention_heads'],
        'width': config['d_model'],
        'hidden': config['encoder_ffn_dim'],
        'norm': 'pre' if config['normalize_before'] else 'post',
        'activation': {'silu': 'swish'}.get(activation, activation),
    }


def _shared() -> Iterator[Rule]:
    yield Rule('params/embedding', 'model.shared.weight')
    yield Rule('params/logits_bias', 'final_logits_bias', one(-1, 0))


def _rules(sides: Mapping[str, int]) -> Iterator[Rule]:
    for side, depth in sides.items():
        for i in range(depth):
            ours, theirs = f'{side}/block_{i}', f'model.{side}.layers.{i}'
            names = [f'{theirs}.self_attn.{name}_proj' for name in ('q', 'k', 'v', 'out')]
            yield from attention(f'{ours}/attention', names)
            yield from norm(f'{ours}/attention_norm', f'{theirs}.self_attn_layer_norm')
            if side == 'decoder':
                yield from _cross(f'{ours}/cross', f'{theirs}.encoder_attn')
                yield from norm(f'{ours}/cross_norm', f'{theirs}.encoder_attn_layer_norm')
            yield from linear(f'{ours}/mlp/up', f'{theirs}.fc1')
            yield from linear(f'{ours}/mlp/down', f'{theirs}.fc2')
            yield from norm(f'{ours}/mlp_norm', f'{theirs}.final_layer_norm')


def _cross(ours: str, theirs: str) -> Iterator[Rule]:
    yield from linear(f'{ours}/q', f'{theirs}.q_proj', outputs=2)
    for i, name in enumerate(('k_proj', 'v_proj')):
        kv = f'params/{ours}/kv'
        yield Rule(f'{kv}/kernel', f'{theirs}.{name}.weight', ((1, 3), (0,)), ((2, i),))
        yield Rule(f'{kv}/bias', f'{theirs}.{name}.bias', ((0, 2),), ((1, i),))
    yield from linear(f'{ours}/out', f'{theirs}.out_proj', inputs=2)
