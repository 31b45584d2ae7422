"""AlexNet as torchvision keeps it."""

from collections.abc import Iterator

from bigjax.models.alexnet import AlexNet
from bigjax.pretrained.layout import Layout, Rule, conv, linear
from bigjax.pretrained.pretrained import Pretrained


def pretrained(model: AlexNet, path: str = '') -> Pretrained:
    """Returns how an AlexNet is kept elsewhere, with the file it starts from, if any."""
    layout = Layout(
        name='AlexNet of torchvision',
        rules=tuple(_rules()),
        config={'architecture': 'alexnet', 'num_classes': model.classes},
        fresh=r'^params/head/',
    )
    return Pretrained((layout,), path)


def _rules() -> Iterator[Rule]:
    for i, number in enumerate((0, 3, 6, 8, 10)):
        yield from conv(f'conv_{i}', f'features.{number}')
    # Theirs reads the last map channel by channel, ours pixel by pixel.
    yield Rule('params/hidden_0/kernel', 'classifier.1.weight', ((3,), (2, 0, 1)))
    yield Rule('params/hidden_0/bias', 'classifier.1.bias')
    yield from linear('hidden_1', 'classifier.4')
    yield from linear('head', 'classifier.6')
