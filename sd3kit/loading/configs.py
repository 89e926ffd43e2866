"""The configurations of the real models, to build them at true size without a download.

Read off the models' own configuration files on the Hub; what is left out is the classes' own default. A test checks
the parameter counts that these give against the published ones. Nothing here holds weights.
"""

HUB = {
    "medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
}

_COMMON = dict(
    sample_size=128,
    patch_size=2,
    joint_attention_dim=4096,
    pooled_projection_dim=2048,
)
_MEDIUM = _COMMON | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
_LARGE = _COMMON | dict(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
)
TRANSFORMER = {
    "medium": _MEDIUM,
    "3.5-medium": _MEDIUM | dict(pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    "3.5-large": _LARGE,
    "3.5-large-turbo": _LARGE,
}
# Steps and guidance where a model's card asks for others than diffusers' 28 and 7: lesson 07 shows who says what.
OWN_SETTINGS = {
    "nano": (28, 4.0),
    "nano-turbo": (4, 1.0),
    "3.5-medium": (40, 4.5),
    "3.5-large": (28, 3.5),
    "3.5-large-turbo": (4, 1.0),
}
SHIFT = 3.0  # FlowMatchEulerDiscreteScheduler's, of all four

# CLIP L/14, OpenCLIP bigG/14 and T5-v1.1-XXL, the same in all four.
CLIP_L = dict(hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12)
CLIP_G = dict(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1280,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
)
T5_XXL = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
VAE = dict(
    latent_channels=16,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    sample_size=1024,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
