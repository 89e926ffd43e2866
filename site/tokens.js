// A prompt -> the tokens of SD3's three encoders, and which of them belong to a word.

import { Tokenizer } from './vendor/tokenizers.min.mjs';

const CLIP = 77; // tokens that a CLIP reads
const SHORTEST = 40; // T5 tokens at least, and at most 256: as `sd3kit.loading.prompt_length` has it
const LONGEST = 256;

export class Tokens {
  /** `files`: the three parsed tokenizer.json; `about`: nano.json. */
  constructor(files, about) {
    this.tokenizers = files.map((file) => new Tokenizer(file, {}));
    this.pads = about.pads;
    this.letters = new Map(Object.entries(about.letters));
  }

  /** The T5 length for some prompts: the longest of them, within limits. Nearly all the rest would be padding. */
  length(...prompts) {
    const t5 = prompts.map((prompt) => this.tokenizers[2].encode(this.small(prompt)).ids.length);
    return Math.min(LONGEST, Math.max(SHORTEST, ...t5));
  }

  /** The padded tokens of each encoder; its last token stays when a prompt is cut. */
  ids(prompt, length) {
    return this.tokenizers.map((tokenizer, i) => {
      const most = i < 2 ? CLIP : length;
      let { ids } = tokenizer.encode(i < 2 ? prompt : this.small(prompt));
      if (ids.length > most) ids = [...ids.slice(0, most - 1), ids.at(-1)];
      return [...ids, ...Array(most - ids.length).fill(this.pads[i])];
    });
  }

  /**
   * The T5's small letters without accents. Its tokenizer.json holds this as a compiled table that the library does not
   * read; nano.json has the letters that it changes. A letter with accents of its own is looked up as a whole.
   */
  small(prompt) {
    const clusters = Array.from(new Intl.Segmenter().segment(prompt), ({ segment }) => segment);
    const one = (letter) => this.letters.get(letter) ?? letter;
    return clusters
      .map((cluster) => {
        const [first] = cluster;
        if (this.letters.has(first) && new TextEncoder().encode(cluster).length < 6) return one(first);
        return [...cluster].map(one).join('');
      })
      .join('');
  }

  /** The places of a word in the joint text: the first CLIP's 77 tokens, then the T5's. The second CLIP shares places. */
  places(prompt, word, length) {
    const low = prompt.toLowerCase();
    const escaped = word.toLowerCase().replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
    const found = new RegExp(`(?<![\\p{L}\\p{N}_])${escaped}(?![\\p{L}\\p{N}_])`, 'u').exec(low);
    if (!found) return [];
    const places = [];
    for (const [i, offset, most] of [[0, 0, CLIP], [2, CLIP, length]]) {
      // Tokens hold no spaces, so places are counted in what is none: bytes, of which a CLIP's tokens are, or small letters.
      const count = (text) =>
        i ? [...this.small(text).replace(/\s/g, '')].length : new TextEncoder().encode(text.normalize('NFC').replace(/\s/g, '')).length;
      const [start, end] = [count(low.slice(0, found.index)), count(low.slice(0, found.index + found[0].length))];
      let at = 0;
      const { tokens } = this.tokenizers[i].encode(i ? this.small(low) : low);
      tokens.slice(0, most).forEach((token, place) => {
        const text = token.replace(/^<\|(?:start|end)oftext\|>$|^<\/s>$|<\/w>$|▁/g, '');
        const size = [...text].length;
        // a mark of a new word that stands alone belongs to the word after it
        if ((size || token === '▁') && at < end && at + Math.max(size, 1) > start) places.push(offset + place);
        at += size;
      });
    }
    return places;
  }
}
