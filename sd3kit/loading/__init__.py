"""Models by name: `names` says what a name stands for, `device` picks where and how precisely, `pipeline` loads it.

May import `errors`. Start with `pipeline.py`.
"""
