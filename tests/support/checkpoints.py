"""Tiny seeded checkpoints in diffusers format: random weights, tokenizers trained here, nothing downloaded.

Constant parameters (norm weights, biases, pad tokens) are perturbed and matrices rescaled, so that a forgotten norm, a
wrong position or a wrong prompt moves the result far above rounding. Head counts, depth and seed are free, because a
test has to hold for other numbers than those it was written with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

PROMPT = "a small red cat sitting on a blue chair, photo"
NEGATIVE = "blurry, low quality"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CORPUS = ("user\nassistant\nsystem\n", PROMPT, NEGATIVE, "one, two and three; a green apple.")


@torch.no_grad()
def randomize(module: nn.Module, seed: int, gain: float | None = 1.5) -> nn.Module:
    """Give matrices a standard deviation of gain / sqrt(fan in), and constants some noise."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if gain and isinstance(part, nn.Embedding):
            part.weight.mul_(0.5 / part.weight.std())
        elif gain and isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d)) and part.weight.numel() > 1:
            part.weight.mul_(gain / part.weight[0].numel() ** 0.5 / part.weight.std())
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        if name.endswith("pad_token"):  # made by torch.empty: holds whatever was there
            parameter.copy_(noise)
        elif float(parameter.max() - parameter.min()) == 0.0:
            parameter.add_(noise)
    return module.eval()


def build(make: Callable[[], nn.Module], seed: int, gain: float | None = 1.5) -> Any:
    """A module with seeded initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
    return randomize(module, seed, gain)


def qwen_tokenizer() -> Any:
    """Byte-level BPE in Qwen's layout, with its chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def kl_vae(seed: int) -> Any:
    """AutoencoderKL in the layout of FLUX.1 and Z-Image: 16 channels, 8x smaller."""
    from diffusers import AutoencoderKL

    return build(
        lambda: AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=False,
        ),
        seed,
        gain=None,
    )


def make_z_image(
    folder: Path,
    *,
    seed: int = 0,
    heads: int = 4,
    head_dim: int = 24,
    layers: int = 2,
    refiner_layers: int = 1,
    text_width: int = 32,
    shift: float = 3.0,
    max_shard_size: str | None = None,
) -> Path:
    """A ZImagePipeline folder; `head_dim` is split into three equal, even RoPE axes."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer()
    transformer = build(
        lambda: ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=16,
            dim=heads * head_dim,
            n_layers=layers,
            n_refiner_layers=refiner_layers,
            n_heads=heads,
            n_kv_heads=heads,
            norm_eps=1e-5,
            qk_norm=True,
            cap_feat_dim=text_width,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=[head_dim // 3] * 3,
            axes_lens=[1024, 512, 512],
        ),
        seed,
    )
    text_config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False),
        vae=kl_vae(seed + 2),
        text_encoder=build(lambda: Qwen3Model(text_config), seed + 1),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return _save(pipe, folder, max_shard_size)


def make_flux1(folder: Path, *, seed: int = 0, heads: int = 4) -> Path:
    """A FluxPipeline folder in the layout of FLUX.1-dev (embedded guidance)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    clip_words, t5_words = _clip_tokenizer(), t5_tokenizer()
    t5_config = T5Config(
        vocab_size=len(t5_words),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000,
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=kl_vae(seed + 2),
        text_encoder=_clip_text(clip_words, seed + 1),
        tokenizer=clip_words,
        text_encoder_2=build(lambda: T5EncoderModel(t5_config), seed + 3),
        tokenizer_2=t5_words,
        transformer=build(
            lambda: FluxTransformer2DModel(
                patch_size=1,
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=24,
                num_attention_heads=heads,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                guidance_embeds=True,
                axes_dims_rope=(8, 8, 8),
            ),
            seed,
        ),
    )
    return _save(pipe, folder, None)


def make_stable_diffusion(folder: Path, *, seed: int = 0) -> Path:
    """A StableDiffusionPipeline folder with a second-order solver, which takes 2n - 1 steps where n were asked for."""
    from diffusers import AutoencoderKL, HeunDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = _clip_tokenizer()
    blocks = (16, 32)
    pipe = StableDiffusionPipeline(
        vae=build(
            lambda: AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=blocks,
                norm_num_groups=4,
            ),
            seed + 2,
            gain=None,
        ),
        text_encoder=_clip_text(tokenizer, seed + 1),
        tokenizer=tokenizer,
        unet=build(
            lambda: UNet2DConditionModel(
                sample_size=32,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=blocks,
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=8,
                cross_attention_dim=32,
            ),
            seed,
            gain=None,
        ),
        scheduler=HeunDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipe, folder, None)


def _clip_text(tokenizer: Any, seed: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|startoftext|>"),
        eos_token_id=end,
        pad_token_id=end,
    )
    return build(lambda: CLIPTextModel(config), seed)


def _clip_tokenizer() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    """Unigram words and letters in T5's layout."""
    from transformers import T5Tokenizer

    words = {"▁" + word: -4.0 for line in CORPUS for word in line.split()}
    letters = dict.fromkeys("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-;", -9.0)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0), *sorted({**words, **letters}.items())]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def _save(pipe: Any, folder: Path, max_shard_size: str | None) -> Path:
    sharding = {"max_shard_size": max_shard_size} if max_shard_size else {}
    pipe.save_pretrained(folder, safe_serialization=True, **sharding)
    return folder
