"""VGG as torchvision and timm keep it."""

from collections.abc import Iterator

from bigjax.models.vgg import VGG, size
from bigjax.pretrained.layout import Layout, Rule, batch_norm, conv, linear, one
from bigjax.pretrained.pretrained import Pretrained


def pretrained(model: VGG, path: str = '') -> Pretrained:
    """Returns how a VGG is kept elsewhere, with the file it starts from, if any."""
    convs = tuple(_convolutions(model))
    torchvision = _layout(model, 'VGG of torchvision', (*convs, *_torchvision_head()))
    return Pretrained((torchvision, _layout(model, 'VGG of timm', (*convs, *_timm_head()))), path)


def _layout(model: VGG, name: str, rules: tuple[Rule, ...]) -> Layout:
    norm = '_bn' if model.batch_norm else ''
    config = {'architecture': f'vgg{model.depth}{norm}', 'num_classes': model.classes}
    return Layout(name=name, rules=rules, config=config, fresh=r'^params/head/')


def _convolutions(model: VGG) -> Iterator[Rule]:
    number = 0  # Theirs counts convolutions, norms, activations and poolings.
    for s, (convs, _) in enumerate(size(model.depth, model.width)):
        for i in range(convs):
            yield from conv(f'stage_{s}_conv_{i}', f'features.{number}')
            if model.batch_norm:
                yield from batch_norm(f'stage_{s}_norm_{i}', f'features.{number + 1}')
            number += 3 if model.batch_norm else 2
        number += 1


def _torchvision_head() -> Iterator[Rule]:
    # Theirs reads the last map channel by channel, ours pixel by pixel.
    yield Rule('params/hidden_0/kernel', 'classifier.0.weight', ((3,), (2, 0, 1)))
    yield Rule('params/hidden_0/bias', 'classifier.0.bias')
    yield from linear('hidden_1', 'classifier.3')
    yield from linear('head', 'classifier.6')


def _timm_head() -> Iterator[Rule]:
    yield from conv('hidden_0', 'pre_logits.fc1')
    yield Rule('params/hidden_1/kernel', 'pre_logits.fc2.weight', one(1, 0, -1, -1))
    yield Rule('params/hidden_1/bias', 'pre_logits.fc2.bias')
    yield from linear('head', 'head.fc')
