// Trains as the page does, without it: `node race.mjs demo rule.onnx`; prints accuracies, checks of gradients, and what
// another program needs to train the same network on the same batches.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [demo, rule] = process.argv.slice(2);
const home = join(demo, "..");
const { Optimizer } = await import(pathToFileURL(join(home, "l2o.js")));
const training = await import(pathToFileURL(join(demo, "training.js")));
const { Adam, Network, Race, SGD, SHAPES, curve, digits, smooth } = training;
const ort = createRequire(join(home, "package.json"))("onnxruntime-web");
ort.env.wasm.numThreads = 1;

// The gradient against central differences, at some coordinates of each tensor.
const [data, network, batch] = [digits(), new Network(3), [0, 1, 2, 3, 4, 5, 6, 7]];
const { grads } = network.gradient(data, batch);
let error = 0;
for (const [p, param] of network.params.entries())
  for (const i of [0, Math.floor(param.length / 2), param.length - 1]) {
    const kept = param[i];
    const at = (value) => ((param[i] = value), [param[i], network.gradient(data, batch).loss]);
    const [[high, above], [low, below]] = [at(kept + 0.01), at(kept - 0.01)];
    param[i] = kept;
    error = Math.max(error, Math.abs((above - below) / (high - low) - grads[p][i]));
  }

const steps = 100;
const learned = await Optimizer.load(readFileSync(rule), SHAPES, { ort, totalSteps: steps });
const race = new Race({ learned, adam: new Adam(0.01), sgd: new SGD(0.1) });
const start = race.runs[0].network.params.map((param) => [...param]);
const batches = [];
for (let step = 0; step < steps; step++) {
  await race.step();
  batches.push(race.batch);
}
const accuracy = Object.fromEntries(race.runs.map(({ name, network }) => [name, network.accuracy(race.data)]));
const first = race.runs.map(({ losses }) => losses[0]);
const plot = { width: 640, height: 280, low: 1e-3, high: 4 };
const points = curve([4, NaN, 1e-9, 0.1], 4, plot).split(" ").map((pair) => pair.split(",").map(Number));
const { images, labels } = data;
const drawn = { start, batches, images: [...images], labels: [...labels] };
console.log(JSON.stringify({ error, accuracy, first, points, smooth: smooth([2, 2, 2]), drawn }));
