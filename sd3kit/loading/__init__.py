"""Models by name: `names` says what a name stands for, `device` picks where and how precisely, `pipeline` loads it.

Imports nothing of sd3kit. Start with `pipeline.py`.
"""
