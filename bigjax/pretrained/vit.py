"""ViT as Hugging Face (`ViTForImageClassification`) and timm keep it."""

from collections.abc import Iterator, Mapping
from typing import Any

from bigjax.models.vit import SIZES, ViT, size
from bigjax.pretrained.layout import Layout, Rule, attention, conv, labels, linear, norm, one
from bigjax.pretrained.pretrained import Pretrained

# What ViTConfig takes where config.json leaves a key out.
DEFAULTS = {
    'hidden_act': 'gelu',
    'hidden_size': 768,
    'intermediate_size': 3072,
    'layer_norm_eps': 1e-12,
    'num_attention_heads': 12,
    'num_channels': 3,
    'num_hidden_layers': 12,
    'patch_size': 16,
    'qkv_bias': True,
}


def pretrained(
    model: ViT, path: str = '', *, image_size: int = 224, channels: int = 3
) -> Pretrained:
    """Returns how a ViT is kept elsewhere, with the folder or file it starts from, if any.

    Args:
      model: the network.
      path: folder or file; empty for a random start.
      image_size: rows and columns of the images.
      channels: of the images.
    """
    return Pretrained((hugging_face(model, image_size, channels), timm(model)), path)


def hugging_face(model: ViT, image_size: int = 224, channels: int = 3) -> Layout:
    """Returns the layout of `transformers.ViTForImageClassification`."""
    own, patch = _size(model)
    return Layout(
        name='ViT of Hugging Face',
        rules=tuple(_hugging_face_rules(own.depth)),
        config={
            **DEFAULTS,
            **labels(model.classes),
            'architectures': ['ViTForImageClassification'],
            'hidden_size': own.width,
            'image_size': image_size,
            'intermediate_size': 4 * own.width,
            'layer_norm_eps': 1e-6,
            'model_type': 'vit',
            'num_attention_heads': own.heads,
            'num_channels': channels,
            'num_hidden_layers': own.depth,
            'patch_size': patch,
        },
        defaults=DEFAULTS,
        # The published weights were trained with ours; Hugging Face's config.json has its own.
        same={'layer_norm_eps': (1e-12,)},
        told=('architectures', 'id2label', 'label2id', 'image_size'),
        arguments=arguments,
        prefix='vit.',
        fresh=r'^params/head/',
        unused=r'(^|\.)pooler\.',
    )


def timm(model: ViT) -> Layout:
    """Returns the layout of `timm.models.vision_transformer`."""
    own, patch = _size(model)
    name = {'Ti': 'tiny', 'S': 'small', 'B': 'base', 'L': 'large', 'H': 'huge'}
    kind = name[model.variant.partition('/')[0]]
    return Layout(
        name='ViT of timm',
        rules=tuple(_timm_rules(own.depth)),
        config={'architecture': f'vit_{kind}_patch{patch}', 'num_classes': model.classes},
        fresh=r'^params/head/',
    )


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the knobs of a ViT that a config.json describes."""
    config = {**DEFAULTS, **config}
    keys = ('num_hidden_layers', 'num_attention_heads', 'hidden_size')
    own = tuple(config[key] for key in keys)
    names = [name for name, published in SIZES.items() if tuple(published) == own]
    knobs = {} if names else dict(zip(('depth', 'heads', 'width'), own, strict=True))
    return {'variant': f'{(names or ["B"])[0]}/{config["patch_size"]}', **knobs}


def _size(model: ViT):
    return size(model.variant, depth=model.depth, heads=model.heads, width=model.width)


def _hugging_face_rules(depth: int) -> Iterator[Rule]:
    embeddings = 'vit.embeddings'
    yield Rule('params/class_token', f'{embeddings}.cls_token', one(-1, -1, 0))
    yield Rule('params/position', f'{embeddings}.position_embeddings', one(-1, 0, 1))
    yield from conv('patch', f'{embeddings}.patch_embeddings.projection')
    for i in range(depth):
        ours, theirs = f'block_{i}', f'vit.encoder.layer.{i}'
        inner = f'{theirs}.attention.attention'
        names = (f'{inner}.query', f'{inner}.key', f'{inner}.value')
        yield from norm(f'{ours}/attention_norm', f'{theirs}.layernorm_before')
        yield from attention(f'{ours}/attention', (*names, f'{theirs}.attention.output.dense'))
        yield from norm(f'{ours}/mlp_norm', f'{theirs}.layernorm_after')
        yield from linear(f'{ours}/mlp/up', f'{theirs}.intermediate.dense')
        yield from linear(f'{ours}/mlp/down', f'{theirs}.output.dense')
    yield from norm('norm', 'vit.layernorm')
    yield from linear('head', 'classifier')


def _timm_rules(depth: int) -> Iterator[Rule]:
    yield Rule('params/class_token', 'cls_token', one(-1, -1, 0))
    yield Rule('params/position', 'pos_embed', one(-1, 0, 1))
    yield from conv('patch', 'patch_embed.proj')
    for i in range(depth):
        ours, theirs = f'block_{i}', f'blocks.{i}'
        qkv = f'params/{ours}/attention/qkv'
        yield from norm(f'{ours}/attention_norm', f'{theirs}.norm1')
        yield Rule(f'{qkv}/kernel', f'{theirs}.attn.qkv.weight', ((2, 1, 3), (0,)))
        yield Rule(f'{qkv}/bias', f'{theirs}.attn.qkv.bias', ((1, 0, 2),))
        yield from linear(f'{ours}/attention/out', f'{theirs}.attn.proj', inputs=2)
        yield from norm(f'{ours}/mlp_norm', f'{theirs}.norm2')
        yield from linear(f'{ours}/mlp/up', f'{theirs}.mlp.fc1')
        yield from linear(f'{ours}/mlp/down', f'{theirs}.mlp.fc2')
    yield from norm('norm', 'norm')
    yield from linear('head', 'head')
