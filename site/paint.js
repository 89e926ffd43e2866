// The picture that is changed, and the mask painted over it.

const VEIL = '#ff5a1fa8';

export class Paint {
  /** `changed` is called when there is another picture or mask. */
  constructor(canvas, changed) {
    Object.assign(this, { canvas, changed, picture: null, brush: 20 });
    this.mask = document.createElement('canvas');
    this.resize(canvas.width);
    let last = null;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      const scale = canvas.width / box.width;
      return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    };
    const stroke = (to) => {
      const pen = this.mask.getContext('2d');
      Object.assign(pen, { lineWidth: this.brush * (canvas.width / 128), lineCap: 'round', strokeStyle: '#fff' });
      pen.beginPath();
      pen.moveTo(...last);
      pen.lineTo(...to);
      pen.stroke();
      last = to;
      this.show();
    };
    canvas.addEventListener('pointerdown', (event) => {
      if (!this.picture) return;
      canvas.setPointerCapture(event.pointerId);
      last = at(event);
      stroke(last);
    });
    canvas.addEventListener('pointermove', (event) => last && stroke(at(event)));
    const end = () => {
      if (last) this.changed('painted');
      last = null;
    };
    canvas.addEventListener('pointerup', end);
    canvas.addEventListener('pointercancel', end);
  }

  resize(size) {
    for (const canvas of [this.canvas, this.mask]) Object.assign(canvas, { width: size, height: size });
    this.show();
  }

  /** Take a picture: its middle square. */
  async take(source) {
    try {
      this.picture = await createImageBitmap(source);
    } catch {
      throw new Error('This file is not a picture that the browser can open: choose a PNG or a JPEG.');
    }
    this.shape('none');
    this.show();
    this.changed('picture');
  }

  /** A mask that needs no mouse. */
  shape(name) {
    const size = this.mask.width;
    const pen = this.mask.getContext('2d');
    pen.clearRect(0, 0, size, size);
    pen.fillStyle = '#fff';
    const half = size / 2;
    const boxes = {
      left: [0, 0, half, size], right: [half, 0, half, size], top: [0, 0, size, half], bottom: [0, half, size, half],
      middle: [size / 4, size / 4, half, half],
    };
    if (boxes[name]) pen.fillRect(...boxes[name]);
    this.show();
  }

  square(pen, size) {
    const { width, height } = this.picture;
    const side = Math.min(width, height);
    Object.assign(pen, { imageSmoothingQuality: 'high', fillStyle: '#fff' });
    pen.fillRect(0, 0, size, size); // behind what is transparent
    pen.drawImage(this.picture, (width - side) / 2, (height - side) / 2, side, side, 0, 0, size, size);
  }

  show() {
    const pen = this.canvas.getContext('2d');
    const size = this.canvas.width;
    pen.clearRect(0, 0, size, size);
    if (!this.picture) return;
    this.square(pen, size);
    const veil = new OffscreenCanvas(size, size);
    const over = veil.getContext('2d');
    over.drawImage(this.mask, 0, 0);
    over.globalCompositeOperation = 'source-in';
    over.fillStyle = VEIL;
    over.fillRect(0, 0, size, size);
    pen.drawImage(veil, 0, 0);
  }

  /** The picture as RGBA and the mask (1 is drawn anew), or null where nothing is painted. */
  pixels(size) {
    const flat = new OffscreenCanvas(size, size).getContext('2d');
    this.square(flat, size);
    const picture = flat.getImageData(0, 0, size, size).data;
    const drawn = new OffscreenCanvas(size, size).getContext('2d');
    drawn.imageSmoothingEnabled = false;
    drawn.drawImage(this.mask, 0, 0, size, size);
    const { data } = drawn.getImageData(0, 0, size, size);
    const mask = Uint8Array.from({ length: size * size }, (_, i) => (data[i * 4 + 3] >= 128 ? 1 : 0));
    return { picture, mask: mask.includes(1) ? mask : null };
  }
}
