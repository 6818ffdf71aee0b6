// A small classifier and its optimizers, in plain typed arrays: what the page shows, without the page.
import { labels, pixels } from "./digits.js";

export const SHAPES = [[24, 64], [24], [10, 24], [10]];
const [INPUTS, HIDDEN, CLASSES] = [64, 24, 10];
const HELD_OUT = 300;
const BATCH = 64;

/** Pseudo-random numbers in [0, 1) from a seed, the same everywhere (mulberry32's mixing of a counter). */
export function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Images (count, 64) with values in 0 … 1, and their labels. */
export function digits() {
  const images = Float32Array.from(pixels, (letter) => (letter.charCodeAt(0) - 97) / 16);
  return { images, labels: Uint8Array.from(labels), count: labels.length };
}

/** A 64-24-10 network with tanh. */
export class Network {
  constructor(seed) {
    const draw = generator(seed);
    this.params = SHAPES.map((shape) => {
      const bound = 1 / Math.sqrt(shape[1] ?? shape[0]);
      const size = shape.reduce((a, b) => a * b, 1);
      return Float32Array.from({ length: size }, () => (2 * draw() - 1) * (shape.length > 1 ? bound : 0));
    });
  }

  /** What the hidden layer says, and probabilities of the classes, of one image. */
  forward(images, index) {
    const [w1, b1, w2, b2] = this.params;
    const hidden = new Float64Array(HIDDEN);
    for (let j = 0; j < HIDDEN; j++) {
      let sum = b1[j];
      for (let i = 0; i < INPUTS; i++) sum += w1[j * INPUTS + i] * images[index * INPUTS + i];
      hidden[j] = Math.tanh(sum);
    }
    const logits = Float64Array.from({ length: CLASSES }, (_, k) => {
      let sum = b2[k];
      for (let j = 0; j < HIDDEN; j++) sum += w2[k * HIDDEN + j] * hidden[j];
      return sum;
    });
    const largest = Math.max(...logits);
    const total = logits.reduce((sum, logit) => sum + Math.exp(logit - largest), 0);
    return { hidden, probabilities: logits.map((logit) => Math.exp(logit - largest) / total) };
  }

  /** Mean cross-entropy over a batch of numbers of images, and its gradients. */
  gradient(data, batch) {
    const sums = this.params.map((param) => new Float64Array(param.length));
    const [g1, c1, g2, c2] = sums;
    const w2 = this.params[2];
    let loss = 0;
    for (const index of batch) {
      const { hidden, probabilities } = this.forward(data.images, index);
      loss -= Math.log(Math.max(probabilities[data.labels[index]], 1e-300)) / batch.length;
      const inner = new Float64Array(HIDDEN);
      for (let k = 0; k < CLASSES; k++) {
        const error = (probabilities[k] - (k === data.labels[index])) / batch.length;
        c2[k] += error;
        for (let j = 0; j < HIDDEN; j++) {
          g2[k * HIDDEN + j] += error * hidden[j];
          inner[j] += error * w2[k * HIDDEN + j];
        }
      }
      for (let j = 0; j < HIDDEN; j++) {
        const slope = inner[j] * (1 - hidden[j] ** 2);
        c1[j] += slope;
        for (let i = 0; i < INPUTS; i++) g1[j * INPUTS + i] += slope * data.images[index * INPUTS + i];
      }
    }
    return { loss, grads: sums.map((sum) => Float32Array.from(sum)) };
  }

  /** The most likely digit. */
  predict(data, index) {
    const { probabilities } = this.forward(data.images, index);
    return probabilities.indexOf(Math.max(...probabilities));
  }

  /** Share of the held-out images that it gets right. */
  accuracy(data) {
    let right = 0;
    for (let index = data.count - HELD_OUT; index < data.count; index++)
      right += this.predict(data, index) === data.labels[index];
    return right / HELD_OUT;
  }
}

/** Stochastic gradient descent. */
export class SGD {
  constructor(rate) {
    this.rate = rate;
  }

  step(params, grads) {
    params.forEach((param, p) => param.forEach((_, i) => (param[i] -= this.rate * grads[p][i])));
  }
}

/** Adam (Kingma and Ba 2015) with its usual constants. */
export class Adam {
  #moments = null;
  #steps = 0;

  constructor(rate) {
    this.rate = rate;
  }

  step(params, grads) {
    this.#moments ??= params.map((param) => [new Float64Array(param.length), new Float64Array(param.length)]);
    this.#steps++;
    const [first, second] = [1 - 0.9 ** this.#steps, 1 - 0.999 ** this.#steps];
    params.forEach((param, p) => {
      const [m, v] = this.#moments[p];
      for (let i = 0; i < param.length; i++) {
        m[i] += 0.1 * (grads[p][i] - m[i]);
        v[i] += 0.001 * (grads[p][i] ** 2 - v[i]);
        param[i] -= (this.rate * (m[i] / first)) / (Math.sqrt(v[i] / second) + 1e-8);
      }
    });
  }
}

/** Networks from one start, on the same batches, each with its optimizer. */
export class Race {
  /** @param optimizers by name; each has step(params, grads, loss). */
  constructor(optimizers, seed = 0) {
    this.data = digits();
    this.runs = Object.entries(optimizers).map(([name, optimizer]) => {
      return { name, optimizer, network: new Network(seed + 1), losses: [], time: 0 };
    });
    this.draw = generator(seed + 2);
  }

  /** One step of all of them. */
  async step() {
    const seen = this.data.count - HELD_OUT;
    this.batch = Array.from({ length: BATCH }, () => Math.floor(this.draw() * seen));
    for (const run of this.runs) {
      const { loss, grads } = run.network.gradient(this.data, this.batch);
      run.losses.push(loss);
      const begun = performance.now();
      await run.optimizer.step(run.network.params, grads, loss);
      run.time += performance.now() - begun; // milliseconds, of all steps
    }
  }
}

/** Exponential averages, so that curves can be told apart. */
export function smooth(losses, keep = 0.9) {
  let [mean, weight] = [0, 0];
  return losses.map((loss) => {
    mean = keep * mean + (1 - keep) * loss;
    weight = keep * weight + (1 - keep);
    return mean / weight;
  });
}

/** Points of a curve for an SVG polyline: steps from left to right, the logarithm of the loss from bottom to top. */
export function curve(losses, steps, { width, height, low, high }) {
  const [bottom, top] = [Math.log(low), Math.log(high)];
  const place = (loss) => {
    const share = (Math.log(Math.min(Math.max(loss, low), high)) - bottom) / (top - bottom);
    return (height * (1 - share)).toFixed(1);
  };
  const finite = smooth(losses).map((loss) => (Number.isFinite(loss) ? loss : high));
  return finite.map((loss, step) => `${((width * step) / Math.max(steps - 1, 1)).toFixed(1)},${place(loss)}`).join(" ");
}
