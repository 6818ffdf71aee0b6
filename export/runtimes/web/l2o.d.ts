/** A file or an argument is not what it should be; the message says what is wrong, and what to do. */
export class L2OError extends Error {}

export interface Options {
  /** Factor on the learned step; 1, if not given, is what rules are meta-trained with. */
  lr?: number;
  /** Decoupled weight decay, as in `LearnedOptimizer`; 0 if not given. */
  weightDecay?: number;
  /** Length of the run: steps grow over its first 2 %, then fall to nothing. null, if not given: not known. */
  totalSteps?: number | null;
  /** "constant": steps of rules that leave their size to a schedule are as long as lr says. "auto" if not given. */
  schedule?: "auto" | "constant";
  /** The onnxruntime to use, such as onnxruntime-node; onnxruntime-web if not given. */
  ort?: unknown;
  /** Options of its session. */
  session?: object;
}

/** Steps taken, and why others were skipped; a step may have several reasons. */
export interface Health {
  steps: number;
  nonfinite_gradient: number;
  nonfinite_loss: number;
  nonfinite_parameter: number;
  zero_gradient: number;
}

/** States by name, copies. A structured clone (IndexedDB, postMessage) keeps them. */
export interface Saved {
  health: Health;
  state: Record<string, Float32Array | Float64Array | BigInt64Array>;
}

/** A frozen rule, and the state of one optimization. */
export class Optimizer {
  /**
   * Read a rule.
   * @param source where `rule.onnx` is, or its bytes.
   * @param shapes of the parameters; [] for a single number.
   * @throws L2OError the file is missing, damaged, of another format or no rule; or an option is out of range.
   */
  static load(
    source: string | URL | ArrayBuffer | Uint8Array,
    shapes: number[][],
    options?: Options,
  ): Promise<Optimizer>;

  /** May be changed between steps. */
  lr: number;
  weightDecay: number;
  totalSteps: number | null;
  schedule: "auto" | "constant";

  /**
   * One step; `params` are changed in place.
   * @param params, grads one Float32Array for every shape.
   * @param loss at `params`; rules that were meta-trained with it at every step need it.
   * @returns false if the step was skipped: a number is not finite, or all gradients are zero.
   * @throws L2OError sizes do not fit, or the loss is missing where it is needed.
   */
  step(params: Float32Array[], grads: Float32Array[], loss?: number | null): Promise<boolean>;

  /** Counted since the start, or since that of the state that was restored. */
  health(): Health;

  /** The state, to go on later. */
  save(): Saved;

  /** Go on from a state of the same rule and shapes. */
  restore(saved: Saved): void;
}

/** What lr is multiplied by in step t, from 1, of a run of T. */
export function linear(step: number, total: number): number;
export function told(step: number, total: number): number;
export function anytime(step: number): number;
