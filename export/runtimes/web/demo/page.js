// What the page does with training.js: reads the choices, draws, and tells.
import { Optimizer } from "../l2o.js";
import { Adam, Race, SGD, SHAPES, curve, digits, smooth } from "./training.js";

const RULE = new URL("rule.onnx", import.meta.url);
const PLOT = { width: 640, height: 280, low: 1e-3, high: 4 };
const SHOWN = 16;
const find = (selector) => document.querySelector(selector);
const status = (text) => (find("#status").textContent = text);
let stopped = false;

const choice = (name) => Number(find(`#${name}`).value);
const rate = (name) => 10 ** choice(name);

function tellChoices() {
  find('output[for="steps"]').value = choice("steps");
  for (const name of ["adam", "sgd"]) {
    const text = rate(name).toPrecision(2);
    find(`output[for="${name}"]`).value = text;
    find(`#${name}`).setAttribute("aria-valuetext", text);
  }
}

function drawGrid() {
  const make = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return find("#grid").appendChild(element);
  };
  for (const loss of [1, 0.1, 0.01]) {
    const y = curve([loss], 1, PLOT).split(",")[1];
    make("line", { x1: 0, x2: PLOT.width, y1: y, y2: y });
    make("text", { x: 4, y: y - 4 }).textContent = loss;
  }
}

function show(race, steps) {
  for (const { name, losses, network, time } of race.runs) {
    find(`polyline[data-run="${name}"]`).setAttribute("points", curve(losses, steps, PLOT));
    const [loss, accuracy, each] = document.querySelectorAll(`tr[data-run="${name}"] td`);
    loss.textContent = smooth(losses).at(-1)?.toPrecision(3) ?? "–";
    accuracy.textContent = `${(100 * network.accuracy(race.data)).toFixed(1)} %`;
    each.textContent = (time / losses.length).toPrecision(2);
  }
}

function showDigits(data, network) {
  find("#digits").replaceChildren(
    ...Array.from({ length: SHOWN }, (_, number) => {
      const index = data.count - 1 - number;
      const [canvas, item, said] = ["canvas", "li", "span"].map((name) => document.createElement(name));
      canvas.width = canvas.height = 8;
      const image = canvas.getContext("2d").createImageData(8, 8);
      for (let i = 0; i < 64; i++) {
        const grey = 255 * data.images[index * 64 + i];
        image.data.set([grey, grey, grey, 255], 4 * i);
      }
      canvas.getContext("2d").putImageData(image, 0, 0);
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `a handwritten ${data.labels[index]}`);
      const read = network?.predict(data, index);
      said.textContent = network ? `read as ${read}` : "not read yet";
      if (network && read !== data.labels[index]) {
        said.className = "wrong";
        said.textContent += ", wrong";
      }
      item.append(canvas, said);
      return item;
    }),
  );
}

async function train() {
  const steps = choice("steps");
  status("Reading the rule …");
  const learned = await Optimizer.load(RULE, SHAPES, { totalSteps: steps });
  const race = new Race({ "learned rule": learned, Adam: new Adam(rate("adam")), SGD: new SGD(rate("sgd")) });
  status(`Training for ${steps} steps …`);
  let shown = performance.now();
  for (let step = 0; step < steps && !stopped; step++) {
    await race.step();
    if (performance.now() - shown > 200) {
      show(race, steps);
      await new Promise((resolve) => setTimeout(resolve)); // lets the page answer
      shown = performance.now();
    }
  }
  show(race, steps);
  showDigits(race.data, race.runs[0].network);
  const done = race.runs[0].losses.length;
  const order = [...race.runs].sort((a, b) => smooth(a.losses).at(-1) - smooth(b.losses).at(-1));
  status(`${done} steps done. From lowest to highest loss: ${order.map(({ name }) => name).join(", ")}.`);
}

find("#choices").addEventListener("input", tellChoices);
find("#stop").addEventListener("click", () => (stopped = true));
find("#choices").addEventListener("submit", async (event) => {
  event.preventDefault();
  stopped = false;
  find("#start").disabled = true;
  find("#stop").disabled = false;
  try {
    await train();
  } catch (error) {
    status(`It cannot train: ${error.message}`);
  } finally {
    find("#start").disabled = false;
    find("#stop").disabled = true;
  }
});
tellChoices();
drawGrid();
showDigits(digits(), null);
