"""The table of families: models that are trained from latents, and how their prompts are encoded.

A family is chosen by the `_class_name` in a folder's model_index.json. Its prompts are encoded by the encode_prompt of
its base pipeline, which the variants for img2img, inpainting, ControlNet and the like have copied.
"""

import re
from dataclasses import replace

from latentprep.prepare.models.family import LIST, MASK, Call, Family, Stored
from latentprep.records import MAX_CONTROLS

VARIANTS = r"(Control(Net(Union|XS)?)?)?(PAG)?(KV)?(Depth2Img|Img2Img|Inpaint(ing)?|Fill|Kontext(Inpaint)?)?Pipeline"
CLIP, CLIP_PROJECTION, T5 = ("CLIPTextModel",), ("CLIPTextModelWithProjection",), ("T5EncoderModel",)
GEMMA2 = ("Gemma2Model", "Gemma2ForCausalLM")
QWEN2_5_VL, QWEN3 = ("Qwen2_5_VLForConditionalGeneration",), ("Qwen3Model", "Qwen3ForCausalLM")
ONE_ENCODER = Stored(("text_encoder",))
EMBEDS_AND_MASK = Call(("prompt_embeds", "prompt_embeds_mask", None, None))
QWEN_EDIT = Family(
    "Qwen-Image-Edit",
    "QwenImageEdit",
    calls=(Call(("prompt_embeds", "prompt_embeds_mask")),),
    stores={"prompt_embeds": ONE_ENCODER},
    length=MASK,
    classes={"text_encoder": QWEN2_5_VL},
    sequence="text_encoder",
    default_tokens=2048,  # no prompt is cut: these are what shards are planned by; an image of 1024x1024 takes 1,369
    most_tokens=2048,
    tokens_argument=None,
    hidden_tokens=64,  # of the template
    one_by_one=True,  # its template has the images of one prompt
    has_special_tokens=True,
    call_defaults=("max_sequence_length",),
    patch=2,
    padding_side=None,  # of one prompt there is nothing to pad
    num_images=1,
)

FAMILIES = (
    Family(
        "Stable Diffusion 1 and 2",
        "StableDiffusion",
        calls=(Call(("prompt_embeds", None)),),
        stores={"prompt_embeds": ONE_ENCODER},
        classes={"text_encoder": CLIP},
        takes_clip_skip=True,
    ),
    Family(
        "SDXL",
        "StableDiffusionXL",
        calls=(Call(("prompt_embeds", None, "pooled_prompt_embeds", None)),),
        stores={
            "prompt_embeds": Stored(("text_encoder", "text_encoder_2")),
            "pooled_prompt_embeds": Stored(("text_encoder_2",), "projection_dim", tokens=1),
        },
        classes={"text_encoder": CLIP, "text_encoder_2": CLIP_PROJECTION},
        optional=("text_encoder",),  # the refiner has but the second
        heeds_force_upcast=True,
    ),
    Family(
        "Stable Diffusion 3",
        "StableDiffusion3",
        calls=(Call(("prompt_embeds", None, "pooled_prompt_embeds", None)),),
        stores={
            "prompt_embeds": Stored(("text_encoder_3",)),  # CLIP's tokens are filled up with zeros
            "pooled_prompt_embeds": Stored(("text_encoder", "text_encoder_2"), "projection_dim", tokens=1),
        },
        classes={"text_encoder": CLIP_PROJECTION, "text_encoder_2": CLIP_PROJECTION, "text_encoder_3": T5},
        optional=("text_encoder_3",),
        identity_projection=("text_encoder",),  # create_diffusers_clip_model_from_ldm, of clip_l
        sequence="text_encoder_3",
        default_tokens=256,
        most_tokens=512,
        has_clip_tokens=True,
        call_defaults=("prompt_2", "prompt_3"),
        patch=2,
    ),
    Family(
        "FLUX.1",
        "Flux",
        calls=(Call(("prompt_embeds", "pooled_prompt_embeds", "text_ids")),),
        stores={
            "prompt_embeds": Stored(("text_encoder_2",)),
            "pooled_prompt_embeds": Stored(("text_encoder",), tokens=1),
            "text_ids": Stored(values=3),
        },
        classes={"text_encoder": CLIP, "text_encoder_2": T5},
        sequence="text_encoder_2",
        default_tokens=512,
        most_tokens=512,
        patch=2,
    ),
    Family(
        "Z-Image",
        "ZImage",
        calls=(Call(("prompt_embeds", None)),),
        stores={"prompt_embeds": ONE_ENCODER},
        length=LIST,
        classes={"text_encoder": QWEN3},
        sequence="text_encoder",
        default_tokens=512,
        most_tokens=512,
        has_special_tokens=True,
        patch=2,
        padding_side=None,  # it takes the tokens that count
    ),
    Family(
        "FLUX.2",  # dev
        "Flux2",
        calls=(Call(("prompt_embeds", "text_ids")),),
        stores={"prompt_embeds": Stored(("text_encoder",), layers=3), "text_ids": Stored(values=4)},
        classes={"text_encoder": ("Mistral3ForConditionalGeneration",)},
        sequence="text_encoder",
        default_tokens=512,
        most_tokens=512,
        has_special_tokens=True,
        padding_side="left",  # as its denoiser was trained: Mistral3Tokenizer of ComfyUI (text_encoders/flux.py)
    ),
    Family(
        "FLUX.2 klein",
        "Flux2Klein",
        calls=(Call(("prompt_embeds", "text_ids")),),
        stores={"prompt_embeds": Stored(("text_encoder",), layers=3), "text_ids": Stored(values=4)},
        classes={"text_encoder": ("Qwen3ForCausalLM",)},
        sequence="text_encoder",
        default_tokens=512,
        most_tokens=512,
        has_special_tokens=True,
    ),
    Family(
        "Qwen-Image",
        "QwenImage",
        calls=(Call(("prompt_embeds", "prompt_embeds_mask")),),
        stores={"prompt_embeds": ONE_ENCODER},
        length=MASK,
        classes={"text_encoder": QWEN2_5_VL},
        sequence="text_encoder",
        default_tokens=512,
        most_tokens=1024,
        hidden_tokens=34,  # of the template; the tokenizer is told 1024 more, whatever is kept
        pads_to_longest=True,
        has_special_tokens=True,
        call_defaults=("max_sequence_length",),
        patch=2,
        padding_side=None,  # it takes the tokens that count
    ),
    QWEN_EDIT,
    replace(QWEN_EDIT, name="Qwen-Image-Edit Plus", stem="QwenImageEditPlus", num_images=MAX_CONTROLS),  # 2509, 2511
    Family(
        "Krea 2",
        "Krea2",
        calls=(Call(("prompt_embeds", "prompt_embeds_mask")),),
        stores={"prompt_embeds": Stored(("text_encoder",), layers="text_encoder_select_layers")},
        length=MASK,
        has_gaps=True,  # before the end of its template; its denoiser has one position for all tokens
        classes={"text_encoder": ("Qwen3VLModel",)},
        sequence="text_encoder",
        default_tokens=512,
        most_tokens=1024,
        has_special_tokens=True,
        settings_of_pipeline=("text_encoder_select_layers",),
        patch=2,
    ),
    Family(
        "Chroma",
        "Chroma",
        # its mask counts one token of padding
        calls=(Call(("prompt_embeds", "text_ids", "prompt_embeds_mask", None, None, None)),),
        stores={"prompt_embeds": ONE_ENCODER, "text_ids": Stored(values=3)},
        length=MASK,
        classes={"text_encoder": T5},
        sequence="text_encoder",
        default_tokens=512,
        most_tokens=512,
        patch=2,
    ),
    Family(
        "SANA",
        "Sana",
        calls=(EMBEDS_AND_MASK,),
        stores={"prompt_embeds": ONE_ENCODER},
        length=MASK,
        classes={"text_encoder": GEMMA2},
        sequence="text_encoder",
        default_tokens=300,
        most_tokens=300,
        call_defaults=("complex_human_instruction",),
        padding_side=None,  # encode_prompt sets it
    ),
    Family(
        "SANA-Sprint",
        "SanaSprint",
        calls=(Call(("prompt_embeds", "prompt_embeds_mask")),),
        stores={"prompt_embeds": ONE_ENCODER},
        length=MASK,
        classes={"text_encoder": GEMMA2},
        sequence="text_encoder",
        default_tokens=300,
        most_tokens=300,
        call_defaults=("complex_human_instruction",),
        padding_side=None,  # encode_prompt sets it
    ),
    Family(
        "Lumina 2",
        "Lumina2",
        calls=(EMBEDS_AND_MASK,),
        stores={"prompt_embeds": ONE_ENCODER},
        length=MASK,
        classes={"text_encoder": GEMMA2},
        sequence="text_encoder",
        default_tokens=256,
        most_tokens=512,
        patch=2,
        padding_side=None,  # its pipeline sets it
    ),
    Family(
        "PixArt-Alpha",
        "PixArtAlpha",
        calls=(EMBEDS_AND_MASK,),
        stores={"prompt_embeds": ONE_ENCODER},
        length=MASK,
        classes={"text_encoder": T5},
        sequence="text_encoder",
        default_tokens=120,
        most_tokens=120,
        call_defaults=("clean_caption",),
        packages=("bs4", "ftfy"),
        patch=2,
    ),
    Family(
        "PixArt-Sigma",
        "PixArtSigma",
        calls=(EMBEDS_AND_MASK,),
        stores={"prompt_embeds": ONE_ENCODER},
        length=MASK,
        classes={"text_encoder": T5},
        sequence="text_encoder",
        default_tokens=300,
        most_tokens=300,
        call_defaults=("clean_caption",),
        packages=("bs4", "ftfy"),
        patch=2,
    ),
    Family(
        "PRX",
        "PRX",
        calls=(EMBEDS_AND_MASK,),
        stores={"prompt_embeds": ONE_ENCODER},
        length=MASK,
        has_gaps=True,  # Gemma's tokenizer pads on the left; its denoiser gives text no positions
        classes={"text_encoder": ("T5GemmaEncoder",)},
        sequence="text_encoder",
        default_tokens=256,
        most_tokens=256,
        tokens_argument="tokenizer_max_length",
        packages=("ftfy",),
        patch=2,
        padding_side=None,
    ),
    Family(
        "AuraFlow",
        "AuraFlow",
        calls=(EMBEDS_AND_MASK,),
        stores={"prompt_embeds": ONE_ENCODER},
        length=MASK,
        is_full=True,  # its denoiser takes no mask: padding counts, and all of it is zeros
        classes={"text_encoder": ("UMT5EncoderModel",)},
        sequence="text_encoder",
        default_tokens=256,
        most_tokens=256,
        heeds_force_upcast=True,
        patch=2,
        has_gaps=True,  # its denoiser gives text no positions
        padding_side=None,
    ),
    Family(
        "HunyuanDiT",
        "HunyuanDiT",
        calls=(
            Call(
                ("prompt_embeds", None, "prompt_embeds_mask", None),
                {"text_encoder_index": 0, "max_sequence_length": 77},
            ),
            Call(
                ("prompt_embeds_2", None, "prompt_embeds_2_mask", None),
                {"text_encoder_index": 1, "max_sequence_length": 256},
            ),
        ),
        # its denoiser pools all that T5 gives, padding too (HunyuanDiTAttentionPool), before it heeds the masks
        stores={
            "prompt_embeds": Stored(("text_encoder",), tokens=77),
            "prompt_embeds_mask": Stored(values=1, tokens=77),
            "prompt_embeds_2": Stored(("text_encoder_2",)),
            "prompt_embeds_2_mask": Stored(values=1),
        },
        classes={"text_encoder": ("BertModel",), "text_encoder_2": T5},
        sequence="text_encoder_2",
        default_tokens=256,
        most_tokens=256,
        tokens_argument=None,
        patch=2,
    ),
    Family(
        "HunyuanImage 2.1",
        "HunyuanImage",
        calls=(Call(("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_2_mask")),),
        stores={"prompt_embeds": ONE_ENCODER, "prompt_embeds_2": Stored(("text_encoder_2",), tokens=128)},
        length=MASK,
        may_be_empty=("prompt_embeds_2",),  # of what a prompt has in quotes
        classes={"text_encoder": QWEN2_5_VL, "text_encoder_2": T5},
        sequence="text_encoder",
        default_tokens=1000,
        most_tokens=1000,
        tokens_argument=None,
        has_special_tokens=True,
    ),
    Family(
        "CogView4",
        "CogView4",
        calls=(Call(("prompt_embeds", None)),),
        stores={"prompt_embeds": ONE_ENCODER},
        length=LIST,
        one_by_one=True,  # else padded on the left to the batch's longest and a multiple of 16, and all of that counts
        classes={"text_encoder": ("GlmModel",)},
        sequence="text_encoder",
        default_tokens=1024,
        most_tokens=1024,
        patch=2,
        padding_side=None,  # of one prompt there is nothing to pad
    ),
    Family(
        "HiDream-I1",
        "HiDreamImage",
        calls=(Call(("prompt_embeds_t5", None, "prompt_embeds_llama3", None, "pooled_prompt_embeds", None)),),
        stores={
            "prompt_embeds_t5": Stored(("text_encoder_3",)),
            "prompt_embeds_llama3": Stored(("text_encoder_4",), layers="num_hidden_layers"),
            "pooled_prompt_embeds": Stored(("text_encoder", "text_encoder_2"), "projection_dim", tokens=1),
        },
        batch_axis={"prompt_embeds_llama3": 1},  # [layers,P,T,D] is stored as [P,layers,T,D]
        classes={
            "text_encoder": CLIP_PROJECTION,
            "text_encoder_2": CLIP_PROJECTION,
            "text_encoder_3": T5,
            "text_encoder_4": ("LlamaForCausalLM",),
        },
        sequence="text_encoder_3",
        default_tokens=128,
        least_tokens=2,  # its CLIPs end a prompt with a token of their own
        most_tokens=128,
        without_pad=("text_encoder_4",),  # its pipeline gives it one
        patch=2,
    ),
    Family(
        "Kolors",
        "Kolors",
        calls=(Call(("prompt_embeds", None, "pooled_prompt_embeds", None)),),
        stores={"prompt_embeds": ONE_ENCODER, "pooled_prompt_embeds": Stored(("text_encoder",), tokens=1)},
        classes={"text_encoder": ("ChatGLMModel",)},
        sequence="text_encoder",
        default_tokens=256,
        most_tokens=256,
        packages=("sentencepiece",),
        heeds_force_upcast=True,
        padding_side="left",  # its tokenizer knows no other
    ),
    Family(
        "ERNIE-Image",
        "ErnieImage",
        calls=(Call(("prompt_embeds",)),),
        stores={"prompt_embeds": ONE_ENCODER},
        length=LIST,
        classes={"text_encoder": ("Mistral3Model",)},
        sequence="text_encoder",
        default_tokens=2048,
        most_tokens=2048,
        tokens_argument=None,  # its tokenizer cuts where its own config says
        without_pad=("text_encoder",),
        one_by_one=True,
        norm_eps=1e-5,  # the config of its VAE says another (pipeline_ernie_image.py, __call__)
        padding_side=None,  # of one prompt there is nothing to pad
    ),
)


def find_family(class_name: object) -> Family | None:
    """The family of a pipeline class, by its name; None where it is none of FAMILIES."""
    return next((family for family in FAMILIES if re.fullmatch(family.stem + VARIANTS, str(class_name))), None)
