"""Time, memory and the floor: what makes SD3 fit (`recipes`) and fast (`speedups`), and what each costs.

`protocol` measures, `account` counts a part's bytes without running it, `fit` advises by what is stored of both,
`bench` is what `sd3kit measure` does, `report` its table. May import `loading`, `records` and `recipe`. Start with
`recipes.py`.
"""
