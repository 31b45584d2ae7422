"""Inception v1 and v3 as torchvision keeps them (`googlenet`, `inception_v3`); v3 also timm."""

from collections.abc import Iterator

from bigjax.models.inception import Inception
from bigjax.pretrained.layout import Layout, Rule, batch_norm, conv, linear
from bigjax.pretrained.pretrained import Pretrained

# Names of the convolutions of each branch, in the order of bigjax.models.inception_tables.
_A = (
    ('branch1x1',),
    ('branch5x5_1', 'branch5x5_2'),
    ('branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3'),
    ('branch_pool',),
)
_B = (('branch3x3',), ('branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3'))
_C = (
    ('branch1x1',),
    tuple(f'branch7x7_{n}' for n in range(1, 4)),
    tuple(f'branch7x7dbl_{n}' for n in range(1, 6)),
    ('branch_pool',),
)
_D = (('branch3x3_1', 'branch3x3_2'), tuple(f'branch7x7x3_{n}' for n in range(1, 5)))
_E = (
    ('branch1x1',),
    ('branch3x3_1', 'branch3x3_2a', 'branch3x3_2b'),
    ('branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3a', 'branch3x3dbl_3b'),
    ('branch_pool',),
)
_V1 = (('branch1',), ('branch2.0', 'branch2.1'), ('branch3.0', 'branch3.1'), ('branch4.1',))

# (what a block is called, its branches), by stage
_STAGES = {
    1: (
        tuple((f'inception3{letter}', _V1) for letter in 'ab'),
        tuple((f'inception4{letter}', _V1) for letter in 'abcde'),
        tuple((f'inception5{letter}', _V1) for letter in 'ab'),
    ),
    3: (
        tuple((f'Mixed_5{letter}', _A) for letter in 'bcd'),
        (('Mixed_6a', _B), *((f'Mixed_6{letter}', _C) for letter in 'bcde')),
        (('Mixed_7a', _D), ('Mixed_7b', _E), ('Mixed_7c', _E)),
    ),
}
_STEMS = {
    1: ('conv1', 'conv2', 'conv3'),
    3: ('Conv2d_1a_3x3', 'Conv2d_2a_3x3', 'Conv2d_2b_3x3', 'Conv2d_3b_1x1', 'Conv2d_4a_3x3'),
}
_NAMES = {1: 'googlenet', 3: 'inception_v3'}


def pretrained(model: Inception, path: str = '') -> Pretrained:
    """Returns how an Inception network is kept elsewhere, with the file it starts from, if any."""
    layout = Layout(
        name=f'Inception v{model.version} of torchvision',
        rules=tuple(_rules(model.version)),
        config={'architecture': _NAMES[model.version], 'num_classes': model.classes},
        # Many files come without auxiliary heads, which only training needs.
        fresh=r'^params/head/|/auxiliary_\d/',
        unused=r'^(aux\d|AuxLogits)\.',
    )
    return Pretrained((layout,), path)


def _rules(version: int) -> Iterator[Rule]:
    for i, name in enumerate(_STEMS[version]):
        yield from _step('stem_', i, name)
    for s, stage in enumerate(_STAGES[version]):
        for b, (block, branches) in enumerate(stage):
            for n, names in enumerate(branches):
                for i, name in enumerate(names):
                    yield from _step(f'stage_{s}_block_{b}/branch_{n}_', i, f'{block}.{name}')
    if version == 1:
        for n in range(2):
            ours, theirs = f'auxiliary_{n}', f'aux{n + 1}'
            yield from _step(f'{ours}/', 0, f'{theirs}.conv')
            # Theirs reads the map channel by channel, ours pixel by pixel.
            yield Rule(f'params/{ours}/hidden/kernel', f'{theirs}.fc1.weight', ((3,), (2, 0, 1)))
            yield Rule(f'params/{ours}/hidden/bias', f'{theirs}.fc1.bias')
            yield from linear(f'{ours}/head', f'{theirs}.fc2')
    else:
        yield from _step('auxiliary_0/', 0, 'AuxLogits.conv0')
        yield from _step('auxiliary_0/', 1, 'AuxLogits.conv1')
        yield from linear('auxiliary_0/head', 'AuxLogits.fc')
    yield from linear('head', 'fc')


def _step(ours: str, number: int, theirs: str) -> Iterator[Rule]:
    yield from conv(f'{ours}conv_{number}', f'{theirs}.conv')
    yield from batch_norm(f'{ours}norm_{number}', f'{theirs}.bn')
