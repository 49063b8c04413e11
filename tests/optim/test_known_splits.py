"""How known models are split: their structure in plain torch, with two blocks."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lit_fanions import split_parameters

WIDTH, HIDDEN, WORDS, LABELS = 16, 40, 50, 3


def net(**layers: nn.Module) -> nn.Module:
    """Modules by their paths; __ stands for a dot, {} for the number of each of two blocks."""
    root = nn.Module()
    for path, layer in layers.items():
        copies = 2 if "{}" in path else 1
        for i in range(copies):
            *parents, leaf = path.format(i).split("__")
            at = root
            for parent in parents:
                if not hasattr(at, parent):
                    at.add_module(parent, nn.Module())
                at = getattr(at, parent)
            at.add_module(leaf, layer if copies == 1 else copy.deepcopy(layer))
    return root


def raw(kind: str, **shapes: tuple[int, ...]) -> nn.Module:
    """A module of a class of that name with parameters of its own."""
    module = type(kind, (nn.Module,), {})()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return module


def tie(module: nn.Module, one: str, other: str) -> nn.Module:
    module.get_submodule(one).weight = module.get_submodule(other).weight
    return module


def linear(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def conv(inputs: int, outputs: int, size: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, bias=False, **options)


def encoder(prefix: str) -> dict[str, nn.Module]:
    """The body of BERT and its relatives."""
    block = f"{prefix}__encoder__layer__{{}}__"
    return {
        f"{prefix}__embeddings__word_embeddings": nn.Embedding(WORDS, WIDTH),
        f"{prefix}__embeddings__position_embeddings": nn.Embedding(20, WIDTH),
        f"{block}attention__self__query": linear(),
        f"{block}attention__output__dense": linear(),
        f"{block}attention__output__LayerNorm": nn.LayerNorm(WIDTH),
        f"{block}intermediate__dense": linear(WIDTH, HIDDEN),
        f"{block}output__dense": linear(HIDDEN, WIDTH),
    }


ENCODER = {
    "*embeddings.weight": "embedding",
    "*attention*.weight": "matrix",
    "*intermediate.dense.weight": "matrix",
    "*output.dense.weight": "matrix",
}


def gpt2() -> nn.Module:
    module = net(
        transformer__wte=nn.Embedding(WORDS, WIDTH),
        transformer__wpe=nn.Embedding(20, WIDTH),
        **{
            "transformer__h__{}__attn__c_attn": raw(
                "Conv1D", weight=(WIDTH, 3 * WIDTH), bias=(3 * WIDTH,)
            ),
            "transformer__h__{}__attn__c_proj": raw("Conv1D", weight=(WIDTH, WIDTH), bias=(WIDTH,)),
            "transformer__h__{}__mlp__c_fc": raw("Conv1D", weight=(WIDTH, HIDDEN), bias=(HIDDEN,)),
        },
        transformer__ln_f=nn.LayerNorm(WIDTH),
        lm_head=linear(WIDTH, WORDS),
    )
    return tie(module, "lm_head", "transformer.wte")


def llama(**experts: nn.Module) -> nn.Module:
    mlp = experts or {
        "model__layers__{}__mlp__gate_proj": linear(WIDTH, HIDDEN),
        "model__layers__{}__mlp__down_proj": linear(HIDDEN, WIDTH),
    }
    return net(
        model__embed_tokens=nn.Embedding(WORDS, WIDTH),
        **{
            "model__layers__{}__self_attn__q_proj": linear(),
            "model__layers__{}__self_attn__k_proj": linear(WIDTH, 8),
            "model__layers__{}__self_attn__o_proj": linear(),
            "model__layers__{}__input_layernorm": raw("LlamaRMSNorm", weight=(WIDTH,)),
            **mlp,
        },
        model__norm=raw("LlamaRMSNorm", weight=(WIDTH,)),
        lm_head=linear(WIDTH, WORDS),
    )


LLAMA = {
    "model.embed_tokens.weight": "embedding",
    "*self_attn*.weight": "matrix",
    "lm_head.weight": "head",
}


def mixtral() -> nn.Module:
    return llama(
        **{
            "model__layers__{}__mlp__gate": raw("MixtralTopKRouter", weight=(4, WIDTH)),
            "model__layers__{}__mlp__experts": raw(
                "MixtralExperts", gate_up_proj=(4, 2 * HIDDEN, WIDTH), down_proj=(4, WIDTH, HIDDEN)
            ),
        }
    )


def gpt_oss() -> nn.Module:
    return llama(
        **{
            "model__layers__{}__mlp__router": raw("Router", weight=(4, WIDTH), bias=(4,)),
            "model__layers__{}__mlp__experts": raw(
                "GptOssExperts",
                gate_up_proj=(4, WIDTH, 2 * HIDDEN),
                gate_up_proj_bias=(4, 2 * HIDDEN),
                down_proj=(4, HIDDEN, WIDTH),
                down_proj_bias=(4, WIDTH),
            ),
        }
    )


def bert() -> nn.Module:
    module = net(
        **encoder("bert"),
        bert__pooler__dense=linear(),
        cls__predictions__transform__dense=linear(),
        cls__predictions__transform__LayerNorm=nn.LayerNorm(WIDTH),
        cls__predictions__decoder=linear(WIDTH, WORDS),
        cls__seq_relationship=linear(WIDTH, 2),
    )
    return tie(module, "cls.predictions.decoder", "bert.embeddings.word_embeddings")


def two_layer_head(prefix: str, head: str) -> nn.Module:
    return net(
        **encoder(prefix),
        **{f"{head}__dense": linear(), f"{head}__out_proj": linear(WIDTH, LABELS)},
    )


def t5() -> nn.Module:
    module = net(
        shared=nn.Embedding(WORDS, WIDTH),
        **{
            "encoder__block__{}__SelfAttention__q": linear(),
            "encoder__block__{}__SelfAttention__o": linear(),
            "encoder__block__{}__DenseReluDense__wi": linear(WIDTH, HIDDEN),
            "encoder__block__{}__DenseReluDense__wo": linear(HIDDEN, WIDTH),
            "encoder__block__{}__layer_norm": raw("T5LayerNorm", weight=(WIDTH,)),
        },
        encoder__relative_attention_bias=nn.Embedding(32, 4),
        lm_head=linear(WIDTH, WORDS),
    )
    return tie(module, "lm_head", "shared")


def xlnet() -> nn.Module:
    shapes = dict.fromkeys("qkvor", (WIDTH, 4, 4))
    attention = raw("XLNetRelativeAttention", **shapes, r_w_bias=(4, 4), r_s_bias=(4, 4))
    return net(
        word_embedding=nn.Embedding(WORDS, WIDTH),
        **{
            "layer__{}__rel_attn": attention,
            "layer__{}__ff__layer_1": linear(WIDTH, HIDDEN),
            "layer__{}__ff__layer_2": linear(HIDDEN, WIDTH),
        },
        lm_loss=linear(WIDTH, WORDS),
    )


def mamba() -> nn.Module:
    module = net(
        backbone__embeddings=nn.Embedding(WORDS, WIDTH),
        **{
            "backbone__layers__{}__mixer": raw("MambaMixer", A_log=(HIDDEN, 4), D=(HIDDEN,)),
            "backbone__layers__{}__norm": raw("MambaRMSNorm", weight=(WIDTH,)),
        },
        backbone__norm_f=raw("MambaRMSNorm", weight=(WIDTH,)),
        lm_head=linear(WIDTH, WORDS),
    )
    for layer in module.backbone.layers.children():
        layer.mixer.in_proj = linear(WIDTH, 2 * HIDDEN)
        layer.mixer.conv1d = nn.Conv1d(HIDDEN, HIDDEN, 4, groups=HIDDEN)
        layer.mixer.x_proj, layer.mixer.out_proj = linear(HIDDEN, 9), linear(HIDDEN, WIDTH)
    return module


def wav2vec2() -> nn.Module:
    positions = nn.Conv1d(WIDTH, WIDTH, 4, groups=2)
    return net(
        feature_extractor__conv=nn.Conv1d(1, 8, 10),
        feature_projection__projection=linear(8, WIDTH),
        encoder__pos_conv_embed__conv=parametrizations.weight_norm(positions, dim=2),
        **{
            "encoder__layers__{}__attention__q_proj": linear(),
            "encoder__layers__{}__feed_forward__intermediate_dense": linear(WIDTH, HIDDEN),
            "encoder__layers__{}__feed_forward__output_dense": linear(HIDDEN, WIDTH),
        },
        encoder__layer_norm=nn.LayerNorm(WIDTH),
        lm_head=linear(WIDTH, 32),
    )


def vit(attention: nn.Module | None = None, **heads: nn.Module) -> nn.Module:
    return net(
        embeds=raw("Embeds", cls_token=(1, 1, WIDTH), pos_embed=(1, 5, WIDTH)),
        patch_embed__proj=nn.Conv2d(3, WIDTH, 4),
        **{
            "blocks__{}__norm1": nn.LayerNorm(WIDTH),
            "blocks__{}__attn": attention or raw("Attention"),
            "blocks__{}__attn__qkv": linear(WIDTH, 3 * WIDTH),
            "blocks__{}__mlp__fc1": linear(WIDTH, HIDDEN),
            "blocks__{}__mlp__fc2": linear(HIDDEN, WIDTH),
        },
        norm=nn.LayerNorm(WIDTH),
        **heads,
    )


VIT = {
    "embeds.*": "other", "patch_embed.proj.weight": "matrix", "blocks.*.qkv.weight": "matrix",
    "blocks.*.fc?.weight": "matrix",
}  # fmt: skip


def resnet(**heads: nn.Module) -> nn.Module:
    return net(
        conv1=conv(3, 8, 7),
        bn1=nn.BatchNorm2d(8),
        **{
            "layer1__{}__conv1": conv(8, 8),
            "layer1__{}__bn1": nn.BatchNorm2d(8),
            "layer1__{}__conv2": conv(8, 8),
            "layer1__{}__bn2": nn.BatchNorm2d(8),
        },
        layer2__0__conv1=conv(8, 16),
        layer2__0__bn1=nn.BatchNorm2d(16),
        **heads,
    )


RESNET = {"*conv?.weight": "matrix"}


def efficientnet() -> nn.Module:
    return net(
        conv_stem=conv(3, 8),
        bn1=nn.BatchNorm2d(8),
        **{
            "blocks__{}__conv_dw": conv(8, 8, groups=8),
            "blocks__{}__conv_pw": conv(8, 8, 1),
            "blocks__{}__bn": nn.BatchNorm2d(8),
        },
        conv_head=conv(8, 32, 1),
        bn2=nn.BatchNorm2d(32),
        classifier=linear(32, 10),
    )


def detr() -> nn.Module:
    return net(
        **{"encoder__layers__{}__fc1": linear(WIDTH, HIDDEN)},
        **{"encoder__layers__{}__fc2": linear(HIDDEN, WIDTH)},
        query_position_embeddings=nn.Embedding(7, WIDTH),
        class_labels_classifier=linear(WIDTH, LABELS + 1),
        bbox_predictor__layers__0=linear(),
        bbox_predictor__layers__1=linear(),
        bbox_predictor__layers__2=linear(WIDTH, 4),
    )


def lora() -> nn.Module:
    module = llama()
    module.requires_grad_(False)
    for layer in module.model.layers.children():
        layer.self_attn.q_proj.lora_A = nn.ModuleDict({"default": linear(WIDTH, 2)})
        layer.self_attn.q_proj.lora_B = nn.ModuleDict({"default": linear(2, WIDTH)})
    return module


Expected = dict[str, str]  # pattern of a name -> group, layout, splits; the first match counts
MODELS: dict[str, tuple[Callable[[], nn.Module], Expected]] = {
    "GPT-2": (gpt2, {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "embedding",
                     "*.c_*.weight": "matrix transposed"}),
    "Llama": (llama, {**LLAMA, "*.mlp*.weight": "matrix"}),
    "Mixtral": (mixtral, {**LLAMA, "*.gate.weight": "matrix", "*.experts.*": "matrix batch"}),
    "gpt-oss": (gpt_oss, {**LLAMA, "*_proj_bias": "other", "*.experts.*": "matrix batch",
                          "*.router.weight": "matrix"}),
    "BERT, pretraining": (bert, {**ENCODER, "*.pooler.dense.weight": "matrix",
                                 "*.transform.dense.weight": "matrix",
                                 "cls.seq_relationship.weight": "head"}),
    "RoBERTa": (lambda: two_layer_head("roberta", "classifier"),
                {**ENCODER, "classifier.dense.weight": "matrix",
                 "classifier.out_proj.weight": "head"}),
    "BART": (lambda: two_layer_head("model", "classification_head"),
             {**ENCODER, "*_head.dense.weight": "matrix", "*_head.out_proj.weight": "head"}),
    "T5": (t5, {"shared.weight": "embedding", "*relative_attention_bias.weight": "embedding",
                "encoder.block*.weight": "matrix"}),
    "XLNet": (xlnet, {"word_embedding.weight": "embedding", "*_bias": "other",
                      "*.rel_attn.?": "matrix", "*.ff.*.weight": "matrix",
                      "lm_loss.weight": "head"}),
    "Mamba": (mamba, {"*.embeddings.weight": "embedding", "*.A_log": "other",
                      "*.conv1d.weight": "other", "*_proj.weight": "matrix",
                      "lm_head.weight": "head"}),
    "Wav2Vec2": (wav2vec2, {"feature_extractor.conv.weight": "matrix", "*original0": "vector",
                            "*original1": "matrix 2", "lm_head.weight": "head",
                            "*.weight": "matrix"}),
    "ViT": (lambda: vit(head=linear(WIDTH, 10)), {**VIT, "head.weight": "head"}),
    "DeiT, distilled": (lambda: vit(head=linear(WIDTH, 10), head_dist=linear(WIDTH, 10)),
                        {**VIT, "head*.weight": "head"}),
    "Swin": (lambda: vit(raw("WindowAttention", relative_position_bias_table=(49, 4)),
                         head__fc=linear(WIDTH, 10)),
             {**VIT, "*bias_table": "other", "head.fc.weight": "head"}),
    "LeViT": (lambda: vit(raw("Attention", attention_biases=(4, 49)), head=linear(WIDTH, 10)),
              {**VIT, "*attention_biases": "other", "head.weight": "head"}),
    "ResNet": (lambda: resnet(fc=linear(16, 10)), {**RESNET, "fc.weight": "head"}),
    "FCN": (lambda: resnet(classifier__0=conv(16, 4), classifier__1=nn.BatchNorm2d(4),
                           classifier__4=conv(4, 21, 1)),
            {**RESNET, "classifier.0.weight": "matrix", "classifier.4.weight": "head"}),
    "SqueezeNet": (lambda: resnet(classifier__1=nn.Conv2d(16, 10, 1)),
                   {**RESNET, "classifier.1.weight": "head"}),
    "Faster R-CNN": (lambda: resnet(rpn__head__conv=conv(16, 16),
                                    rpn__head__cls_logits=conv(16, 3, 1),
                                    rpn__head__bbox_pred=conv(16, 12, 1),
                                    roi_heads__box_head__fc6=linear(784, 32),
                                    roi_heads__box_predictor__cls_score=linear(32, 91),
                                    roi_heads__box_predictor__bbox_pred=linear(32, 364)),
                     {**RESNET, "rpn.head.conv.weight": "matrix", "*.fc6.weight": "matrix",
                      "*.weight": "head"}),
    "Inception": (lambda: resnet(AuxLogits__conv=conv(16, 24, 1), AuxLogits__bn=nn.BatchNorm2d(24),
                                 AuxLogits__fc=linear(24, 10), Mixed__conv1=conv(16, 16),
                                 Mixed__bn1=nn.BatchNorm2d(16), fc=linear(16, 10)),
                  {**RESNET, "AuxLogits.conv.weight": "matrix",
                   "*fc.weight": "head"}),
    "EfficientNet": (efficientnet, {"*.conv_dw.weight": "other", "*conv_*.weight": "matrix",
                                    "classifier.weight": "head"}),
    "DETR": (detr, {"encoder*.weight": "matrix", "query*.weight": "embedding",
                    "class_labels_classifier.weight": "head",
                    "bbox_predictor.layers.2.weight": "head",
                    "bbox_predictor.layers.?.weight": "matrix"}),
    "Llama with LoRA": (lora, {"*lora_?.default.weight": "matrix"}),
}  # fmt: skip


def matches(pattern: str, name: str) -> bool:
    return (
        re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), name) is not None
    )


@pytest.mark.filterwarnings("ignore:.*(low-rank adapter|guesses)")
@pytest.mark.parametrize("model", MODELS)
def test_known_model_is_split_as_expected(model):
    build, expected = MODELS[model]
    used = set()
    for a in split_parameters(build()):
        if a.parameter.ndim < 2:
            assert a.group == "vector"
            continue
        pattern = next(p for p in expected if matches(p, a.name))
        used.add(pattern)
        form = [a.options.get("layout", "flatten"), a.options.get("splits")]
        words = [a.group, *(str(word) for word in form if word not in ("flatten", None))]
        got = " ".join(words).replace("batch_transposed", "batch")
        assert got == expected[pattern], (a.name, a.reason)
    assert used == expected.keys()


@pytest.mark.parametrize("model", [m for m in MODELS if m not in ("XLNet", "Llama with LoRA")])
def test_known_model_has_no_guesses(model):
    guesses = [a.name for a in split_parameters(MODELS[model][0]()) if "doubtful" in a.reason]
    assert guesses == []
