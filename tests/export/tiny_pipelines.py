"""Real pipelines of diffusers around a given first stage, with small random networks and a vocabulary of letters."""

import string
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanImageTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from latent_ae.export.pipelines import PIPELINES

LATENT_PX = 8
WIDTH = 32
"""Of every text encoder."""
STEPS = 2**17
"""Of flow matching's image-to-image, of which only the last is taken: it noises the image by less than 1e-5."""


def pipeline(name: str, vae: torch.nn.Module, *, image_to_image: bool = False) -> Any:
    """The pipeline of family `name` with `vae` inside."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = PARTS[name](min(PIPELINES[name].published))
    parts["movq" if name == "kandinsky" else "vae"] = vae
    made = getattr(diffusers, PIPELINES[name].classes[int(image_to_image)])(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def _clip(kind: type = CLIPTextModel) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 37, "projection_dim": WIDTH, "max_position_embeddings": 77}
    shape = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 60}
    return kind(CLIPTextConfig(**sizes, **shape, bos_token_id=0, eos_token_id=1, pad_token_id=1)).eval()


def _clip_words() -> CLIPTokenizer:
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocab = {word: number for number, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5() -> dict[str, Any]:
    config = T5Config(vocab_size=130, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    pieces = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase)]
    return {"encoder": T5EncoderModel(config).eval(), "words": T5Tokenizer(vocab=pieces)}


def _unet(channels: int, **changes: Any) -> UNet2DConditionModel:
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    sides = {"sample_size": LATENT_PX, "in_channels": channels, "out_channels": channels}
    return UNet2DConditionModel(**sides, **shape, **blocks, **({"cross_attention_dim": WIDTH} | changes)).eval()


def _noise_schedule() -> DDIMScheduler:
    return DDIMScheduler(set_alpha_to_one=True, clip_sample=False, steps_offset=0)


def hardly_noise(made: Any) -> dict[str, Any]:
    """Words that make image-to-image return its image: the last of many steps, or a schedule of hardly any noise."""
    if isinstance(made.scheduler, DDIMScheduler):
        made.scheduler = DDIMScheduler.from_config(made.scheduler.config, trained_betas=[1e-7] * 1000)
        return {"num_inference_steps": 1000, "strength": 1e-3}
    return {"num_inference_steps": STEPS, "strength": 1 / STEPS}


def _sd(channels: int) -> dict[str, Any]:
    text = {"text_encoder": _clip(), "tokenizer": _clip_words()}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {"unet": _unet(channels), "scheduler": _noise_schedule(), **text, **none}


def _sdxl(channels: int) -> dict[str, Any]:
    text = {"text_encoder": _clip(), "tokenizer": _clip_words()}
    text |= {"text_encoder_2": _clip(CLIPTextModelWithProjection), "tokenizer_2": _clip_words()}
    # six numbers of sizes and crops, eight wide each, beside the pooled text
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added |= {"projection_class_embeddings_input_dim": 6 * 8 + WIDTH, "cross_attention_dim": 2 * WIDTH}
    return {"unet": _unet(channels, **added), "scheduler": _noise_schedule(), "add_watermarker": False, **text}


def _sd3(channels: int) -> dict[str, Any]:
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_PX,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    ).eval()
    text = {"text_encoder": _clip(CLIPTextModelWithProjection), "tokenizer": _clip_words()}
    text |= {"text_encoder_2": _clip(CLIPTextModelWithProjection), "tokenizer_2": _clip_words()}
    t5 = T5Config(vocab_size=130, d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    text |= {"text_encoder_3": T5EncoderModel(t5).eval(), "tokenizer_3": _t5()["words"]}
    return {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS), **text}


def _flux(channels: int) -> dict[str, Any]:
    transformer = FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    ).eval()
    t5 = _t5()
    text = {
        "text_encoder": _clip(),
        "tokenizer": _clip_words(),
        "text_encoder_2": t5["encoder"],
        "tokenizer_2": t5["words"],
    }
    return {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS), **text}


def _dit(channels: int) -> dict[str, Any]:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=1,
        sample_size=LATENT_PX,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        norm_type="ada_norm_zero",
    ).eval()
    return {"transformer": transformer, "scheduler": _noise_schedule()}


NO_TEXT = {"text_encoder": None, "tokenizer": None}
"""Of pipelines that are given what an encoder makes of the text, because the encoder is a language model."""


def _flow(transformer: torch.nn.Module, **more: Any) -> dict[str, Any]:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS)
    return {"transformer": transformer.eval(), "scheduler": scheduler, **NO_TEXT, **more}


def _flux2(channels: int) -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        in_channels=4 * channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return _flow(transformer)


def _sana(channels: int) -> dict[str, Any]:
    transformer = SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=LATENT_PX,
    )
    return _flow(transformer)


def _qwenimage(channels: int) -> dict[str, Any]:
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    return _flow(transformer)


def _z_image(channels: int) -> dict[str, Any]:
    transformer = ZImageTransformer2DModel(
        in_channels=channels,
        dim=WIDTH,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # which begin as whatever the memory held
        transformer.x_pad_token.zero_()
        transformer.cap_pad_token.zero_()
    return _flow(transformer)


def _wan(channels: int) -> dict[str, Any]:
    transformer = WanTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        text_dim=WIDTH,
        ffn_dim=16,
        freq_dim=16,
        rope_max_seq_len=32,
    )
    return _flow(transformer)


def _pixart(channels: int) -> dict[str, Any]:
    transformer = PixArtTransformer2DModel(
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=LATENT_PX,
    )
    return {"transformer": transformer.eval(), "scheduler": _noise_schedule(), **NO_TEXT}


def _hunyuanimage(channels: int) -> dict[str, Any]:
    transformer = HunyuanImageTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )
    return _flow(transformer, text_encoder_2=None, tokenizer_2=None)


def _lumina2(channels: int) -> dict[str, Any]:
    transformer = Lumina2Transformer2DModel(
        in_channels=channels,
        sample_size=LATENT_PX,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return _flow(transformer)


def _kandinsky(channels: int) -> dict[str, Any]:
    unet = UNet2DConditionModel(
        in_channels=channels,
        out_channels=2 * channels,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        addition_embed_type="image",
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=WIDTH,
        resnet_time_scale_shift="scale_shift",
    )
    return {"unet": unet.eval(), "scheduler": _noise_schedule()}


PARTS = {
    "sd": _sd,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "dit": _dit,
    "flux2": _flux2,
    "sana": _sana,
    "qwenimage": _qwenimage,
    "z_image": _z_image,
    "wan": _wan,
    "pixart": _pixart,
    "hunyuanimage": _hunyuanimage,
    "lumina2": _lumina2,
    "kandinsky": _kandinsky,
}


def asked(family: str, side: int) -> dict[str, Any]:
    """What to call a family's pipeline with for an image of `side` px: a class, words, or what an encoder made of them.

    There is guidance away from other words where that is simple.
    """
    if family == "dit":
        return {"class_labels": [3]}
    sides = {"height": side, "width": side}
    if family in ("sd", "sdxl", "sd3", "flux"):
        return {"prompt": "a cat", **sides, **({} if family == "flux" else {"guidance_scale": 2.0})}
    drawn = torch.randn(2, 1, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    words, mask = drawn[0], torch.ones(1, 4, dtype=torch.long)
    if family == "kandinsky":
        return {"image_embeds": drawn[0, :, 0], "negative_image_embeds": drawn[1, :, 0], **sides}
    if family == "z_image":
        return {"prompt_embeds": list(words), "guidance_scale": 0.0, **sides}
    if family == "flux2":
        return {"prompt_embeds": words, **sides}
    if family == "qwenimage":
        return {"prompt_embeds": words, "prompt_embeds_mask": mask, "true_cfg_scale": 1.0, **sides}
    if family == "hunyuanimage":
        second = {"prompt_embeds_2": drawn[1], "prompt_embeds_mask_2": mask}
        return {"prompt_embeds": words, "prompt_embeds_mask": mask, **second, **sides}
    guided = {"prompt_embeds": words, "negative_prompt_embeds": drawn[1], "guidance_scale": 2.0, **sides}
    if family == "wan":
        return {**guided, "num_frames": 1}
    guided |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    if family == "lumina2":
        return guided
    return {**guided, "negative_prompt": None, "use_resolution_binning": False}
