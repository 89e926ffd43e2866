// The page: what is asked for, what is shown. The drawing itself is in worker.js.

import * as gallery from './gallery.js';
import { Paint } from './paint.js';
import { settingsOf, withSettings } from './png.js';
import { Words } from './words.js';

const $ = (id) => document.getElementById(id);
const FIRST = 'A cat holding a sign that says hello world';
const FRAMES = 8; // in the strip under the hood
const LARGEST_SEED = 2 ** 32 - 1; // torch reads no more of a seed
const NUMBERS = { seed: 'Seed', steps: 'Steps', guidance: 'Guidance', shift: 'Shift', strength: 'Strength' };

let worker, about, words, paint;
let ready = false;
let mode = 'text';
let turn = 0; // grows with each press of Draw; what belongs to an earlier one is dropped
let busy = false;
let tiles = [];
let chosen = null; // the tile that the buttons and the view under the hood are about
let hood = { id: null, word: null, step: 0 };
let touched = false; // whether strength was set by hand
const waiting = new Map(); // id -> what waits for an answer of the worker

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const plain = (number) => String(Number(number));

// ---- the worker -----------------------------------------------------------------------------------------------------

let backend = null;

/**
 * Ask for threads where the web host does not give them: isolate.js adds its headers from the next load on, so the page
 * is loaded once more, before it has loaded anything large. Without service workers nano runs on one thread.
 */
async function isolate() {
  if (crossOriginIsolated || !navigator.serviceWorker) return;
  try {
    if (sessionStorage.getItem('isolated')) return;
    await navigator.serviceWorker.register('isolate.js');
    const late = new Promise((_, reject) => setTimeout(reject, 3000));
    await Promise.race([navigator.serviceWorker.ready, late]);
    sessionStorage.setItem('isolated', 'once');
  } catch {
    return;
  }
  location.reload();
  await new Promise(() => {});
}

/** A new worker; what was being drawn is drawn again. */
function start(wanted) {
  worker?.terminate();
  ready = false;
  turn++;
  for (const { reject } of waiting.values()) reject(new Error('Started anew.'));
  waiting.clear();
  worker = new Worker(new URL('worker.js', import.meta.url), { type: 'module' });
  worker.onmessage = ({ data }) => hear(data, wanted);
  worker.onerror = () => say('This browser cannot run nano: it needs WebAssembly and module workers.', 'error');
  const model = $('model').value || new URLSearchParams(location.hash.slice(1)).get('model');
  worker.postMessage({ kind: 'load', wanted, model });
  if (about) draw();
}

function hear(data, wanted) {
  const asked = waiting.get(data.id);
  if (data.kind === 'about') know(data.about);
  else if (data.kind === 'loading') {
    if (!busy || tiles.every((tile) => !tile.begun)) {
      $('bar').value = data.loaded / data.total;
      say(`Loading nano: ${(data.loaded / 1e6).toFixed(0)} of ${(data.total / 1e6).toFixed(0)} MB.`);
    }
  } else if (data.kind === 'starting') say('Starting.');
  else if (data.kind === 'ready') {
    ready = true;
    backend = data.backend;
    const where = data.backend === 'webgpu' ? 'your graphics processor' : `your processor, ${data.threads === 1 ? 'one thread' : `${data.threads} threads`}`;
    $('machine').textContent = `It runs on ${where}.`;
    document.documentElement.dataset.ready = data.seconds.toFixed(2);
    if (!busy) say('Ready.');
  } else if (data.kind === 'error') {
    // a graphics processor that fails is no reason not to draw
    const graphics = backend === 'webgpu' || (data.during === 'load' && navigator.gpu);
    if (graphics && wanted === 'auto') start('wasm');
    else if (asked) {
      waiting.delete(data.id);
      asked.reject(new Error(data.message));
    }
    else say(data.message, 'error');
  } else if (data.kind === 'step') asked?.step?.(data);
  else if (data.kind === 'frame') showFrame(data);
  else if (data.kind === 'attention') showLooks(data);
  else if (asked) {
    waiting.delete(data.id);
    asked.resolve(data);
  }
}

let ids = 0;
/** Ask for a drawing; gives the message that ends it. */
function ask(message, step, transfer = []) {
  const id = ++ids;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject, step });
    worker.postMessage({ ...message, id }, transfer);
  });
}

/** What nano.json says of the models: their words, and the settings that they are made for. */
function know(told) {
  if (about) return;
  about = told;
  words = new Words(about.words);
  $('parameters').textContent = (about.parameters / 1e6).toFixed(1);
  for (let size = about.sizes[0]; size <= about.sizes[1]; size += 16) $('size').append(new Option(`${size} px`, size));
  chips('styles', 'style', about.words.styles);
  chips('colours', 'colour', Object.keys(about.words.colours));
  chips('signs', 'sign', ['hello world', ...about.words.signs.slice(1, 9)]);
  chips('subjects', 'subject', about.words.subjects);
  for (const name of Object.keys(about.models).reverse()) {
    const { steps, guidance } = own(name);
    const label = guidance > 1 ? `${name}: ${steps} guided steps` : `${name}: ${steps} steps, no guidance`;
    $('model').append(new Option(label, name));
  }
  if (!two()) $('other').querySelector('[value="model"]').remove();
  put({ model: about.first, ...own(about.first), size: about.size, ...fromLink() });
  draw();
}

// ---- settings -------------------------------------------------------------------------------------------------------

/** The settings that a model is made for, as `sd3kit.load(model).own_settings` and its scheduler have them. */
function own(model) {
  const { steps, guidance, shift } = about.models[model] ?? {};
  return { steps, guidance, shift };
}

const two = () => Object.keys(about.models).length > 1;
const otherModel = (model) => Object.keys(about.models).find((name) => name !== model);

/** The settings as they stand, under the names that sd3kit's Python has. */
function settings() {
  const value = (id) => Number($(id).value);
  return {
    model: $('model').value, prompt: $('prompt').value.trim().replace(/\s+/g, ' '), negative_prompt: $('negative_prompt').value.trim(),
    seed: value('seed'), steps: value('steps'), guidance: value('guidance'), shift: value('shift'), size: value('size'),
  };
}

/** What is wrong with some settings, in one sentence, or null. */
function wrong({ model, prompt, seed, ...others }) {
  if (!about.models[model]) return `There is no such model in this page: choose ${Object.keys(about.models).join(' or ')}.`;
  if (!prompt) return 'The prompt is empty: say what to draw, such as “a fox on a blue background, 3d”.';
  if (!Number.isInteger(seed) || seed < 0 || seed > LARGEST_SEED || $('seed').value === '')
    return `The seed must be a whole number from 0 to ${LARGEST_SEED}.`;
  const [smallest, largest] = about.sizes;
  if (!(others.size >= smallest && others.size <= largest)) return `Size must be a multiple of 16 from ${smallest} to ${largest}: choose one under More.`;
  const limits = { steps: [1, 1000], guidance: [1, 20], shift: [0.1, 100] };
  for (const [name, [low, high]] of Object.entries(limits)) {
    const value = others[name];
    if (!(value >= low && value <= high) || (name === 'steps' && !Number.isInteger(value)))
      return `${NUMBERS[name]} must be from ${low} to ${high}${name === 'steps' ? ', a whole number' : ''}.`;
  }
  if (others.strength !== undefined && Math.trunc(others.steps * others.strength) < 1)
    return 'Strength times steps is below one step: raise one of them.';
  return null;
}

/** Put settings into the controls; what is not given stays. */
function put(given) {
  // few steps are chosen more easily on a short slider
  if (about?.models[given.model]) $('steps').max = own(given.model).steps > 10 ? 50 : 10;
  for (const name of ['model', 'prompt', 'negative_prompt', 'seed', 'size', 'steps', 'guidance', 'shift', 'strength', 'other', 'other-value']) {
    let value = given[name];
    if (value === undefined || value === null) continue;
    const control = $(name);
    // a slider would take its middle for what is no number; 0 is refused in a sentence
    if (control.type === 'range') value = Number.isFinite(Number(value)) ? Number(value) : 0;
    if (name === 'other') compared(value);
    // a slider would cut off what lies beyond its end
    if (control.type === 'range' && Number(value) > Number(control.max)) control.max = value;
    // its steps are counted from its beginning, which therefore goes back
    if (control.type === 'range') control.min = Math.min(control.dataset.min, value);
    // nor should it round to its own steps
    const step = Number(control.dataset.step);
    if (control.type === 'range') control.step = Number.isInteger(Number(value) / step) ? step : 'any';
    control.value = value;
  }
  if (given.count) document.querySelector(`[name="count"][value="${given.count === '4' ? 4 : 1}"]`).checked = true;
  if (given.mode) show(given.mode);
  refresh();
}

const count = () => Number(document.querySelector('[name="count"]:checked').value);

function fromLink() {
  const link = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (!['text', 'compare'].includes(link.mode)) delete link.mode;
  return { prompt: FIRST, negative_prompt: '', ...(link.model && own(link.model)), ...link };
}

function toLink() {
  // a link cannot hold the picture that is changed
  const link = { ...settings(), count: count(), mode: mode === 'change' ? 'text' : mode };
  if (mode === 'compare') Object.assign(link, { other: $('other').value, 'other-value': $('other-value').value });
  if (!link.negative_prompt) delete link.negative_prompt;
  return `${location.href.split('#')[0]}#${new URLSearchParams(link)}`;
}

/** What follows from the controls: numbers beside sliders, marks under the prompt, chips that are pressed. */
function refresh() {
  for (const name of ['steps', 'guidance', 'shift', 'strength']) $(`${name}-out`).value = plain($(name).value);
  const steps = Number($('steps').value);
  if (mode === 'change') $('steps-out').value = `${Math.max(1, steps - Math.trunc(Math.max(steps - steps * $('strength').value, 0)))} of ${steps} are run`;
  if (!words) return;
  if ($('other').value === 'model') $('other-value').value = otherModel($('model').value) ?? '';
  const prompt = $('prompt').value;
  const unknown = words.unknown(prompt);
  const marks = [];
  let at = 0;
  for (const { start, end } of unknown) {
    marks.push(prompt.slice(at, start), make('u', { textContent: prompt.slice(start, end) }));
    at = end;
  }
  $('marks').replaceChildren(...marks, prompt.slice(at));
  hint(unknown);
  const parts = words.parts(prompt);
  for (const chip of document.querySelectorAll('.chips [data-kind]'))
    chip.setAttribute('aria-pressed', String(parts[chip.dataset.kind] === chip.dataset.value));
}

/** The line under the prompt: the first word that nano does not know and has something near to, or the first. */
function hint(unknown) {
  const first = unknown.find(({ nearest }) => nearest?.length) ?? unknown[0];
  if (!first) {
    const seen = words.subject($('prompt').value) || !$('prompt').value.trim();
    $('hint').replaceChildren(seen ? `It knows ${about.words.subjects.length} things, in three styles on ${Object.keys(about.words.colours).length} colours, and spells words of up to ${about.words.longest} letters.` : 'There is no thing in it that nano knows: choose one below.');
    return;
  }
  const strong = make('strong', { textContent: first.word });
  const more = unknown.length > 1 ? ` (${unknown.length - 1} more)` : '';
  if (first.why === 'long') $('hint').replaceChildren(strong, ` is too long for a sign: up to ${about.words.longest} letters fit.${more}`);
  else if (first.why === 'letters') $('hint').replaceChildren(strong, ` cannot be spelled: a sign has letters from a to z.${more}`);
  else {
    const near = first.nearest.map((word) => {
      const button = make('button', { type: 'button', textContent: word });
      button.onclick = () => {
        const { value } = $('prompt');
        $('prompt').value = value.slice(0, first.start) + word + value.slice(first.end);
        refresh();
        $('prompt').focus();
      };
      return button;
    });
    $('hint').replaceChildren('nano does not know ', strong, ...(near[0] ? ['. Written most like it: ', near[0], ' ', near[1]] : ['.']), more);
  }
}

function chips(id, kind, values) {
  $(id).replaceChildren(
    ...values.map((value) => {
      const chip = make('button', { type: 'button' });
      Object.assign(chip.dataset, { kind, value });
      if (kind === 'colour') {
        const dot = make('i');
        dot.style.setProperty('--dot', about.words.colours[value]);
        chip.append(dot);
      }
      chip.append(kind === 'sign' ? `“${value}”` : value);
      chip.onclick = () => {
        $('prompt').value = words.with($('prompt').value, kind, value);
        refresh();
      };
      return chip;
    }),
  );
}

// ---- tabs -----------------------------------------------------------------------------------------------------------

const MODES = ['text', 'change', 'compare'];

function show(name) {
  mode = name;
  for (const other of MODES) {
    const [tab, on] = [$(`tab-${other}`), other === name];
    tab.setAttribute('aria-selected', String(on));
    tab.tabIndex = on ? 0 : -1;
  }
  $('panel').setAttribute('aria-labelledby', `tab-${name}`);
  for (const part of document.querySelectorAll('[data-modes]')) part.hidden = !part.dataset.modes.split(' ').includes(name);
  refresh();
}

for (const [i, name] of MODES.entries()) {
  $(`tab-${name}`).onclick = () => show(name);
  $(`tab-${name}`).onkeydown = ({ key }) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: MODES.length - 1 }[key];
    if (to === undefined) return;
    show(MODES.at(to % MODES.length));
    $(`tab-${mode}`).focus();
  };
}

// ---- drawing --------------------------------------------------------------------------------------------------------

/** What is to be drawn, a tile each: settings, and a caption where there are several. */
function wanted() {
  const base = settings();
  const seeds = count();
  const many = (seed, more = {}, caption) => ({ settings: { ...base, seed, ...more }, caption });
  if (mode === 'compare') {
    const name = $('other').value;
    const text = name.includes('prompt') || name === 'model';
    const value = text ? $('other-value').value.trim() : Number($('other-value').value);
    const label = { negative_prompt: 'without', prompt: '', model: '' }[name] ?? name;
    const caption = (side, { [name]: value, steps }) => {
      const told = `${label} ${value || 'nothing'}${name === 'model' ? `, ${steps} steps` : ''}`;
      return `${side}: ${told.trim()}`;
    };
    const change = { [name]: value, ...(name === 'model' && own(value)) };
    return Array.from({ length: seeds === 4 ? 2 : 1 }, (_, i) => [
      many(base.seed + i, {}, caption('A', base)),
      many(base.seed + i, change, caption('B', { ...base, ...change })),
    ]).flat();
  }
  const strength = mode === 'change' ? { strength: Number($('strength').value) } : {};
  return Array.from({ length: seeds }, (_, i) => many(base.seed + i, strength, seeds > 1 ? `seed ${base.seed + i}` : ''));
}

function say(text, kind = '') {
  $('status').textContent = text;
  $('status').className = kind;
  if (kind) $('live').textContent = text;
}

function working(on) {
  busy = on;
  $('draw').textContent = on ? 'Stop' : 'Draw';
}

async function draw() {
  if (!about) return; // it is drawn as soon as that is there
  const mine = ++turn;
  const jobs = wanted();
  const fault = jobs.map((job) => wrong(job.settings)).find(Boolean) ?? null;
  const missing = mode === 'change' && !paint.picture ? 'There is no picture to change: choose one, or take the drawn one.' : null;
  if (fault || missing) {
    if (busy) stop(); // what was being drawn belongs to an earlier turn: nothing of it is shown any more
    return say(fault ?? missing, 'error');
  }
  if (busy) worker.postMessage({ kind: 'stop', id: ids });
  working(true);
  history.replaceState(null, '', toLink());
  lay(jobs);
  $('live').textContent = 'Drawing.';
  const given = mode === 'change' ? paint.pixels(settings().size) : {};
  const begun = performance.now();
  const name = (i) => (jobs.length > 1 ? `Picture ${i + 1} of ${jobs.length}, ` : '');
  if (ready) say('Reading the prompt.');
  try {
    for (const [i, job] of jobs.entries()) {
      const tile = tiles[i];
      tile.begun = true;
      const end = await ask({ kind: 'draw', settings: job.settings, ...given }, (step) => {
        if (mine !== turn) return;
        paintOn(tile.canvas, step.rgba, step.size);
        $('bar').value = (i + step.step / step.total) / jobs.length;
        const text = `step ${step.step} of ${step.total}, noise ${step.sigma.toFixed(2)}`;
        say(name(i) ? name(i) + text : text[0].toUpperCase() + text.slice(1));
      });
      if (mine !== turn) return;
      if (end.kind === 'stopped') {
        say('Stopped.');
        break;
      }
      await finish(tile, end);
      if (mine !== turn) return;
      const seconds = ((performance.now() - begun) / 1000).toFixed(1);
      document.documentElement.dataset.drawn = end.seconds.toFixed(2);
      say(jobs.length > 1 ? `${i + 1} of ${jobs.length} pictures in ${seconds} s.` : `Drawn in ${end.seconds.toFixed(1)} s, ${end.steps} steps.`);
      $('live').textContent = `Drawn: ${tile.alt}.`;
    }
    $('bar').value = 0;
  } catch (error) {
    if (mine === turn) say(error.message, 'error');
  }
  if (mine !== turn) return;
  working(false);
  if (!chosen) choose(tiles.find((tile) => tile.png) ?? null);
  else underTheHood();
}

function stop() {
  turn++;
  worker.postMessage({ kind: 'stop', id: ids });
  working(false);
  $('bar').value = 0;
  say('Stopped.');
}

/** Empty tiles for what is to come; the stage keeps its size. */
function lay(jobs) {
  $('stage').style.setProperty('--across', jobs.length > 1 ? 2 : 1);
  chosen = null;
  tiles = jobs.map((job) => {
    const canvas = make('canvas', { width: 16, height: 16, ariaHidden: 'true' });
    const button = make('button', { type: 'button', className: 'tile', disabled: true }, canvas);
    button.setAttribute('aria-label', 'Not drawn yet');
    if (job.caption) button.append(make('span', { textContent: job.caption }));
    const tile = { ...job, canvas, button };
    button.onclick = () => (chosen === tile ? zoom() : choose(tile));
    return tile;
  });
  $('stage').replaceChildren(...tiles.map((tile) => tile.button));
  actions();
}

function paintOn(canvas, rgba, side) {
  Object.assign(canvas, { width: side, height: side });
  canvas.getContext('2d').putImageData(new ImageData(rgba, side), 0, 0);
}

async function finish(tile, { id, rgba, size }) {
  const flat = make('canvas');
  paintOn(flat, rgba, size);
  const blob = await new Promise((resolve) => flat.toBlob(resolve, 'image/png'));
  const png = await withSettings(blob, tile.settings);
  fill(tile, png, id);
  keep({ png, settings: tile.settings });
}

/** A picture in its tile. */
function fill(tile, png, id) {
  const { model, prompt, seed } = tile.settings;
  Object.assign(tile, { png, id, url: URL.createObjectURL(png), alt: `${prompt}; seed ${seed}; ${model}${tile.caption?.match(/^[AB]:/) ? `; ${tile.caption}` : ''}` });
  tile.button.append(make('img', { src: tile.url, alt: tile.alt }));
  if (tile.caption) tile.button.append(tile.button.querySelector('span')); // above the picture
  tile.button.removeAttribute('aria-label');
  tile.button.disabled = false;
  if (!chosen && tiles.includes(tile)) choose(tile); // another drawing may have begun while this one became a PNG
}

function choose(tile) {
  chosen = tile;
  for (const other of tiles) other.button.setAttribute('aria-pressed', String(other === tile));
  actions();
  if (!busy) underTheHood();
}

/** The buttons under the picture. */
function actions() {
  for (const id of ['zoom', 'reuse']) $(id).disabled = !chosen;
  $('download').setAttribute('aria-disabled', String(!chosen));
  if (chosen) {
    $('download').href = chosen.url;
    $('download').download = `${chosen.settings.prompt.toLowerCase().replace(/[^a-z0-9]+/g, '-').slice(0, 60)}-${chosen.settings.model}-${chosen.settings.seed}.png`;
  } else $('download').removeAttribute('href');
}

function zoom() {
  const image = $('large').querySelector('img');
  Object.assign(image, { src: chosen.url, alt: chosen.alt });
  $('large').showModal();
}

// ---- under the hood -------------------------------------------------------------------------------------------------

/** Places for the frames that are to come. */
function emptyStrip() {
  const steps = chosen?.settings.steps ?? Number($('steps').value);
  const blank = () => make('div', {}, make('canvas'), '\u00a0', make('br'), '\u00a0');
  $('strip').replaceChildren(...Array.from({ length: Math.min(FRAMES, steps) }, blank));
}

function underTheHood() {
  emptyStrip();
  $('words').replaceChildren();
  const pen = $('heat').getContext('2d');
  pen.clearRect(0, 0, 256, 256);
  $('heat').setAttribute('aria-label', 'No picture yet');
  hood = { id: chosen?.id ?? null, word: null, step: 0, tile: chosen };
  if (!chosen) return;
  if (!chosen.id) {
    $('looks-note').textContent = 'This picture was drawn earlier. Press Draw to see its steps and where it looks.';
    return;
  }
  const { prompt } = chosen.settings;
  const all = [...new Set(prompt.split(/\s+/).map((word) => word.replace(/^[^\p{L}\d]+|[^\p{L}\d]+$/gu, '')).filter(Boolean))];
  const subject = words.subject(prompt)?.name.split(' ').at(-1);
  for (const word of all) {
    const button = make('button', { type: 'button', textContent: word });
    button.onclick = () => look({ word });
    $('words').append(button);
  }
  worker.postMessage({ kind: 'strip', id: hood.id, most: FRAMES });
  const longest = all.reduce((a, b) => (b.length > a.length ? b : a), '');
  look({ word: all.find((word) => word.toLowerCase() === subject) ?? longest });
}

function showFrame({ id, index, step, total, sigma, size, rgba }) {
  if (id !== hood.id) return;
  const canvas = make('canvas');
  paintOn(canvas, rgba, size);
  const button = make('button', { type: 'button' }, canvas, `step ${step}`, make('br'), `σ ${sigma.toFixed(2)}`);
  button.setAttribute('aria-pressed', String(hood.step === step));
  button.setAttribute('aria-label', `The expected picture at step ${step} of ${total}, noise ${sigma.toFixed(2)}`);
  button.onclick = () => look({ step: hood.step === step ? 0 : step });
  button.dataset.step = step;
  $('strip').children[index].replaceWith(button);
  // image to image may run fewer steps
  for (const [i, place] of [...$('strip').children].entries()) place.style.visibility = i < total ? '' : 'hidden';
}

/** Ask where the picture looks at a word, at a step or in the mean of all. */
function look(change) {
  Object.assign(hood, change);
  for (const button of $('words').children) button.setAttribute('aria-pressed', String(button.textContent === hood.word));
  for (const button of $('strip').querySelectorAll('button')) button.setAttribute('aria-pressed', String(Number(button.dataset.step) === hood.step));
  worker.postMessage({ kind: 'attention', id: hood.id, word: hood.word, step: hood.step });
}

/** The map as a warm veil over the gray picture. */
function showLooks({ id, word, step, side, map }) {
  if (id !== hood.id || word !== hood.word || step !== hood.step) return;
  const [low, high] = [Math.min(...map), Math.max(...map)];
  const veil = new OffscreenCanvas(side, side);
  const rgba = new Uint8ClampedArray(side * side * 4);
  map.forEach((value, i) => rgba.set([213, 94, 0, (230 * (value - low)) / (high - low || 1)], i * 4));
  veil.getContext('2d').putImageData(new ImageData(rgba, side), 0, 0);
  const pen = $('heat').getContext('2d');
  pen.filter = 'grayscale(1)';
  pen.drawImage(hood.tile.button.querySelector('img'), 0, 0, 256, 256); // the chosen one may be newer
  pen.filter = 'none';
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(veil, 0, 0, 256, 256);
  const most = map.indexOf(high);
  const when = step ? `at step ${step}` : 'in the mean of all steps and layers';
  $('looks-note').textContent = `Where the picture looks at “${word}”, ${when}: up to ${(100 * high).toFixed(1)}% of a place's attention.`;
  $('heat').setAttribute('aria-label', `Where the picture looks at ${word} ${when}: most at row ${Math.floor(most / side) + 1} of ${side}, column ${(most % side) + 1}`);
}

// ---- the gallery ----------------------------------------------------------------------------------------------------

function entry({ png, settings: drawn }) {
  const { model = 'nano', prompt, seed } = drawn; // before there was a choice it was nano
  const title = `${prompt}; seed ${seed}; ${model}`;
  const button = make('button', { type: 'button', title }, make('img', { src: URL.createObjectURL(png), alt: title }));
  button.onclick = () => {
    turn++;
    if (busy) stop();
    const again = { ...drawn, model };
    put({ ...again, mode: 'text', count: '1' });
    lay([{ settings: again, caption: '' }]);
    fill(tiles[0], png, null);
    say('From the gallery, with its settings.');
    $('stage').scrollIntoView({ block: 'nearest', behavior: 'smooth' });
  };
  return make('li', {}, button);
}

async function keep(picture) {
  $('gallery').prepend(entry(picture));
  $('clear').disabled = false;
  try {
    await gallery.add(picture);
  } catch {
    $('gallery-note').textContent = 'This browser keeps nothing for this page: pictures are here until you close it.';
  }
}

async function fillGallery() {
  const pictures = await gallery.all().catch(() => []);
  $('gallery').append(...pictures.map(entry));
  $('clear').disabled = !$('gallery').children.length;
}

$('clear').onclick = async () => {
  await gallery.clear().catch(() => {});
  $('gallery').replaceChildren();
  $('clear').disabled = true;
  $('live').textContent = 'The gallery is empty.';
};

// ---- controls -------------------------------------------------------------------------------------------------------

$('form').onsubmit = (event) => {
  event.preventDefault();
  if (busy && event.submitter === $('draw')) stop();
  else draw();
};
$('form').onkeydown = (event) => {
  // in a field it would press Draw, which while something is drawn is Stop
  if (event.key !== 'Enter' || event.isComposing || !event.target.matches('textarea, input:not([type="file"])')) return;
  event.preventDefault();
  draw();
};
$('prompt').onscroll = () => ($('marks').scrollTop = $('prompt').scrollTop);
$('form').oninput = (event) => {
  if (event.target.id === 'strength') touched = true;
  refresh();
};
$('dice').onclick = () => ($('seed').value = crypto.getRandomValues(new Uint32Array(1))[0]);
$('zoom').onclick = zoom;
$('close').onclick = () => $('large').close();
$('large').onclick = ({ target }) => target === $('large') && $('large').close();
$('link').onclick = async () => {
  try {
    await navigator.clipboard.writeText(toLink());
    say('The link is copied. It holds the settings.');
    $('live').textContent = 'The link is copied.';
  } catch {
    history.replaceState(null, '', toLink());
    say('The link is in the address bar: copy it from there.');
  }
};
$('backend').onchange = () => start($('backend').value);
$('model').onchange = () => {
  put({ model: $('model').value, ...own($('model').value) });
  $('live').textContent = `${$('model').value}: steps, guidance and shift are its own.`;
};
/** What B's other setting is at first; the other model follows from the first. */
function compared(name) {
  const steps = Number($('steps').value) > 4 ? 4 : 2;
  $('other-value').readOnly = name === 'model';
  $('other-value').value = { model: '', guidance: 2, steps, shift: 1, prompt: 'a dog holding a sign that says hello world', negative_prompt: '3d' }[name] ?? '';
}
$('other').onchange = () => {
  compared($('other').value);
  refresh();
};
$('settings-file').onchange = async ({ target }) => {
  const found = await settingsOf(target.files[0]);
  target.value = '';
  if (!found) return say('This file holds no settings: only PNGs that sd3kit or this page wrote do.', 'error');
  const told = about.models[found.model];
  put({ ...found, model: told ? found.model : 'nano', mode: 'text', count: '1' });
  say(`The settings are those of the picture.${told ? '' : ' It does not say which model drew it: nano is taken.'}`);
};

paint = new Paint($('paint'), (what) => {
  if (what === 'painted') $('mask').value = 'painted';
  else $('mask').value = 'none';
  $('paint').setAttribute('aria-label', what === 'picture' ? 'The picture that is changed' : 'The picture that is changed, with a mask');
  if (!touched) $('strength').value = what === 'painted' ? 1 : 0.6;
  refresh();
});
$('mask').onchange = () => {
  if ($('mask').value === 'painted') return;
  paint.shape($('mask').value);
  if (!touched) $('strength').value = $('mask').value === 'none' ? 0.6 : 1;
  refresh();
};
$('brush').oninput = () => (paint.brush = Number($('brush').value));

async function take(source) {
  show('change');
  try {
    await paint.take(source);
    say('Say what the picture is to become, and press Draw.');
  } catch (error) {
    say(error.message, 'error');
  }
}
$('file').onchange = ({ target }) => {
  if (target.files[0]) take(target.files[0]);
  target.value = '';
};
$('take').onclick = $('reuse').onclick = () =>
  chosen ? take(chosen.png) : say('There is no drawn picture yet.', 'error');
const dropped = (list) => [...(list ?? [])].find((file) => file.type.startsWith('image/'));
addEventListener('paste', ({ clipboardData }) => {
  const file = dropped(clipboardData?.files);
  if (file) take(file);
});
addEventListener('dragover', (event) => {
  event.preventDefault();
  document.querySelector('.paint').classList.add('over');
});
addEventListener('dragleave', () => document.querySelector('.paint').classList.remove('over'));
addEventListener('drop', (event) => {
  event.preventDefault();
  document.querySelector('.paint').classList.remove('over');
  const file = dropped(event.dataTransfer?.files);
  if (file) take(file);
});
addEventListener('hashchange', () => {
  if (!about) return;
  put(fromLink());
  draw();
});

for (const range of document.querySelectorAll('[type="range"]')) Object.assign(range.dataset, { step: range.step || 1, min: range.min });
emptyStrip();
compared('model');
show('text');
lay([{ settings: {}, caption: '' }]);
fillGallery();
await isolate();
start('auto');
