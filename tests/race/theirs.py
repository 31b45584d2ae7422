"""The other side of a race: the same shapes in PyTorch, run in an environment of its own.

PYTHON tests/race/theirs.py CASE BATCH.npz
"""

import os
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from cases import serve
from torch import nn

# Ours clips the gradient in every other case that AdamW trains.
UNCLIPPED = ('cnn', 'cnn256', 'alexnet')
# torchvision built for another torch lacks its compiled operators, which no classifier calls; but
# it does not import without these.
LIBRARY = torch.library.Library('torchvision', 'FRAGMENT')
for operator in ('nms', 'qnms'):
    LIBRARY.define(f'{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor')


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
    if name in ('cnn', 'cnn256', 'resnet20', 'resnet18'):
        return {
            'cnn': cnn,
            'cnn256': cnn,
            'resnet20': lambda: small_resnet((3, 3, 3), 16, channels),
            'resnet18': lambda: small_resnet((2, 2, 2, 2), 64, channels),
        }[name]()
    import timm
    import torchvision

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


class Block(nn.Module):
    """One layer of nanoGPT, without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        split = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """nanoGPT (github.com/karpathy/nanoGPT) over bytes: the embedding is the output layer, too."""

    def __init__(self, length: int, depth: int, heads: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.embed(tokens) + self.position)
        return self.norm(x) @ self.embed.weight.T


def causal(name: str, length: int) -> nn.Module:
    """nanoGPT at two sizes, Llama by transformers, and a recurrent model."""
    if name == 'rnn_lm':
        return RecurrentLM()
    if name == 'gpt':
        return GPT(length, depth=4, heads=4, width=128)
    if name == 'gpt6':
        return GPT(length, depth=6, heads=6, width=384)
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {'hidden_size': 128, 'intermediate_size': 512, 'num_hidden_layers': 4}
    heads = {'num_attention_heads': 4, 'num_key_value_heads': 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, use_cache=False, **shape, **heads))


class RecurrentLM(nn.Module):
    """Embedding and one layer of 256 units over bytes, as experiments/rnn_lm.py has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 256)
        self.lstm = nn.LSTM(256, 256, 1, batch_first=True)
        self.head = nn.Linear(256, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


class RecurrentTranslation(nn.Module):
    """experiments/rnn_translation.py: a GRU that reads both ways, one that attends as it writes."""

    def __init__(self, vocab: int, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.encoder = nn.GRU(width, width, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(2 * width, width)
        self.query = nn.Linear(width, width, bias=False)
        self.memory = nn.Linear(2 * width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)
        self.cell = nn.GRUCell(3 * width, width)
        self.readout = nn.Linear(4 * width, width)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, source: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        real = source >= 0
        lengths = real.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(source.clamp(min=0)), lengths, batch_first=True, enforce_sorted=False
        )
        packed, last = self.encoder(packed)
        values, _ = nn.utils.rnn.pad_packed_sequence(
            packed, batch_first=True, total_length=source.shape[1]
        )
        keys, y = self.memory(values), self.embed(before)
        state = torch.tanh(self.bridge(torch.cat((last[0], last[1]), 1)))
        read = []
        for y_t in y.unbind(1):
            scores = self.score(torch.tanh(self.query(state)[:, None] + keys))[..., 0]
            weights = scores.masked_fill(~real, -1e30).softmax(1)
            context = torch.bmm(weights[:, None], values)[:, 0]
            state = self.cell(torch.cat((y_t, context), 1), state)
            read.append(torch.cat((state, context, y_t), 1))
        read = torch.tanh(self.readout(torch.stack(read, 1)))
        return F.linear(read, self.embed.weight, self.bias)


def bert_loss(batch: dict[str, torch.Tensor]) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """BERT's "mini" shape; like ours it looks for the masked tokens' logits alone."""
    from transformers import BertConfig, BertForMaskedLM

    shape = {'hidden_size': 256, 'num_hidden_layers': 4, 'num_attention_heads': 4}
    none = {'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}
    net = BertForMaskedLM(BertConfig(vocab_size=4096, intermediate_size=1024, **shape, **none))
    tokens, where, targets = batch['tokens'], batch['positions'], batch['targets']

    def loss() -> torch.Tensor:
        real = tokens >= 0
        hidden = net.bert(tokens.clamp(min=0), attention_mask=real.long()).last_hidden_state
        index = where.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        logits = net.cls(hidden.gather(1, index))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    return net, loss


def translation_loss(
    name: str, batch: dict[str, torch.Tensor]
) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Our "small" sizes: the recurrent one, or transformers' Marian."""
    source, target = batch['source'], batch['target']
    before = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1].clamp(min=0)], 1)
    vocab = 3002  # with the tokens that begin and end a text
    if name == 'rnn_translation':
        net = RecurrentTranslation(vocab)

        def loss() -> torch.Tensor:
            out = net(source, before)
            return F.cross_entropy(out.flatten(0, 1), target.flatten(), ignore_index=-1)

        return net, loss
    from transformers import MarianConfig, MarianMTModel

    sides = {
        f'{side}_{name}': value
        for side in ('encoder', 'decoder')
        for name, value in (('layers', 2), ('attention_heads', 4), ('ffn_dim', 512))
    }
    config = MarianConfig(
        vocab_size=vocab, d_model=128, dropout=0.0, activation_function='relu', use_cache=False,
        max_position_embeddings=source.shape[1], scale_embedding=True, pad_token_id=0, **sides,
    )  # fmt: skip
    marian = MarianMTModel(config)

    def marian_loss() -> torch.Tensor:
        mask = (source >= 0).long()
        out = marian(source.clamp(min=0), attention_mask=mask, decoder_input_ids=before)
        return F.cross_entropy(out.logits.flatten(0, 1), target.flatten(), ignore_index=-1)

    return marian, marian_loss


def image_loss(name: str, batch: dict[str, torch.Tensor]) -> tuple[nn.Module, Callable]:
    """A classifier; auxiliary heads count 0.3, as in ours."""
    image = (batch['image'].permute(0, 3, 1, 2).float() / 255).contiguous()
    net, label = image_model(name, image.shape[1]), batch['label']

    def loss() -> torch.Tensor:
        out = net(image)
        heads = out if isinstance(out, tuple) else (out,)
        pairs = zip((1, 0.3, 0.3), heads, strict=False)
        return sum(weight * F.cross_entropy(head, label) for weight, head in pairs)

    return net, loss


def make_loss(name: str, batch: dict[str, torch.Tensor]) -> tuple[nn.Module, Callable]:
    """Returns the module and a function of no arguments that gives its loss on the batch."""
    if 'image' in batch:
        return image_loss(name, batch)
    if name == 'bert':
        return bert_loss(batch)
    if 'source' in batch:
        return translation_loss(name, batch)
    tokens = batch['tokens']
    if name == 'lstm_classifier':
        classifier, label = LSTMClassifier(int(batch['label'].max()) + 1), batch['label']
        return classifier, lambda: F.cross_entropy(classifier(tokens), label)
    net = causal(name, tokens.shape[1] - 1)

    def loss() -> torch.Tensor:
        out = net(tokens[:, :-1])
        logits = getattr(out, 'logits', out)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return net, loss


def main(name: str, path: str) -> None:
    """Builds the case's network and serves its train step."""
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    arrays = {key: torch.tensor(value) for key, value in np.load(path).items()}
    batch = {k: v if k == 'image' or v.is_floating_point() else v.long() for k, v in arrays.items()}
    net, loss = make_loss(name, batch)
    sgd = name.startswith(('resnet', 'vgg', 'inception'))
    if sgd:
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        if not (sgd or name in UNCLIPPED):
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        value.item()

    serve(step)


if __name__ == '__main__':
    main(*sys.argv[1:])
