"""A script for an environment with PyTorch: random models of other libraries, and their logits.

    python tests/pretrained/generate_parity.py FOLDER [CASE … minilm=FOLDER_OF_THE_MODEL]

Needs torch, transformers, timm and torchvision, which bigjax does not. Each case is a folder with
the weights as that library saves them and `case.npz`: inputs and logits in float32.
`python -m pytest tests/pretrained/test_parity.py --parity=FOLDER` compares.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch


def import_torchvision():
    """Returns torchvision, also where its build lacks compiled operators (no model needs them)."""
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith('torchvision')]:
            del sys.modules[name]
        backward = ('roi_align', 'roi_pool', 'ps_roi_align', 'ps_roi_pool', 'deform_conv2d')
        for name in ('nms', 'qnms', 'qroi_align', *backward, *(f'_{n}_backward' for n in backward)):
            torch.library.define(f'torchvision::{name}', '(Tensor x) -> Tensor')
        import torchvision
    return torchvision


torchvision = import_torchvision()

import timm  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

TEXT = {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2}
ENCODER = {**TEXT, 'intermediate_size': 24, 'vocab_size': 50, 'max_position_embeddings': 20}


def shake(model, draw):
    """Gives every weight a size at which it matters, and statistics that are not 0 and 1."""
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not value.is_floating_point() or name.endswith(
                ('inv_freq', 'embed_positions.weight')
            ):
                continue
            noise = torch.randn(value.shape, generator=draw)
            if name.endswith('running_var'):
                value.copy_(1 + 0.2 * noise.abs())
            elif value.ndim < 2:
                value.add_(0.1 * noise)
            elif 'position' not in name or value.ndim < 3:
                fan_in = value[0].numel()
                value.copy_(noise / fan_in**0.5)
            else:
                value.copy_(0.3 * noise)
    return model.eval()


def text(folder, model, draw, *, padded=False, pick=lambda output: output.logits, **more):
    """Saves a text model with logits for two rows of tokens, the second one padded."""
    shake(model, draw).save_pretrained(folder)
    tokens = torch.randint(5, 50, (2, 12), generator=draw)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, 9:] = 0
        tokens[1, 9:] = model.config.pad_token_id
    with torch.no_grad():
        output = model(tokens, attention_mask=mask, **more)
    values = pick(output)
    values = values if isinstance(values, dict) else {'logits': values}
    tokens = torch.where(mask > 0, tokens, -1).to(torch.int32)
    more = {name: value.numpy() for name, value in more.items()}
    np.savez(
        folder / 'case.npz', tokens=tokens, **more, **{k: v.numpy() for k, v in values.items()}
    )


def images(folder, model, draw, size, *, hugging_face=False):
    """Saves an image model with logits for two images."""
    shake(model, draw)
    x_BCHW = torch.randn((2, 3, size, size), generator=draw)
    if hugging_face:
        model.save_pretrained(folder)
    else:
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / 'model.safetensors', {'format': 'pt'})
    with torch.no_grad():
        logits = model(x_BCHW)
    logits = logits.logits if hugging_face else logits
    np.savez(folder / 'case.npz', images=x_BCHW.permute(0, 2, 3, 1).numpy(), logits=logits.numpy())


def gpt2(folder, draw):
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=20)
    text(folder, transformers.GPT2LMHeadModel(config), draw)


def llama(folder, draw):
    config = transformers.LlamaConfig(
        **TEXT | {'num_attention_heads': 4}, vocab_size=50, intermediate_size=24,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    text(folder, transformers.LlamaForCausalLM(config), draw)


def llama_tied(folder, draw):
    config = transformers.LlamaConfig(
        **TEXT, vocab_size=50, intermediate_size=24, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_theta=500000.0, max_position_embeddings=32,
    )  # fmt: skip
    text(folder, transformers.LlamaForCausalLM(config), draw)


def llama_scaled(folder, draw):
    scaling = {
        'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
        'original_max_position_embeddings': 16,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        **TEXT, vocab_size=50, intermediate_size=24, max_position_embeddings=64,
        rope_parameters={'rope_theta': 100.0, **scaling},
    )  # fmt: skip
    text(folder, transformers.LlamaForCausalLM(config), draw)


def marian(folder, draw):
    sides = {
        f'{side}_{key}': value
        for side in ('encoder', 'decoder')
        for key, value in (('layers', 2), ('attention_heads', 2), ('ffn_dim', 24))
    }
    config = transformers.MarianConfig(
        vocab_size=50, d_model=16, max_position_embeddings=20, pad_token_id=49, eos_token_id=0,
        decoder_start_token_id=49, forced_eos_token_id=0, activation_function='swish',
        scale_embedding=True, **sides,
    )  # fmt: skip
    decoder = torch.randint(1, 49, (2, 7), generator=draw)
    text(folder, transformers.MarianMTModel(config), draw, padded=True, decoder_input_ids=decoder)


def bert_pretraining(folder, draw):
    model = transformers.BertForPreTraining(transformers.BertConfig(**ENCODER))
    types = torch.tensor([[0] * 5 + [1] * 7] * 2)
    text(
        folder, model, draw, padded=True, token_type_ids=types,
        pick=lambda o: {'logits': o.prediction_logits, 'next': o.seq_relationship_logits},
    )  # fmt: skip


def bert_masked(folder, draw):
    text(folder, transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER)), draw)


def bert_sequence(folder, draw):
    config = transformers.BertConfig(**ENCODER, num_labels=3)
    text(folder, transformers.BertForSequenceClassification(config), draw, padded=True)


def bert_token(folder, draw):
    config = transformers.BertConfig(**ENCODER, num_labels=5)
    text(folder, transformers.BertForTokenClassification(config), draw, padded=True)


def bert_question(folder, draw):
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**ENCODER))
    text(
        folder, model, draw, padded=True,
        pick=lambda o: torch.stack([o.start_logits, o.end_logits], -1),
    )  # fmt: skip


def bert_encoder(folder, draw):
    model = transformers.BertModel(transformers.BertConfig(**ENCODER))
    text(folder, model, draw, padded=True, pick=lambda o: o.last_hidden_state)


def _roberta():
    return transformers.RobertaConfig(
        **ENCODER | {'max_position_embeddings': 22}, type_vocab_size=1, layer_norm_eps=1e-5,
        num_labels=3,
    )  # fmt: skip


def roberta_masked(folder, draw):
    text(folder, transformers.RobertaForMaskedLM(_roberta()), draw, padded=True)


def roberta_sequence(folder, draw):
    text(folder, transformers.RobertaForSequenceClassification(_roberta()), draw, padded=True)


def roberta_token(folder, draw):
    text(folder, transformers.RobertaForTokenClassification(_roberta()), draw, padded=True)


def vit(folder, draw):
    config = transformers.ViTConfig(
        **TEXT, intermediate_size=64, image_size=32, patch_size=8, layer_norm_eps=1e-6, num_labels=5
    )
    images(folder, transformers.ViTForImageClassification(config), draw, 32, hugging_face=True)


def vit_timm(folder, draw, **options):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, **options
    )
    images(folder, model, draw, 32)


def vit_timm_mean(folder, draw):
    vit_timm(folder, draw, class_token=False, global_pool='avg', fc_norm=False)


def resnet_basic(folder, draw):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2], layer_type='basic',
        num_labels=5,
    )  # fmt: skip
    images(folder, transformers.ResNetForImageClassification(config), draw, 64, hugging_face=True)


def resnet_bottleneck(folder, draw):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[3, 4, 6, 3], num_labels=5
    )
    images(folder, transformers.ResNetForImageClassification(config), draw, 64, hugging_face=True)


def resnet_torchvision(folder, draw):
    images(folder, torchvision.models.resnet18(num_classes=5), draw, 64)


def resnet_timm(folder, draw):
    images(folder, timm.create_model('resnet50', num_classes=5), draw, 64)


def vgg(folder, draw, batch_norm=False):
    widths = [8, 'M', 16, 'M', 32, 32, 'M', 64, 64, 'M', 64, 64, 'M']
    layers = torchvision.models.vgg.make_layers(widths, batch_norm=batch_norm)
    model = torchvision.models.VGG(layers, num_classes=5, init_weights=False)
    model.classifier[0] = torch.nn.Linear(64 * 49, 24)
    model.classifier[3] = torch.nn.Linear(24, 24)
    model.classifier[6] = torch.nn.Linear(24, 5)
    images(folder, model, draw, 64)


def vgg_norm(folder, draw):
    vgg(folder, draw, batch_norm=True)


def vgg_timm(folder, draw):
    images(folder, timm.create_model('vgg11', num_classes=5), draw, 224)


def alexnet(folder, draw):
    model, channels = torchvision.models.AlexNet(num_classes=5), 3
    for number in (0, 3, 6, 8, 10):
        old = model.features[number]
        model.features[number] = torch.nn.Conv2d(
            channels, old.out_channels // 8, old.kernel_size, old.stride, old.padding
        )
        channels = old.out_channels // 8
    model.classifier[1] = torch.nn.Linear(channels * 36, 24)
    model.classifier[4] = torch.nn.Linear(24, 24)
    model.classifier[6] = torch.nn.Linear(24, 5)
    images(folder, model, draw, 127)


def inception_v1(folder, draw):
    images(folder, torchvision.models.googlenet(num_classes=5, init_weights=False), draw, 96)


def inception_v3(folder, draw):
    images(folder, torchvision.models.inception_v3(num_classes=5, init_weights=False), draw, 107)


CASES = (
    gpt2, llama, llama_tied, llama_scaled, marian, bert_pretraining, bert_masked, bert_sequence,
    bert_token, bert_question, bert_encoder, roberta_masked, roberta_sequence, roberta_token, vit,
    vit_timm, vit_timm_mean, resnet_basic, resnet_bottleneck, resnet_torchvision, resnet_timm, vgg,
    vgg_norm, vgg_timm, alexnet, inception_v1, inception_v3,
)  # fmt: skip


def sentences(folder, source):
    """The sentence encoder in the folder `source`: its own weights, and pooled vectors."""
    model = transformers.AutoModel.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    texts = ['A cat sat on the mat.', 'Trained weights!', 'One step for everything is a claim.']
    x = tokenizer(texts, padding=True, return_tensors='pt')
    with torch.no_grad():
        hidden_BTC = model(**x).last_hidden_state
    real_BT1 = x['attention_mask'][..., None]
    pooled_BC = (hidden_BTC * real_BT1).sum(1) / real_BT1.sum(1)
    tokens = torch.where(x['attention_mask'] > 0, x['input_ids'], -1).to(torch.int32)
    arrays = {'tokens': tokens, 'logits': hidden_BTC, 'pooled': pooled_BC}
    np.savez(folder / 'case.npz', **{name: value.numpy() for name, value in arrays.items()})
    for name in ('config.json', 'model.safetensors'):
        shutil.copy(Path(source) / name, folder / name)


def main(folder, wanted):
    chosen = {case.__name__: case for case in CASES if not wanted or case.__name__ in wanted}
    for name in wanted:
        if name.startswith('minilm='):
            source = name.partition('=')[2]
            chosen['minilm'] = lambda target, draw, source=source: sentences(target, source)
    for name, case in chosen.items():
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        case(target, torch.Generator().manual_seed(0))
        print(target, flush=True)


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2:])
