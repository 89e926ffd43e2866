"""Damaged folders of a pipeline: a table of what is done to nano's folder, and what `load` must say.

Each case is one sentence of a LoadError that names the file, the part or the tensor, never a traceback of another kind
and never a pipeline. To add one, write what is done to the folder and a fragment of the sentence.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd3kit
from sd3kit.loading.names import NANO

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "text_encoder_3": "model.safetensors",
}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def linked(folder: Path) -> Path:
    """nano's folder, its files links into the package, so that a damage is a file of its own."""
    for file in NANO.rglob("*.*"):
        if file.suffix in (".json", ".safetensors"):
            place = folder / file.relative_to(NANO)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    return folder


def put(path: str, data: bytes | str | None):
    """The damage of a file whose content is another, or which is gone."""

    def damage(folder):
        (folder / path).unlink()
        if data is not None:
            (folder / path).write_bytes(data.encode() if isinstance(data, str) else data)

    return damage


def cut(path: str, keep: float):
    def damage(folder):
        data = (folder / path).read_bytes()
        put(path, data[: int(len(data) * keep)])(folder)

    return damage


def link(path: str, to: str):
    def damage(folder):
        (folder / path).unlink()
        (folder / path).symlink_to(to)

    return damage


def weights(part: str, change):
    """The damage of a part's tensors: `change` is given their dictionary."""

    def damage(folder):
        file = folder / part / WEIGHTS[part]
        tensors = load_file(file)
        change(tensors)
        file.unlink()
        save_file({name: t.contiguous() for name, t in tensors.items()}, file)

    return damage


def settings(path: str, **change):
    def damage(folder):
        found = json.loads((folder / path).read_text())
        put(path, json.dumps({k: v for k, v in (found | change).items() if v is not ...}))(folder)

    return damage


def first(tensors, kind=""):
    return next(name for name in sorted(tensors) if kind in name)


def without(tensors):
    del tensors[first(tensors)]


def with_another(tensors):
    tensors["another.weight"] = torch.zeros(2)


def of_another_shape(tensors):
    name = first(tensors)
    tensors[name] = torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)


def with_value(value):
    def change(tensors):
        tensors[first(tensors)].flatten()[-1] = value

    return change


def gone(part):
    return lambda folder: shutil.rmtree(folder / part)


def swapped(a, b):
    def damage(folder):
        for name in (a, b):
            (folder / name).rename(folder / f"{name}.old")
        (folder / f"{a}.old").rename(folder / b)
        (folder / f"{b}.old").rename(folder / a)

    return damage


def sharded(missing: bool):
    def damage(folder):
        part = folder / "vae"
        tensors = load_file(part / WEIGHTS["vae"])
        (part / WEIGHTS["vae"]).unlink()
        names = sorted(tensors)
        halves = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
        for file, own in halves.items():
            save_file({name: tensors[name] for name in own}, part / file)
        if missing:
            (part / "b.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {n: file for file, own in halves.items() for n in own}}
        (part / f"{WEIGHTS['vae']}.index.json").write_text(json.dumps(index))

    return damage


def a_variant_only(folder):
    for part in WEIGHTS:
        file = folder / part / WEIGHTS[part]
        file.rename(file.with_name(file.name.replace(".safe", ".fp16.safe")))


def all_cases():
    """What is damaged, the damage, and what is said. Parts that a case does not name are given, which saves time."""
    for part in WEIGHTS:
        yield f"{part} lacks a tensor", weights(part, without), f"{part} lacks the weight"
    for part in ("vae", "text_encoder"):  # one of each library
        name = WEIGHTS[part]
        file, config = f"{part}/{name}", f"{part}/config.json"
        yield f"{part} has another tensor", weights(part, with_another), "does not know: another.weight"
        yield f"{part} has another shape", weights(part, of_another_shape), f"{part} has a weight of another shape"
        yield (
            f"{part} holds NaN",
            weights(part, with_value(float("nan"))),
            f"{part} holds NaN or infinity in the weight",
        )
        yield f"{part} holds infinity", weights(part, with_value(float("-inf"))), f"{part} holds NaN or infinity"
        yield f"{part} without tensors", weights(part, dict.clear), f"{part}.*(lacks the weight|damaged)"
        yield f"{part} gone", gone(part), f"{part}(/config.json)? is missing"
        yield f"{part} without weights", put(file, None), f"no file named {name}"
        yield f"{part} weights of 0 bytes", put(file, b""), f"{file} is damaged"
        yield f"{part} weights cut in the header", put(file, b"\x40\x00\x00\x00\x00\x00\x00\x00{"), f"{file} is damaged"
        yield f"{part} weights cut at half", cut(file, 0.5), f"{file} is damaged"
        yield f"{part} weights lack the last byte", cut(file, 0.99999), f"{file} is damaged"
        yield f"{part} weights are HTML", put(file, "<html>" * 99), f"{file} is damaged"
        yield f"{part} weights are a pointer", put(file, LFS), f"{file} is only a pointer of Git LFS"
        yield f"{part} weights a broken link", link(file, "/no/such"), "link to /no/such, which is not there"
        yield f"{part} weights a link in a circle", link(file, name), f"{file} cannot be read"
        yield f"{part} weights are a folder", lambda f, x=file: (put(x, None)(f), (f / x).mkdir()), "cannot be read"
        yield f"{part} without settings", put(config, None), f"{config} is missing"
        yield f"{part} settings cut", cut(config, 0.5), f"{config} is damaged: it is not JSON"
        yield f"{part} settings a list", put(config, "[]"), f"{config} is damaged: it holds a list"
        yield f"{part} settings a pointer", put(config, LFS), f"{config} is only a pointer"
        yield f"{part} settings in another encoding", put(config, b"\xff\xfe\x00{"), f"{config} is damaged"
        yield f"{part} settings nested deep", put(config, "[" * 100_000), f"{config} is damaged"
    for part, change in {
        "transformer": {"num_layers": 7},
        "vae": {"latent_channels": 8},
        "text_encoder": {"hidden_size": 128},
        "text_encoder_2": {"num_hidden_layers": 9},
        "text_encoder_3": {"vocab_size": 900},
    }.items():
        yield f"{part} settings of another size", settings(f"{part}/config.json", **change), f"{part} (lacks|has)"
    yield "transformer fewer layers", settings("transformer/config.json", num_layers=5), "transformer has"
    yield "transformer settings words", settings("transformer/config.json", num_layers="six"), "transformer cannot be"
    yield "text_encoder settings words", settings("text_encoder/config.json", hidden_size="x"), "text_encoder cannot be"
    for part in ("tokenizer", "tokenizer_3"):
        file = f"{part}/tokenizer.json"
        yield f"{part} gone", gone(part), f"{part} is missing"
        yield f"{part} without words", put(file, None), f"{part} cannot read a prompt: its words"
        yield f"{part} cut", cut(file, 0.5), f"{file} is damaged: it is not JSON"
        yield f"{part} a list", put(file, "[]"), f"{file} is damaged: it holds a list"
        yield f"{part} empty object", put(file, "{}"), f"{part} cannot"
        yield f"{part} a pointer", put(file, LFS), f"{file} is only a pointer"
        yield f"{part} broken link", link(file, "nowhere.json"), "is a link to nowhere.json"
        yield f"{part} settings cut", cut(f"{part}/tokenizer_config.json", 0.5), "tokenizer_config.json is damaged"
    yield "all: tokenizers swapped", swapped("tokenizer", "tokenizer_3"), "tokenizer_3 (is another model's|cannot)"
    yield "all: encoders swapped", swapped("text_encoder", "text_encoder_3"), "text_encoder .*"
    yield "all: transformer and vae swapped", swapped("transformer", "vae"), "transformer .*"
    file = "scheduler/scheduler_config.json"
    yield "scheduler gone", gone("scheduler"), "scheduler is missing"
    yield "scheduler without settings", put(file, None), "no file named scheduler_config.json"
    yield "scheduler cut", cut(file, 0.4), f"{file} is damaged"
    yield "scheduler of words", settings(file, num_train_timesteps="many"), "scheduler cannot be loaded"
    index = "model_index.json"
    yield "index gone", put(index, None), "holds no model_index.json"
    yield "index a list", put(index, "[]"), f"{index} is damaged: it holds a list"
    yield "index empty", put(index, ""), f"{index} is damaged: it is not JSON"
    yield "index an empty object", put(index, "{}"), f"{index} describes a None"
    yield "index of another pipeline", settings(index, _class_name="FluxPipeline"), "describes a FluxPipeline"
    yield "index without the vae", settings(index, vae=...), "no library and class for the vae"
    yield "index with a short entry", settings(index, vae=["diffusers"]), "no library and class for the vae"
    yield "index with numbers", settings(index, vae=[1, 2]), "no library and class for the vae"
    yield "vae of an unknown class", settings(index, vae=["diffusers", "AutoencoderXY"]), "asks for AutoencoderXY"
    yield "vae in shards, one missing", sharded(missing=True), r"vae cannot be loaded .*b\.safetensors"
    yield "vae of a variant only", a_variant_only, 'has its weights only as variant="fp16": give load that too'


CASES = {name: (damage, words) for name, damage, words in all_cases()}


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_folder_is_one_sentence(name, tmp_path, pipe):
    damage, words = CASES[name]
    damage(linked(tmp_path / "mine"))
    loaded = (part := name.split()[0], part.replace("tokenizer", "text_encoder"))
    given = {} if part == "all:" else {k: v for k, v in pipe.components.items() if k not in loaded and v is not None}
    with pytest.raises(sd3kit.LoadError) as caught:
        sd3kit.load(tmp_path / "mine", quiet=True, **given)
    said = str(caught.value)
    assert re.search(words, said) and "\n" not in said and len(said) < 700
    assert not re.search(r"\b(delete|remove)\b", said)  # the folder is the person's own


def test_the_undamaged_folder_loads_and_shards_do(tmp_path, pipe):
    sharded(missing=False)(linked(tmp_path / "mine"))
    loaded = sd3kit.load(tmp_path / "mine", quiet=True)
    for x, y in zip(loaded.vae.state_dict().values(), pipe.vae.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def test_a_variant_is_used_where_it_is_and_refused_where_it_is_not(tmp_path):
    a_variant_only(linked(tmp_path / "mine"))
    assert sd3kit.load(tmp_path / "mine", variant="fp16", quiet=True).transformer.dtype is torch.float32
    with pytest.raises(sd3kit.LoadError, match="no weights of the variant 'fp16'"):
        sd3kit.load("nano", variant="fp16", quiet=True)


def test_parts_that_are_given_need_no_files(tmp_path, pipe):
    folder = linked(tmp_path / "mine")
    for part in ("text_encoder_3", "tokenizer_3", "vae"):
        gone(part)(folder)
    loaded = sd3kit.load(folder, text_encoder_3=None, tokenizer_3=None, vae=pipe.vae, quiet=True)
    assert loaded.text_encoder_3 is None and loaded.vae is pipe.vae


def test_what_the_libraries_place_or_quantize_is_loaded_by_them(tmp_path):
    folder = linked(tmp_path / "mine")
    assert type(sd3kit.load(folder, quiet=True, device_map=None).vae).__name__ == "AutoencoderKL"
    weights("vae", without)(folder)
    with pytest.raises(sd3kit.LoadError, match="vae lacks the weight"):
        sd3kit.load(folder, quiet=True, device_map=None)


def test_a_folder_that_may_not_be_read(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    folder = linked(tmp_path / "mine")
    put("vae/config.json", "{}")(folder)
    (folder / "vae" / "config.json").chmod(0)
    with pytest.raises(sd3kit.LoadError, match="cannot be read"):
        sd3kit.load(folder, quiet=True)


def test_a_copy_from_the_hub_is_got_again_by_a_command(tmp_path, monkeypatch):
    from sd3kit.loading import hub

    folder = linked(tmp_path / "snapshot")
    put("vae/config.json", "[]")(folder)
    monkeypatch.setattr(hub, "folder", lambda *args, **kwargs: folder)
    with pytest.raises(sd3kit.LoadError, match=r"`hf download someone/model vae/config\.json --force-download`"):
        sd3kit.load("someone/model", quiet=True)


def test_nothing_of_the_libraries_reaches_the_page(tmp_path, capfd):
    weights("text_encoder", without)(linked(tmp_path / "mine"))
    with pytest.raises(sd3kit.LoadError):
        sd3kit.load(tmp_path / "mine", quiet=True)
    assert capfd.readouterr() == ("", "")
