// How SD3 draws: a rectified flow followed by Euler's method, with shift and guidance. Equal to diffusers'.

/**
 * The noise levels from near 1 down to 0: one more than there are steps.
 *
 * Without shift they fall evenly. `shift` above 1 bends them so that more steps are spent at high noise, where it is
 * decided what stands where. `terminal`, where a model has one, is the level at which the last step starts: all levels
 * are stretched up to it. Without it the last of few steps starts near 0, where nothing is left to do.
 */
export function sigmas(steps, shift, { sigma_max: first, sigma_min: last, terminal }) {
  const levels = new Float64Array(steps + 1); // its last entry stays 0: no noise
  for (let i = 0; i < steps; i++) {
    const even = steps === 1 ? first : first + ((last - first) * i) / (steps - 1);
    levels[i] = (shift * even) / (1 + (shift - 1) * even);
  }
  if (terminal && steps > 1) { // one level alone cannot be stretched
    const stretch = (1 - terminal) / (1 - levels[steps - 1]);
    for (let i = 0; i < steps; i++) levels[i] = 1 - (1 - levels[i]) * stretch;
  }
  return Float32Array.from(levels);
}

/** Classifier-free guidance: away from what the empty (or negative) prompt predicts, by `scale` times the difference. */
export function guided(prompt, empty, scale) {
  return prompt.map((value, i) => empty[i] + scale * (value - empty[i]));
}

/** A clean latent with noise of level `sigma`: the straight line between the two. */
export function noised(clean, noise, sigma) {
  return clean.map((value, i) => sigma * noise[i] + (1 - sigma) * value);
}

/**
 * Follow the flow from `latents` down the noise levels.
 *
 * `velocity(latents, sigma)` predicts where the flow goes: noise minus picture. At each level one can follow it to the
 * very end; that is the picture which the model expects so far. `each({step, sigma, expected, latents})` is told of it
 * and may give other latents to go on with; inpainting does.
 */
export async function sample(latents, levels, velocity, each = () => {}) {
  for (let step = 0; step + 1 < levels.length; step++) {
    const [now, next] = [levels[step], levels[step + 1]];
    const flow = await velocity(latents, now);
    const expected = latents.map((value, i) => value - now * flow[i]);
    latents = latents.map((value, i) => value + (next - now) * flow[i]);
    latents = (await each({ step, sigma: now, next, expected, latents })) ?? latents;
  }
  return latents;
}

/**
 * The levels that image to image runs through. A picture is noised to the first of them, so with strength 0.6 the first
 * 40% of the steps are left out.
 */
export function from_strength(levels, strength) {
  const steps = levels.length - 1;
  return levels.slice(Math.trunc(Math.max(steps - Math.min(steps * strength, steps), 0)));
}
