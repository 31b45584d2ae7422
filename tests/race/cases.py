"""What is raced: experiments of ours with their knobs; and how a side answers for its times.

Imported by both sides: it may import neither JAX nor PyTorch.
"""

import sys
import time
from collections.abc import Callable

# Knobs that undo what an experiment's defaults shrink to small images.
_LARGE = {
    'dataset': 'digits',
    'num_classes': 1000,
    'image_size': 224,
    'width': 0,
    'label_smoothing': 0.0,
}

CASES = {
    'cnn': {'experiment': 'cnn', 'knobs': {'batch': 64, 'image_size': 28, 'ema': 0.0}},
    'cnn256': {'experiment': 'cnn', 'knobs': {'batch': 256, 'image_size': 28, 'ema': 0.0}},
    'resnet20': {'experiment': 'resnet', 'knobs': {'depth': 20, 'batch': 128, 'image_size': 28}},
    'resnet18': {'experiment': 'resnet', 'knobs': {'depth': 18, 'batch': 64, 'image_size': 32}},
    'resnet50': {'experiment': 'resnet', 'knobs': {**_LARGE, 'depth': 50, 'batch': 8}},
    'alexnet': {'experiment': 'alexnet', 'knobs': {**_LARGE, 'hidden': 0, 'batch': 16, 'ema': 0.0}},
    'vgg16': {
        'experiment': 'vgg',
        'knobs': {**_LARGE, 'hidden': 0, 'depth': 16, 'batch_norm': False, 'batch': 4},
    },
    'inception1': {'experiment': 'inception', 'knobs': {**_LARGE, 'version': 1, 'batch': 8}},
    'inception3': {
        'experiment': 'inception',
        'knobs': {**_LARGE, 'version': 3, 'image_size': 299, 'batch': 4},
    },
    'vit': {
        'experiment': 'vit',
        'knobs': {**_LARGE, 'variant': 'Ti/16', 'depth': 0, 'heads': 0, 'drop_path': 0.0,
                  'batch': 16, 'ema': 0.0},
    },
    'gpt': {'experiment': 'gpt_stdlib', 'knobs': {}},
    'gpt6': {
        'experiment': 'gpt_stdlib',
        'knobs': {'depth': 6, 'heads': 6, 'width': 384, 'seq': 256, 'batch': 8},
    },
    'llama': {
        'experiment': 'llama',
        'knobs': {'depth': 4, 'width': 128, 'heads': 4, 'kv_heads': 2, 'hidden': 512,
                  'tokenizer': 'bytes', 'vocab': 256, 'seq': 64, 'batch': 12},
    },
    'bert': {
        'experiment': 'bert',
        'knobs': {'size': 'mini', 'next_sentence': False, 'vocab': 4096, 'seq': 128, 'batch': 16},
    },
    'transformer': {
        'experiment': 'transformer_translation',
        'knobs': {'norm': 'post', 'activation': 'relu', 'dropout': 0.0, 'batch': 32,
                  'label_smoothing': 0.0},
    },
    'rnn_translation': {
        'experiment': 'rnn_translation',
        'knobs': {'dropout': 0.0, 'batch': 32, 'label_smoothing': 0.0},
    },
    'rnn_lm': {'experiment': 'rnn_lm', 'knobs': {'dropout': 0.0}},
    'lstm_classifier': {
        'experiment': 'lstm_classifier',
        'knobs': {'batch': 32, 'seq': 128, 'embed': 128, 'width': 128, 'depth': 2,
                  'direction': 'forward', 'pool': 'last', 'dropout': 0.0},
    },
}  # fmt: skip


def serve(step: Callable[[], None]) -> None:
    """Warms up, says 'ready', and answers each number with the times of that many steps, in ms."""
    for _ in range(3):
        step()
    print('ready', flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        print(*times, flush=True)
