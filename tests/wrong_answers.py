"""Typical wrong answers to the exercises, and what each check must say to them: by lesson, then by exercise."""

WRONG = {
    "00_start_here": [
        [("calls = 56", "two predictions of a step apart"), ("calls = 29", "after the last step")],
        [
            ("banana = 'a banana on a purple background'", "that is a prompt"),
            ("banana = draw('a fox on a blue background, flat', 1)", "background is not purple"),
            ("banana = Image.new('RGB', (128, 128), scenes.COLOURS['purple'])", "sees nothing"),
        ],
        [
            ("guided = lambda a, b, w: b + w * (a - b)", "swapped"),
            ("guided = lambda a, b, w: b + w * (b - a)", "start from the empty prompt"),
            ("guided = lambda a, b, w: None", "add return"),
        ],
        [
            ("wide = (side, side // 2 + 8)", "multiples of 16"),
            ("wide = (side // 2, side)", "width comes first"),
            ("wide = (side * 2, side)", "should be near side x side"),
            ("wide = (side, side)", "near 16 / 9"),
        ],
        [("run = 28", "skips the first steps"), ("run = 3", "share of the steps")],
    ],
    "01_architecture": [
        [("joint_tokens = n + 2 * 77 + 256", "side by side"), ("joint_tokens = 77 + 256", "picture's own tokens")],
        [
            ("rms_norm = lambda x, w: F.layer_norm(x, (16,), w)", "does not subtract the mean"),
            ("rms_norm = lambda x, w: x / x.square().sum(-1, True).sqrt() * w", "mean of the squares"),
        ],
        [
            ("patchify = lambda z: z", "should be (N, H/2 * W/2, 64)"),
            (
                "patchify = lambda z: z.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 3, 5, 1)"
                ".flatten(3).flatten(1, 2)",
                "the order is not",
            ),
        ],
        [
            ("per_word = 0.5", "give a dictionary"),
            (
                "per_word = {w: weights[:, places[w], :n].mean().item() for w in ('fox', 'blue', 'background')}",
                "the way back",
            ),
        ],
        [
            ("clips_alone = 0.463", "whatever the CLIPs do"),
            ("clips_alone = 0.537 * 0.463**2", "one CLIP alone"),
            ("clips_alone = 13.4", "between 0 and 1"),
        ],
    ],
    "02_sampling_and_shift": [
        [
            ("my_shift = lambda t, a: t / (a - (a - 1) * t)", "the inverse"),
            ("my_shift = lambda t, a: a * t", "no noise levels"),
        ],
        [
            ("x0_from = lambda x, s, v: x + (1 - s) * v", "that is the noise"),
            ("x0_from = lambda x, s, v: x - v", "scale the velocity"),
        ],
        [
            ("heun = lambda x, s, f, v: x + (f - s) * v(x, s)", "first order"),
            ("heun = lambda x, s, f, v: x - (f - s) * v(x, s)", "the wrong way"),
            ("heun = lambda x, s, f, v: x + (f - s) * (v(x, s) + v(x + (f - s) * v(x, s), s)) / 2", "the level"),
            ("heun = lambda x, s, f, v: x + (f - s) * v(x + (f - s) / 2 * v(x, s), (s + f) / 2)", "both ends"),
        ],
        [("a_for_1024_places = 4.0", "ratio of the places"), ("a_for_1024_places = 0.5", "other way round")],
    ],
    "03_rectified_flow": [
        [("line = lambda x0, noise, s: s * x0 + (1 - s) * noise", "share of the noise")],
        [
            ("my_lognorm = lambda n, m, s: m + s * torch.randn(n)", "no noise levels"),
            ("my_lognorm = lambda n, m, s: torch.sigmoid(s * (m + torch.randn(n)))", "the mean goes outside"),
            ("my_lognorm = lambda n, m, s: torch.sigmoid(m + s**2 * torch.randn(n))", "not the variance"),
            ("my_lognorm = lambda n, m, s: torch.sigmoid(m + s**0.5 * torch.randn(n))", "not the variance"),
        ],
        [
            ("left_at_1 = moons(100_000).var(0).mean().item() ** 0.5", "that is the deviation"),
            ("left_at_1 = moons(100_000).var(0).sum().item()", "not their sum"),
        ],
        [
            (
                "weight = lambda s: torch.exp(-torch.logit(s) ** 2 / 2) / (2 * torch.pi) ** 0.5",
                "change of variables",
            ),
            ("weight = lambda s: torch.exp(-torch.logit(s) ** 2 / 2) / (s * (1 - s))", "has the integral 1"),
        ],
    ],
    "04_memory": [
        [
            ("gib = lambda parameters, bits: parameters * bits / 2**30", "bits are not bytes"),
            ("gib = lambda parameters, bits: parameters * bits / 8 / 1e9", "thousand million"),
        ],
        [
            ("without_negative = max(offloaded(stages))", "with the negative prompt"),
            ("without_negative = sum(weights.values())", "all parts together"),
        ],
        [
            ("in_blocks = lambda weight, bits, block: rounded(weight, bits)", "each block has its own scale"),
            ("in_blocks = lambda weight, bits, block: rounded(weight.reshape(-1, block), bits)", "own shape again"),
            (
                """def in_blocks(weight, bits, block):
    rows = weight.reshape(-1, block)
    scale = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((rows / scale).trunc() * scale).view_as(weight)""",
                "round to the nearest",
            ),
        ],
        [("k_black = 1", "still finite"), ("k_black = 1e8", "before that already")],
    ],
    "05_compile": [
        [
            ("break_even = lambda first, eager, compiled: first / (eager - compiled)", "draws a picture too"),
            ("break_even = lambda first, eager, compiled: first / eager", "by what a call saves"),
            (
                """def break_even(first, eager, compiled):
    return (first - compiled) / (eager - compiled) if eager != compiled else float("inf")""",
                "it never pays",
            ),
        ],
        [
            ("saved = 0.7", "compute the prompt's half"),
            ("saved = 0.65", "what is left"),
            ("saved = 0.15", "missing in 70%"),
        ],
        [
            ("intensity_of = lambda n, d, b: n * d**2 / (b * (d**2 + 2 * n * d))", "two operations"),
            ("intensity_of = lambda n, d, b: 2 * n / b", "cross the memory too"),
        ],
        [("graphs = 3", "the batch is a shape too"), ("graphs = 2", "no graph serves two sizes")],
        [
            (
                """def left_out(ratios, threshold):
    return int(len(ratios) - 0.2 * len(ratios))""",
                "after three steps that were left out",
            ),
            (
                """def left_out(ratios, threshold):
    return sum(1 for i in range(len(ratios)) if i % 4)""",
                "the first fifth",
            ),
            (
                """def left_out(ratios, threshold):
    error, row, total = 0.0, 0, 0
    for ratio in ratios[int(0.2 * len(ratios) + 0.5) :]:
        error, row = error + abs(1 - ratio), row + 1
        if error <= threshold and row <= 3:
            total += 1
        else:
            error, row = 0.0, 0
    return total""",
                "the ratios multiply",
            ),
        ],
    ],
    "07_few_steps": [
        [("passes = 80", "a third time"), ("passes = 88", "both ends")],
        [
            ("chord = lambda s, e, h, t: (e - s) / (h - t)", "the sign"),
            ("chord = lambda s, e, h, t: e - s", "divide by the length"),
        ],
        [
            ("stretch = lambda s, last: s * last / s[-1]", "first level must stay 1"),
            ("stretch = lambda s, last: 1 - (1 - s) * last", "should be 0.5"),
        ],
        [
            ("reflow_pair = lambda n, p, s: ((1 - s) * n + s * p, n - p)", "share of the noise"),
            ("reflow_pair = lambda n, p, s: ((1 - s) * p + s * n, p - n)", "points to the noise"),
        ],
    ],
    "06_dreambooth_lora": [
        [
            ("lora_count = lambda out, inner, rank: out * inner", "the whole matrix"),
            ("lora_count = lambda out, inner, rank: rank * out * inner", "not multiplied"),
        ],
        [
            ("lora_forward = lambda x, W, A, B, scale: x @ W.T", "the product of B and A is missing"),
            ("lora_forward = lambda x, W, A, B, scale: x @ (B @ A).T", "the frozen W is missing"),
            ("lora_forward = lambda x, W, A, B, scale: x @ (W + B @ A).T", "must depend on the scale"),
        ],
        [
            (
                "with_prior = lambda each, weight: each.chunk(2)[1].mean() + weight * each.chunk(2)[0].mean()",
                "the halves are swapped",
            )
        ],
        [("times = 100", "the accumulation counts"), ("times = 2000", "there are five"), ("times = 500", "not a pass")],
        [
            ("rank_found = min(original.shape)", "the rank of a whole matrix"),
            ("rank_found = 16", "a tolerance"),
            ("rank_found = 2", "clearly above rounding"),
        ],
    ],
}
