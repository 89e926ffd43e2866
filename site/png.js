// Settings inside a PNG: the text chunk "sd3kit", as `sd3kit.explore.from_png` reads it.

const KEY = 'sd3kit';
const TABLE = Uint32Array.from({ length: 256 }, (_, i) => {
  for (let bit = 0; bit < 8; bit++) i = i & 1 ? 0xedb88320 ^ (i >>> 1) : i >>> 1;
  return i;
});

function crc(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = TABLE[(value ^ byte) & 255] ^ (value >>> 8);
  return ~value >>> 0;
}

function* chunks(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const size = view.getUint32(at);
    yield { at, end: at + 12 + size, kind: String.fromCharCode(...bytes.subarray(at + 4, at + 8)), data: bytes.subarray(at + 8, at + 8 + size) };
    at += 12 + size;
  }
}

/** A PNG with its settings in it; what is not ASCII is escaped, as Python's json does it. */
export async function withSettings(blob, settings) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const json = JSON.stringify(settings).replace(/[\u0080-\uffff]/g, (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));
  const body = new TextEncoder().encode(`tEXt${KEY}\0${json}`);
  const chunk = new Uint8Array(body.length + 8);
  new DataView(chunk.buffer).setUint32(0, body.length - 4);
  chunk.set(body, 4);
  new DataView(chunk.buffer).setUint32(body.length + 4, crc(body));
  const head = [...chunks(bytes)][0].end; // after the header
  return new Blob([bytes.subarray(0, head), chunk, bytes.subarray(head)], { type: 'image/png' });
}

/** The settings in a PNG, or null. */
export async function settingsOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (bytes[1] !== 0x50 || bytes[2] !== 0x4e) return null;
  for (const { kind, data } of chunks(bytes)) {
    const text = kind === 'tEXt' ? new TextDecoder('latin1').decode(data) : '';
    if (!text.startsWith(`${KEY}\0`)) continue;
    try {
      return JSON.parse(text.slice(KEY.length + 1));
    } catch {
      return null;
    }
  }
  return null;
}
