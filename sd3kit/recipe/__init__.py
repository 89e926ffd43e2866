"""How nano was made and how it is judged: `python -m sd3kit.recipe train` makes everything from the sources.

`scenes` says what nano knows, `art` draws it, `judge` reads pictures; `autoencoder`, `reading` and `flow` train the
three parts; `evaluate` measures the result, `digest` tells of which weights. May import `loading`, `records` and
`lesson.show`. Start with `scenes.py`.
Using nano needs none of this code: `StableDiffusion3Pipeline.from_pretrained` loads its folder as it is.
"""
