"""The text half of nano: two CLIPs and a T5 at small size, their tokenizers, and SD3's way to join what they say."""

import collections
import io
import itertools
import json
import math
import random
import string
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from . import scenes
from .checkpoints import whole_files

CLIP_LENGTH = 77  # as SD3's: diffusers' training tools count on it
JOINT = 192  # width of the T5, and of the joint sequence; the two CLIPs side by side must not exceed it
CLIP_WIDTHS = (64, 96)


def captions(count: int, seed: int = 0) -> list[str]:
    """So many captions over all subjects, signs among them, from which the tokenizers learn."""
    rng = random.Random(seed)
    kinds = itertools.cycle(("single", "sign", "pair", "count"))
    return [
        scenes.caption(scenes.random_scene(rng, scenes.SUBJECTS, kind, spell=0.2), rng)
        for kind in itertools.islice(kinds, count)
    ]


def clip_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """CLIP's byte-level BPE, trained on the captions. As in SD3 one pads with its end token, the other with "!"."""
    trained = CLIPTokenizer(model_max_length=CLIP_LENGTH).train_new_from_iterator(captions(20_000), 1600)
    start, end = trained.bos_token, trained.eos_token
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    # every byte, also at the end of a word: no text is unknown
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    learnt = [token for token in model["vocab"] if token not in alphabet and token not in (start, end)]
    # the end token comes last, as in CLIP; as number 2 it would switch transformers to an old way of pooling
    vocabulary = {token: i for i, token in enumerate((*alphabet, *learnt, start, end))}
    merges = [tuple(pair) for pair in model["merges"]]
    first, second = (
        CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=CLIP_LENGTH)
        for pad in (end, "!")
    )
    return first, second


def t5_tokenizer() -> T5TokenizerFast:
    """A Unigram tokenizer as T5's: the captions' words whole, and letters.

    The words on signs are left out on purpose: like any word that it does not know, a sign's text falls into letters,
    and the T5 can see how it is spelled.
    """
    rng, counts = random.Random(0), collections.Counter()
    for kind in itertools.islice(itertools.cycle(("single", "sign", "pair", "count")), 20_000):
        scene = scenes.random_scene(rng, scenes.SUBJECTS, kind, spell=0.0)
        counts.update(
            w
            for w in scenes.caption(scene, rng).replace(",", " ").replace('"', " ").split()
            if w not in scene.text.split()
        )
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, math.log(n / total)) for word, n in sorted(counts.items()) if n >= 5]
    pieces += [(c, -9.0) for c in string.ascii_lowercase + string.digits + string.punctuation]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512, _spm_precompiled_charsmap=small_letters())


def small_letters() -> bytes:
    """SentencePiece's compiled table that makes small letters of capitals and drops accents.

    transformers 5 rebuilds a T5's tokenizer from its vocabulary, and of normalizers keeps this kind alone.
    """
    import sentencepiece  # only the first run of the recipe needs it
    from sentencepiece import sentencepiece_model_pb2

    quotes = {chr(0x2018): "'", chr(0x2019): "'", chr(0x201C): '"', chr(0x201D): '"'}
    rules = []
    for code in (*range(0x21, 0x250), *range(0x1E00, 0x1F00), *range(0x2010, 0x2030)):
        plain = unicodedata.normalize("NFKD", chr(code)).lower()
        plain = "".join(quotes.get(c, c) for c in plain if not unicodedata.combining(c))
        if plain.strip() and plain != chr(code):
            rules.append(f"{code:X}\t{' '.join(f'{ord(c):X}' for c in plain)}")
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rules.tsv"
        table.write_text("\n".join(rules) + "\n", encoding="utf-8")
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c"] * 10), model_writer=model, vocab_size=7, model_type="unigram",
            normalization_rule_tsv=str(table), hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    return sentencepiece_model_pb2.ModelProto.FromString(model.getvalue()).normalizer_spec.precompiled_charsmap


def tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer, T5TokenizerFast]:
    """The three tokenizers in `folder`, in the pipeline's layout; trained and stored where they are not there."""
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    if not all((folder / name).is_dir() for name in names):
        with whole_files(folder) as part:
            for name, tokenizer in zip(names, (*clip_tokenizers(), t5_tokenizer()), strict=True):
                tokenizer.save_pretrained(part / name)
    kinds = (CLIPTokenizer, CLIPTokenizer, T5TokenizerFast)
    first, second, third = (kind.from_pretrained(folder / name) for kind, name in zip(kinds, names, strict=True))
    return first, second, third


def clip(width: int, tokenizer: CLIPTokenizer, activation: str) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=JOINT,
        d_kv=32,
        d_ff=384,
        num_layers=3,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = T5EncoderModel(config)
    # Each head begins by looking at one neighbour: 1, 2 or 4 tokens before or after (16 buckets before, 16 after).
    # From no preference at all, letters learn their place in a word several times slower.
    with torch.no_grad():
        bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        for head, bucket in enumerate((1, 2, 4, 17, 18, 20)):
            bias[bucket, head] += 5
    return model


def cut(ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Ids as `Text.tokens` gives them, each (N, tokens), up to the longest of the N."""
    return [each[:, : int((each >= 0).sum(1).max())] for each in ids]


class Text(torch.nn.Module):
    """The three encoders and their tokenizers, and the joint embedding that SD3's pipeline makes of them."""

    def __init__(self, folder: Path):
        """Encoders with new weights; tokenizers from `folder`, or trained and stored there: ids must not change."""
        super().__init__()
        self.tokenizers = tokenizers(folder)
        self.text_encoder = clip(CLIP_WIDTHS[0], self.tokenizers[0], "quick_gelu")
        self.text_encoder_2 = clip(CLIP_WIDTHS[1], self.tokenizers[1], "gelu")
        self.text_encoder_3 = t5(self.tokenizers[2])

    @classmethod
    def from_pipeline(cls, folder: Path) -> "Text":
        """The trained encoders of a pipeline's folder, in float32."""
        text = cls(folder)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            kind = type(getattr(text, name))
            setattr(text, name, kind.from_pretrained(folder / name, use_safetensors=True).float())
        return text.eval().requires_grad_(False)

    @classmethod
    def of(cls, pipe) -> "Text":
        """The encoders and tokenizers of a loaded pipeline, as they are."""
        text = cls.__new__(cls)
        torch.nn.Module.__init__(text)
        text.tokenizers = (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3)
        text.text_encoder, text.text_encoder_2 = pipe.text_encoder, pipe.text_encoder_2
        text.text_encoder_3 = pipe.text_encoder_3
        return text

    def tokens(self, prompts: list[str], clip_length: int, t5_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids for the CLIPs (N, clip_length) and for the T5 (N, t5_length); -1 where there is only padding."""
        found = []
        for tokenizer, length in zip(self.tokenizers[::2], (clip_length, t5_length), strict=True):
            given = tokenizer(
                prompts, padding="max_length", truncation=True, max_length=length, return_attention_mask=True,
                return_tensors="pt",
            )  # fmt: skip
            found.append(given.input_ids.masked_fill(given.attention_mask == 0, -1))
        return found[0], found[1]

    def forward(
        self, prompts: list[str], clip_length: int, t5_length: int, keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt embeddings (N, clip_length + t5_length, 192) and the pooled ones (N, 160).

        `keep` is (N, 3), 1 or 0 for each encoder of each prompt: a dropped one is zeros, as where a pipeline has no T5.
        """
        clip, t5 = self.tokens(prompts, clip_length, t5_length)
        return self.encode(clip.to(keep.device), t5.to(keep.device), keep)

    def encode(self, clip: torch.Tensor, t5: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` for ids as `tokens` gives them."""
        pads = (tokenizer.pad_token_id for tokenizer in self.tokenizers)
        ids = [given.masked_fill(given < 0, pad) for given, pad in zip((clip, clip, t5), pads, strict=True)]
        first = self.text_encoder(ids[0], output_hidden_states=True)
        second = self.text_encoder_2(ids[1], output_hidden_states=True)
        third = self.text_encoder_3(ids[2])[0]
        one, two, three = keep.to(third.dtype).unbind(1)
        side_by_side = torch.cat(
            [first.hidden_states[-2] * one[:, None, None], second.hidden_states[-2] * two[:, None, None]], dim=-1
        )
        side_by_side = torch.nn.functional.pad(side_by_side, (0, JOINT - side_by_side.shape[-1]))
        pooled = torch.cat([first.text_embeds * one[:, None], second.text_embeds * two[:, None]], dim=-1)
        return torch.cat([side_by_side, third * three[:, None, None]], dim=1), pooled
