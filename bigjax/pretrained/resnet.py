"""ResNet as Hugging Face (`ResNetForImageClassification`) and torchvision and timm keep it."""

from collections.abc import Iterator, Mapping
from typing import Any

from bigjax.models.resnet import SIZES, ResNet, size
from bigjax.pretrained.layout import Layout, Rule, batch_norm, conv, labels, linear
from bigjax.pretrained.pretrained import Pretrained

# What ResNetConfig takes where config.json leaves a key out.
DEFAULTS = {
    'depths': [3, 4, 6, 3],
    'downsample_in_bottleneck': False,
    'downsample_in_first_stage': False,
    'embedding_size': 64,
    'hidden_act': 'relu',
    'hidden_sizes': [256, 512, 1024, 2048],
    'layer_type': 'bottleneck',
    'num_channels': 3,
}
_HEADS = r'^params/head/'


def pretrained(model: ResNet, path: str = '', *, channels: int = 3) -> Pretrained:
    """Returns how a ResNet is kept elsewhere, with the folder or file it starts from, if any.

    Args:
      model: the network; with a small stem, no other library has it, but the names still fit.
      path: folder or file; empty for a random start.
      channels: of the images.
    """
    if model.small_stem or len(SIZES[model.depth][0]) == 3:
        return Pretrained((torchvision(model),), path)
    return Pretrained((hugging_face(model, channels), torchvision(model)), path)


def hugging_face(model: ResNet, channels: int = 3) -> Layout:
    """Returns the layout of `transformers.ResNetForImageClassification`."""
    stages, bottleneck, width = size(model.depth, model.width)
    return Layout(
        name='ResNet of Hugging Face',
        rules=tuple(_hugging_face_rules(model)),
        config={
            **DEFAULTS,
            **labels(model.classes),
            'architectures': ['ResNetForImageClassification'],
            'depths': list(stages),
            'embedding_size': width,
            'hidden_sizes': [width * 2**s * (4 if bottleneck else 1) for s in range(len(stages))],
            'layer_type': 'bottleneck' if bottleneck else 'basic',
            'model_type': 'resnet',
            'num_channels': channels,
        },
        defaults=DEFAULTS,
        told=('architectures', 'id2label', 'label2id'),
        arguments=arguments,
        prefix='resnet.',
        fresh=_HEADS,
    )


def torchvision(model: ResNet) -> Layout:
    """Returns the layout of `torchvision.models.resnet…` and `timm.models.resnet`."""
    return Layout(
        name='ResNet of torchvision',
        rules=tuple(_torchvision_rules(model)),
        config={'architecture': f'resnet{model.depth}', 'num_classes': model.classes},
        fresh=_HEADS,
    )


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the knobs of a ResNet that a config.json describes."""
    config = {**DEFAULTS, **config}
    kind = (tuple(config['depths']), config['layer_type'] == 'bottleneck')
    depths = [depth for depth, (*found, _) in SIZES.items() if tuple(found) == kind]
    return {'depth': depths[0], 'width': config['embedding_size']} if depths else {}


def _blocks(model: ResNet) -> Iterator[tuple[int, int, str, int]]:
    """Yields stage, block, path of ours, and the number of its convolutions."""
    stages, bottleneck, _ = size(model.depth, model.width)
    for s, blocks in enumerate(stages):
        for b in range(blocks):
            yield s, b, f'stage_{s}_block_{b}', 3 if bottleneck else 2


def _hugging_face_rules(model: ResNet) -> Iterator[Rule]:
    def step(ours: str, own_norm: str, theirs: str) -> Iterator[Rule]:
        yield from conv(ours, f'{theirs}.convolution')
        yield from batch_norm(own_norm, f'{theirs}.normalization')

    yield from step('stem', 'stem_norm', 'resnet.embedder.embedder')
    for s, b, ours, convs in _blocks(model):
        theirs = f'resnet.encoder.stages.{s}.layers.{b}'
        for i in range(convs):
            yield from step(f'{ours}/conv_{i}', f'{ours}/norm_{i}', f'{theirs}.layer.{i}')
        yield from step(f'{ours}/shortcut', f'{ours}/shortcut_norm', f'{theirs}.shortcut')
    yield from linear('head', 'classifier.1')


def _torchvision_rules(model: ResNet) -> Iterator[Rule]:
    yield from conv('stem', 'conv1')
    yield from batch_norm('stem_norm', 'bn1')
    for s, b, ours, convs in _blocks(model):
        theirs = f'layer{s + 1}.{b}'
        for i in range(convs):
            yield from conv(f'{ours}/conv_{i}', f'{theirs}.conv{i + 1}')
            yield from batch_norm(f'{ours}/norm_{i}', f'{theirs}.bn{i + 1}')
        yield from conv(f'{ours}/shortcut', f'{theirs}.downsample.0')
        yield from batch_norm(f'{ours}/shortcut_norm', f'{theirs}.downsample.1')
    yield from linear('head', 'fc')
