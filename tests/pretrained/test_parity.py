"""Logits equal those of transformers, timm and torchvision on random weights.

Needs a folder that `generate_parity.py` wrote in an environment with PyTorch: --parity=FOLDER.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.models.alexnet import AlexNet
from bigjax.models.bert import BERT
from bigjax.models.bert_heads import MaskedLM, SequenceClassifier, TokenClassifier, mean_pool
from bigjax.models.gpt import GPT
from bigjax.models.inception import Inception
from bigjax.models.llama import Llama
from bigjax.models.resnet import ResNet
from bigjax.models.transformer import Transformer
from bigjax.models.vgg import VGG
from bigjax.models.vit import ViT
from bigjax.nn.rotary import RotaryScaling
from bigjax.pretrained import alexnet, bert, gpt2, inception, llama, marian, resnet, vgg, vit
from bigjax.pretrained.files import open_weights
from bigjax.state import replaced


class Case(NamedTuple):
    """A model that must give the logits of a folder.

    Attributes:
      family: module with `pretrained`, and `arguments` where a config.json tells the sizes.
      make: its sizes -> model.
      run: (bound model, arrays of case.npz) -> {name: array}.
    """

    family: Any
    make: Any
    run: Any = lambda model, x: {'logits': model(x['images'], train=False)}


def encoder(**sizes):
    shared = {'vocab_size': 50, 'positions': 20, 'dropout': 0.0}
    return BERT(**shared | sizes)


def roberta(**sizes):
    return encoder(types=1, first_position=2, epsilon=1e-5, **sizes)


def tokens(model, x):
    logits = model(x['tokens'])
    return {'logits': logits}


def sentences(model, x):
    hidden_BTC = model(x['tokens'])
    return {'logits': hidden_BTC, 'pooled': mean_pool(hidden_BTC, x['tokens'])}


def scaled_llama(factor, **sizes):
    scaling = RotaryScaling(factor, original=16)
    return Llama(50, 64, tied=False, epsilon=1e-6, scaling=scaling, **sizes)


def pretraining(model, x):
    logits, following = model(x['tokens'], None, x['token_type_ids'])
    return {'logits': logits, 'next': following}


CASES = {
    'gpt2': Case(gpt2, lambda **s: GPT(50, 20, bias=True, **s), tokens),
    'llama': Case(llama, lambda factor, **s: Llama(50, 32, tied=False, epsilon=1e-6, **s), tokens),
    'llama_tied': Case(llama, lambda factor, **s: Llama(50, 32, tied=True, **s), tokens),
    'llama_scaled': Case(llama, scaled_llama, tokens),
    'marian': Case(
        marian,
        lambda **s: Transformer(50, logits_bias=True, **s),
        lambda m, x: {'logits': m(x['tokens'], x['decoder_input_ids'])},
    ),
    'bert_pretraining': Case(bert, lambda **s: MaskedLM(encoder(**s), True), pretraining),
    'bert_masked': Case(
        bert, lambda **s: MaskedLM(encoder(**s)), lambda m, x: {'logits': m(x['tokens'])[0]}
    ),
    'bert_sequence': Case(bert, lambda **s: SequenceClassifier(encoder(**s), 3), tokens),
    'bert_token': Case(bert, lambda **s: TokenClassifier(encoder(**s), 5), tokens),
    'bert_question': Case(bert, lambda **s: TokenClassifier(encoder(**s), 2, 'span'), tokens),
    'bert_encoder': Case(bert, encoder, tokens),
    'minilm': Case(bert, lambda **s: BERT(30_522, **s), sentences),
    'roberta_masked': Case(
        bert, lambda **s: MaskedLM(roberta(**s)), lambda m, x: {'logits': m(x['tokens'])[0]}
    ),
    'roberta_sequence': Case(bert, lambda **s: SequenceClassifier(roberta(**s), 3), tokens),
    'roberta_token': Case(bert, lambda **s: TokenClassifier(roberta(**s), 3), tokens),
    'vit': Case(vit, lambda **s: ViT(5, **s)),
    'vit_timm': Case(vit, lambda: ViT(5, 'Ti/8', depth=2, heads=2, width=16)),
    'vit_timm_mean': Case(vit, lambda: ViT(5, 'Ti/8', depth=2, heads=2, width=16, pool='mean')),
    'resnet_basic': Case(resnet, lambda **s: ResNet(5, **s)),
    'resnet_bottleneck': Case(resnet, lambda **s: ResNet(5, **s)),
    'resnet_torchvision': Case(resnet, lambda: ResNet(5, 18)),
    'resnet_timm': Case(resnet, lambda: ResNet(5, 50)),
    'vgg': Case(vgg, lambda: VGG(5, 11, width=8, hidden=24)),
    'vgg_norm': Case(vgg, lambda: VGG(5, 11, True, width=8, hidden=24)),
    'vgg_timm': Case(vgg, lambda: VGG(5, 11)),
    'alexnet': Case(alexnet, lambda: AlexNet(5, width=8, hidden=24)),
    'inception_v1': Case(inception, lambda: Inception(5, 1)),
    'inception_v3': Case(inception, lambda: Inception(5, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_logits_equal_the_references(name, parity: Path):
    case, folder = CASES[name], parity / name
    if not folder.exists():
        pytest.skip(f'{folder} is not there: generate_parity.py wrote none')
    config = open_weights(str(folder)).config if (folder / 'config.json').exists() else {}
    model = case.make(**(case.family.arguments(config) if config else {}))
    source = folder if config else folder / 'model.safetensors'
    arrays = {key: jnp.asarray(value) for key, value in np.load(folder / 'case.npz').items()}

    def run(variables):
        return case.run(model.bind(variables), arrays)

    def init():
        if 'images' in arrays:
            return model.init(jax.random.key(0), arrays['images'], train=False)
        inputs = [arrays[key] for key in ('tokens', 'decoder_input_ids') if key in arrays]
        return model.init(jax.random.key(0), *inputs)

    abstract = jax.eval_shape(init)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = case.family.pretrained(model, str(source)).load(
        abstract, jax.tree.map(lambda _: here, abstract)
    )
    found = jax.jit(run)(replaced(abstract, loaded))
    for key, ours in found.items():
        theirs, ours = np.asarray(arrays[key]), np.asarray(ours)
        if theirs.ndim == 3 and 'decoder_input_ids' not in arrays:
            real_BT = np.asarray(arrays['tokens']) >= 0
            theirs, ours = theirs[real_BT], ours[real_BT]
        error = np.abs(ours - theirs).max()
        print(f'\n{name} {key}: {error:.2g} absolute, {error / np.abs(theirs).max():.2g} relative')
        assert error <= 1e-4
        assert error <= 1e-5 * np.abs(theirs).max()
