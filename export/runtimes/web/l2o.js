// l2o: exported rules in JavaScript, over onnxruntime-web.
//
//     const optimizer = await Optimizer.load("rule.onnx", [[24, 64], [24], [10, 24], [10]], { totalSteps: 1000 });
//     await optimizer.step(params, grads, loss); // Float32Arrays; params are changed in place
//
// Steps are those of `LearnedOptimizer` in Python: the file computes Δ, this module adds lr · Δ times a schedule, and
// skips steps whose numbers are not finite.
import { intact, metadata } from "./onnx-metadata.js";

const FORMAT = "l2o-rule/2";
const ARRAYS = { float32: Float32Array, float64: Float64Array, int64: BigInt64Array };
const MAX_BYTES = 48 * 2 ** 20;

/** A file or an argument is not what it should be; the message says what is wrong, and what to do. */
export class L2OError extends Error {
  name = "L2OError";
}

function require(good, message) {
  if (!good) throw new L2OError(message);
}

// Schedules: l2o_runtime/stepping/schedule.py has the same formulas, and says why.

/** min(1, t / 0.02 T) (1 − t/T), and 0 from T on. */
export function linear(step, total) {
  return Math.min(step / Math.max(0.02 * total, 1), 1) * Math.max(1 - step / total, 0);
}

/** `linear`, times √(2500 / T), within 1 … 3. */
export function told(step, total) {
  return Math.sqrt(Math.min(Math.max(2500 / total, 1), 9)) * linear(step, total);
}

/** 3/2 min(1, t/20) / (1 + t/250)^¾. */
export function anytime(step) {
  return (1.5 * Math.min(step / 20, 1)) / (1 + step / 250) ** 0.75;
}

/** l2o_runtime/stepping/interpolation.py: the share of the average. */
const beta = (step) => Math.min(step / (step + 100), 0.9);

/** What a file says of its rule: docs/artifact.md, "Signature". */
function readSignature(bytes) {
  let text;
  try {
    text = JSON.parse(metadata(bytes).get("l2o-rule.json")).signature;
  } catch {
    throw new L2OError("not a rule in ONNX that `l2o export` wrote");
  }
  require(typeof text === "string", "without a signature, so of an older l2o: export it again");
  const [format, ...facts] = text.split("; ");
  require(format === FORMAT, `format ${format}, this version reads ${FORMAT}: take a newer l2o-web`);
  const found = { layout: [], state: [] };
  for (const fact of facts) {
    const [key, ...words] = fact.split(" ");
    if (key === "layout") found.layout.push(words[0]);
    else if (key === "state") found.state.push({ name: words[0], type: words[1], sides: words.slice(2) });
    else if (["needs_loss", "scheduled", "decay_unit", "rows"].includes(key)) found[key] = Number(words[0]);
    else throw new L2OError(`its signature says "${fact}", which this version does not know: take a newer l2o-web`);
  }
  for (const { type } of found.state)
    require(type in ARRAYS, `a state of type ${type}, which this version does not know`);
  return found;
}

async function read(source) {
  if (typeof source === "string" || source instanceof URL) {
    const answer = await fetch(source).catch((error) => {
      throw new L2OError(`${source}: cannot be fetched (${error.message})`);
    });
    require(answer.ok, `${source}: cannot be fetched (${answer.status})`);
    source = await answer.arrayBuffer();
  }
  require(source instanceof ArrayBuffer || source instanceof Uint8Array, "expected a URL, or the bytes of a rule.onnx");
  const bytes = source instanceof Uint8Array ? source : new Uint8Array(source);
  require(bytes.length <= MAX_BYTES, `larger than ${MAX_BYTES} bytes; a rule is not`);
  require(await intact(bytes), "damaged, or not written by `l2o export`: it does not end with its digest");
  return bytes;
}

const product = (shape) => shape.reduce((size, side) => size * side, 1);

/** Where matrices have their coordinates, as `grid_of` in Python; convolutions are outputs × the rest. */
function gridOf(shapes, starts, least) {
  const matrices = [];
  shapes.forEach((shape, index) => {
    const [first, rest] = [shape[0], product(shape.slice(1))];
    if (shape.length > 1 && Math.min(first, rest) > 1) matrices.push({ start: starts[index], first, rest });
  });
  const rows = Math.max(least, ...matrices.map(({ first, rest }) => Math.min(first, rest)));
  const columns = Math.max(2, ...matrices.map(({ first, rest }) => Math.max(first, rest)));
  const dims = [Math.max(matrices.length, 2), rows, columns];
  const grid = new BigInt64Array(product(dims)).fill(-1n);
  matrices.forEach(({ start, first, rest }, number) => {
    for (let k = 0; k < first * rest; k++) {
      const [row, column] = [Math.floor(k / rest), k % rest];
      const place = first > rest ? column * columns + row : row * columns + column; // not more rows than columns
      grid[number * rows * columns + place] = BigInt(start + k);
    }
  });
  return [grid, dims];
}

/** A frozen rule, and the state of one optimization. */
export class Optimizer {
  #ort;
  #session;
  #signature;
  #sizes;
  #layout = {};
  #state = [];
  #lag = new Float32Array(0); // how far parameters are behind, where nobody says how long the run is
  #counters = { steps: 0, nonfinite_gradient: 0, nonfinite_loss: 0, nonfinite_parameter: 0, zero_gradient: 0 };
  #busy = false;

  /** See l2o.d.ts. */
  static async load(source, shapes, options = {}) {
    const known = ["lr", "weightDecay", "totalSteps", "schedule", "ort", "session"];
    const unknown = Object.keys(options).find((key) => !known.includes(key));
    require(unknown === undefined, `unknown option ${unknown}: expected ${known.join(", ")}`);
    const whole = (side) => Number.isInteger(side) && side > 0;
    require(Array.isArray(shapes) && shapes.length > 0, "no parameters: give the shape of each");
    require(
      shapes.every((shape) => Array.isArray(shape) && shape.every(whole)),
      "shapes: expected arrays of whole numbers, 1 or more; [] for a single number",
    );
    const found = new Optimizer();
    found.lr = options.lr ?? 1;
    found.weightDecay = options.weightDecay ?? 0;
    found.totalSteps = options.totalSteps ?? null;
    found.schedule = options.schedule ?? "auto";
    found.#check();
    const bytes = await read(source);
    found.#signature = readSignature(bytes);
    found.#ort = options.ort ?? (await import("onnxruntime-web"));
    try {
      found.#session = await found.#ort.InferenceSession.create(bytes, { logSeverityLevel: 3, ...options.session });
    } catch (error) {
      throw new L2OError(`onnxruntime does not read it: ${error.message ?? error}`);
    }
    found.#sizes = shapes.map(product);
    found.#arrange(shapes);
    return found;
  }

  #check() {
    for (const key of ["lr", "weightDecay"])
      require(Number.isFinite(this[key]) && this[key] >= 0, `${key}: expected a finite number, 0 or more, got ${this[key]}`);
    const total = this.totalSteps;
    const fits = total === null || (Number.isInteger(total) && total > 0);
    require(fits, `totalSteps: expected a whole number, 1 or more, or null; got ${total}`);
    const known = this.schedule === "auto" || this.schedule === "constant";
    require(known, `schedule: expected "auto" or "constant", got ${this.schedule}`);
  }

  /** Layout, as in Python, and zero states. */
  #arrange(shapes) {
    const n = this.#sizes.reduce((sum, size) => sum + size, 0);
    const owner = new BigInt64Array(n);
    const starts = [];
    let start = 0;
    this.#sizes.forEach((size, index) => {
      owner.fill(BigInt(index), start, start + size);
      starts.push(start);
      start += size;
    });
    for (const key of this.#signature.layout) {
      if (key === "owner") this.#layout["layout.owner"] = this.#tensor("int64", owner, [n]);
      else if (key === "shapes") {
        const described = shapes.flatMap((shape, index) => [shape.length, this.#sizes[index]]);
        this.#layout["layout.shapes"] = this.#tensor("float32", Float32Array.from(described), [shapes.length, 2]);
      } else if (key === "grid")
        this.#layout["layout.grid"] = this.#tensor("int64", ...gridOf(shapes, starts, this.#signature.rows));
      else throw new L2OError(`layout.${key} is unknown to this version: take a newer l2o-web`);
    }
    this.#lag = new Float32Array(this.#signature.scheduled ? n : 0);
    this.#state = this.#signature.state.map(({ type, sides }) => {
      const dims = sides.map((side) => ({ n, tensors: shapes.length })[side] ?? Number(side));
      return this.#tensor(type, new ARRAYS[type](product(dims)), dims);
    });
  }

  #tensor(type, data, dims) {
    return new this.#ort.Tensor(type, data, dims);
  }

  /** All arrays one after the other. */
  #flat(what, arrays) {
    const count = this.#sizes.length;
    require(Array.isArray(arrays) && arrays.length === count, `expected one ${what} for each of ${count} shapes, got ${arrays?.length}`);
    const n = this.#sizes.reduce((sum, size) => sum + size, 0);
    const flat = new Float32Array(n);
    let start = 0;
    arrays.forEach((array, index) => {
      require(array instanceof Float32Array, `${what} ${index}: expected a Float32Array`);
      const size = this.#sizes[index];
      require(array.length === size, `${what} ${index} has ${array.length} numbers, its shape has ${size}`);
      flat.set(array, start);
      start += size;
    });
    return flat;
  }

  #factor(step) {
    if (this.totalSteps === null) return this.#fades ? anytime(step) : 1;
    return (this.#fades ? told : linear)(step, this.totalSteps);
  }

  /** See l2o.d.ts. */
  async step(params, grads, loss = null) {
    require(!this.#busy, "step() before the last one has ended: await it");
    this.#check();
    require(loss !== null || !this.#signature.needs_loss, "this rule needs the loss at every step: step(params, grads, loss)");
    require(loss === null || typeof loss === "number", "loss: expected a number");
    const [theta, grad] = [this.#flat("parameter", params), this.#flat("gradient", grads)];
    const pulse = grad.reduce((sum, g) => sum + Math.abs(g), 0);
    const whole = theta.reduce((sum, x) => sum + x, 0);
    const reasons = {
      nonfinite_gradient: !Number.isFinite(pulse),
      nonfinite_loss: !Number.isFinite(loss ?? 0),
      nonfinite_parameter: !Number.isFinite(whole),
      zero_gradient: pulse === 0,
    };
    const good = !Object.values(reasons).some(Boolean);
    if (good) await this.#advance(params, theta, grad, loss ?? 0);
    this.#counters.steps += good;
    for (const [reason, holds] of Object.entries(reasons)) this.#counters[reason] += holds;
    return good;
  }

  async #advance(params, theta, grad, loss) {
    const names = this.#signature.state.map(({ name }) => name);
    const feeds = {
      param: this.#tensor("float32", theta, [theta.length]),
      grad: this.#tensor("float32", grad, [grad.length]),
      loss: this.#tensor("float32", Float32Array.of(loss), []),
      ...this.#layout,
      ...Object.fromEntries(names.map((name, index) => [name, this.#state[index]])),
    };
    this.#busy = true;
    let found;
    try {
      found = await this.#session.run(feeds);
    } finally {
      this.#busy = false;
    }
    this.#state = names.map((name) => found[`next.${name}`]);
    const lr = this.lr * this.#factor(this.#counters.steps + 1);
    const kept = 1 - lr * this.#signature.decay_unit * this.weightDecay;
    const scale = Math.fround(lr);
    const delta = found.delta.data;
    if (!this.#trails) this.#lag.fill(0);
    const follow = this.#trails && lr !== 0 ? this.#follower(this.#counters.steps + 1) : null;
    let at = 0;
    for (const param of params) {
      for (let i = 0; i < param.length; i++, at++) {
        const move = Math.fround(delta[at] * scale);
        if (follow) param[i] += follow(kept === 1 ? move : move - param[i] * (1 - kept), at);
        else {
          if (kept !== 1) param[i] *= kept;
          param[i] += move;
        }
      }
    }
  }

  /** Whether the size of steps is left to a schedule. */
  get #fades() {
    return this.#signature.scheduled && this.schedule === "auto";
  }

  /** Whether nobody says how long the run is. */
  get #trails() {
    return this.#fades && this.totalSteps === null;
  }

  /** How far a parameter moves in a step that would be `move`; what it is behind is kept. */
  #follower(step) {
    const [lag, keep, before, after] = [this.#lag, 1 - 4 / (step + 3), beta(step - 1), beta(step)];
    return (move, at) => {
      const behind = lag[at];
      lag[at] = (behind + move) * keep;
      return move + behind * before - lag[at] * after;
    };
  }

  /** See l2o.d.ts. */
  health() {
    return { ...this.#counters };
  }

  /** See l2o.d.ts. */
  save() {
    const entries = this.#signature.state.map(({ name }, index) => [name, this.#state[index].data.slice()]);
    if (this.#signature.scheduled) entries.push(["lag", this.#lag.slice()]);
    return { health: this.health(), state: Object.fromEntries(entries) };
  }

  /** See l2o.d.ts. */
  restore(saved) {
    const other = "the state of another rule, or of parameters of other shapes";
    require(saved?.state && saved?.health, "no state that save() gave");
    const { lag = new Float32Array(this.#lag.length), ...states } = saved.state; // older ones have none
    require(Object.keys(states).length === this.#state.length, other);
    require(lag instanceof Float32Array && lag.length === this.#lag.length, other);
    const health = Object.fromEntries(Object.keys(this.#counters).map((key) => [key, saved.health[key]]));
    require(Object.values(health).every((n) => Number.isInteger(n) && n >= 0), "no state that save() gave");
    this.#state = this.#signature.state.map(({ name, type }, index) => {
      const [data, own] = [saved.state[name], this.#state[index]];
      require(data instanceof ARRAYS[type] && data.length === own.data.length, other);
      return this.#tensor(type, data.slice(), own.dims);
    });
    this.#lag = lag.slice();
    this.#counters = health;
  }
}
