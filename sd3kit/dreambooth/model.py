"""What is trained: the transformer with a LoRA, or all of it; and how the model's parts are loaded."""

import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, inject_adapter_in_model
from peft.import_utils import is_torchao_available
from peft.tuners.tuners_utils import BaseTunerLayer

from ..loading import hub, names, parts, pipeline
from .settings import DreamBoothError, Settings

# The joint attention's projections: q, k, v and output, of the picture's tokens and (add_) of the text's.
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ATTENTION = [f"attn.{name}" for name in PROJECTIONS]
CLIP_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Denoiser(torch.nn.Module):
    """The transformer, and with it the CLIPs where they learn too: one module, so that accelerate wraps it once."""

    def __init__(self, transformer: SD3Transformer2DModel, text: StableDiffusion3Pipeline | None = None):
        super().__init__()
        self.transformer, self.text = transformer, text
        if text is not None:
            self.text_encoder, self.text_encoder_2 = text.text_encoder, text.text_encoder_2

    def forward(self, x, timesteps, embeds, pooled, captions):
        """The velocity (B, C, h, w) at x; where the CLIPs learn, their part of the embeddings is made anew."""
        if self.text is not None:
            embeds, pooled = encode_clips(self.text, captions, embeds)
        return self.transformer(x, embeds, pooled, timesteps, return_dict=False)[0]


def encode(text: StableDiffusion3Pipeline, prompts: list[str], length: int, device=None):
    """Embeddings (B, 77 + length, D) and pooled ones (B, P), as diffusers' pipeline makes them."""
    embeds, _, pooled, _ = text.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return embeds, pooled


def encode_clips(text: StableDiffusion3Pipeline, prompts: list[str], embeds: torch.Tensor):
    """The same with the CLIPs as they are now; the T5's part is that of the `embeds` that were made before."""
    (first, pooled), (second, pooled_2) = (text._get_clip_prompt_embeds(prompts, clip_model_index=n) for n in (0, 1))
    clips = torch.cat([first, second], -1)
    clips = torch.nn.functional.pad(clips, (0, embeds.shape[-1] - clips.shape[-1]))
    return torch.cat([clips, embeds[:, clips.shape[1] :]], 1), torch.cat([pooled, pooled_2], -1)


@torch.no_grad()
def encode_all(settings: Settings, accelerator: Accelerator, dtype: torch.dtype, prompts) -> dict[str, list]:
    """Each prompt's embeddings and pooled ones, on the CPU.

    On a GPU the encoders stay in the host's memory and come over layer by layer: the T5 alone is larger than SD3
    Medium's transformer, and would decide the peak of a LoRA's training.
    """
    cuda = accelerator.device.type == "cuda"
    text = load(settings, accelerator, dtype, transformer=None, vae=None, **({"device": "cpu"} if cuda else {}))
    if cuda:
        stream(text, accelerator.device)
    found, prompts = {}, sorted(prompts)
    for start in range(0, len(prompts), 16):
        some = prompts[start : start + 16]
        made = encode(text, some, settings.max_sequence_length, accelerator.device)
        for n, prompt in enumerate(some):
            found[prompt] = [t[n : n + 1].cpu().pin_memory() if cuda else t[n : n + 1].clone() for t in made]
    return found


def stream(text: StableDiffusion3Pipeline, device: torch.device) -> None:
    """Let the encoders' layers come to the device one by one, when each is used."""
    for encoder in (text.text_encoder, text.text_encoder_2, text.text_encoder_3):
        if encoder is not None:
            apply_group_offloading(encoder, device, torch.device("cpu"), offload_type="leaf_level")


def lora_targets(settings: Settings, transformer: torch.nn.Module) -> list[str]:
    """The names of the layers that get a LoRA, as peft matches them: by the end of a module's name.

    Raises:
        DreamBoothError: a layer or a block that this transformer does not have.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = [name.strip() for name in settings.lora_layers.split(",")] if settings.lora_layers else ATTENTION
    blocks = [int(number) for number in settings.lora_blocks.split(",")] if settings.lora_blocks else []
    if wrong := [b for b in blocks if b >= len(transformer.transformer_blocks)]:
        raise DreamBoothError(f"There is no block {wrong[0]}: the last is {len(transformer.transformer_blocks) - 1}.")
    for layer in layers:
        if not any(name == layer or name.endswith(f".{layer}") for name in linear):
            known = sorted({name.partition(".")[2].partition(".")[2] for name in linear if "blocks.0." in name})
            raise DreamBoothError(f"There is no layer {layer!r} in the transformer: a block has {', '.join(known)}.")
    return [f"transformer_blocks.{b}.{layer}" for b in blocks for layer in layers] or layers


def check_transformer(settings: Settings) -> None:
    """Read the transformer's configuration and refuse what does not fit it, before its weights are loaded."""
    try:
        is_torchao_available()  # peft asks when it makes a LoRA, after minutes
    except ImportError as error:
        raise DreamBoothError(f"{error}: pip install -U torchao, or pip uninstall torchao.") from error
    name = settings.pretrained_model_name_or_path
    source = names.resolve(name)
    path = hub.file(name, source, "transformer/config.json", revision=settings.revision)
    try:
        config = parts.read_json(path)
    except parts.Damaged as error:
        raise DreamBoothError(f"{error}: get it again.") from error
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    lora_targets(settings, transformer)
    most = transformer.config.pos_embed_max_size * transformer.config.patch_size * 8
    if settings.resolution > most:
        raise DreamBoothError(f"--resolution may be {most} at most for {name}, not {settings.resolution}.")


def load(settings: Settings, accelerator: Accelerator, dtype: torch.dtype, **more) -> StableDiffusion3Pipeline:
    s, more = settings, {"device": str(accelerator.device)} | more
    return pipeline.load(
        s.pretrained_model_name_or_path, dtype=dtype, quiet=True, revision=s.revision, variant=s.variant, **more
    )


def quantized(settings: Settings, dtype: torch.dtype) -> dict:
    """What `load` takes so that the transformer is in NF4, where that is asked for."""
    if settings.base_quantization is None:
        return {}
    from diffusers.quantizers import PipelineQuantizationConfig

    how = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": PipelineQuantizationConfig("bitsandbytes_4bit", how, ["transformer"])}


def make_trainable(settings: Settings, model: Denoiser) -> None:
    """Freeze everything, then let a LoRA (peft's, by diffusers' `add_adapter`) or the whole transformer learn."""
    model.requires_grad_(False)
    if settings.full_finetuning:
        model.transformer.requires_grad_(True)
    else:
        common = dict(r=settings.rank, lora_alpha=settings.rank, lora_dropout=settings.lora_dropout)
        targets = lora_targets(settings, model.transformer)
        model.transformer.add_adapter(LoraConfig(**common, init_lora_weights="gaussian", target_modules=targets))
        for clip in clips(model):
            config = LoraConfig(**common, init_lora_weights="gaussian", target_modules=CLIP_ATTENTION)
            inject_adapter_in_model(config, clip)  # transformers' add_adapter asks for a peft that is not out yet
    cast_training_params(model)  # what learns stays in float32, whatever the rest is in
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):  # autocast does it: peft's own would keep a copy of x for each of q, k, v
            layer.cast_input_dtype_enabled = False
    if settings.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
        for clip in clips(model):
            clip.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def clips(model: Denoiser) -> list[torch.nn.Module]:
    return [] if model.text is None else [model.text_encoder, model.text_encoder_2]


def make_optimizer(settings: Settings, model: Denoiser, processes: int) -> torch.optim.Optimizer:
    s = settings
    factor = s.gradient_accumulation_steps * s.train_batch_size * processes if s.scale_lr else 1
    rate, prodigy = s.learning_rate * factor, s.optimizer.lower() == "prodigy"
    groups = [{"params": [p for p in model.transformer.parameters() if p.requires_grad], "lr": rate}]
    for clip in clips(model):
        learning = [p for p in clip.parameters() if p.requires_grad]
        clip_rate = rate if prodigy else s.text_encoder_lr  # prodigy wants one rate for all
        groups.append({"params": learning, "lr": clip_rate, "weight_decay": s.adam_weight_decay_text_encoder})
    common = dict(betas=(s.adam_beta1, s.adam_beta2), weight_decay=s.adam_weight_decay, eps=s.adam_epsilon)
    if prodigy:
        from prodigyopt import Prodigy

        return Prodigy(
            groups, **common, lr=rate, beta3=s.prodigy_beta3, decouple=s.prodigy_decouple,
            use_bias_correction=s.prodigy_use_bias_correction, safeguard_warmup=s.prodigy_safeguard_warmup,
        )  # fmt: skip
    if s.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **common)
    # on a GPU one kernel for all, without the temporary copies of every weight that torch's default there makes
    return torch.optim.AdamW(groups, **common, fused=groups[0]["params"][0].is_cuda or None)
