// Draws, away from the page: loads nano's parts, runs them with onnxruntime-web, and tells the page of each step.

import { Generator, randn } from './random.js';
import { from_strength, guided, noised, sample, sigmas } from './sampler.js';
import { Tokens } from './tokens.js';

const KEPT = 16; // pictures whose steps are kept for the view under the hood, about a megabyte each
const tell = (message, transfer = []) => self.postMessage(message, transfer);

let about, tokens, ort, sessions, backend;
let transformers; // model -> its session
let failed = null; // why nothing can be drawn
let halted = 0; // drawings up to this id are not wanted any more
const records = new Map(); // id -> what the view under the hood needs

// ---- loading --------------------------------------------------------------------------------------------------------

/** A file's bytes; the page is told how many have come. */
async function bytes(url, count = () => {}) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} could not be loaded (${answer.status}): reload the page.`);
  const parts = [];
  let size = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    count(value.length);
  }
  const whole = new Uint8Array(size);
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
}

/** float16 -> float32. nano overflows when it computes in float16, so only the file is of half width. */
export function widen(half) {
  const table = new Float32Array(65536);
  for (let i = 0; i < 65536; i++) {
    const [sign, power, rest] = [i >> 15 ? -1 : 1, (i >> 10) & 31, i & 1023];
    table[i] = sign * (power ? 2 ** (power - 15) * (1 + rest / 1024) : 2 ** -14 * (rest / 1024));
  }
  const wide = new Float32Array(half.length);
  for (let i = 0; i < half.length; i++) wide[i] = table[half[i]];
  return wide;
}

async function load({ wanted, threads, model }) {
  const start = performance.now();
  about = JSON.parse(new TextDecoder().decode(await bytes('model/nano.json')));
  tell({ kind: 'about', about });
  const adapter = wanted !== 'wasm' && (await navigator.gpu?.requestAdapter().catch(() => null));
  // an adapter that a processor imitates is slower than the processor itself
  const imitated = adapter?.info?.isFallbackAdapter || adapter?.info?.architecture === 'swiftshader';
  backend = adapter && (!imitated || wanted === 'webgpu') ? 'webgpu' : 'wasm';
  let loaded = 0;
  const count = (n) => tell({ kind: 'loading', loaded: (loaded += n), total: about.bytes });
  const [weights, ...files] = await Promise.all([
    bytes('model/weights.f16', count),
    ...['tokenizer', 'tokenizer_2', 'tokenizer_3'].map((name) => bytes(`model/${name}.json`)),
    runtime(threads),
  ]);
  tell({ kind: 'starting' });
  tokens = new Tokens(files.slice(0, 3).map((file) => JSON.parse(new TextDecoder().decode(file))), about);
  const values = widen(new Uint16Array(weights.buffer));
  const graphs = await Promise.all(Object.keys(about.weights).map((name) => bytes(`model/${name}.onnx`)));
  sessions = {};
  transformers = {};
  for (const [i, name] of Object.keys(about.weights).entries()) {
    const open = (parts) => session(graphs[i], about.weights[name], values, parts);
    if (name === 'transformer') {
      for (const [each, { lora }] of Object.entries(about.models)) transformers[each] = lazily(() => open(merged(values, lora)));
    } else sessions[name] = lazily(open);
  }
  // the encoder of pictures, and the other model, are opened when they are needed
  for (const part of [sessions.text, transformers[model] ?? transformers[about.first], sessions.decoder]) await part.open();
  const alone = ort.env.wasm.numThreads === 1;
  tell({ kind: 'ready', backend, threads: alone ? 1 : ort.env.wasm.numThreads, seconds: (performance.now() - start) / 1000 });
}

/** A session that is opened at its first use, or before by `open`. */
function lazily(make) {
  let made;
  const open = () => (made ??= make());
  return { open, run: async (feeds) => (await open()).run(feeds) };
}

/**
 * A LoRA added to the weights that it belongs to: place -> W + B A, and the others stay shared. So one transformer is
 * both models, and drawing takes no longer than without it.
 */
export function merged(values, lora) {
  const parts = new Map();
  for (const [place, inputs, outputs, rank, a, b] of lora) {
    const weight = values.slice(place, place + inputs * outputs); // inputs x outputs
    const up = Array.from({ length: rank }, (_, r) => Float32Array.from({ length: outputs }, (_, o) => values[b + o * rank + r]));
    for (let i = 0; i < inputs; i++) {
      const row = weight.subarray(i * outputs, (i + 1) * outputs);
      for (let r = 0; r < rank; r++) {
        const [scale, column] = [values[a + r * inputs + i], up[r]];
        for (let o = 0; o < outputs; o++) row[o] += scale * column[o];
      }
    }
    parts.set(place, weight);
  }
  return parts;
}

/** onnxruntime-web: the small build for a CPU, or the one that knows WebGPU too. */
async function runtime(threads) {
  const gpu = backend === 'webgpu';
  ort = await import(gpu ? './vendor/ort.webgpu.min.mjs' : './vendor/ort.wasm.min.mjs');
  const name = gpu ? 'ort-wasm-simd-threaded.asyncify' : 'ort-wasm-simd-threaded';
  const here = (file) => new URL(`vendor/${file}`, self.location).href;
  ort.env.wasm.wasmPaths = { mjs: here(`${name}.mjs`), wasm: here(`${name}.wasm`) };
  ort.env.logLevel = 'error';
  // Threads share memory, which a page may only do when its server isolates it (serve.py does).
  const most = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  ort.env.wasm.numThreads = threads || Math.max(1, Math.min(4, most));
}

/** A graph with its weights; `parts` are those that are not as in the file, by their place there. */
function session(graph, table, values, parts = new Map()) {
  const externalData = Object.entries(table).map(([path, [place, count]]) => {
    const part = parts.get(place) ?? values.subarray(place, place + count);
    return { path, data: new Uint8Array(part.buffer, part.byteOffset, count * 4) };
  });
  return ort.InferenceSession.create(graph, {
    executionProviders: [backend],
    externalData,
    graphOptimizationLevel: 'disabled', // export.py has done it
  });
}

// ---- drawing --------------------------------------------------------------------------------------------------------

const floats = (data, ...sides) => new ort.Tensor('float32', data, sides);
const join = (a, b) => {
  const both = new Float32Array(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
};
/** Let messages in, such as the one that stops a drawing. */
const breathe = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), resolve());
    port2.postMessage(0);
  });

/** What the transformer reads: the negative prompt first, then the prompt. Without guidance only the prompt. */
async function encode(prompts, length) {
  const rows = prompts.map((prompt) => tokens.ids(prompt, length));
  const feeds = {};
  for (const [i, name] of ['clip', 'clip_2', 't5'].entries()) {
    const ids = rows.flatMap((row) => row[i]);
    feeds[name] = new ort.Tensor('int64', BigInt64Array.from(ids, BigInt), [rows.length, ids.length / rows.length]);
  }
  return sessions.text.run(feeds);
}

async function draw({ id, settings, picture, mask }) {
  if (failed) throw failed;
  if (id <= halted) throw new Stopped();
  const start = performance.now();
  const { model, prompt, negative_prompt: negative, seed, steps, guidance, shift, size, strength } = settings;
  const side = size / about.factor;
  const count = about.channels * side * side;
  const length = tokens.length(prompt, negative);
  const guide = guidance > 1;
  const { text, pooled } = await encode(guide ? [negative, prompt] : [prompt], length);

  const generator = new Generator(seed);
  let levels = sigmas(steps, shift, about.models[model]);
  let clean, noise, latents;
  if (picture) {
    levels = from_strength(levels, strength);
    clean = await encodePicture(picture, size, generator);
    noise = randn(generator, count);
    latents = mask && strength === 1 ? noise : noised(clean, noise, levels[0]);
  } else {
    latents = noise = randn(generator, count);
  }
  const anew = mask && shrink(mask, size, side);

  const record = { prompt, length, side, levels, expected: [], looks: [] };
  const velocity = async (x, sigma) => {
    const batch = guide ? 2 : 1;
    const { velocity: found, looks } = await transformers[model].run({
      latents: floats(guide ? join(x, x) : x, batch, about.channels, side, side),
      timestep: floats(new Float32Array(batch).fill(Math.fround(sigma * about.timesteps)), batch),
      text,
      pooled,
    });
    record.looks.push(layersMean(looks, batch - 1));
    if (!guide) return found.data;
    return guided(found.data.subarray(count), found.data.subarray(0, count), guidance);
  };
  const each = async ({ step, next, expected, latents: now }) => {
    record.expected.push(expected);
    const rgba = look(expected, side);
    tell({ kind: 'step', id, step: step + 1, total: levels.length - 1, sigma: next, size, rgba }, [rgba.buffer]);
    await breathe();
    if (id <= halted) throw new Stopped();
    if (!anew) return now;
    // Outside the mask the picture itself goes on, with the noise that this level has.
    const kept = next ? noised(clean, noise, next) : clean;
    return now.map((value, i) => (anew[i % (side * side)] ? value : kept[i]));
  };
  const done = await sample(latents, levels, velocity, each);
  const rgba = await decode(done, side);
  records.set(id, record);
  if (records.size > KEPT) records.delete(records.keys().next().value);
  const seconds = (performance.now() - start) / 1000;
  tell({ kind: 'drawn', id, size, rgba, seconds, steps: levels.length - 1 }, [rgba.buffer]);
}

class Stopped extends Error {}

/** Attention to the text for one row of the batch, the mean of the layers: (places, text tokens). */
function layersMean({ data, dims }, row) {
  const [, layers, places, width] = dims;
  const mean = new Float32Array(places * width);
  for (let layer = 0; layer < layers; layer++) {
    const from = (row * layers + layer) * mean.length;
    for (let i = 0; i < mean.length; i++) mean[i] += data[from + i] / layers;
  }
  return mean;
}

/** Latents as a picture, without the decoder: a place's 8 x 8 pixels are linear in its channels, nearly. */
function look(latents, side) {
  const { preview, channels, factor } = about;
  const [size, block] = [side * factor, factor * factor];
  const rgba = new Uint8ClampedArray(size * size * 4).fill(255);
  const values = new Float32Array(3 * block);
  for (let place = 0; place < side * side; place++) {
    values.set(preview[channels]);
    for (let c = 0; c < channels; c++) {
      const latent = latents[c * side * side + place];
      for (let i = 0; i < values.length; i++) values[i] += latent * preview[c][i];
    }
    const corner = Math.floor(place / side) * factor * size + (place % side) * factor;
    for (let i = 0; i < values.length; i++) {
      const pixel = corner + Math.floor((i % block) / factor) * size + (i % factor);
      rgba[pixel * 4 + Math.floor(i / block)] = values[i] * 255;
    }
  }
  return rgba;
}

async function decode(latents, side) {
  const { picture } = await sessions.decoder.run({ latents: floats(latents, 1, about.channels, side, side) });
  const pixels = picture.data.length / 3;
  const rgba = new Uint8ClampedArray(pixels * 4).fill(255);
  for (let c = 0; c < 3; c++) for (let i = 0; i < pixels; i++) rgba[i * 4 + c] = picture.data[c * pixels + i] * 255;
  return rgba;
}

/** A picture (RGBA) -> its latents, drawn from what the encoder says they may be. */
async function encodePicture(rgba, size, generator) {
  const pixels = size * size;
  const data = new Float32Array(3 * pixels);
  for (let c = 0; c < 3; c++) for (let i = 0; i < pixels; i++) data[c * pixels + i] = rgba[i * 4 + c] / 127.5 - 1;
  const { mean, deviation } = await sessions.encoder.run({ picture: floats(data, 1, 3, size, size) });
  const noise = randn(generator, mean.data.length);
  return mean.data.map((value, i) => (value + deviation.data[i] * noise[i] - about.offset) * about.scaling);
}

/** The mask at the latent's places; each takes the pixel in its corner, as the pipeline does. */
function shrink(mask, size, side) {
  const step = size / side;
  return Uint8Array.from({ length: side * side }, (_, i) => mask[Math.floor(i / side) * step * size + (i % side) * step]);
}

// ---- under the hood -------------------------------------------------------------------------------------------------

/** The picture that the model expected after each of some steps, unless a drawing waits. */
async function strip({ id, most }) {
  const record = records.get(id);
  if (!record) return;
  const total = record.expected.length;
  const chosen = [...new Set(Array.from({ length: most }, (_, i) => Math.round((i * (total - 1)) / (most - 1))))];
  for (const [index, step] of chosen.entries()) {
    if (waiting) return;
    const rgba = await decode(record.expected[step], record.side);
    const size = record.side * about.factor;
    tell({ kind: 'frame', id, index, step: step + 1, total, sigma: record.levels[step], size, rgba }, [rgba.buffer]);
    await breathe();
  }
}

/** Where the picture looks at a word: the mean of all steps, or one step (from 1). */
function attention({ id, word, step }) {
  const record = records.get(id);
  if (!record) return;
  const places = tokens.places(record.prompt, word, record.length);
  const side = record.side / about.patch;
  const map = new Float32Array(side * side);
  const width = record.looks[0].length / map.length;
  const chosen = step ? [record.looks[step - 1]] : record.looks;
  for (const looks of chosen) {
    for (let i = 0; i < map.length; i++) for (const place of places) map[i] += looks[i * width + place] / chosen.length;
  }
  tell({ kind: 'attention', id, word, step, side, map });
}

// ---- messages: one drawing after the other --------------------------------------------------------------------------

let queue = Promise.resolve();
let waiting = 0; // drawings in the queue
const kinds = { load, draw, strip };

self.onmessage = ({ data }) => {
  if (data.kind === 'stop') {
    halted = data.id;
    return;
  }
  if (data.kind === 'attention') return attention(data); // needs no model, so it need not wait
  const drawing = data.kind === 'draw';
  waiting += drawing;
  const turn = () => {
    waiting -= drawing;
    return kinds[data.kind](data);
  };
  queue = queue.then(turn).catch((error) => {
    if (data.kind === 'load') failed = error;
    if (error instanceof Stopped) tell({ kind: 'stopped', id: data.id });
    else tell({ kind: 'error', id: data.id, during: data.kind, message: error.message ?? String(error) });
  });
};
