"""The training loop of DreamBooth for Stable Diffusion 3.

Around it: options in `settings`, pictures and noise in `data`, what learns in `model`, what is written in `saving`.
"""

import json
import os
import shutil
import types
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list, send_to_device, set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, free_memory
from diffusers.utils import is_bitsandbytes_version
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .. import files
from ..loading.device import check_launch, is_out_of_memory, pick_device
from . import reporting, saving
from .checks import check
from .data import Row, Samples, class_rows, collate, instance_rows, passed_over
from .model import Denoiser, check_transformer, encode_all, load, make_optimizer, make_trainable, quantized
from .settings import DreamBoothError, Settings

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def noise_levels(u: torch.Tensor, scheduler: FlowMatchEulerDiscreteScheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmas (B, 1, 1, 1) and timesteps (B,) at places u (B,) of the schedule; 0 is pure noise, 1 nearly none."""
    last = scheduler.config.num_train_timesteps - 1
    i = (u * scheduler.config.num_train_timesteps).long().clamp(0, last)  # "mode" reaches 1 itself
    return scheduler.sigmas[i][:, None, None, None], scheduler.timesteps[i]


def flow_matching_loss(
    velocity: torch.Tensor,
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    weighting_scheme: str = "logit_normal",
    precondition: bool = False,
) -> torch.Tensor:
    """Conditional flow matching (arXiv 2403.03206, section 3): each sample's squared error of the velocity, (B,).

    Args:
        velocity: what the model says at x = (1 - sigma) x0 + sigma noise, (B, C, h, w).
        x0, noise: latents and noise, (B, C, h, w).
        sigma: (B, 1, 1, 1) in 0..1.
        weighting_scheme: weights of diffusers' `compute_loss_weighting_for_sd3`; 1 for logit_normal and mode.
        precondition: compare x - sigma velocity with x0, so that the error counts sigma squared times.
    """
    error = velocity.float() - (noise - x0)
    if precondition:
        error = sigma * error
    return (compute_loss_weighting_for_sd3(weighting_scheme, sigma) * error.square()).flatten(1).mean(1)


@torch.no_grad()
def latents(batch: dict, vae: AutoencoderKL) -> torch.Tensor:
    """A batch's x0 (B, C, h, w): drawn from the autoencoder's distribution, then shifted and scaled as SD3 wants it."""
    found = vae.encode(batch["pixels"]).latent_dist if "pixels" in batch else types.SimpleNamespace(**batch)
    shift = vae.config.shift_factor or 0.0  # often forgotten: diffusers issues 8708, 8887
    return (found.mean + found.std * batch["draw"] - shift) * vae.config.scaling_factor


def sample_losses(s: Settings, batch: dict, model, vae: AutoencoderKL, scheduler, prompts: dict) -> torch.Tensor:
    """The loss (B,) of a batch of `data.collate`, by a `Denoiser`; `prompts` holds each caption's `encode`d tensors."""
    device = next(model.parameters()).device
    sigma, timesteps = (t.to(device) for t in noise_levels(batch.pop("u").flatten(), scheduler))
    queued = device.type == "cuda"  # Apple's GPUs copy from, and to, memory that is in use again (pytorch issue 189690)
    batch = send_to_device(batch, device, non_blocking=queued)
    x0, noise, captions = latents(batch, vae), batch["noise"], batch["caption"]
    x = (1 - sigma) * x0 + sigma * noise
    embeds, pooled = (
        torch.cat([t.to(device, non_blocking=queued) for t in parts])
        for parts in zip(*(prompts[c] for c in captions), strict=True)
    )
    velocity = model(x.to(embeds.dtype), timesteps, embeds, pooled, captions)
    return flow_matching_loss(velocity, x0, noise, sigma, s.weighting_scheme, bool(s.precondition_outputs))


def make_accelerator(settings: Settings) -> Accelerator:
    device = pick_device()
    on_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    if not on_cpu:
        check_launch(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    precision = settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision == "fp16" and on_cpu:
        raise DreamBoothError("fp16 needs a GPU, and this training is on the CPU: use --mixed_precision no, or bf16.")
    if settings.use_8bit_adam and on_cpu and is_bitsandbytes_version("<", "0.50.0"):
        raise DreamBoothError("--use_8bit_adam on a CPU needs a newer package: pip install -U bitsandbytes.")
    if precision == "bf16" and not on_cpu and device == "mps":
        raise DreamBoothError("bf16 does not train on Apple's GPUs: use --mixed_precision fp16, or no.")
    out = Path(settings.output_dir)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / settings.logging_dir)),
    )
    if (counts := accelerator.gradient_accumulation_steps) != settings.gradient_accumulation_steps:
        raise DreamBoothError(  # its own setting, of the environment or of DeepSpeed, wins
            f"accelerate is configured for {counts} gradient accumulation steps, and --gradient_accumulation_steps is "
            f"{settings.gradient_accumulation_steps}: give both the same number."
        )
    return accelerator


def train(settings: Settings) -> Path:
    """Teach the model and write the result to the output folder, which is returned.

    In it: the LoRA (`pytorch_lora_weights.safetensors`) or a whole pipeline, `losses.jsonl` (a line an update: step,
    loss, lr), checkpoints, and validation pictures.

    Raises:
        DreamBoothError, LoadError: whatever stops it, in one sentence; what was saved before is kept.
    """
    check(settings)
    accelerator = make_accelerator(settings)
    if settings.base_quantization and accelerator.device.type == "cpu":
        raise DreamBoothError("--base_quantization needs a GPU, and this training is on the CPU: leave it out.")
    rows = instance_rows(settings)
    check_transformer(settings)
    with files.lock(settings.output_dir):
        check(settings)  # again: what another training wrote meanwhile
        return _train(settings, accelerator, rows)


def _train(s: Settings, accelerator: Accelerator, rows: list[Row]) -> Path:
    main, device = accelerator.is_main_process, accelerator.device
    out, resumed = Path(s.output_dir), saving.find_checkpoint(s)
    progress = saving.read_progress(s, accelerator, resumed) if resumed else {"step": 0}
    drawn = int.from_bytes(os.urandom(4), "little") if s.seed is None else s.seed
    seed = broadcast_object_list([progress.get("seed", drawn)])[0]
    if main:
        if note := passed_over(s):
            print(note, flush=True)
        if s.resume_from_checkpoint and not resumed:
            print(f"{out} holds no checkpoint yet, so the training starts from the beginning.", flush=True)
        for left in (*out.glob(".checkpoint-*"), *out.glob(".result.part"), *out.glob(".sd3kit-*.part")):
            left.unlink() if left.is_file() else shutil.rmtree(left)
        repository = reporting.create(s)
    accelerator.wait_for_everyone()
    set_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = s.allow_tf32
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    groups = [rows]
    if s.with_prior_preservation:
        saving.draw_class_pictures(s, accelerator, seed)
        groups.append(class_rows(s))
    wanted = {row.caption for group in groups for row in group} | {s.validation_prompt or "", ""}
    prompts = encode_all(s, accelerator, dtype, wanted)  # once, and the encoders go
    free_memory()

    none = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    pipe = load(s, accelerator, torch.float32, transformer=None, **none)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    vae = pipe.vae.requires_grad_(False)
    vae.enable_slicing()  # one picture at a time: at 1024 px one fills a GPU, and four take gigabytes
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
    side = s.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    samples = Samples(groups, s, seed, (vae.config.latent_channels, side, side))
    if s.cache_latents or samples.fixed():  # before the transformer comes: the peak is the larger of the two
        samples.cache(vae)
        vae.to("cpu")
        free_memory()

    pipe = load(s, accelerator, torch.float32 if s.full_finetuning else dtype, vae=None, **none, **quantized(s, dtype))
    text = None
    if s.train_text_encoder:  # without the T5, which does not learn: what it said of the captions is kept
        text = load(s, accelerator, dtype, transformer=None, vae=None, text_encoder_3=None, tokenizer_3=None)
    model = Denoiser(pipe.transformer, text)
    make_trainable(s, model)
    optimizer = make_optimizer(s, model, accelerator.num_processes)
    batch_of_all = s.train_batch_size * accelerator.num_processes
    per_epoch = -(-len(samples) // (batch_of_all * s.gradient_accumulation_steps))  # updates, rounded up
    steps = s.max_train_steps or s.num_train_epochs * per_epoch
    lr_scheduler = get_scheduler(s.lr_scheduler, optimizer, None, s.lr_warmup_steps, steps, s.lr_num_cycles, s.lr_power)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)
    sharded = accelerator.distributed_type in SHARDED
    if not sharded:
        saving.use_small_checkpoints(s, accelerator)
    validates = bool(s.validation_prompt and s.num_validation_images)
    if validates and sharded and main:
        print("No validation pictures are drawn: no process holds the whole model (FSDP, DeepSpeed).", flush=True)
    draws = validates and main and not sharded
    step = progress["step"]
    rates = lr_scheduler.base_lrs  # a --learning_rate that was lowered since counts, not the checkpoint's
    asked = [{k: group[k] for k in ("betas", "eps", "weight_decay") if k in group} for group in optimizer.param_groups]
    if resumed:
        try:
            accelerator.load_state(str(resumed))
        except Exception as error:  # a damaged file of any of five kinds, or tensors of another size
            if is_out_of_memory(error):
                raise
            raise DreamBoothError(
                f"The checkpoint {resumed} is damaged or was made with other options ({f'{error}'[:80]})."
            ) from error
        lr_scheduler.base_lrs = rates
        for group, rate, shape, own in zip(optimizer.param_groups, rates, lr_scheduler.lr_lambdas, asked, strict=True):
            group.update(own, lr=rate * shape(lr_scheduler.last_epoch))
    accelerator.init_trackers("dreambooth-sd3-lora", {k: "" if v is None else v for k, v in s.public().items()})
    if main:
        files.write_whole(out / "settings.json", json.dumps(s.public(), indent=1))
        went = f", going on from {resumed.name}" if resumed else ""
        learning = sum(p.numel() for p in accelerator.unwrap_model(model).parameters() if p.requires_grad)
        print(
            f"{len(rows)} pictures, {learning:,} parameters learn, {steps} updates of "
            f"{batch_of_all * s.gradient_accumulation_steps} pictures{went}.",
            flush=True,
        )

    # each process takes its places of each forward pass; after a resume the count goes on where it was
    passes = range(step * s.gradient_accumulation_steps, steps * s.gradient_accumulation_steps)
    first = accelerator.process_index * s.train_batch_size
    loader = DataLoader(
        samples,
        batch_sampler=([k * batch_of_all + first + j for j in range(s.train_batch_size)] for k in passes),
        collate_fn=collate,
        num_workers=s.dataloader_num_workers,
        pin_memory=device.type == "cuda",  # a copy from other memory waits until the device has done all before it
        generator=torch.Generator(),  # a loader draws a number; from torch's own it would shift a resumed dropout
    )
    model.train()
    total = torch.zeros((), device=device)
    with tqdm(total=steps, initial=step, unit="step", disable=not accelerator.is_local_main_process) as bar:
        losses = reporting.Losses(accelerator, out / "losses.jsonl", step, bar)
        for batch in loader:
            with accelerator.accumulate(model):
                each = sample_losses(s, batch, model, vae, scheduler, prompts)
                subject, *prior = each.chunk(len(groups))
                loss = subject.mean() + s.prior_loss_weight * sum(part.mean() for part in prior)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], s.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach() / s.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue
            lr = optimizer.param_groups[0]["lr"]
            lr_scheduler.step()
            step += 1
            bar.update()
            due = step % s.checkpointing_steps == 0
            shows = draws and step < steps and step % (per_epoch * s.validation_epochs) == 0
            losses.add(step, lr, accelerator.reduce(total, "mean"))
            total.zero_()
            if due or shows or step == steps:
                losses.write()
            if due:
                saving.save_checkpoint(s, accelerator, model, step, seed)
            if shows:
                saving.draw_validation(s, accelerator, model, vae, scheduler, prompts, step, seed)

    saving.save_result(s, accelerator, model, step, dtype)
    images = []
    if draws:
        images = saving.draw_validation(s, accelerator, model, vae, scheduler, prompts, step, seed)
    if main and repository:
        reporting.upload(s, repository, images)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return out
