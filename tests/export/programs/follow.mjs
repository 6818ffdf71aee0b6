// Follows recorded gradients: `node follow.mjs package folder`; the folder has recording.json, with files beside it.
//
// Numbers come as raw float32 files; out.bin gets the parameters after every step, and stdout the counters.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [home, folder] = process.argv.slice(2);
const { Optimizer, L2OError } = await import(pathToFileURL(join(home, "l2o.js")));
const floats = (name) => {
  const bytes = readFileSync(join(folder, name));
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
};
const recording = JSON.parse(readFileSync(join(folder, "recording.json"), "utf8"));
const sizes = recording.shapes.map((shape) => shape.reduce((a, b) => a * b, 1));
const size = sizes.reduce((a, b) => a + b, 0);

/** Pieces of numbers that lie one after the other. */
function split(numbers) {
  let at = 0;
  return sizes.map((length) => numbers.slice(at, (at += length)));
}

async function main() {
  const ort = createRequire(join(home, "package.json"))("onnxruntime-web");
  ort.env.wasm.numThreads = 1;
  const load = () => Optimizer.load(readFileSync(recording.rule), recording.shapes, { ort, ...recording.options });
  let optimizer = await load();
  const params = split(floats("params.bin"));
  const [grads, losses] = [floats("grads.bin"), floats("losses.bin")];
  const seen = [];
  for (let step = 0; step < losses.length; step++) {
    if (step === recording.stop) {
      const saved = structuredClone(optimizer.save());
      optimizer = await load();
      optimizer.restore(saved);
    }
    const now = split(grads.subarray(step * size, (step + 1) * size));
    if (recording.drop) now.pop();
    if (recording.shorten) now[0] = now[0].subarray(1);
    await optimizer.step(params, now, recording.told ? losses[step] : null);
    seen.push(...params.map((param) => param.slice()));
  }
  writeFileSync(join(folder, "out.bin"), Buffer.concat(seen.map((array) => Buffer.from(array.buffer))));
  console.log(JSON.stringify(optimizer.health()));
}

await main().catch((error) => {
  if (!(error instanceof L2OError)) throw error;
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
});
