"""Where the words look: what diffusers' joint blocks compute in their attention, recorded while a pipeline draws.

diffusers' `JointAttnProcessor2_0` computes joint attention in one fused call that keeps no weights. The processor here
computes the same thing openly.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
from diffusers.models.attention_processor import Attention

# What is kept of an attention: a function of its logits and weights (N, heads, tokens, tokens), picture tokens first,
# and its outputs (N, tokens, width), what each token has read before the output projection.
Keep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
# The pipeline's arguments that its `encode_prompt` takes.
ENCODING = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "clip_skip")


class OpenProcessor:
    """`JointAttnProcessor2_0` with its weights and outputs in the open.

    After a call `kept` is what `keep(logits, weights, outputs)` gives: weights are large (SD3 Medium at 1024 pixels:
    1.7 GB a layer with guidance), so they are not kept whole. Their rows sum to 1 over what a token reads.

    The last `concepts` of the text's tokens go along without a trace: no other token reads them, and they read the
    picture and each other (ConceptAttention, arXiv 2502.04320, section 4).
    """

    kept: object

    def __init__(self, keep: Keep, concepts: int = 0):
        self.keep, self.concepts = keep, concepts

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **_
    ):
        def heads(x, q, k, v, norm_q, norm_k):
            q, k, v = (f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (q, k, v))
            return (norm_q(q) if norm_q else q), (norm_k(k) if norm_k else k), v

        streams = [heads(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
            streams.append(heads(encoder_hidden_states, *added))
        query, key, value = (torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))
        logits = (query * attn.scale) @ key.transpose(-1, -2)  # scaled first: in float16 the product may overflow
        picture, end = hidden_states.shape[1], logits.shape[-1] - self.concepts
        logits[..., :end, end:] = -torch.inf
        logits[..., end:, picture:end] = -torch.inf
        weights = logits.softmax(-1)
        outputs = (weights @ value).transpose(1, 2).flatten(2)
        self.kept = self.keep(logits, weights, outputs)
        looked = attn.to_out[1](attn.to_out[0](outputs[:, :picture]))
        if encoder_hidden_states is None:
            return looked
        text = outputs[:, picture:]
        return looked, text if attn.context_pre_only else attn.to_add_out(text)


@contextlib.contextmanager
def opened(transformer, keep: Keep, concepts: int = 0) -> Iterator[list[OpenProcessor]]:
    """Put an `OpenProcessor` into the joint attention of each block while this lasts; gives them in order."""
    before = [block.attn.processor for block in transformer.transformer_blocks]
    open_ones = [OpenProcessor(keep, concepts) for _ in before]
    for block, processor in zip(transformer.transformer_blocks, open_ones, strict=True):
        block.attn.processor = processor
    try:
        yield open_ones
    finally:
        for block, processor in zip(transformer.transformer_blocks, before, strict=True):
            block.attn.processor = processor


def word_tokens(pipe, prompt: str, word: str, max_sequence_length: int = 40) -> list[int]:
    """The places of a word's tokens in the joint text sequence, for the CLIPs' 77 and the T5's part after them.

    The word is looked for as a whole: "a" is not the one in "apples".

    Raises:
        ValueError: the word is not in the prompt, or is cut off.
    """
    found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
    if not word or found is None:
        raise ValueError(f"The word {word!r} is not in the prompt {prompt!r}.")
    start, end = found.span()
    places = []
    for tokenizer, offset, length in ((pipe.tokenizer, 0, 77), (pipe.tokenizer_3, 77, max_sequence_length)):
        if tokenizer is None:
            continue
        spans = tokenizer(prompt, return_offsets_mapping=True, truncation=True, max_length=length).offset_mapping
        places += [offset + i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a]
    if not places:
        raise ValueError(f"The word {word!r} is beyond the {max_sequence_length} tokens that the T5 reads.")
    return places


@torch.no_grad()
def maps(
    pipe,
    prompt: str,
    words: list[str],
    *,
    seed: int = 0,
    steps: int = 28,
    max_sequence_length: int = 40,
    callback: Callable | None = None,
    **settings,
) -> dict:
    """Draw a prompt and record where its words are looked at.

    Args:
        words: each must be in the prompt.
        callback: run at the end of each step, as the pipeline's `callback_on_step_end`.
        settings: more arguments for the pipeline, for one picture.

    Returns:
        `image`; `raw` (words, steps, layers, rows, columns): the attention that picture tokens pay to a word's tokens;
        `concept`, the same shape: ConceptAttention (arXiv 2502.04320). Each word, encoded alone, goes along as concept
        tokens; the map is the similarity of what picture tokens and a word's concept tokens have read (the attention's
        outputs), as a softmax over the words given.

    Raises:
        ValueError: no words, or one that is not in the prompt.
    """
    if not words:
        raise ValueError(f"There is no word to look at: name some of the prompt {prompt!r}.")
    places = [word_tokens(pipe, prompt, word, max_sequence_length) for word in words]
    asked = {"prompt_2": None, "prompt_3": None} | {name: settings.pop(name) for name in ENCODING if name in settings}
    scale = (settings.get("joint_attention_kwargs") or {}).get("scale")
    embeds, empty, pooled, empty_pooled = pipe.encode_prompt(
        prompt, **asked, lora_scale=scale, max_sequence_length=max_sequence_length
    )
    alone = pipe.encode_prompt(
        list(words), None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )[0]
    concepts = [one[word_tokens(pipe, word, word, max_sequence_length)] for one, word in zip(alone, words, strict=True)]
    along, sizes = torch.cat(concepts)[None], [len(tokens) for tokens in concepts]
    raw, concept = [], []

    def kept(logits, weights, outputs):
        weights, outputs = weights[-1], outputs[-1]  # the prompt's half, not the empty one's
        picture = len(outputs) - embeds.shape[1] - sum(sizes)
        outputs = outputs.float()  # half precision cannot hold the products below
        read = torch.stack([weights[:, :picture, [picture + p for p in at]].sum(-1).mean(0) for at in places])
        said = torch.stack([part.mean(0) for part in outputs[-sum(sizes) :].split(sizes)])
        return read, (outputs[:picture] @ said.T).softmax(-1).T

    def keep(pipe, step, timestep, values):
        read, similar = zip(*(processor.kept for processor in processors), strict=True)
        raw.append(torch.stack(read, 1))
        concept.append(torch.stack(similar, 1))
        return values if callback is None else callback(pipe, step, timestep, values)

    with opened(pipe.transformer, kept, sum(sizes)) as processors:
        image = pipe(
            prompt_embeds=torch.cat([embeds, along], 1),
            negative_prompt_embeds=torch.cat([empty, along], 1),
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=empty_pooled,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=keep,
            **settings,
        ).images[0]
    rows = image.height // (pipe.vae_scale_factor * pipe.transformer.config.patch_size)
    return {
        "image": image,
        "raw": torch.stack(raw, 1).unflatten(-1, (rows, -1)).float().cpu(),
        "concept": torch.stack(concept, 1).unflatten(-1, (rows, -1)).float().cpu(),
    }
