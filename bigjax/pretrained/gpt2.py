"""GPT-2 as Hugging Face keeps it: `GPT2LMHeadModel`."""

from collections.abc import Iterator, Mapping
from typing import Any

from bigjax.models.gpt import GPT
from bigjax.pretrained.layout import Layout, Rule, norm
from bigjax.pretrained.pretrained import Pretrained

# What GPT2Config takes where config.json leaves a key out.
DEFAULTS = {
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': 1e-5,
    'n_embd': 768,
    'n_head': 12,
    'n_layer': 12,
    'n_positions': 1024,
    'n_inner': None,
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'tie_word_embeddings': True,
    'vocab_size': 50257,
}


def pretrained(model: GPT, path: str = '') -> Pretrained:
    """Returns how a GPT is kept elsewhere, with the folder or file it starts from, if any."""
    return Pretrained((hugging_face(model),), path)


def hugging_face(model: GPT) -> Layout:
    """Returns the layout of `transformers.GPT2LMHeadModel`."""
    return Layout(
        name='GPT-2 of Hugging Face',
        rules=tuple(_rules(model)),
        config={
            **DEFAULTS,
            'architectures': ['GPT2LMHeadModel'],
            'model_type': 'gpt2',
            'n_embd': model.width,
            'n_head': model.heads,
            'n_layer': model.depth,
            'n_positions': model.context_length,
            'vocab_size': model.vocab_size,
        },
        defaults=DEFAULTS,
        same={'activation_function': ('gelu_pytorch_tanh',), 'n_inner': (4 * model.width,)},
        told=('architectures', 'n_positions'),  # Fewer positions than there are may be used.
        arguments=_flags,
        prefix='transformer.',
        # The causal mask, and the output layer, which is the embedding.
        buffers=r'\.attn\.(masked_)?bias$|^lm_head\.weight$',
    )


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the knobs of a GPT that a config.json describes."""
    config = {**DEFAULTS, **config}
    names = {'depth': 'n_layer', 'heads': 'n_head', 'width': 'n_embd'}
    return {knob: config[key] for knob, key in names.items()}


def _flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `--help` of the experiment calls them, the vocabulary with them."""
    return {**arguments(config), 'vocab': {**DEFAULTS, **config}['vocab_size']}


def _rules(model: GPT) -> Iterator[Rule]:
    yield Rule('params/embedding', 'transformer.wte.weight')
    yield Rule('params/position', 'transformer.wpe.weight', first=True)
    for i in range(model.depth):
        ours, theirs = f'block_{i}', f'transformer.h.{i}'
        yield from norm(f'{ours}/attention_norm', f'{theirs}.ln_1')
        yield from norm(f'{ours}/mlp_norm', f'{theirs}.ln_2')
        # Its dense layers keep inputs first. Ours holds q, k and v of a head side by side.
        for layer, name, kernel, bias in (
            ('attention/qkv', 'attn.c_attn', ((0,), (2, 1, 3)), ((1, 0, 2),)),
            ('attention/out', 'attn.c_proj', ((0, 1), (2,)), ((0,),)),
            ('mlp/up', 'mlp.c_fc', ((0,), (1,)), ((0,),)),
            ('mlp/down', 'mlp.c_proj', ((0,), (1,)), ((0,),)),
        ):
            yield Rule(f'params/{ours}/{layer}/kernel', f'{theirs}.{name}.weight', kernel)
            yield Rule(f'params/{ours}/{layer}/bias', f'{theirs}.{name}.bias', bias)
    yield from norm('norm', 'transformer.ln_f')
