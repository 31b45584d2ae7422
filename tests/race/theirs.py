"""The other side of a race: the same shapes in PyTorch, run in an environment of its own.

PYTHON tests/race/theirs.py CASE BATCH.npz
"""

import os
import sys

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from cases import CASES, serve
from torch import nn


def small_resnet(stages: tuple[int, ...], width: int, channels: int) -> nn.Module:
    """torchvision's basic blocks behind a 3×3 stem, as for small images."""
    from torchvision.models.resnet import BasicBlock

    layers = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            outputs, stride = width * 2**stage, 2 if stage and not block else 1
            shortcut = None
            if inputs != outputs:
                conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
            layers.append(BasicBlock(inputs, outputs, stride, shortcut))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def cnn() -> nn.Module:
    """The two-layer network of experiments/cnn.py."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(7 * 7 * 64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10),
    )  # fmt: skip


class LSTMClassifier(nn.Module):
    """Embedding, two layers of 128 units, the last state, a dense layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 128)
        self.lstm = nn.LSTM(128, 128, 2, batch_first=True)
        self.head = nn.Linear(128, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(tokens.clamp(min=0)))[1][0][-1])


def image_model(name: str, channels: int) -> nn.Module:
    """The published network, reading as many channels as the batch has."""
    if name in ('cnn', 'resnet20', 'resnet18'):
        return {
            'cnn': cnn,
            'resnet20': lambda: small_resnet((3, 3, 3), 16, channels),
            'resnet18': lambda: small_resnet((2, 2, 2, 2), 64, channels),
        }[name]()
    if name == 'vit':
        return timm.create_model('vit_tiny_patch16_224', in_chans=channels)
    models = torchvision.models
    net = {
        'resnet50': models.resnet50,
        'alexnet': models.alexnet,
        'vgg16': models.vgg16,
        'inception1': lambda: models.googlenet(aux_logits=True, init_weights=False),
        'inception3': lambda: models.inception_v3(aux_logits=True, init_weights=False),
    }[name]()
    for path, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):  # the first one reads the image
            first = nn.Conv2d(
                channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                bias=layer.bias is not None,
            )  # fmt: skip
            net.set_submodule(path, first)
            return net
    raise ValueError(name)


def gpt(vocab: int, length: int) -> nn.Module:
    """nanoGPT's smallest recipe, by transformers' GPT-2 without biases' cost counted apart."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab, n_positions=length, n_embd=128, n_layer=4, n_head=4,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip


def make_loss(name: str, batch: dict[str, np.ndarray]):
    """Returns the module and a function of no arguments that gives its loss on the batch."""
    label = torch.tensor(batch['label']).long() if 'label' in batch else None
    if 'image' in batch:
        image = (
            torch.tensor(batch['image'].astype(np.float32) / 255).permute(0, 3, 1, 2).contiguous()
        )
        net = image_model(name, image.shape[1])

        def loss() -> torch.Tensor:
            out = net(image)
            heads = out if isinstance(out, tuple) else (out,)
            return sum(
                w * F.cross_entropy(h, label) for w, h in zip((1, 0.3, 0.3), heads, strict=False)
            )

        return net, loss
    tokens = torch.tensor(batch['tokens']).long()
    if name == 'gpt':
        net = gpt(256, tokens.shape[1] - 1)

        def loss() -> torch.Tensor:
            logits = net(tokens[:, :-1]).logits
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        return net, loss
    net = LSTMClassifier(int(label.max()) + 1)
    return net, lambda: F.cross_entropy(net(tokens), label)


def main(name: str, path: str) -> None:
    """Builds the case's network and serves its train step."""
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    net, loss = make_loss(name, dict(np.load(path)))
    sgd = name.startswith(('resnet', 'vgg', 'inception'))
    assert name in CASES
    if sgd:
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        value.item()

    serve(step)


if __name__ == '__main__':
    main(*sys.argv[1:])
