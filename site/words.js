// What nano knows: which words of a prompt it does not, what is nearest, and prompts put together from chips.

const article = (noun) => (/^[aeiou]/.test(noun) ? 'an' : 'a');
const escape = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
const any = (names) => [...names].sort((a, b) => b.length - a.length).map(escape).join('|');
// One or two words after "says", or what is in quotation marks there: letters that nano spells, not words it knows.
const SIGN = /\b(sign that says|says)\s+("[^"]*"?|“[^”]*”?|[^\s,.]+(?:\s+(?!on\b|with\b|in\b)[\p{L}\d]+(?=[,.]|$|\s+on\b))?)/iu;

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
    this.singular = Object.fromEntries(Object.entries(words.plurals).map(([one, many]) => [many, one]));
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
    if (word.length < 3) return []; // nothing is written like it
    const near = this.things.map((name) => [distance(word, name) - (name[0] === word[0] ? 0.5 : 0), name]);
    return near.sort((a, b) => a[0] - b[0]).slice(0, 2).map(([, name]) => name);
  }

  /** The first subject that a prompt names, by any of its names, one or many: {name, many, start, end}. */
  subject(prompt) {
    const names = any([...this.names, ...Object.keys(this.singular)]);
    const spelled = prompt.replace(SIGN, (all) => ' '.repeat(all.length));
    const found = new RegExp(`(?<![\\p{L}\\d])(${names})(?![\\p{L}\\d])`, 'iu').exec(spelled);
    if (!found) return null;
    const word = found[1].toLowerCase();
    const many = word in this.singular && !this.names.includes(word);
    return { name: many ? this.singular[word] : word, many, start: found.index, end: found.index + word.length };
  }

  /** A style in a prompt, and a colour where the background is told: "on a red background", "on red". */
  style = () => new RegExp(`(?<![\\p{L}\\d])(${any(this.styles)})(?![\\p{L}\\d])`, 'iu');
  colour = () => {
    const names = any(Object.keys(this.colours));
    return new RegExp(`\\ban?\\s+(${names})(?= background)|(?<=\\bon )(${names})(?![\\p{L}\\d])|(?<=, )(${names})(?= background)`, 'iu');
  };

  /** What of the chips a prompt has. */
  parts(prompt) {
    const subject = this.subject(prompt)?.name;
    const sign = SIGN.exec(prompt)?.[2].replace(/["“”]/g, '').toLowerCase();
    const colour = this.colour().exec(prompt)?.slice(1).find(Boolean)?.toLowerCase();
    const style = this.style().exec(prompt)?.[1].toLowerCase();
    return { subject: this.synonyms[subject] ?? subject, sign, colour, style };
  }

  /** A prompt with one of its parts changed, or put in. The rest stays as it was written. */
  with(prompt, kind, value) {
    const at = this.subject(prompt);
    if (kind === 'subject') {
      if (!at) return `${article(value)} ${value} on a blue background, 3d`;
      const before = prompt.slice(0, at.start).replace(/\ban?\s+$/i, (a) => `${a[0]}${article(value).slice(1)} `);
      return before + (at.many ? this.plurals[value] : value) + prompt.slice(at.end);
    }
    if (!prompt.trim()) prompt = kind === 'sign' ? 'a cat' : 'a fox';
    if (kind === 'colour') {
      if (this.colour().test(prompt))
        return prompt.replace(this.colour(), (old) => (/^an?\s/i.test(old) ? `${article(value)} ${value}` : value));
      const comma = this.style().test(prompt) ? prompt.lastIndexOf(',') : -1;
      const end = comma < 0 ? prompt.length : comma;
      return `${prompt.slice(0, end).trimEnd()} on ${article(value)} ${value} background${prompt.slice(end)}`;
    }
    if (kind === 'style')
      return this.style().test(prompt) ? prompt.replace(this.style(), value) : `${prompt.trimEnd()}, ${value}`;
    if (SIGN.test(prompt)) return prompt.replace(SIGN, (_, says) => `${says} ${value}`);
    const end = this.subject(prompt)?.end ?? prompt.trimEnd().length;
    return `${prompt.slice(0, end)} holding a sign that says ${value}${prompt.slice(end)}`;
  }
}
