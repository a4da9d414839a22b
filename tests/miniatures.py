"""A miniature of every family: its own classes and its own tokenizer's kind, with random weights and few of them."""

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tests.conftest import TINY

IMAGE_TOKEN = "<|image_pad|>"
TOKENS = [*json.loads((TINY / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))][:256]  # a symbol for each byte
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>{% endif %}{% endif %}"
)
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
}  # fmt: skip
WINDOWED: dict[str, Any] = {"sliding_window": 4096, "query_pre_attn_scalar": 8}


def make_vae(**config: Any) -> Any:
    """An AutoencoderKL of factor 8."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, layers_per_block=1, **config,
    )  # fmt: skip


def make_flux_vae(**config: Any) -> Any:
    return make_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **config)


def make_flux2_vae() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=8, layers_per_block=1, latent_channels=4
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.1, 4)
    return vae


def make_qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, latents_mean=[0.5, -0.5, 0.0, 1.0],
        latents_std=[2.0, 1.0, 0.5, 3.0],
    ).eval()  # fmt: skip


def make_sana_vae() -> Any:
    six = {"encoder_block_out_channels": (8,) * 6, "decoder_block_out_channels": (8,) * 6}
    layers = {"encoder_layers_per_block": (1,) * 6, "decoder_layers_per_block": (1,) * 6}
    blocks = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock", "attention_head_dim": 8}
    return diffusers.AutoencoderDC(latent_channels=8, scaling_factor=0.41, **six, **layers, **blocks).eval()


def make_hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(32,) * 6, layers_per_block=1,
        spatial_compression_ratio=32, sample_size=64, scaling_factor=0.75,
    ).eval()  # fmt: skip


def make_clip(projection: bool = False, width: int = 32, **config: Any) -> Any:
    """With random layer norms, as trained ones have: else the mean of a token's values would be 0."""
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    clip = kind(
        transformers.CLIPTextConfig(
            vocab_size=514, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=4,
            projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513, **config,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if "layer_norm" in name:
                parameter.add_(torch.rand_like(parameter))
    return clip


def make_clip_tokenizer(**options: Any) -> Any:
    return transformers.CLIPTokenizer.from_pretrained(TINY / "tokenizer", **options)


def make_t5(kind: str = "T5", **config: Any) -> Any:
    made = getattr(transformers, f"{kind}Config")(
        vocab_size=400, d_model=80, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", **config
    )
    return getattr(transformers, f"{kind}EncoderModel")(made).eval()


def make_t5_tokenizer(vocab: list[tuple[str, float]] | None = None, **options: Any) -> Any:
    """T5's tokenizer of (piece, score) pairs, of which the first are <pad>, </s> and <unk>; without any: of letters."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,.0123456789\"'"]
    pieces = vocab or [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁house", -4.0), *letters]
    options = {"extra_ids": 0, **options}
    if not transformers.__version__.startswith("4."):
        return transformers.T5TokenizerFast(vocab=pieces, **options)
    made = Tokenizer(models.Unigram(pieces, unk_id=2))  # transformers 4 takes no vocab: what 5 makes of it
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=made, **options)


def make_qwen_tokenizer(folder: Path) -> Any:
    """Qwen's, of 256 bytes and no merges, with the special tokens of its chats."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: n for n, symbol in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["assistant"])  # so that the end of Krea 2's template has five tokens, as it has for Qwen's
    tokenizer.chat_template = CHAT
    return tokenizer


def make_bytes_tokenizer(begin: str | None = None, **options: Any) -> Any:
    """One of Rust that is of no class of its own, as of Llama, GLM and Mistral: 256 bytes, and what begins a text."""
    special = ["<pad>", "<eos>", "<bos>"]
    made = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate([*TOKENS, *special])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    if begin is not None:
        made.post_processor = processors.TemplateProcessing(f"{begin} $A", f"{begin} $A $B", [(begin, 258)])
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", **options}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named)


def make_gemma_tokenizer(**options: Any) -> Any:
    vocab = {token: n for n, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *map(chr, range(33, 127))])}
    if not transformers.__version__.startswith("4."):
        return transformers.GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True, **options)
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    made.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", 2)])
    return transformers.GemmaTokenizerFast(tokenizer_object=made, **options)


def make_llm(kind: str, config: str | None = None, **options: Any) -> Any:
    made = getattr(transformers, config or f"{kind.removesuffix('Model').removesuffix('ForCausalLM')}Config")
    return getattr(transformers, kind)(made(**{**SMALL, **options})).eval()


def make_qwen_vl(kind: str, config: str, tokens: int, layers: int = 3, **options: int) -> Any:
    """A model that sees images too, of which a prompt uses the language half."""
    text = {
        **SMALL, "num_hidden_layers": layers, "vocab_size": tokens,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    eyes: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    if config == "Qwen3VLConfig":
        eyes |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    made = getattr(transformers, config)(text_config=text, vision_config=eyes, **options)
    return getattr(transformers, kind)(made).eval()


def make_mistral(kind: str, layers: int) -> Any:
    text = {"model_type": "mistral", **SMALL, "num_hidden_layers": layers, "vocab_size": 300}
    eyes = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return getattr(transformers, kind)(transformers.Mistral3Config(text_config=text, vision_config=eyes)).eval()


def stable_diffusion(folder: Path) -> dict[str, Any]:  # 2: OpenCLIP's text encoder, whose padding is "!"
    return {
        "text_encoder": make_clip(hidden_act="gelu"), "tokenizer": make_clip_tokenizer(pad_token="!"),
        "vae": make_vae(latent_channels=4), "safety_checker": None, "feature_extractor": None,
        "requires_safety_checker": False,
    }  # fmt: skip


def sdxl(folder: Path) -> dict[str, Any]:
    return {
        "text_encoder": make_clip(), "tokenizer": make_clip_tokenizer(), "vae": make_vae(latent_channels=4),
        "text_encoder_2": make_clip(True, 48, hidden_act="gelu"), "tokenizer_2": make_clip_tokenizer(pad_token="!"),
    }  # fmt: skip


def sd3(folder: Path) -> dict[str, Any]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=80,
        caption_projection_dim=8, pooled_projection_dim=80, pos_embed_max_size=8,
    )  # fmt: skip
    return {
        "text_encoder": make_clip(True), "tokenizer": make_clip_tokenizer(), "text_encoder_2": make_clip(True, 48),
        "tokenizer_2": make_clip_tokenizer(pad_token="!"), "text_encoder_3": make_t5(),
        "tokenizer_3": make_t5_tokenizer(model_max_length=512), "transformer": transformer, "vae": make_flux_vae(),
    }  # fmt: skip


def flux(folder: Path) -> dict[str, Any]:
    return {
        "text_encoder": make_clip(), "tokenizer": make_clip_tokenizer(), "text_encoder_2": make_t5(),
        "tokenizer_2": make_t5_tokenizer(model_max_length=512), "vae": make_flux_vae(),
    }  # fmt: skip


def zimage(folder: Path) -> dict[str, Any]:
    tokenizer = make_qwen_tokenizer(folder)
    encoder = make_llm("Qwen3Model", vocab_size=len(tokenizer))
    return {"text_encoder": encoder, "tokenizer": tokenizer, "vae": make_flux_vae()}


def flux2(folder: Path) -> dict[str, Any]:
    tokenizer = make_bytes_tokenizer(extra_special_tokens=["<|im_start|>", "<|im_end|>"], padding_side="left")
    tokenizer.chat_template = CHAT
    encoder = make_mistral("Mistral3ForConditionalGeneration", 31)
    return {"text_encoder": encoder, "tokenizer": tokenizer, "vae": make_flux2_vae()}


def klein(folder: Path) -> dict[str, Any]:
    tokenizer = make_qwen_tokenizer(folder)
    encoder = make_llm("Qwen3ForCausalLM", vocab_size=len(tokenizer), num_hidden_layers=28)
    return {"text_encoder": encoder, "tokenizer": tokenizer, "vae": make_flux2_vae()}


def qwen_image(folder: Path) -> dict[str, Any]:
    tokenizer = make_qwen_tokenizer(folder)
    encoder = make_qwen_vl("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", len(tokenizer))
    return {"text_encoder": encoder, "tokenizer": tokenizer, "vae": make_qwen_vae()}


def qwen_edit(folder: Path) -> dict[str, Any]:
    """With eyes for images of 28 pixels a token, and few of these: a picture of 1024x1024 is one of 84x84 to it."""
    tokenizer = make_qwen_tokenizer(folder)
    tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN, "<|video_pad|>"], special_tokens=True)
    encoder = make_qwen_vl("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", len(tokenizer), **{
        name: tokenizer.convert_tokens_to_ids(token) for name, token in (
            ("image_token_id", IMAGE_TOKEN), ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
        )
    })  # fmt: skip
    processor = make_processor(tokenizer, min_pixels=28 * 28, max_pixels=84 * 84)
    return {"text_encoder": encoder, "processor": processor, "tokenizer": tokenizer, "vae": make_qwen_vae()}


def with_positions(pipeline: Any) -> Any:
    """A copy whose text encoder hears which tokens are of images, as the model's authors had it.

    transformers has asked for that since 5, and diffusers leaves it out: its pull request 14189 is this.
    """
    made, encoder = copy.copy(pipeline), copy.deepcopy(pipeline.text_encoder)
    forward = encoder.forward

    def tell(input_ids: Any, **options: Any) -> Any:
        of_images = {"mm_token_type_ids": (input_ids == encoder.config.image_token_id).int()}
        return forward(input_ids=input_ids, **of_images, **options)

    if "mm_token_type_ids" in inspect.signature(forward).parameters:
        encoder.forward = tell
    made.register_modules(text_encoder=encoder)
    return made


def make_processor(tokenizer: Any, **sizes: int) -> Any:
    """Qwen's own, but for videos: what processes those needs torchvision."""
    images = next(
        getattr(transformers, f"Qwen2VLImageProcessor{suffix}")
        for suffix in ("Pil", "")
        if hasattr(transformers, f"Qwen2VLImageProcessor{suffix}")
    )
    processor = object.__new__(transformers.Qwen2VLProcessor)
    own = {"image_token": IMAGE_TOKEN, "video_token": "<|video_pad|>", "chat_template": None}
    own |= {f"{name}_id": tokenizer.convert_tokens_to_ids(own[name]) for name in ("image_token", "video_token")}
    for name, value in {"image_processor": images(**sizes), "tokenizer": tokenizer, **own}.items():
        setattr(processor, name, value)

    def save(folder: Path, **options: Any) -> None:
        for part in (processor.image_processor, tokenizer):
            part.save_pretrained(folder)

    processor.save_pretrained = save
    return processor


def krea2(folder: Path) -> dict[str, Any]:
    tokenizer = make_qwen_tokenizer(folder)
    encoder = make_qwen_vl("Qwen3VLModel", "Qwen3VLConfig", len(tokenizer), layers=6)
    own = {"text_encoder_select_layers": (1, 3, 5)}
    return {"text_encoder": encoder, "tokenizer": tokenizer, "vae": make_qwen_vae(), **own}


def chroma(folder: Path) -> dict[str, Any]:
    own = {"tokenizer": make_t5_tokenizer(model_max_length=512), "vae": make_flux_vae()}
    return {"text_encoder": make_t5(), **own}


def sana(folder: Path) -> dict[str, Any]:
    tokenizer = make_gemma_tokenizer()
    # the instruction before each prompt has 1,800 letters
    words = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer.add_tokens(sorted({word for line in words for word in line.split() if len(word) > 2}))
    encoder = make_llm("Gemma2Model", vocab_size=len(tokenizer), **WINDOWED)
    return {"text_encoder": encoder, "tokenizer": tokenizer, "vae": make_sana_vae()}


def lumina2(folder: Path) -> dict[str, Any]:
    return {**sana(folder), "vae": make_flux_vae()}


def pixart(folder: Path) -> dict[str, Any]:
    return {**chroma(folder), "vae": make_vae(latent_channels=4)}


def prx(folder: Path) -> dict[str, Any]:
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    config = T5GemmaModuleConfig(**SMALL, **WINDOWED, vocab_size=200, dropout_rate=0.0)
    tokenizer = make_gemma_tokenizer(model_max_length=256)
    return {"text_encoder": T5GemmaEncoder(config).eval(), "tokenizer": tokenizer, "vae": make_flux_vae()}


def auraflow(folder: Path) -> dict[str, Any]:
    return {**pixart(folder), "text_encoder": make_t5("UMT5")}


def hunyuan_dit(folder: Path) -> dict[str, Any]:
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77,
    )  # fmt: skip
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127)), *("##" + c for c in "abcdefghij")]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocab))
    return {
        "text_encoder": transformers.BertModel(config).eval(), "vae": make_vae(latent_channels=4),
        "tokenizer": transformers.BertTokenizer.from_pretrained(folder, model_max_length=77),
        "text_encoder_2": make_t5(), "tokenizer_2": make_t5_tokenizer(), "requires_safety_checker": False,
    }  # fmt: skip


def hunyuan_image(folder: Path) -> dict[str, Any]:
    own = {"text_encoder_2": make_t5(), "tokenizer_2": transformers.ByT5Tokenizer(), "vae": make_hunyuan_vae()}
    return {**qwen_image(folder), **own}


def cogview4(folder: Path) -> dict[str, Any]:
    encoder = make_llm("GlmModel", vocab_size=300, pad_token_id=256)
    tokenizer = make_bytes_tokenizer("<bos>", padding_side="left")
    return {"text_encoder": encoder, "tokenizer": tokenizer, "vae": make_flux_vae()}


def hidream(folder: Path) -> dict[str, Any]:
    long = {"max_position_embeddings": 248}
    return {
        "text_encoder": make_clip(True, **long), "text_encoder_2": make_clip(True, 48, **long),
        "tokenizer": make_clip_tokenizer(model_max_length=248), "text_encoder_3": make_t5(),
        "tokenizer_2": make_clip_tokenizer(model_max_length=248), "tokenizer_3": make_t5_tokenizer(),
        "text_encoder_4": make_llm("LlamaForCausalLM", vocab_size=300),
        "tokenizer_4": make_bytes_tokenizer("<bos>"), "vae": make_flux_vae(),
    }  # fmt: skip


def kolors(folder: Path) -> dict[str, Any]:
    import sentencepiece
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("a red house in the snow, with one cat and two dogs\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=23, minloglevel=2
    )
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=100, hidden_size=32, ffn_hidden_size=48, kv_channels=8, num_attention_heads=4,
        seq_length=300, multi_query_attention=True, multi_query_group_num=2, layernorm_epsilon=1e-5,
        add_qkv_bias=True, original_rope=True, rmsnorm=True,
    )  # fmt: skip
    encoder = ChatGLMModel(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # it comes as memory was
            parameter.uniform_(-0.2, 0.2)
    tokenizer = ChatGLMTokenizer(str(folder / "tokenizer.model"))
    return {"text_encoder": encoder, "tokenizer": tokenizer, "vae": make_vae(latent_channels=4)}


def ernie(folder: Path) -> dict[str, Any]:
    tokenizer = make_bytes_tokenizer("<bos>", model_max_length=200)
    return {"text_encoder": make_mistral("Mistral3Model", 3), "tokenizer": tokenizer, "vae": make_flux2_vae()}


# Stem of a family -> what makes the parts of its pipeline; the folder is one to work in.
PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "StableDiffusion": stable_diffusion, "StableDiffusionXL": sdxl, "StableDiffusion3": sd3, "Flux": flux,
    "ZImage": zimage, "Flux2": flux2, "Flux2Klein": klein, "QwenImage": qwen_image, "Krea2": krea2, "Chroma": chroma,
    "QwenImageEdit": qwen_edit, "QwenImageEditPlus": qwen_edit,
    "Sana": sana, "SanaSprint": sana, "Lumina2": lumina2, "PixArtAlpha": pixart, "PixArtSigma": pixart, "PRX": prx,
    "AuraFlow": auraflow, "HunyuanDiT": hunyuan_dit, "HunyuanImage": hunyuan_image, "CogView4": cogview4,
    "HiDreamImage": hidream, "Kolors": kolors, "ErnieImage": ernie,
}  # fmt: skip


def make_miniature(stem: str, folder: Path) -> Any:
    """The whole pipeline of a family, without its denoiser, as diffusers has it."""
    torch.manual_seed(0)
    return assemble(stem, PARTS[stem](folder))


def assemble(stem: str, parts: dict[str, Any]) -> Any:
    kind = getattr(diffusers, f"{stem}Pipeline")
    parameters = inspect.signature(kind.__init__).parameters
    missing = {name: None for name, p in parameters.items() if p.default is p.empty and name != "self"}
    return kind(**{**missing, **parts})
