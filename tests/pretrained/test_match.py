"""What does not fit is named leaf by leaf; what may start at random does, and this is said."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_families import ENCODER, FAMILIES, leaves

from bigjax.models.bert_heads import SequenceClassifier
from bigjax.run import UsageError


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gpt2')
    FAMILIES['gpt2'].save(folder, FAMILIES['gpt2'].random())
    return folder


def changed(source, folder, change, **config):
    """Copies a folder with its tensors and config.json changed."""
    folder.mkdir()
    tensors = load_file(source / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')
    old = json.loads((source / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**old, **config}))
    return folder


def refusal(tiny, path):
    with pytest.raises(UsageError) as error:
        tiny.load(path)
    return str(error.value)


def test_leaves_that_do_not_fit_are_named(gpt2, tmp_path):
    def change(tensors):
        del tensors['transformer.h.0.ln_1.bias']
        tensors['transformer.h.0.extra'] = np.zeros(1, np.float32)
        tensors['transformer.h.1.mlp.c_fc.bias'] = np.zeros(3, np.float32)
        tensors['transformer.h.1.ln_2.weight'] = np.zeros(16, np.int8)

    folder = changed(gpt2, tmp_path / 'damaged', change)
    assert refusal(FAMILIES['gpt2'], folder) == (
        f'--pretrained={folder}: does not fit this GPT-2 of Hugging Face:\n'
        '  missing: params/block_0/attention_norm/bias: transformer.h.0.ln_1.bias is not there\n'
        '  shape: params/block_1/mlp/up/bias: transformer.h.1.mlp.c_fc.bias is (3,) there, '
        '(64,) here\n'
        '  type: params/block_1/mlp_norm/scale: transformer.h.1.ln_2.weight is I8\n'
        '  unexpected: transformer.h.0.extra\n'
        'try --depth=2 --heads=4 --width=16 --vocab=32'
    )


def test_another_architecture_is_told_with_flags_that_fit(gpt2):
    tiny = FAMILIES['gpt2']
    deeper = tiny._replace(model=tiny.model.clone(depth=3, heads=2))
    message = refusal(deeper, gpt2)
    assert '  config.json: n_layer is 2 there, 3 here\n' in message
    assert '  config.json: n_head is 4 there, 2 here\n' in message
    assert '  missing: params/block_2/mlp/up/bias: transformer.h.2.mlp.c_fc.bias is ' in message
    assert message.endswith('\ntry --depth=2 --heads=4 --width=16 --vocab=32')
    fits = dict(re.findall(r'--(\w+)=(\d+)', message.splitlines()[-1]))
    assert fits.pop('vocab') == '32'
    fitting = tiny.model.clone(**{name: int(value) for name, value in fits.items()})
    tiny._replace(model=fitting).load(gpt2)


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'marian', 'bert', 'vit', 'resnet', 'resnet_50'])
def test_the_flags_that_are_offered_are_those_of_the_model(name, tmp_path):
    tiny = FAMILIES[name]
    layout = tiny.pretrained(tiny.model).layouts[0]
    for knob, value in layout.arguments(json.loads(json.dumps(layout.config))).items():
        if knob not in ('factor', 'variant', 'vocab'):
            assert getattr(tiny.model, knob) == value


def test_defaults_of_the_other_library_count_where_config_json_is_silent(gpt2, tmp_path):
    folder = changed(gpt2, tmp_path / 'silent', lambda tensors: None)
    config = json.loads((folder / 'config.json').read_text())
    for key in ('activation_function', 'layer_norm_epsilon', 'n_inner'):
        del config[key]
    (folder / 'config.json').write_text(json.dumps(config))
    FAMILIES['gpt2'].load(folder)
    del config['n_layer']  # 12, by default
    (folder / 'config.json').write_text(json.dumps(config))
    assert 'n_layer is 12 there, 2 here' in refusal(FAMILIES['gpt2'], folder)


@pytest.mark.parametrize(
    ('key', 'value'), [('activation_function', 'relu'), ('scale_attn_by_inverse_layer_idx', True)]
)
def test_another_function_of_the_same_shapes_is_refused(key, value, gpt2, tmp_path):
    folder = changed(gpt2, tmp_path / key, lambda tensors: None, **{key: value})
    assert f'config.json: {key} is {value} there' in refusal(FAMILIES['gpt2'], folder)


def test_another_family_is_refused(gpt2, tmp_path):
    file = tmp_path / 'other.safetensors'
    save_file({'something.weight': np.zeros(1, np.float32)}, file)
    message = refusal(FAMILIES['gpt2'], file)
    assert message == (
        f'--pretrained={file}: holds no tensor of GPT-2 of Hugging Face: it has something.weight, '
        'where transformer.h.0.attn.c_attn.bias, transformer.h.0.attn.c_attn.weight, '
        'transformer.h.0.attn.c_proj.bias, … are looked for; give a folder or file of this family'
    )
    assert 'config.json: model_type is gpt2 there, bert here' in refusal(
        FAMILIES['bert'], changed_to_bert(gpt2, tmp_path)
    )


def changed_to_bert(gpt2, tmp_path):
    def change(tensors):
        tensors['bert.embeddings.LayerNorm.weight'] = np.zeros(16, np.float32)

    return changed(gpt2, tmp_path / 'mixed', change)


def test_a_head_of_other_classes_starts_at_random_and_this_is_said(tmp_path, capsys):
    three = FAMILIES['bert_sequence']
    three.save(tmp_path / 'three', three.random())
    five = three._replace(model=SequenceClassifier(ENCODER, 5))
    loaded = five.load(tmp_path / 'three')
    assert set(leaves(five.abstract())) - set(loaded) == {
        'params/classifier/kernel',
        'params/classifier/bias',
    }
    said = capsys.readouterr().err
    assert (
        '\n  params/classifier/kernel starts at random: classifier.weight is (3, 16) there, '
        '(5, 16) here\n'
    ) in said
    # Another head altogether: theirs is left out, and that is said.
    masked = FAMILIES['bert_masked']
    masked.save(tmp_path / 'masked', masked.random())
    loaded = three.load(tmp_path / 'masked')
    assert 'params/pooler/kernel' in loaded
    assert 'params/classifier/kernel' not in loaded
    assert '\n  not used: cls.predictions.bias, ' in capsys.readouterr().err


def test_images_of_other_classes(tmp_path):
    tiny = FAMILIES['resnet']
    tiny.save(tmp_path / 'four', tiny.random())
    loaded = tiny._replace(model=tiny.model.clone(classes=7)).load(tmp_path / 'four')
    assert not any('head' in path for path in loaded)
    assert 'batch_stats/stem_norm/var' in loaded


def test_fewer_positions_than_there_are_take_the_first(gpt2, capsys):
    tiny = FAMILIES['gpt2']
    loaded = tiny._replace(model=tiny.model.clone(context_length=5)).load(gpt2)
    expected = tiny.random()['params']['position'][:5]
    assert np.array_equal(loaded['params/position'], expected)
    assert '\n  params/position: the first 5 of 8 rows\n' in capsys.readouterr().err
    longer = tiny._replace(model=tiny.model.clone(context_length=9))
    assert 'transformer.wpe.weight is (8, 16) there, (9, 16) here' in refusal(longer, gpt2)


def test_names_of_older_files_and_of_models_without_their_head(tmp_path):
    tiny = FAMILIES['bert']
    variables = tiny.random()
    tiny.save(tmp_path / 'new', variables)

    def change(tensors):
        for name in list(tensors):
            old = name.removeprefix('bert.').replace('LayerNorm.weight', 'LayerNorm.gamma')
            tensors[old.replace('LayerNorm.bias', 'LayerNorm.beta')] = tensors.pop(name)
        tensors['embeddings.position_ids'] = np.arange(12)[None]

    loaded = tiny.load(changed(tmp_path / 'new', tmp_path / 'old', change))
    for path, value in leaves(variables).items():
        assert jnp.array_equal(loaded[path], value), path


def test_llamas_rotation_as_both_versions_write_it(tmp_path):
    tiny = FAMILIES['llama']
    tiny.save(tmp_path / 'four', tiny.random())
    config = json.loads((tmp_path / 'four' / 'config.json').read_text())
    theta = config.pop('rope_theta')
    del config['rope_scaling'], config['head_dim']
    for rope, fits in (
        ({'rope_theta': theta, 'rope_type': 'default'}, True),
        ({'rope_theta': theta, 'rope_type': 'llama3', 'factor': 8.0}, False),
        ({'rope_theta': 1.0, 'rope_type': 'default'}, False),
    ):
        (tmp_path / 'four' / 'config.json').write_text(
            json.dumps(config | {'rope_parameters': rope})
        )
        if fits:
            tiny.load(tmp_path / 'four')
        else:
            assert 'config.json: rope_' in refusal(tiny, tmp_path / 'four')
