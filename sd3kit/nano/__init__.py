"""nano: the weights of a small SD3 in diffusers' layout, and the recipe that made them.

`python -m sd3kit.nano train` makes everything from the sources; `evaluate` measures it. Using nano needs none of this
code: `StableDiffusion3Pipeline.from_pretrained` loads this folder as it is.
"""
