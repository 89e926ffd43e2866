"""Time, memory and the floor: what makes SD3 fit (`recipes`) and fast (`speedups`), and what each costs.

`protocol` measures, `account` counts a part's bytes without running it, `fit` advises by what is stored of both. May
import `loading` and `records`. Start with `recipes.py`; `python -m studies.measure`, in the repository, measures all.
"""
