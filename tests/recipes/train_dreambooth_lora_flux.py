"""A small training of our own, with the places that the recipe for diffusers' script of this name looks for."""

import copy
import math

import diffusers
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torchvision import transforms
from torchvision.transforms.functional import crop
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from tests.recipes.common import Steps, make_parser, stack

logger = get_logger(__name__)


def parse_args(input_args=None):
    parser = make_parser("instance_data_dir", "instance_prompt")
    parser.add_argument("--class_data_dir")
    if input_args is not None:  # noqa: SIM108
        args = parser.parse_args(input_args)
    else:
        args = parser.parse_args()
    if args.dataset_name is None and args.instance_data_dir is None:
        raise ValueError("no images")
    return args


def load_text_encoders(class_one, class_two):
    model = args.pretrained_model_name_or_path
    return (
        class_one.from_pretrained(model, subfolder="text_encoder"),
        class_two.from_pretrained(model, subfolder="text_encoder_2"),
    )


def import_model_class(subfolder):
    return T5EncoderModel if subfolder.endswith("2") else CLIPTextModel


class DreamBoothDataset(torch.utils.data.Dataset):
    def __init__(self, name, size):
        from datasets import load_dataset

        rows = load_dataset(name)["train"]
        self.custom_instance_prompts = rows["text"]
        resize = transforms.Resize(size, interpolation=transforms.InterpolationMode.BILINEAR)
        to_pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
        resized = [resize(image.convert("RGB")) for image in rows["image"]]
        corners = [((image.height - size) // 2, (image.width - size) // 2) for image in resized]
        self.pixel_values = [
            to_pixels(crop(image, *corner, size, size)) for image, corner in zip(resized, corners, strict=True)
        ]

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "prompt": self.custom_instance_prompts[index]}


def collate_fn(examples):
    return {"pixel_values": stack(examples, "pixel_values"), "prompts": [example["prompt"] for example in examples]}


def main(args):
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(args.seed)
    diffusers.utils.logging.set_verbosity_warning()
    model = args.pretrained_model_name_or_path
    tokenizer_one = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    tokenizer_two = T5TokenizerFast.from_pretrained(model, subfolder="tokenizer_2")
    text_encoder_cls_one = import_model_class("text_encoder")
    text_encoder_cls_two = import_model_class("text_encoder_2")
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
    noise_scheduler_copy = copy.deepcopy(noise_scheduler)
    text_encoder_one, text_encoder_two = load_text_encoders(text_encoder_cls_one, text_encoder_cls_two)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    transformer = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
    vae.requires_grad_(False)
    text_encoder_one.requires_grad_(False)
    text_encoder_two.requires_grad_(False)
    weight_dtype = torch.float32
    vae.to(accelerator.device, dtype=weight_dtype)
    text_encoder_one.to(accelerator.device, dtype=weight_dtype)
    text_encoder_two.to(accelerator.device, dtype=weight_dtype)

    def unwrap_model(model):
        return accelerator.unwrap_model(model)

    train_dataset = DreamBoothDataset(args.dataset_name, args.resolution)
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset, shuffle=True, collate_fn=collate_fn, batch_size=args.train_batch_size
    )

    clip, t5 = text_encoder_one, text_encoder_two

    @torch.no_grad()
    def compute_text_embeddings(prompts):
        ids = [
            tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            for tokenizer, length in ((tokenizer_one, 77), (tokenizer_two, 512))
        ]
        embeds = t5(ids[1])[0]
        return embeds, clip(ids[0]).pooler_output, torch.zeros(embeds.shape[1], 3)

    vae_config_shift_factor = vae.config.shift_factor
    vae_config_scaling_factor = vae.config.scaling_factor
    if args.cache_latents:
        latents_cache = []
        for batch in train_dataloader:
            latents_cache.append(vae.encode(batch["pixel_values"]).latent_dist)  # noqa: PERF401

    if args.max_train_steps is None:
        len_train_dataloader_after_sharding = math.ceil(len(train_dataloader) / accelerator.num_processes)
        num_update_steps_per_epoch = math.ceil(len_train_dataloader_after_sharding / args.gradient_accumulation_steps)
        num_steps = args.num_train_epochs * num_update_steps_per_epoch * accelerator.num_processes
    else:
        num_steps = args.max_train_steps * accelerator.num_processes
    steps = Steps(args, accelerator, transformer, num_steps)
    transformer, steps.optimizer, train_dataloader, steps.schedule = accelerator.prepare(
        transformer, steps.optimizer, train_dataloader, steps.schedule
    )
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / num_update_steps_per_epoch)
    steps.resume()
    for epoch in range(steps.done // num_update_steps_per_epoch, args.num_train_epochs):
        transformer.train()
        logger.info(f"epoch {epoch} of {len(train_dataset)} images")
        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(transformer):
                prompts = batch["prompts"]
                if train_dataset.custom_instance_prompts:
                    prompt_embeds, pooled_prompt_embeds, text_ids = compute_text_embeddings(prompts)
                if args.cache_latents:
                    model_input = latents_cache[step].sample()
                else:
                    model_input = vae.encode(batch["pixel_values"]).latent_dist.sample()
                model_input = (model_input - vae_config_shift_factor) * vae_config_scaling_factor
                vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
                noise = torch.randn_like(model_input)
                count, channels, height, width = model_input.shape
                indices = (torch.rand(count) * noise_scheduler_copy.config.num_train_timesteps).long()
                sigmas = noise_scheduler_copy.sigmas[indices].view(-1, 1, 1, 1)
                predicted = transformer(
                    hidden_states=FluxPipeline._pack_latents(
                        (1 - sigmas) * model_input + sigmas * noise, count, channels, height, width
                    ),
                    timestep=noise_scheduler_copy.timesteps[indices] / 1000,
                    guidance=torch.ones(count),
                    pooled_projections=pooled_prompt_embeds,
                    encoder_hidden_states=prompt_embeds,
                    txt_ids=text_ids,
                    img_ids=FluxPipeline._prepare_latent_image_ids(
                        count, height // 2, width // 2, accelerator.device, weight_dtype
                    ),
                    return_dict=False,
                )[0]
                predicted = FluxPipeline._unpack_latents(
                    predicted, height * vae_scale_factor, width * vae_scale_factor, vae_scale_factor
                )
                loss = (predicted - (noise - model_input)) ** 2
                loss = loss.mean()
                steps.step(loss, model_input)
            if steps.are_over():
                break
        if args.validation_prompt is not None:
            if not args.train_text_encoder:
                text_encoder_one, text_encoder_two = load_text_encoders(text_encoder_cls_one, text_encoder_cls_two)
            pipeline = FluxPipeline.from_pretrained(
                args.pretrained_model_name_or_path,
                vae=vae,
                text_encoder=text_encoder_one,
                text_encoder_2=text_encoder_two,
                transformer=unwrap_model(transformer),
            )
            size = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "np"}
            print("DRAWN", pipeline(args.validation_prompt, **size).images.shape)
            if not args.train_text_encoder:
                del text_encoder_one, text_encoder_two
    steps.end()


if __name__ == "__main__":
    args = parse_args()
    main(args)
