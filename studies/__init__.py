"""How the lessons' figures with intervals were measured: `python -m studies NAME` measures what is not stored yet.

It runs in the repository's folder and is no part of the package, which holds the results alone (`sd3kit.study.load`).
`store` says what a study is and where its rows go; `drawing`, `training`, `teaching` and `few` what is measured;
`seats` what a class needs, `accounting` what the real models do; `measure` is the time and memory of every recipe and
speed-up, with `tables` and `bench`. May import all of sd3kit; nothing but the tests
imports it. Start with `store.py`.
"""
