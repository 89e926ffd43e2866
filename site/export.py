"""nano's weights -> ONNX graphs, one file of weights in float16, and a JSON of what the page says: one command.

`python site/export.py FOLDER` writes into FOLDER:

- `text.onnx`, `transformer.onnx`, `encoder.onnx`, `decoder.onnx`: graphs without weights;
- `weights.f16`: the weights of all of them, once, and the LoRA of nano-turbo, in float16. They are stored so in sd3kit,
  so nothing is lost. In float16 the transformer overflows, so the page widens them to float32 before it computes;
- `nano.json`: where each weight lies, what each model is made for, and the words that nano knows;
- `tokenizer.json`, `tokenizer_2.json`, `tokenizer_3.json`.

The weights lie apart from the graphs, so that the page can add the LoRA to them before it opens the transformer: one
graph and one file of weights are both models.
"""

import argparse
import hashlib
import json
import logging
import random
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's sd3kit, not an installed one

import sd3kit
from sd3kit.explore.drawing import sizes
from sd3kit.loading.names import NANO, TURBO, own_settings
from sd3kit.loading.pipeline import LORA

# The recipe's words, imported here and nowhere else in this folder.
from sd3kit.recipe import scenes
from sd3kit.recipe.judge import TEMPLATES, Judge

OPSET = 20
LARGE = 256  # bytes: a smaller constant stays in its graph


class Text(torch.nn.Module):
    """Three encoders as `StableDiffusion3Pipeline.encode_prompt` joins them."""

    def __init__(self, pipe):
        super().__init__()
        self.clip, self.clip_2, self.t5 = pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3
        self.width = pipe.transformer.config.joint_attention_dim

    def forward(self, clip, clip_2, t5):
        first = self.clip(clip, output_hidden_states=True)
        second = self.clip_2(clip_2, output_hidden_states=True)
        # SD3 reads the layer before the last
        both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        both = torch.nn.functional.pad(both, (0, self.width - both.shape[-1]))
        joint = torch.cat([both, self.t5(t5).last_hidden_state], 1)
        return joint, torch.cat([first.text_embeds, second.text_embeds], -1)


class Looking:
    """Joint attention as diffusers computes it, with its weights in the open as in `sd3kit.attention`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
        def heads(x, q, k, v, norm_q, norm_k):
            q, k, v = (f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (q, k, v))
            return norm_q(q), norm_k(k), v

        picture = heads(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        text = heads(encoder_hidden_states, *added)
        q, k, v = (torch.cat(pair, 2) for pair in zip(picture, text, strict=True))
        weights = ((q * attn.scale) @ k.transpose(-1, -2)).softmax(-1)
        tokens = hidden_states.shape[1]
        # what each place of the picture pays to each token of the text, the mean of the heads
        self.looks = weights[:, :, :tokens, tokens:].mean(1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        picture, text = out[:, :tokens], out[:, tokens:]
        picture = attn.to_out[0](picture)
        return picture, text if attn.context_pre_only else attn.to_add_out(text)


class Transformer(torch.nn.Module):
    """The velocity, and where the picture looks: (N, layers, places, text tokens)."""

    def __init__(self, pipe):
        super().__init__()
        self.net, self.processors = pipe.transformer, []
        for block in self.net.transformer_blocks:
            block.attn.processor = Looking()
            self.processors.append(block.attn.processor)

    def forward(self, latents, timestep, text, pooled):
        velocity = self.net(latents, text, pooled, timestep, return_dict=False)[0]
        return velocity, torch.stack([p.looks for p in self.processors], 1)


class Encoder(torch.nn.Module):
    """A picture (-1..1) -> the mean and the deviation of its latents, before scale and shift."""

    def __init__(self, pipe):
        super().__init__()
        self.vae = pipe.vae

    def forward(self, picture):
        posterior = self.vae.encode(picture).latent_dist
        return posterior.mean, posterior.std


class Decoder(torch.nn.Module):
    """Latents -> a picture (0..1)."""

    def __init__(self, pipe):
        super().__init__()
        self.vae, config = pipe.vae, pipe.vae.config
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0

    def forward(self, latents):
        picture = self.vae.decode(latents / self.scale + self.shift, return_dict=False)[0]
        return (picture / 2 + 0.5).clamp(0, 1)


def _graphs(pipe) -> dict[str, tuple]:
    """For each graph: the module, example inputs by name, names of outputs, and which sides may vary."""
    config = pipe.transformer.config
    batch, area = {0: "batch"}, {2: "height", 3: "width"}
    ids, t5 = torch.ones(2, 77, dtype=torch.int64), torch.ones(2, 40, dtype=torch.int64)
    latents = torch.zeros(2, config.in_channels, config.sample_size, config.sample_size)
    picture = torch.zeros(1, 3, sizes(pipe)[1], sizes(pipe)[1])
    reads = {
        "latents": latents,
        "timestep": torch.zeros(2),
        "text": torch.zeros(2, 117, config.joint_attention_dim),
        "pooled": torch.zeros(2, config.pooled_projection_dim),
    }
    vary = {
        "latents": batch | area,
        "timestep": batch,
        "text": batch | {1: "tokens"},
        "pooled": batch,
        "velocity": batch | area,
        "looks": batch | {2: "places", 3: "tokens"},
    }
    return {
        "text": (
            Text(pipe),
            {"clip": ids, "clip_2": ids, "t5": t5},
            ["text", "pooled"],
            {"clip": batch, "clip_2": batch, "t5": batch | {1: "length"}},
        ),
        "transformer": (Transformer(pipe), reads, ["velocity", "looks"], vary),
        "encoder": (Encoder(pipe), {"picture": picture}, ["mean", "deviation"], {"picture": area}),
        "decoder": (Decoder(pipe), {"latents": latents[:1]}, ["picture"], {"latents": area}),
    }


class Weights:
    """One file of float16 values; equal tensors are stored once."""

    def __init__(self):
        self.values, self.places, self.count = [], {}, 0

    @staticmethod
    def _key(half: np.ndarray) -> bytes:
        return hashlib.sha256(half.tobytes()).digest()

    def find(self, array: np.ndarray) -> int:
        """The place of what was added before; KeyError where it was not."""
        return self.places[self._key(array.astype(np.float16))]

    def add(self, array: np.ndarray) -> int:
        """The place of the first of its values."""
        half = array.astype(np.float16)
        key = self._key(half)
        if key not in self.places:
            self.places[key] = self.count
            self.values.append(half.ravel())
            self.count += half.size
        return self.places[key]


def _export(path: Path, module, inputs, outputs, dynamic) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # traced shapes, and that this exporter is the older one
        torch.onnx.export(
            module.eval(), tuple(inputs.values()), path, input_names=list(inputs), output_names=outputs,
            dynamic_axes=dynamic, opset_version=OPSET, dynamo=False,
        )  # fmt: skip


def _optimize(path: Path) -> None:
    """Fuse and fold the graph here, so that a browser has nothing to do but load it (a second less for each visit)."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _part(path: Path, weights: Weights) -> dict[str, list[int]]:
    """Move the weights out of the graph; gives where each lies: [place in weights.f16, count]."""
    model, table = onnx.load(path), {}
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.raw_data) < LARGE:
            continue
        array = numpy_helper.to_array(tensor)
        name, shape, place = tensor.name, list(tensor.dims), f"w{len(table)}"
        table[place] = [weights.add(array), array.size]
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.data_location = name, onnx.TensorProto.FLOAT, onnx.TensorProto.EXTERNAL
        tensor.dims.extend(shape)
        # each weight is a file of its own to the runtime, so that the page gives it a view and no copy
        for key, value in (("location", place), ("offset", "0"), ("length", str(array.size * 4))):
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return table


def models(pipe, weights: Weights) -> dict[str, dict]:
    """What the page draws with: nano, and nano-turbo where its LoRA is, each with the settings that it is made for."""
    found = {"nano": _model("nano", pipe.scheduler, [])}
    if (TURBO / LORA).is_file():
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(TURBO, subfolder="scheduler")
        found["nano-turbo"] = _model("nano-turbo", scheduler, _lora(pipe.transformer, weights))
    return found


def _model(name: str, scheduler, lora: list[list[int]]) -> dict:
    return own_settings(name) | {
        "shift": scheduler.config.shift,
        "sigma_max": scheduler.sigma_max,
        "sigma_min": scheduler.sigma_min,
        "terminal": scheduler.config.shift_terminal,
        "lora": lora,
    }


def _lora(transformer, weights: Weights) -> list[list[int]]:
    """Store the LoRA; a row for each layer: [place of its weight, inputs, outputs, rank, place of A, place of B].

    The page adds B A to the weight, which the graphs hold as inputs x outputs.

    Raises:
        ValueError: it does not belong to these weights, or it is scaled.
    """
    tensors, rows = load_file(TURBO / LORA), []
    ends = (".lora_A.weight", ".lora_B.weight")
    if other := [name for name in tensors if not name.endswith(ends)]:
        raise ValueError(f"{TURBO / LORA} holds {other[0]}, which the page does not know.")
    for name in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        down, up = (tensors[name + end].numpy() for end in ends)
        weight = transformer.get_submodule(name.removeprefix("transformer.")).weight.detach().numpy()
        if weight.shape != (len(up), down.shape[1]):
            raise ValueError(f"{name} of {TURBO / LORA} does not fit nano: make nano-turbo again.")
        rows.append([weights.find(weight.T), *weight.T.shape, len(down), weights.add(down), weights.add(up)])
    if len({row[0] for row in rows}) < len(rows):
        raise ValueError("Two layers share a weight, so a LoRA for each cannot be added to it.")
    return rows


def export(folder: Path) -> None:
    """Write everything that the page draws with into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = sd3kit.load("nano", device="cpu", quiet=True)
    look = preview(pipe)
    weights, tables = Weights(), {}
    for name, (module, *rest) in _graphs(pipe).items():
        path = folder / f"{name}.onnx"
        _export(path, module, *rest)
        _optimize(path)
        tables[name] = _part(path, weights)
    known = models(pipe, weights)
    np.concatenate(weights.values).tofile(folder / "weights.f16")
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = json.loads((NANO / part / "tokenizer.json").read_text(encoding="utf-8"))
        if part == "tokenizer_3":
            tokenizer["normalizer"] = None  # the page has `letters` in its place
        (folder / f"{part}.json").write_text(json.dumps(tokenizer, separators=(",", ":")), encoding="utf-8")
    about = {
        "parameters": sum(
            p.numel() for m in pipe.components.values() if isinstance(m, torch.nn.Module) for p in m.parameters()
        ),
        "size": sizes(pipe)[1],
        "sizes": sizes(pipe)[::2],
        "factor": pipe.vae_scale_factor,
        "channels": pipe.transformer.config.in_channels,
        "patch": pipe.transformer.config.patch_size,
        "scaling": pipe.vae.config.scaling_factor,
        "offset": pipe.vae.config.shift_factor or 0.0,
        "models": known,
        "first": list(known)[-1],  # what the page opens with: the quick one, where it is there
        "timesteps": pipe.scheduler.config.num_train_timesteps,
        "pads": [pipe.tokenizer.pad_token_id, pipe.tokenizer_2.pad_token_id, pipe.tokenizer_3.pad_token_id],
        "preview": look,
        "weights": tables,
        "letters": letters(pipe),
        "bytes": weights.count * 2,
        "words": vocabulary(pipe),
    }
    (folder / "nano.json").write_text(json.dumps(about, separators=(",", ":")), encoding="utf-8")


@torch.no_grad()
def preview(pipe) -> list[list[float]]:
    """A quick look without the decoder: a linear map from a place's latents to its 8 x 8 pixels (0..1).

    A row for each channel and one for the constant; fitted by least squares on the judge's small pictures of the art,
    on backgrounds of all colours.
    """
    side, factor = sizes(pipe)[1], pipe.vae_scale_factor
    sheet = Image.open(TEMPLATES).convert("RGBA")
    stored = sheet.width // len(scenes.STYLES)
    pictures, colours = [], list(scenes.COLOURS.values())
    for row in range(0, sheet.height // stored, 2):
        icon = sheet.crop(((row % 3) * stored, row * stored, (row % 3 + 1) * stored, (row + 1) * stored))
        icon = icon.resize((side * 3 // 4,) * 2, Image.Resampling.BICUBIC)
        canvas = Image.new("RGBA", (side, side), colours[row % len(colours)])
        canvas.alpha_composite(icon, (side // 8, side // 8))
        pictures.append(np.asarray(canvas.convert("RGB"), np.float32) / 255)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    config = pipe.vae.config
    latents = (pipe.vae.encode(pixels * 2 - 1).latent_dist.mode() - (config.shift_factor or 0)) * config.scaling_factor
    rows = torch.nn.functional.pad(latents.permute(0, 2, 3, 1), (0, 1), value=1.0).flatten(0, 2)
    blocks = pixels.unfold(2, factor, factor).unfold(3, factor, factor)  # N, 3, rows, columns, 8, 8
    blocks = blocks.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    return [[round(v, 4) for v in row] for row in torch.linalg.lstsq(rows, blocks).solution.tolist()]


def letters(pipe) -> dict[str, str]:
    """What the T5's tokenizer turns into other letters; its tokenizer.json holds it in a compiled form."""
    normalizer = pipe.tokenizer_3.backend_tokenizer.normalizer
    every = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    return {letter: small for letter in every if (small := normalizer.normalize_str(letter)) != letter}


def vocabulary(pipe) -> dict:
    """What the page offers as chips, and every word that nano knows."""
    subjects = known_subjects()
    rng, words = random.Random(0), {"the"}
    for subject in subjects:
        for name in subject.names:
            words.update(name.split(), scenes._plural(name).split())
    words.update(word for names in scenes.STYLES.values() for name in names for word in name.split())
    for kind in ("single", "sign", "pair", "count"):
        for _ in range(400):
            scene = scenes.random_scene(rng, subjects, kind, spell=0)
            # what stands on a sign is spelled and need not be known
            told = set(re.findall(r"\w+", scenes.caption(scene, rng).lower()))
            words.update(told - set(scene.text.split()))
    return {
        "subjects": [subject.name for subject in subjects],
        "plurals": {n: scenes._plural(n) for s in subjects for n in s.names},
        "synonyms": {n: s.name for s in subjects for n in s.names[1:]},
        "styles": list(scenes.STYLES),
        "colours": {name: "#{:02x}{:02x}{:02x}".format(*rgb) for name, rgb in scenes.COLOURS.items()},
        "signs": list(dict.fromkeys(scenes.WORDS)),
        "counts": list(scenes.COUNTS.values()),
        "longest": scenes.LONGEST,
        "known": sorted(words),
    }


def known_subjects() -> list:
    """The subjects that these weights were trained on: those that the judge has templates of."""
    return list(Judge().subjects)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    logging.disable(logging.WARNING)
    export(parser.parse_args().folder)
