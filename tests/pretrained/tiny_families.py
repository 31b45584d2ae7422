"""A tiny model of every importable family, with random variables that no program computes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigjax.models import alexnet, bert, gpt, inception, llama, resnet, transformer, vgg, vit
from bigjax.models.bert_heads import MaskedLM, SequenceClassifier, TokenClassifier
from bigjax.pretrained import alexnet as alexnet_weights
from bigjax.pretrained import bert as bert_weights
from bigjax.pretrained import gpt2 as gpt2_weights
from bigjax.pretrained import inception as inception_weights
from bigjax.pretrained import llama as llama_weights
from bigjax.pretrained import marian as marian_weights
from bigjax.pretrained import resnet as resnet_weights
from bigjax.pretrained import vgg as vgg_weights
from bigjax.pretrained import vit as vit_weights
from bigjax.sharding import make_mesh, path_string, state_shardings
from bigjax.state import TrainState

SIZES = {'depth': 2, 'heads': 4, 'width': 16}
ENCODER = bert.BERT(32, 12, hidden=24, dropout=0.0, **SIZES)
ROBERTA = ENCODER.clone(first_position=2, types=1, epsilon=1e-5)
VIT = vit.ViT(4, 'Ti/4', **SIZES)


class Tiny(NamedTuple):
    """A model, where its weights come from, its rules, and the inputs of its init.

    Attributes:
      model: the Linen module.
      pretrained: (model, path) -> Pretrained.
      rules: sharding rules.
      images: side of the images that it reads; 0: tokens.
      sides: how many inputs of tokens it has.
    """

    model: Any
    pretrained: Any
    rules: Any
    images: int = 0
    sides: int = 1

    @functools.cache  # noqa: B019  (a few tuples, for as long as the tests run)
    def abstract(self) -> dict[str, Any]:
        """Returns shapes and dtypes of all variables."""
        key = jax.random.key(0)
        if self.images:
            x = jnp.zeros((1, self.images, self.images, 3))
            return jax.eval_shape(lambda: self.model.init(key, x, train=False))
        tokens = [jnp.zeros((1, 4), jnp.int32)] * self.sides
        return jax.eval_shape(lambda: self.model.init(key, *tokens))

    def random(self, seed: int = 0) -> dict[str, Any]:
        """Returns variables that are all different."""
        draw = np.random.default_rng(seed)
        make = lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype)  # noqa: E731
        return jax.tree.map(make, self.abstract())

    def shardings(self, mesh: str) -> dict[str, Any]:
        """Returns where the variables live on a mesh of the eight devices."""
        variables = dict(self.abstract())
        state = TrainState(jnp.zeros(()), variables.pop('params'), (), variables)
        placed = state_shardings(state, self.rules, make_mesh(mesh))
        return {'params': placed.params, **placed.extra}

    def load(self, path: Any, mesh: str = 'data=8') -> dict[str, jax.Array]:
        """Returns {path: array} of what a folder or file gives."""
        shardings = self.shardings(mesh)
        return self.pretrained(self.model, str(path)).load(self.abstract(), shardings)

    def save(self, folder: Any, variables: Any, max_bytes: int = 10**9) -> None:
        """Writes variables into a folder."""
        self.pretrained(self.model).save(folder, variables, max_bytes)


def leaves(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf}."""
    return {path_string(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def of_bert(model: Any) -> Tiny:
    return Tiny(model, bert_weights.pretrained, bert.RULES)


FAMILIES = {
    'gpt2': Tiny(gpt.GPT(32, 8, bias=True, **SIZES), gpt2_weights.pretrained, gpt.RULES),
    'llama': Tiny(
        llama.Llama(32, 8, kv_heads=2, hidden=24, tied=False, **SIZES),
        llama_weights.pretrained,
        llama.RULES,
    ),
    'llama_tied': Tiny(
        llama.Llama(32, 8, kv_heads=2, hidden=24, **SIZES), llama_weights.pretrained, llama.RULES
    ),
    'marian': Tiny(
        transformer.Transformer(32, hidden=24, logits_bias=True, **SIZES),
        marian_weights.pretrained,
        transformer.RULES,
        sides=2,
    ),
    'bert': of_bert(ENCODER),
    'bert_masked': of_bert(MaskedLM(ENCODER, next_sentence=True)),
    'bert_sequence': of_bert(SequenceClassifier(ENCODER, 3)),
    'bert_mean': of_bert(SequenceClassifier(ENCODER, 3, 'mean')),
    'bert_token': of_bert(TokenClassifier(ENCODER, 3)),
    'bert_span': of_bert(TokenClassifier(ENCODER, 2, 'span')),
    'roberta_masked': of_bert(MaskedLM(ROBERTA)),
    'roberta_sequence': of_bert(SequenceClassifier(ROBERTA, 3)),
    'vit': Tiny(VIT, vit_weights.pretrained, vit.RULES, 8),
    'resnet': Tiny(resnet.ResNet(4, 18, 8), resnet_weights.pretrained, resnet.RULES, 32),
    'resnet_50': Tiny(resnet.ResNet(4, 50, 8), resnet_weights.pretrained, resnet.RULES, 32),
    'resnet_small': Tiny(
        resnet.ResNet(4, 20, 8, small_stem=True), resnet_weights.pretrained, resnet.RULES, 8
    ),
    'vgg': Tiny(vgg.VGG(4, 11, width=8, hidden=16), vgg_weights.pretrained, vgg.RULES, 32),
    'vgg_norm': Tiny(
        vgg.VGG(4, 13, True, width=8, hidden=16), vgg_weights.pretrained, vgg.RULES, 32
    ),
    'alexnet': Tiny(
        alexnet.AlexNet(4, width=8, hidden=16), alexnet_weights.pretrained, alexnet.RULES, 63
    ),
    'inception_v1': Tiny(
        inception.Inception(4, 1, 16), inception_weights.pretrained, inception.RULES, 32
    ),
    'inception_v3': Tiny(
        inception.Inception(4, 3, 16), inception_weights.pretrained, inception.RULES, 75
    ),
}
SCANNED = {
    name: tiny._replace(model=clone)
    for name, tiny, clone in (
        ('gpt2', FAMILIES['gpt2'], FAMILIES['gpt2'].model.clone(scan=True)),
        ('llama', FAMILIES['llama'], FAMILIES['llama'].model.clone(scan=True)),
        ('marian', FAMILIES['marian'], FAMILIES['marian'].model.clone(scan=True)),
        ('bert_masked', FAMILIES['bert_masked'], MaskedLM(ENCODER.clone(scan=True), True)),
        ('vit', FAMILIES['vit'], VIT.clone(scan=True)),
    )
}
