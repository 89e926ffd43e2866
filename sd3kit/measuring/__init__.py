"""Time, memory and the floor: `protocol` measures, `account` counts bytes without running, `bench` is the command.

`recipes` and `speedups` are what is measured. May import `loading`, `records` and `recipe`. Start with `recipes.py`.
"""
