"""Ways to make SD3 fit, each the few lines of diffusers that one would write in a notebook.

A recipe takes `model` (a folder or a Hub id), `dtype` (what to compute in) and `device`, and returns a pipeline; those
that encode the prompt first return its inputs too. One that cannot work on a device raises the library's own error.
Three helpers: `stream` moves parts while they are used, `nf4` stores a part in four bits, `tile` decodes in tiles.
"""

import dataclasses
import functools
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import diffusers
import torch
import transformers
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.hooks import apply_group_offloading
from transformers import T5EncoderModel

from ..loading.pipeline import undisturbed
from .plan import ENCODERS, RECIPES, Recipe, recipe

# ---- the announcement's four ----------------------------------------------------------------------------------------


@recipe()
def default(model, dtype, device):
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype).to(device)


@recipe(keeps="part", moves="copy")
def model_offload(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.enable_model_cpu_offload()
    return pipe


@recipe(keeps="part", moves="copy", without=("text_encoder_3",))
def model_offload_without_t5(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, text_encoder_3=None, tokenizer_3=None)
    pipe.enable_model_cpu_offload()
    return pipe


@recipe(bits={"text_encoder_3": 8}, straight=("text_encoder_3",))
def t5_int8(model, dtype, device):
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    t5 = T5EncoderModel.from_pretrained(model, subfolder="text_encoder_3", quantization_config=config, dtype=dtype)
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, text_encoder_3=t5, device_map="balanced")


# ---- leaving out ----------------------------------------------------------------------------------------------------


@recipe(without=("text_encoder_3",))
def without_t5(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, text_encoder_3=None, tokenizer_3=None)
    return pipe.to(device)


def encode(model, dtype, device, prompts, **loading):
    encoders = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, transformer=None, vae=None, **loading)
    encoders = encoders if loading else encoders.to(device)
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    with torch.no_grad():
        return {p: dict(zip(names, encoders.encode_prompt(p, p, p), strict=True)) for p in prompts}


WITHOUT_ENCODERS = dict.fromkeys((*ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3"))
ONE = ("a fox on a blue background, flat",)


@recipe(keeps="stage", moves="load")
def precomputed_prompt(model, dtype, device, prompts=ONE):
    inputs = encode(model, dtype, device, prompts)
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, **WITHOUT_ENCODERS).to(device), inputs


def encode_apart(model, dtype, device, prompts):
    with undisturbed(local=True):
        inputs = encode(model, dtype, device, prompts, device_map="balanced")
    return {p: {name: embeds.float().cpu().numpy() for name, embeds in i.items()} for p, i in inputs.items()}


@recipe(keeps="stage", moves="load", straight=(*ENCODERS, "transformer", "vae"))
def prompt_apart(model, dtype, device, prompts=ONE):
    # in a process of its own: all that the encoders took ends with it, and they never cross the processor's memory
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        inputs = apart.submit(encode_apart, model, dtype, device, prompts).result()
    inputs = {p: {n: torch.from_numpy(e).to(device, dtype) for n, e in i.items()} for p, i in inputs.items()}
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, device_map="balanced", **WITHOUT_ENCODERS)
    return pipe, inputs


# ---- moving ---------------------------------------------------------------------------------------------------------


@recipe(keeps="leaf", moves="copy")
def sequential_offload(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.enable_sequential_cpu_offload()
    return pipe


def stream(device, *parts, use_stream=True, offload_type="leaf_level", **more):
    place = {"onload_device": torch.device(device), "offload_device": torch.device("cpu")}
    for part in parts:
        apply_group_offloading(part, **place, offload_type=offload_type, use_stream=use_stream, **more)


@recipe(keeps="block", moves="copy")
def group_offload_block(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    # the T5's layers are one level deeper than block_level looks, so it would come as a whole
    stream(device, *(getattr(pipe, name) for name in ENCODERS), pipe.vae, use_stream=False)
    stream(device, pipe.transformer, use_stream=False, offload_type="block_level", num_blocks_per_group=1)
    return pipe


@recipe(keeps="leaf", moves="stream")
def group_offload_stream(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level", use_stream=True)
    return pipe


@recipe(keeps="leaf", moves="load")
def group_offload_disk(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.offload_folder = tempfile.TemporaryDirectory(prefix="sd3kit-")  # lives as long as the pipeline
    # One folder for each part: in a shared one the two CLIPs overwrite each other's files. And not the T5 as a whole:
    # its embedding has two names, and the second would be saved after the first was emptied (diffusers 0.42.1).
    parts = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3.encoder, pipe.transformer, pipe.vae]
    for i, part in enumerate(parts):
        stream(device, part, use_stream=False, offload_to_disk_path=f"{pipe.offload_folder.name}/{i}")
    return pipe


@recipe(keeps="rest", moves="stream")
def encoders_offload_stream(model, dtype, device, **parts):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, **parts)
    stream(device, *(getattr(pipe, name) for name in ENCODERS))  # once a picture; the transformer runs in every step
    pipe.transformer.to(device)
    pipe.vae.to(device)
    return pipe


@recipe(straight=(*ENCODERS, "transformer", "vae"))
def sharded(model, dtype, device):
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, device_map="balanced")


# ---- fewer bits -----------------------------------------------------------------------------------------------------


def nf4(model, dtype, part, wo_too=False, **loading):
    """The transformer or the T5 in NF4; `wo_too`: the T5's `wo` layers too, which transformers keeps in float32."""
    cls, library = (SD3Transformer2DModel, diffusers) if part == "transformer" else (T5EncoderModel, transformers)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    if wo_too:
        # The T5 casts what goes into `wo` to the type that its weight is stored in: uint8 as a rule, which gives wrong
        # embeddings and raises no error. And float16 is too small for what comes out of it.
        settings |= {"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = library.BitsAndBytesConfig(load_in_4bit=True, **settings)
    with mock.patch.object(transformers.T5PreTrainedModel, "_keep_in_fp32_modules", None if wo_too else ["wo"]):
        return cls.from_pretrained(model, subfolder=part, quantization_config=config, dtype=dtype, **loading)


@recipe(bits={"text_encoder_3": 4.5}, straight=("text_encoder_3",))
def t5_nf4(model, dtype, device):
    t5 = nf4(model, dtype, "text_encoder_3")
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, text_encoder_3=t5).to(device)


@recipe(bits={"text_encoder_3": 4.5}, every_linear=True, straight=("text_encoder_3",))
def t5_nf4_stored(model, dtype, device):
    with tempfile.TemporaryDirectory(prefix="sd3kit-") as folder:  # keep yours: it is quantised once, on the processor
        nf4(model, dtype, "text_encoder_3", wo_too=True, device_map="cpu").save_pretrained(folder)
        with mock.patch.object(transformers.T5PreTrainedModel, "_keep_in_fp32_modules", None):
            t5 = T5EncoderModel.from_pretrained(folder, dtype=dtype, device_map=device)
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, text_encoder_3=t5).to(device)


@recipe(bits={"transformer": 8}, straight=("transformer",))
def transformer_int8(model, dtype, device):
    config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    part = SD3Transformer2DModel.from_pretrained(
        model, subfolder="transformer", quantization_config=config, dtype=dtype
    )
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, transformer=part).to(device)


@recipe(bits={"transformer": 4.5}, straight=("transformer",))
def transformer_nf4(model, dtype, device):
    part = nf4(model, dtype, "transformer")
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, transformer=part).to(device)


@recipe(bits={"transformer": 4.5, "text_encoder_3": 4.5}, straight=("transformer", "text_encoder_3"))
def all_nf4(model, dtype, device):
    parts = {part: nf4(model, dtype, part) for part in ("transformer", "text_encoder_3")}
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, **parts).to(device)


@recipe(bits={"transformer": 4.5, "text_encoder_3": 4.5}, every_linear=True, straight=("transformer", "text_encoder_3"))
def all_nf4_wo(model, dtype, device):
    parts = {"transformer": nf4(model, dtype, "transformer")}
    parts["text_encoder_3"] = nf4(model, dtype, "text_encoder_3", wo_too=True)
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, **parts).to(device)


@recipe(keeps="rest", moves="stream", bits={"transformer": 4.5}, straight=("transformer",))
def encoders_stream_nf4(model, dtype, device):
    return encoders_offload_stream(model, dtype, device, transformer=nf4(model, dtype, "transformer"))


def torchao(model, dtype, device, config):
    from torchao.quantization import quantize_

    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    for part in (pipe.transformer, pipe.text_encoder_3):
        quantize_(part, config)
    return pipe.to(device)


@recipe(bits={"transformer": 8, "text_encoder_3": 8}, every_linear=True)
def torchao_int8(model, dtype, device):
    from torchao.quantization import Int8WeightOnlyConfig

    return torchao(model, dtype, device, Int8WeightOnlyConfig())


@recipe(bits={"transformer": 8, "text_encoder_3": 8}, every_linear=True)
def torchao_float8(model, dtype, device):
    from torchao.quantization import Float8WeightOnlyConfig

    return torchao(model, dtype, device, Float8WeightOnlyConfig())


# diffusers' own exceptions; "norm" also names SD3's AdaLN modulation, a third of its weights
CAST = {"bits": {"transformer": 8}, "skips": ("pos_embed", "patch_embed", "norm")}


@recipe(**CAST)
def layerwise_casting(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    return pipe.to(device)


@recipe(keeps="rest", moves="stream", **CAST)
def encoders_stream_fp8(model, dtype, device):
    transformer = SD3Transformer2DModel.from_pretrained(model, subfolder="transformer", dtype=dtype)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    return encoders_offload_stream(model, dtype, device, transformer=transformer)


# ---- the decoder's peak ---------------------------------------------------------------------------------------------


def tile(pipe):
    pipe.vae.enable_tiling()
    # a tile is as large as the model's own picture unless told otherwise, and then nothing is tiled
    pipe.vae.tile_sample_min_size //= 2
    pipe.vae.tile_latent_min_size //= 2
    return pipe


@recipe(tiles=2)
def vae_tiling(model, dtype, device):
    return tile(default(model, dtype, device))


def _tiled(plan: Recipe) -> Recipe:
    @functools.wraps(plan.build)  # takes what it takes, shows its source
    def build(*arguments, **extra):
        made = plan.build(*arguments, **extra)
        return (tile(made[0]), made[1]) if isinstance(made, tuple) else tile(made)

    return dataclasses.replace(plan, build=build, tiles=2)


TILED = ("without_t5", "group_offload_stream", "encoders_offload_stream", "t5_int8", "t5_nf4_stored",
         "all_nf4", "all_nf4_wo", "encoders_stream_nf4", "encoders_stream_fp8")  # fmt: skip
RECIPES |= {f"{name}_tiled": _tiled(RECIPES[name]) for name in TILED}
