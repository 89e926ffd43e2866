// torch's random numbers: the same seed gives the same noise here and in Python.

const SIZE = 624;
const MIDDLE = 397;

/** The Mersenne Twister mt19937, as `torch.Generator().manual_seed(seed)` runs it on a CPU. */
export class Generator {
  constructor(seed) {
    this.state = new Uint32Array(SIZE);
    this.state[0] = Number(BigInt(seed) & 0xffffffffn); // torch uses the low 32 bits of a seed
    for (let i = 1; i < SIZE; i++) {
      const last = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, last) + i;
    }
    this.next = SIZE;
  }

  /** The next 32 random bits. */
  bits() {
    if (this.next === SIZE) this.twist();
    let x = this.state[this.next++];
    x ^= x >>> 11;
    x ^= (x << 7) & 0x9d2c5680;
    x ^= (x << 15) & 0xefc60000;
    return (x ^ (x >>> 18)) >>> 0;
  }

  twist() {
    const { state } = this;
    for (let i = 0; i < SIZE; i++) {
      const both = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
      state[i] = state[(i + MIDDLE) % SIZE] ^ (both >>> 1) ^ (both & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }
}

/**
 * `torch.randn` on a CPU for float32: a multiple of 16 numbers.
 *
 * Uniform numbers of 24 bits fill everything first. Box and Muller's formula then turns each block of 16 into normal
 * ones: the first eight are radii, the other eight angles.
 */
export function randn(generator, count) {
  if (count % 16) throw new RangeError(`randn gives a multiple of 16 numbers, not ${count}.`);
  const data = new Float32Array(count);
  for (let i = 0; i < count; i++) data[i] = (generator.bits() & 0xffffff) / 0x1000000;
  for (let block = 0; block < count; block += 16) {
    for (let i = block; i < block + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - data[i])); // 1 - u is never 0, whose logarithm is infinite
      const angle = 2 * Math.PI * data[i + 8];
      data[i] = radius * Math.cos(angle);
      data[i + 8] = radius * Math.sin(angle);
    }
  }
  return data;
}
