"""A small training of our own, with the places that the recipe for diffusers' script of this name looks for."""

import math

import datasets
import diffusers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torchvision import transforms
from torchvision.transforms.functional import crop
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from tests.recipes.common import Steps, make_parser, stack

logger = get_logger(__name__)


def parse_args(input_args=None):
    parser = make_parser("train_data_dir", "pretrained_vae_model_name_or_path")
    parser.add_argument(
        "--image_interpolation_mode", default="lanczos", choices=[mode.value for mode in transforms.InterpolationMode]
    )
    if input_args is not None:  # noqa: SIM108
        args = parser.parse_args(input_args)
    else:
        args = parser.parse_args()
    if args.dataset_name is None and args.train_data_dir is None:
        raise ValueError("no images")
    return args


def import_model_class(subfolder):
    return CLIPTextModelWithProjection if subfolder.endswith("2") else CLIPTextModel


def encode_prompt(text_encoders, tokens):
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(text_encoders, tokens, strict=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds


def main(args):
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    args.mixed_precision = "no"
    if accelerator.is_local_main_process:
        datasets.utils.logging.set_verbosity_warning()
        diffusers.utils.logging.set_verbosity_warning()
    else:
        datasets.utils.logging.set_verbosity_error()
        diffusers.utils.logging.set_verbosity_error()
    set_seed(args.seed)
    model = args.pretrained_model_name_or_path
    tokenizer_one = AutoTokenizer.from_pretrained(model, subfolder="tokenizer")
    tokenizer_two = AutoTokenizer.from_pretrained(model, subfolder="tokenizer_2")
    text_encoder_cls_one = import_model_class("text_encoder")
    text_encoder_cls_two = import_model_class("text_encoder_2")
    noise_scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    text_encoder_one = text_encoder_cls_one.from_pretrained(model, subfolder="text_encoder")
    text_encoder_two = text_encoder_cls_two.from_pretrained(model, subfolder="text_encoder_2")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    vae.requires_grad_(False)
    text_encoder_one.requires_grad_(False)
    text_encoder_two.requires_grad_(False)
    weight_dtype = torch.float32
    if args.pretrained_vae_model_name_or_path is None:
        vae.to(accelerator.device, dtype=torch.float32)
    else:
        vae.to(accelerator.device, dtype=weight_dtype)
    text_encoder_one.to(accelerator.device, dtype=weight_dtype)
    text_encoder_two.to(accelerator.device, dtype=weight_dtype)

    def unwrap_model(model):
        return accelerator.unwrap_model(model)

    if args.dataset_name is not None:
        dataset = load_dataset(args.dataset_name)
    else:
        dataset = load_dataset("imagefolder", data_files={"train": f"{args.train_data_dir}/**"})
    interpolation = transforms.InterpolationMode(args.image_interpolation_mode)
    resize = transforms.Resize(args.resolution, interpolation=interpolation)
    to_pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])

    def preprocess_train(examples):
        examples["sizes"], examples["corners"], examples["pixel_values"] = [], [], []
        for image in examples["image"]:
            resized = resize(image.convert("RGB"))
            top, left = ((side - args.resolution) // 2 for side in (resized.height, resized.width))
            cut = crop(resized, top, left, args.resolution, args.resolution)
            examples["pixel_values"].append(to_pixels(cut))
            examples["sizes"].append(image.size[::-1])
            examples["corners"].append((top, left))
        for name, tokenizer in (("input_ids_one", tokenizer_one), ("input_ids_two", tokenizer_two)):
            tokens = tokenizer(examples["text"], padding="max_length", truncation=True, return_tensors="pt")
            examples[name] = tokens.input_ids
        return examples

    train_dataset = dataset["train"].with_transform(preprocess_train)

    def collate_fn(examples):
        batch = {name: stack(examples, name) for name in ("pixel_values", "input_ids_one", "input_ids_two")}
        return batch | {name: [example[name] for example in examples] for name in ("sizes", "corners")}

    train_dataloader = torch.utils.data.DataLoader(
        train_dataset, shuffle=True, collate_fn=collate_fn, batch_size=args.train_batch_size
    )

    overrode_max_train_steps = False
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
        overrode_max_train_steps = True
    steps = Steps(args, accelerator, unet, args.max_train_steps * args.gradient_accumulation_steps)
    unet, steps.optimizer, train_dataloader, steps.schedule = accelerator.prepare(
        unet, steps.optimizer, train_dataloader, steps.schedule
    )
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    if overrode_max_train_steps:
        args.max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / num_update_steps_per_epoch)
    steps.resume()
    for epoch in range(steps.done // num_update_steps_per_epoch, args.num_train_epochs):
        unet.train()
        logger.info(f"epoch {epoch} of {len(train_dataset)} images")
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                if args.pretrained_vae_model_name_or_path is not None:
                    pixel_values = batch["pixel_values"].to(dtype=weight_dtype)
                else:
                    pixel_values = batch["pixel_values"]
                model_input = vae.encode(pixel_values).latent_dist.sample() * vae.config.scaling_factor
                if args.pretrained_vae_model_name_or_path is None:
                    model_input = model_input.to(weight_dtype)
                noise = torch.randn_like(model_input)
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(model_input),))
                noisy = noise_scheduler.add_noise(model_input, noise, timesteps)

                def compute_time_ids(size, corner):
                    return torch.tensor([[*size, *corner, args.resolution, args.resolution]], dtype=weight_dtype)

                add_time_ids = torch.cat(list(map(compute_time_ids, batch["sizes"], batch["corners"])))
                prompt_embeds, pooled_prompt_embeds = encode_prompt(
                    [text_encoder_one, text_encoder_two], [batch["input_ids_one"], batch["input_ids_two"]]
                )
                added = {"time_ids": add_time_ids, "text_embeds": pooled_prompt_embeds}
                predicted = unet(noisy, timesteps, prompt_embeds, added_cond_kwargs=added).sample
                loss = F.mse_loss(predicted, noise)
                global_step = steps.done
                if args.debug_loss and "filenames" in batch:
                    for name in batch["filenames"]:
                        accelerator.log({"loss_for_" + name: loss.item()}, step=global_step)
                steps.step(loss, model_input)
            if steps.are_over():
                break
        if args.validation_prompt is not None:
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                args.pretrained_model_name_or_path,
                vae=vae,
                text_encoder=unwrap_model(text_encoder_one),
                text_encoder_2=unwrap_model(text_encoder_two),
                unet=unwrap_model(unet),
            )
            print("DRAWN", pipeline(args.validation_prompt, num_inference_steps=1, output_type="np").images.shape)
    if args.mixed_precision == "fp16":
        vae.to(weight_dtype)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path, vae=vae, revision=args.revision
    )
    print("MADE", type(pipeline.vae).__name__)
    steps.end()


if __name__ == "__main__":
    main(parse_args())
