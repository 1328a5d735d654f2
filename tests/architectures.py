"""Architectures of transformers and PEFT, built from their configs: random weights, nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

import wplfast

hf.logging.set_verbosity_error()

C = 5


@dataclass(frozen=True)
class Size:
    """How large a model is to be."""

    hidden: int = 32
    layers: int = 2
    heads: int = 4
    vocabulary: int = 61
    tokens: int = 7
    image: int = 32

    @property
    def inner(self) -> int:
        return 2 * self.hidden


TINY = Size()
MID = Size(hidden=256, layers=4, heads=8, vocabulary=1000, tokens=64, image=64)

Data = Callable[[Size, int], tuple[dict[str, Tensor], Tensor]]


@dataclass(frozen=True)
class Architecture:
    """A model with its data: batches of (keyword inputs, targets)."""

    build: Callable[[Size], nn.Module]
    data: Data
    loss: Callable[[Any, Tensor], Tensor] = wplfast.losses.cross_entropy
    train: bool = False
    double: bool = True  # False: an operation of the model has no float64
    rtol: float = 1e-9
    model_rtol: float = 1e-10

    def make(self, size: Size = TINY, double: bool = True) -> nn.Module:
        """Build the model with random weights, none of which is zero or one by its initialisation."""
        torch.manual_seed(0)
        model = self.build(size).train(self.train)
        perturb(model)
        return model.double() if double and self.double else model.float()


def perturb(model: nn.Module) -> None:
    """Move parameters and running statistics away from where they start."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() < 2 else 0.5 * parameter[0].numel() ** -0.5
            parameter += scale * torch.randn(parameter.shape)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


# ---- data ------------------------------------------------------------------------------------------------------------


def padded(size: Size, n: int) -> dict[str, Tensor]:
    """Token ids with padding at the right; the first sequence is whole."""
    lengths = torch.randint(size.tokens // 2, size.tokens + 1, (n, 1))
    lengths[0] = size.tokens
    mask = (torch.arange(size.tokens) < lengths).long()
    ids = torch.randint(2, size.vocabulary, (n, size.tokens))
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


def ignoring(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels of token ids: -100 at padding and at some other tokens."""
    return ids.masked_fill((mask == 0) | (torch.rand(ids.shape) < 0.15), -100)


def language(size: Size, n: int) -> tuple[dict[str, Tensor], Tensor]:
    inputs = padded(size, n)
    return inputs, ignoring(inputs["input_ids"], inputs["attention_mask"])


def text(size: Size, n: int) -> tuple[dict[str, Tensor], Tensor]:
    return padded(size, n), torch.randint(0, C, (n,))


def translation(size: Size, n: int) -> tuple[dict[str, Tensor], Tensor]:
    inputs, labels = padded(size, n), padded(size, n)
    given = {"decoder_input_ids": labels["input_ids"].roll(1, 1)}
    return {**inputs, **given}, ignoring(labels["input_ids"], labels["attention_mask"])


def images(size: Size, n: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"pixel_values": torch.randn(n, 3, size.image, size.image)}, torch.randint(0, C, (n,))


def speech(size: Size, n: int) -> tuple[dict[str, Tensor], Tensor]:
    labels = padded(size, n)
    features = {
        "input_features": torch.randn(n, 8, 4 * size.tokens),
        "decoder_input_ids": labels["input_ids"].roll(1, 1),
    }
    return features, ignoring(labels["input_ids"], labels["attention_mask"])


def waves(size: Size, n: int) -> tuple[dict[str, Tensor], Tensor]:
    length = 20 * size.tokens
    mask = torch.ones(n, length, dtype=torch.long)
    mask[1:, length // 2 :] = 0
    return {"input_values": torch.randn(n, length) * mask, "attention_mask": mask}, torch.randint(0, C, (n,))


def next_token(outputs: Any, targets: Tensor) -> Tensor:
    """Causal language modelling."""
    return wplfast.losses.cross_entropy(outputs, targets, shift=True)


def after_prompt(outputs: Any, targets: Tensor) -> Tensor:
    """Causal language modelling where virtual tokens precede the logits."""
    return wplfast.losses.cross_entropy(outputs.logits[:, -targets.shape[1] :], targets, shift=True)


# ---- models ----------------------------------------------------------------------------------------------------------


def gpt2(s: Size) -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_embd": s.hidden, "n_layer": s.layers, "n_head": s.heads, "n_positions": s.tokens + 5}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=s.vocabulary, **shape, **dropout))


def encoder(s: Size) -> dict[str, Any]:
    """Options that the BERT family shares."""
    return {
        "vocab_size": s.vocabulary,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "intermediate_size": s.inner,
        "max_position_embeddings": s.tokens + 5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": C,
    }


def bert(s: Size) -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**encoder(s)))


def bert_masked(s: Size) -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**encoder(s)))


def roberta(s: Size) -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**encoder(s), pad_token_id=1))


def albert(s: Size) -> nn.Module:
    config = hf.AlbertConfig(**encoder(s), embedding_size=s.hidden // 2, classifier_dropout_prob=0.0)
    return hf.AlbertForSequenceClassification(config)


def deberta(s: Size) -> nn.Module:
    options = {"relative_attention": True, "max_relative_positions": s.tokens, "pos_att_type": ["p2c", "c2p"]}
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**encoder(s), **options))


def distilbert(s: Size) -> nn.Module:
    shape = {"dim": s.hidden, "hidden_dim": s.inner, "n_layers": s.layers, "n_heads": s.heads, "num_labels": C}
    dropout = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    positions = {"vocab_size": s.vocabulary, "max_position_embeddings": s.tokens + 5}
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**shape, **dropout, **positions))


def checkpointed(build: Callable[[Size], Any], reentrant: bool) -> Callable[[Size], nn.Module]:
    def build_checkpointed(s: Size) -> nn.Module:
        model = build(s)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model

    return build_checkpointed


def decoder(s: Size) -> dict[str, Any]:
    """Options that the Llama family shares."""
    return {
        "vocab_size": s.vocabulary,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.heads // 2,
        "head_dim": s.hidden // s.heads,
        "intermediate_size": s.inner,
        "max_position_embeddings": s.tokens + 5,
        "pad_token_id": 1,
    }


def llama(s: Size) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**decoder(s), attention_bias=True))


def qwen3(s: Size) -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**decoder(s), tie_word_embeddings=True))


def gemma2(s: Size) -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**decoder(s), sliding_window=4, query_pre_attn_scalar=8))


def mixtral(experts: str) -> Callable[[Size], nn.Module]:
    def build(s: Size) -> nn.Module:
        config = hf.MixtralConfig(**decoder(s), num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
        config._experts_implementation = experts
        return hf.MixtralForCausalLM(config)

    return build


def neox(s: Size) -> nn.Module:
    options = {k: v for k, v in decoder(s).items() if k not in ("num_key_value_heads", "head_dim")}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**options))


def t5(projection: str) -> Callable[[Size], nn.Module]:
    def build(s: Size) -> nn.Module:
        shape = {"d_model": s.hidden, "d_kv": s.hidden // s.heads, "d_ff": s.inner, "num_heads": s.heads}
        more = {"num_layers": s.layers, "vocab_size": s.vocabulary, "dropout_rate": 0.0, "decoder_start_token_id": 0}
        gated = projection != "relu"
        config = hf.T5Config(**shape, **more, feed_forward_proj=projection, tie_word_embeddings=not gated)
        return hf.T5ForConditionalGeneration(config)

    return build


def bart(s: Size) -> nn.Module:
    sides = ("encoder", "decoder")
    shape: dict[str, int] = {f"{side}_layers": s.layers for side in sides}
    shape |= {f"{side}_attention_heads": s.heads for side in sides} | {f"{side}_ffn_dim": s.inner for side in sides}
    more = {"d_model": s.hidden, "vocab_size": s.vocabulary, "max_position_embeddings": s.tokens + 5, "dropout": 0.0}
    return hf.BartForConditionalGeneration(hf.BartConfig(**shape, **more, scale_embedding=True))


def mamba(s: Size) -> nn.Module:
    config = hf.MambaConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        state_size=4,
        use_mambapy=False,
        pad_token_id=1,
    )
    return hf.MambaForCausalLM(config)


def vision(s: Size) -> dict[str, Any]:
    """Options that vision transformers share."""
    options = encoder(s)
    del options["vocab_size"], options["max_position_embeddings"]
    return {**options, "image_size": s.image, "patch_size": s.image // 4}


def vit(s: Size) -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**vision(s)))


def beit(s: Size) -> nn.Module:
    tables = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1, "drop_path_rate": 0.0}
    return hf.BeitForImageClassification(hf.BeitConfig(**vision(s), **tables))


def swin(s: Size) -> nn.Module:
    return hf.SwinForImageClassification(
        hf.SwinConfig(
            image_size=s.image,
            patch_size=4,
            embed_dim=s.hidden // 2,
            depths=[s.layers, s.layers],
            num_heads=[2, 4],
            window_size=4,
            drop_path_rate=0.0,
            num_labels=C,
        )
    )


def resnet(layer: str) -> Callable[[Size], nn.Module]:
    def build(s: Size) -> nn.Module:
        widths = [s.hidden // 2, s.hidden]
        shape = {"embedding_size": s.hidden // 4, "hidden_sizes": widths, "depths": [1, s.layers]}
        return hf.ResNetForImageClassification(hf.ResNetConfig(**shape, layer_type=layer, num_labels=C))

    return build


def convnext(s: Size) -> nn.Module:
    shape = {"hidden_sizes": [s.hidden // 2, s.hidden], "depths": [1, s.layers], "num_stages": 2}
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(**shape, layer_scale_init_value=0.5, num_labels=C))


def mobilenet(s: Size) -> nn.Module:
    config = hf.MobileNetV2Config(image_size=s.image, depth_multiplier=s.hidden / 256, min_depth=8, num_labels=C)
    return hf.MobileNetV2ForImageClassification(config)


def segformer(s: Size) -> nn.Module:
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, s.layers],
        sr_ratios=[2, 1],
        hidden_sizes=[s.hidden // 2, s.hidden],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        drop_path_rate=0.0,
        num_labels=C,
    )
    return hf.SegformerForImageClassification(config)


def whisper(s: Size) -> nn.Module:
    sides = ("encoder", "decoder")
    shape: dict[str, int] = {f"{side}_layers": s.layers for side in sides}
    shape |= {f"{side}_attention_heads": s.heads for side in sides} | {f"{side}_ffn_dim": s.inner for side in sides}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    lengths = {"max_source_positions": 2 * s.tokens, "max_target_positions": s.tokens + 5, "num_mel_bins": 8}
    config = hf.WhisperConfig(d_model=s.hidden, vocab_size=s.vocabulary, **shape, **tokens, **lengths)
    return hf.WhisperForConditionalGeneration(config)


def wav2vec2(s: Size) -> nn.Module:
    options = encoder(s)
    del options["hidden_dropout_prob"], options["attention_probs_dropout_prob"], options["max_position_embeddings"]
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop")
    return hf.Wav2Vec2ForSequenceClassification(
        hf.Wav2Vec2Config(
            **options,
            **dict.fromkeys((*dropouts, "final_dropout"), 0.0),
            conv_dim=(s.hidden // 2, s.hidden // 2),
            conv_kernel=(4, 3),
            conv_stride=(3, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=s.hidden // 2,
            mask_time_prob=0.0,
        )
    )


def adapted(build: Callable[[Size], Any], config: Callable[[], Any]) -> Callable[[Size], nn.Module]:
    """A model in which only an adapter is trained."""

    def build_adapted(s: Size) -> nn.Module:
        return peft.get_peft_model(build(s), config())

    return build_adapted


def lora(targets: list[str], **options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=targets, **options)


ATTENTION = ["q_proj", "v_proj"]

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(gpt2, language, next_token),
    "bert": Architecture(bert, text),
    "bert, masked": Architecture(bert_masked, language),
    "roberta": Architecture(roberta, text),
    "albert": Architecture(albert, text),
    "deberta": Architecture(deberta, text),
    "distilbert, checkpointed": Architecture(checkpointed(distilbert, reentrant=False), text, train=True),
    "distilbert, checkpointed, reentrant": Architecture(checkpointed(distilbert, reentrant=True), text, train=True),
    "llama": Architecture(llama, language, next_token),
    "qwen3": Architecture(qwen3, language, next_token),
    "gemma2": Architecture(gemma2, language, next_token, rtol=1e-6, model_rtol=1e-7),  # its norms cast to float32
    "gpt-neox": Architecture(neox, language, next_token),
    "mixtral": Architecture(mixtral("eager"), language, next_token),
    "mixtral, grouped": Architecture(
        mixtral("grouped_mm"), language, next_token, double=False, rtol=1e-4, model_rtol=1e-5
    ),
    "t5": Architecture(t5("relu"), translation),
    "t5, gated": Architecture(t5("gated-gelu"), translation),
    "bart": Architecture(bart, translation),
    "mamba": Architecture(mamba, language, next_token),
    "vit": Architecture(vit, images),
    "beit": Architecture(beit, images),
    "swin": Architecture(swin, images),
    "resnet": Architecture(resnet("bottleneck"), images),
    "convnext": Architecture(convnext, images),
    "mobilenet": Architecture(mobilenet, images),
    "segformer": Architecture(segformer, images),
    "whisper": Architecture(whisper, speech),
    "wav2vec2": Architecture(wav2vec2, waves),
    "gpt2, lora": Architecture(adapted(gpt2, lora(["c_attn", "c_fc"], fan_in_fan_out=True)), language, next_token),
    "llama, lora": Architecture(adapted(llama, lora([*ATTENTION, "down_proj"])), language, next_token),
    "llama, lora of embeddings": Architecture(
        adapted(llama, lora([*ATTENTION, "embed_tokens", "lm_head"])), language, next_token
    ),
    "llama, dora": Architecture(adapted(llama, lora(ATTENTION, use_dora=True)), language, next_token),
    "bert, lora": Architecture(adapted(bert, lora(["query", "value"], task_type="SEQ_CLS")), text),
    "llama, ia3": Architecture(
        adapted(
            llama,
            lambda: peft.IA3Config(
                target_modules=["k_proj", "v_proj", "down_proj"],
                feedforward_modules=["down_proj"],
                task_type="CAUSAL_LM",
            ),
        ),
        language,
        next_token,
    ),
    "gpt2, prompt": Architecture(
        adapted(gpt2, lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        language,
        after_prompt,
    ),
}
