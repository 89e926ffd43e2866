// What nano knows: which words of a prompt it does not, what is nearest, and prompts put together from chips.

const article = (noun) => (/^[aeiou]/.test(noun) ? 'an' : 'a');
const escape = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
const any = (names) => [...names].sort((a, b) => b.length - a.length).map(escape).join('|');
// One or two words after "says", or what is in quotation marks there: letters that nano spells, not words it knows.
const SIGN = /\b(sign that says|says)\s+("[^"]*"?|“[^”]*”?|\S+(?:\s+(?!on\b|with\b|in\b)[\p{L}\d]+(?=,|$|\s+on\b))?)/iu;

/** Edits between two words: letters put in, left out, changed, or swapped with the next. */
export function distance(a, b) {
  let [before, last] = [[], Array.from({ length: b.length + 1 }, (_, j) => j)];
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      row[j] = Math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] !== b[j - 1]));
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j], before[j - 2] + 1);
    }
    [before, last] = [last, row];
  }
  return last[b.length];
}

export class Words {
  constructor(words) {
    Object.assign(this, words);
    this.all = new Set(words.known);
    this.names = [...words.subjects, ...Object.keys(words.synonyms)];
    this.things = [...this.names, ...words.styles, ...Object.keys(words.colours)];
  }

  /** The stretches of a prompt that nano does not know: [{start, end, word, why, nearest}]. */
  unknown(prompt) {
    const sign = SIGN.exec(prompt);
    const from = sign ? sign.index + sign[0].length - sign[2].length : Infinity;
    const to = sign ? sign.index + sign[0].length : -1;
    const found = [];
    for (const { 0: word, index: start } of prompt.matchAll(/[\p{L}\d]+/gu)) {
      const end = start + word.length;
      if (start >= from && end <= to) {
        if (!/^[a-z]+$/i.test(word)) found.push({ start, end, word, why: 'letters' });
        else if (word.length > this.longest) found.push({ start, end, word, why: 'long' });
      } else if (!this.all.has(word.toLowerCase())) {
        found.push({ start, end, word, why: 'unknown', nearest: this.nearest(word.toLowerCase()) });
      }
    }
    return found;
  }

  /** The two things it can draw, by any of their names, that are written most like a word. */
  nearest(word) {
    const near = this.things.map((name) => [distance(word, name) - (name[0] === word[0] ? 0.5 : 0), name]);
    return near.sort((a, b) => a[0] - b[0]).slice(0, 2).map(([, name]) => name);
  }

  /** The first subject that a prompt names, by any of its names. */
  subject(prompt) {
    const found = new RegExp(`(?<![\\p{L}\\d])(${any(this.names)})(?![\\p{L}\\d])`, 'iu').exec(prompt.replace(SIGN, (all) => ' '.repeat(all.length)));
    return found && { name: found[1].toLowerCase(), start: found.index, end: found.index + found[1].length };
  }

  /** What of the chips a prompt has. */
  parts(prompt) {
    const subject = this.subject(prompt)?.name;
    const sign = SIGN.exec(prompt)?.[2].replace(/["“”]/g, '').toLowerCase();
    const colour = new RegExp(`(${any(Object.keys(this.colours))})(?= background)`, 'i').exec(prompt)?.[1].toLowerCase();
    const style = new RegExp(`(?<![\\p{L}\\d])(${any(this.styles)})(?![\\p{L}\\d])`, 'iu').exec(prompt)?.[1].toLowerCase();
    return { subject: this.synonyms[subject] ?? subject, sign, colour, style };
  }

  /** A prompt with one of its parts changed, or put in. The rest stays as it was written. */
  with(prompt, kind, value) {
    const at = this.subject(prompt);
    if (kind === 'subject') {
      if (!at) return `${article(value)} ${value}${prompt.trim() ? ` on a ${this.parts(prompt).colour ?? 'blue'} background, ${this.parts(prompt).style ?? '3d'}` : ' on a blue background, 3d'}`;
      const before = prompt.slice(0, at.start).replace(/\ban?\s+$/i, (a) => (a[0] === 'A' ? 'A' : 'a') + article(value).slice(1) + ' ');
      return before + value + prompt.slice(at.end);
    }
    if (kind === 'colour') {
      const there = new RegExp(`\\ban?\\s+(${any(Object.keys(this.colours))})(?= background)`, 'i');
      if (there.test(prompt)) return prompt.replace(there, `${article(value)} ${value}`);
      const comma = this.parts(prompt).style ? prompt.lastIndexOf(',') : -1;
      const end = comma < 0 ? prompt.length : comma;
      return `${prompt.slice(0, end).trimEnd()} on ${article(value)} ${value} background${prompt.slice(end)}`.trim();
    }
    if (kind === 'style') {
      const there = new RegExp(`(?<![\\p{L}\\d])(${any(this.styles)})(?![\\p{L}\\d])`, 'iu');
      return there.test(prompt) ? prompt.replace(there, value) : `${prompt.trimEnd()}, ${value}`;
    }
    if (SIGN.test(prompt)) return prompt.replace(SIGN, (_, says) => `${says} ${value}`);
    if (!at) return `a cat holding a sign that says ${value}`;
    return `${prompt.slice(0, at.end)} holding a sign that says ${value}${prompt.slice(at.end)}`;
  }
}
