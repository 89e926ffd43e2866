"""Ways to make SD3 fit, each the few lines of diffusers that one would write in a notebook.

A recipe takes `model` (a folder or a Hub id), `dtype` (what to compute in) and `device`, and returns a pipeline;
`precomputed_prompt` returns the inputs of its prompts too. The decorator says what `sd3kit.account` must
know to account its bytes. A recipe that cannot work on a device raises the library's own error.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from diffusers import BitsAndBytesConfig
from diffusers.hooks import apply_group_offloading
from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig
from transformers import T5EncoderModel

from ..loading.pipeline import with_dtype

StableDiffusion3Pipeline = with_dtype(diffusers.StableDiffusion3Pipeline)
SD3Transformer2DModel = with_dtype(diffusers.SD3Transformer2DModel)
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe and what it keeps where.

    Attributes:
        build: (model, dtype, device) to a pipeline, or to a pipeline and {prompt: inputs}.
        keeps: what is on the device at one time: "all", "part" (of the pipeline), "block", "leaf" (a layer), "stage"
            (the text encoders, then the rest), or "rest" (the rest always, the text encoders layer by layer).
        bits: stored bits of the linear weights of a part; 16 where it is not named.
        straight: the parts that are loaded straight onto the device, not by way of the processor's memory.
        every_linear: no linear layer is left out of the fewer bits (bitsandbytes leaves the T5's `wo` in float32).
        skips: layers with one of these in their name keep their 16 bits.
        without: the parts that are left out.
        tiles: the autoencoder decodes in this many tiles along a side.
    """

    build: Callable[..., Any]
    keeps: str = "all"
    bits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    straight: tuple[str, ...] = ()
    every_linear: bool = False
    skips: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    tiles: int = 1

    @property
    def name(self) -> str:
        return self.build.__name__


RECIPES: dict[str, Recipe] = {}


def recipe(**facts: Any) -> Callable:
    def register(build: Callable) -> Callable:
        RECIPES[build.__name__] = Recipe(build, **facts)
        return build

    return register


# ---- the announcement's four ----------------------------------------------------------------------------------------


@recipe()
def default(model, dtype, device):
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype).to(device)


@recipe(keeps="part")
def model_offload(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.enable_model_cpu_offload()
    return pipe


@recipe(keeps="part", without=("text_encoder_3",))
def model_offload_without_t5(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, text_encoder_3=None, tokenizer_3=None)
    pipe.enable_model_cpu_offload()
    return pipe


@recipe(bits={"text_encoder_3": 8}, straight=("text_encoder_3",))
def t5_int8(model, dtype, device):
    config = TransformersBitsAndBytesConfig(load_in_8bit=True)
    t5 = T5EncoderModel.from_pretrained(model, subfolder="text_encoder_3", quantization_config=config, dtype=dtype)
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, text_encoder_3=t5, device_map="balanced")


# ---- leaving out, and moving ----------------------------------------------------------------------------------------


@recipe(without=("text_encoder_3",))
def without_t5(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, text_encoder_3=None, tokenizer_3=None)
    return pipe.to(device)


@recipe(keeps="stage")
def precomputed_prompt(model, dtype, device, prompts=("a fox on a blue background, flat",)):
    encoders = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, transformer=None, vae=None).to(device)
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    with torch.no_grad():
        inputs = {p: dict(zip(names, encoders.encode_prompt(p, p, p), strict=True)) for p in prompts}
    del encoders
    dropped = dict.fromkeys((*ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3"))
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, **dropped).to(device), inputs


@recipe(keeps="leaf")
def sequential_offload(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.enable_sequential_cpu_offload()
    return pipe


@recipe(keeps="block")
def group_offload_block(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    place = {"onload_device": torch.device(device), "offload_device": torch.device("cpu")}
    # the T5's layers are one level deeper than block_level looks, so it would come as a whole
    for part in (*(getattr(pipe, name) for name in ENCODERS), pipe.vae):
        apply_group_offloading(part, **place, offload_type="leaf_level")
    apply_group_offloading(pipe.transformer, **place, offload_type="block_level", num_blocks_per_group=1)
    return pipe


@recipe(keeps="leaf")
def group_offload_leaf(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    return pipe


@recipe(keeps="leaf")
def group_offload_stream(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level", use_stream=True)
    return pipe


@recipe(keeps="rest")
def encoders_offload_stream(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    place = {"onload_device": torch.device(device), "offload_device": torch.device("cpu")}
    for name in ENCODERS:  # they run once a picture, the transformer in every step
        apply_group_offloading(getattr(pipe, name), **place, offload_type="leaf_level", use_stream=True)
    pipe.transformer.to(device)
    pipe.vae.to(device)
    return pipe


@recipe(keeps="leaf")
def group_offload_disk(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.offload_folder = tempfile.TemporaryDirectory(prefix="sd3kit-")  # lives as long as the pipeline
    # One folder for each part: in a shared one the two CLIPs overwrite each other's files. And not the T5 as a whole:
    # its embedding has two names, and the second would be saved after the first was emptied (diffusers 0.42.1).
    parts = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3.encoder, pipe.transformer, pipe.vae]
    for i, part in enumerate(parts):
        folder = f"{pipe.offload_folder.name}/{i}"
        apply_group_offloading(
            part, onload_device=torch.device(device), offload_type="leaf_level", offload_to_disk_path=folder
        )
    return pipe


@recipe()
def sharded(model, dtype, device):
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, device_map="balanced")


# ---- fewer bits -----------------------------------------------------------------------------------------------------


@recipe(bits={"text_encoder_3": 4}, straight=("text_encoder_3",))
def t5_nf4(model, dtype, device):
    config = TransformersBitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    t5 = T5EncoderModel.from_pretrained(model, subfolder="text_encoder_3", quantization_config=config, dtype=dtype)
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, text_encoder_3=t5).to(device)


@recipe(bits={"transformer": 8}, straight=("transformer",))
def transformer_int8(model, dtype, device):
    config = BitsAndBytesConfig(load_in_8bit=True)
    transformer = SD3Transformer2DModel.from_pretrained(
        model, subfolder="transformer", quantization_config=config, dtype=dtype
    )
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, transformer=transformer).to(device)


@recipe(bits={"transformer": 4}, straight=("transformer",))
def transformer_nf4(model, dtype, device):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    transformer = SD3Transformer2DModel.from_pretrained(
        model, subfolder="transformer", quantization_config=config, dtype=dtype
    )
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, transformer=transformer).to(device)


@recipe(bits={"transformer": 4, "text_encoder_3": 4}, straight=("transformer", "text_encoder_3"))
def all_nf4(model, dtype, device):
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    config, t5_config = BitsAndBytesConfig(**four_bits), TransformersBitsAndBytesConfig(**four_bits)
    transformer = SD3Transformer2DModel.from_pretrained(
        model, subfolder="transformer", quantization_config=config, dtype=dtype
    )
    t5 = T5EncoderModel.from_pretrained(model, subfolder="text_encoder_3", quantization_config=t5_config, dtype=dtype)
    parts = {"transformer": transformer, "text_encoder_3": t5}
    return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, **parts).to(device)


@recipe(bits={"transformer": 8, "text_encoder_3": 8}, every_linear=True)
def torchao_int8(model, dtype, device):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    for part in (pipe.transformer, pipe.text_encoder_3):
        quantize_(part, Int8WeightOnlyConfig())
    return pipe.to(device)


@recipe(bits={"transformer": 8, "text_encoder_3": 8}, every_linear=True)
def torchao_float8(model, dtype, device):
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    for part in (pipe.transformer, pipe.text_encoder_3):
        quantize_(part, Float8WeightOnlyConfig())
    return pipe.to(device)


# diffusers' own exceptions; "norm" also names SD3's AdaLN modulation, a third of its weights
@recipe(bits={"transformer": 8}, skips=("pos_embed", "patch_embed", "norm"))
def layerwise_casting(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    return pipe.to(device)


# ---- the decoder's peak ---------------------------------------------------------------------------------------------


@recipe(tiles=2)
def vae_tiling(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.vae.enable_tiling()
    # a tile is as large as the model's own picture unless told otherwise, and then nothing is tiled
    pipe.vae.tile_sample_min_size //= 2
    pipe.vae.tile_latent_min_size //= 2
    return pipe


@recipe()
def vae_slicing(model, dtype, device):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.vae.enable_slicing()  # decodes a batch picture by picture: nothing to gain with one
    return pipe
