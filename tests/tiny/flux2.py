from __future__ import annotations

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

from tiny.parts import byte_symbols, qwen3_text, qwen_tokenizer


def build(klein: bool, distilled: bool = False) -> Flux2Pipeline | Flux2KleinPipeline:
    """dev, told a guidance scale, or Klein. 16 channels of 2x2 patches, one token for 8x8 pixels."""
    parts = {
        "vae": vae(),
        "transformer": Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=not klein,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }  # fmt: skip
    if klein:
        tokenizer = qwen_tokenizer()
        return Flux2KleinPipeline(
            tokenizer=tokenizer,
            text_encoder=qwen3_text(tokenizer, 27, Qwen3ForCausalLM),
            is_distilled=distilled,
            **parts,
        )
    processor = pixtral_processor()
    return Flux2Pipeline(tokenizer=processor, text_encoder=mistral(processor.tokenizer), **parts)


def vae() -> AutoencoderKLFlux2:
    """With statistics of its latents that are neither 0 nor 1."""
    model = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    model.bn.running_mean.normal_(0, 0.2)
    model.bn.running_var.uniform_(0.5, 2)
    return model


def pixtral_processor() -> PixtralProcessor:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<unk>", "<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    vocab = {symbol: i for i, symbol in enumerate([*specials, *byte_symbols()])}
    plain = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens=specials[4:],
    )  # fmt: skip
    # The user's words alone: the real template's system message is 500 letters long.
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<s>' }}"
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
    )
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=template)


def mistral(tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    """30 layers deep, as of layers 10, 20 and 30 the pipeline takes the states."""
    text = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=30, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    image = tokenizer.convert_tokens_to_ids("[IMG]")
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=image)
    )
