// l2o: exported rules in C++, over libtorch. One header; it needs C++20 and what torch's own package ships.
//
//     l2o::Optimizer optimizer("rule.pt", {{64, 784}, {64}, {10, 64}, {10}}, {.total_steps = 1000});
//     optimizer.step(params, grads, loss);   // params are changed in place
// Steps are those of `LearnedOptimizer` in Python, on the CPU: the file computes Δ, this header adds lr · Δ times a
// schedule, and skips steps whose numbers are not finite. A .pt file is a program: take it from people you trust.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace l2o {
struct Error : std::runtime_error { using std::runtime_error::runtime_error; };
inline void require(bool good, const std::string& message) { if (!good) throw Error(message); }

using Shape = std::vector<int64_t>;

// What a file says of its rule: docs/artifact.md, "Signature".
struct Signature {
  bool needs_loss = false, scheduled = false;
  double decay_unit = 0;
  int64_t rows = 0;
  std::vector<std::string> layout;
  std::vector<std::pair<std::string, std::vector<std::string>>> states;  // type, sides

  static Signature parse(const std::string& metadata) {
    const std::string key = "\"signature\": \"";  // the last key of all
    const size_t start = metadata.rfind(key);
    require(start != std::string::npos, "not a rule, or of an older l2o, without a signature: export it again");
    std::istringstream facts(metadata.substr(start + key.size(), metadata.rfind('"') - start - key.size()));
    std::string fact, word;
    std::getline(facts, fact, ';');
    require(fact == "l2o-rule/2", "format " + fact + ", this header reads l2o-rule/2: take l2o.hpp of a newer l2o");
    Signature found;
    while (std::getline(facts, fact, ';')) {
      std::istringstream words(fact);
      words >> word;
      if (word == "needs_loss") words >> found.needs_loss;
      else if (word == "scheduled") words >> found.scheduled;
      else if (word == "decay_unit") words >> found.decay_unit;
      else if (word == "rows") words >> found.rows;
      else if (word == "layout" && words >> word) found.layout.push_back(word);
      else if (word == "state" && words >> word >> word) {
        found.states.emplace_back(word, std::vector<std::string>{});
        while (words >> word) found.states.back().second.push_back(word);
      } else throw Error("its signature says \"" + fact + "\", which this header does not know: take a newer one");
    }
    return found;
  }
};

// Schedules, as in l2o_runtime/stepping/schedule.py, which says why.
inline double linear(double step, double total) {
  return std::min(step / std::max(0.02 * total, 1.0), 1.0) * std::max(1 - step / total, 0.0);
}
inline double told(double step, double total) {
  return std::sqrt(std::clamp(2500 / total, 1.0, 9.0)) * linear(step, total);
}
inline double anytime(double step) { return 1.5 * std::min(step / 20, 1.0) / std::pow(1 + step / 250, 0.75); }
inline double beta(double step) { return std::min(step / (step + 100), 0.9); }

struct Options {
  double lr = 1, weight_decay = 0;
  int64_t total_steps = 0;  // length of the run; 0: not known
  bool constant = false;    // steps are as long as lr says: the caller makes them shorter
};

// What is counted: steps taken, and why others were not; a step may have several reasons.
constexpr const char* counters[]{
    "steps", "nonfinite_gradient", "nonfinite_loss", "nonfinite_parameter", "zero_gradient"};

class Optimizer {
 public:
  Options options;  // lr may be changed between steps

  // A rule that `l2o export` wrote, for parameters of these shapes; throws l2o::Error.
  Optimizer(const std::string& path, std::vector<Shape> shapes, Options chosen = {})
      : options(chosen), shapes_(std::move(shapes)) {
    require(!shapes_.empty(), "no parameters: give the shape of each");
    for (const double number : {options.lr, options.weight_decay, double(options.total_steps)})
      require(std::isfinite(number) && number >= 0, "lr, weight_decay and total_steps: expected 0 or more");
    for (const Shape& shape : shapes_) {
      sizes_.push_back(1);
      for (int64_t side : shape) sizes_.back() *= side;
      require(sizes_.back() > 0, c10::str("a parameter of shape ", c10::IntArrayRef(shape), " has no numbers"));
      start_.push_back(start_.back() + sizes_.back());
    }
    torch::jit::ExtraFilesMap extra{{"l2o-rule.json", ""}};
    try {
      module_ = torch::jit::load(path, c10::Device(c10::kCPU), extra);
    } catch (const c10::Error& error) {
      throw Error(path + ": missing, damaged or no TorchScript (" + error.what_without_backtrace() + ")");
    }
    try {
      signature_ = Signature::parse(extra["l2o-rule.json"]);
      for (const auto& [type, sides] : signature_.states) state_.push_back(zeros(type, sides));
      if (signature_.scheduled) state_.push_back(zeros("float32", {"n"}));
      for (const std::string& key : signature_.layout) layout_.push_back(layout(key));
    } catch (const Error& error) {
      throw Error(path + ": " + error.what());
    }
  }

  // One step, params changed in place; false if it was skipped. Gradients are in the order and shapes of params.
  bool step(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& grads,
            std::optional<double> loss = std::nullopt) {
    const c10::InferenceMode off(false);
    const at::NoGradGuard none;
    require(loss || !signature_.needs_loss, "this rule needs the loss at every step: step(params, grads, loss)");
    const at::Tensor theta = flat("parameter", params), grad = flat("gradient", grads);
    const double pulse = grad.abs().sum(at::kDouble).item<double>(), whole = theta.sum(at::kDouble).item<double>();
    const bool wrong[] = {!std::isfinite(pulse), !std::isfinite(loss.value_or(0)), !std::isfinite(whole), pulse == 0};
    const bool good = std::none_of(std::begin(wrong), std::end(wrong), [](bool reason) { return reason; });
    state_[0][0] += good;
    for (int i = 0; i < 4; ++i) state_[0][i + 1] += wrong[i];
    if (!good) return false;

    std::vector<c10::IValue> inputs{theta, grad, at::full({}, loss.value_or(0), at::kFloat)};
    inputs.insert(inputs.end(), layout_.begin(), layout_.end());
    inputs.insert(inputs.end(), state_.begin() + 1, state_.end() - signature_.scheduled);
    const auto outputs = module_.forward(std::move(inputs)).toTupleRef().elements().vec();
    require(outputs.size() + signature_.scheduled == state_.size(), "the file gives another number of states than it says");
    const double lr = options.lr * factor(state_[0][0].item<double>());
    const bool trails = fades() && options.total_steps == 0;
    if (signature_.scheduled && !trails) state_.back().zero_();
    const double decay = lr * signature_.decay_unit * options.weight_decay;
    const auto deltas = outputs[0].toTensor().mul(lr).split_with_sizes(sizes_);
    for (size_t i = 0; i < params.size(); ++i) {
      at::Tensor move = deltas[i].view(shapes_[i]);
      if (decay != 0) move = move - params[i] * decay;
      params[i].add_(trails && lr != 0 ? follow(move, i) : move);
    }
    for (size_t i = 1; i < outputs.size(); ++i) state_[i] = outputs[i].toTensor();
    return true;
  }

  std::map<std::string, int64_t> health() const {
    std::map<std::string, int64_t> found;
    for (int i = 0; i < 5; ++i) found[counters[i]] = state_[0][i].item<int64_t>();
    return found;
  }

  // The state, to go on later; the file appears whole or not at all.
  void save(const std::string& path) const {
    const std::vector<char> data = torch::jit::pickle_save(state_);
    std::ofstream(path + ".part", std::ios::binary).write(data.data(), std::streamsize(data.size()));
    require(std::rename((path + ".part").c_str(), path.c_str()) == 0, path + ": cannot be written");
  }

  // A state that `save` wrote, of the same rule and shapes.
  void load(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> data{std::istreambuf_iterator<char>(file), {}};
    require(!data.empty(), path + ": cannot be read, or is empty");
    std::vector<at::Tensor> found;
    try {
      found = torch::jit::pickle_load(data).toTensorVector();
    } catch (const std::exception&) {
      throw Error(path + ": damaged, or no state that save() wrote");
    }
    if (signature_.scheduled && found.size() + 1 == state_.size()) found.push_back(at::zeros_like(state_.back()));  // older
    const auto alike = [](const at::Tensor& a, const at::Tensor& b) {
      return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type();
    };
    require(std::equal(found.begin(), found.end(), state_.begin(), state_.end(), alike), path + ": the state of another rule, or of parameters of other shapes");
    state_ = std::move(found);
  }

 private:
  // All of the tensors one after the other, float32.
  at::Tensor flat(const std::string& what, const std::vector<at::Tensor>& tensors) const {
    require(tensors.size() == shapes_.size(),
            c10::str("expected one ", what, " for each of ", shapes_.size(), " shapes, got ", tensors.size()));
    std::vector<at::Tensor> parts;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const std::string name = c10::str(what, " ", i);
      require(tensors[i].defined(), name + " is missing: leave parameters without a gradient out");
      require(tensors[i].is_cpu() && tensors[i].is_floating_point(), name + ": expected real numbers on the CPU");
      require(tensors[i].sizes() == c10::IntArrayRef(shapes_[i]),
              c10::str(name, " has shape ", tensors[i].sizes(), ", expected ", c10::IntArrayRef(shapes_[i])));
      parts.push_back(tensors[i].detach().reshape({-1}).to(at::kFloat));
    }
    return at::cat(parts);
  }

  bool fades() const { return signature_.scheduled && !options.constant; }
  double factor(double step) const {
    const double length = double(options.total_steps);
    if (length == 0) return fades() ? anytime(step) : 1;
    return fades() ? told(step, length) : linear(step, length);
  }

  // How far a parameter moves in a step that would be `move`: l2o_runtime/stepping/interpolation.py.
  at::Tensor follow(const at::Tensor& move, size_t index) {
    const double step = state_[0][0].item<double>();
    at::Tensor lag = state_.back().slice(0, start_[index], start_[index + 1]).view(shapes_[index]);
    const at::Tensor kept = (lag + move) * (1 - 4 / (step + 3)), moved = move + lag * beta(step - 1) - kept * beta(step);
    lag.copy_(kept);
    return moved;
  }

  at::Tensor zeros(const std::string& type, const std::vector<std::string>& sides) const {
    const std::map<std::string, c10::ScalarType> types{
        {"float32", at::kFloat}, {"float64", at::kDouble}, {"int64", at::kLong}};
    require(types.contains(type), "a state of type " + type + ", which this header does not know");
    Shape shape;
    for (const std::string& side : sides)
      shape.push_back(side == "n" ? start_.back() : side == "tensors" ? int64_t(sizes_.size()) : std::stoll(side));
    return at::zeros(shape, types.at(type));
  }

  // As `Layout` in Python has it.
  at::Tensor layout(const std::string& key) const {
    Shape owner, described;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      owner.insert(owner.end(), sizes_[i], int64_t(i));
      described.insert(described.end(), {int64_t(shapes_[i].size()), sizes_[i]});
    }
    if (key == "owner") return at::tensor(owner);
    if (key == "shapes") return at::tensor(described).view({-1, 2}).to(at::kFloat);
    require(key == "grid", "layout." + key + " is unknown to this header: take a newer one");
    std::vector<size_t> matrices;  // convolutions are outputs × the rest; without more rows than columns
    int64_t rows = signature_.rows, columns = 2;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      const int64_t first = shapes_[i].empty() ? 1 : shapes_[i][0], rest = sizes_[i] / first;
      if (shapes_[i].size() < 2 || std::min(first, rest) < 2) continue;
      matrices.push_back(i);
      rows = std::max(rows, std::min(first, rest));
      columns = std::max({columns, first, rest});
    }
    at::Tensor grid = at::full({std::max<int64_t>(int64_t(matrices.size()), 2), rows, columns}, -1, at::kLong);
    auto cell = grid.accessor<int64_t, 3>();
    for (size_t m = 0; m < matrices.size(); ++m) {
      const int64_t size = sizes_[matrices[m]], first = shapes_[matrices[m]][0], rest = size / first;
      for (int64_t k = 0; k < size; ++k)
        (first > rest ? cell[m][k % rest][k / rest] : cell[m][k / rest][k % rest]) = start_[matrices[m]] + k;
    }
    return grid;
  }

  std::vector<Shape> shapes_;
  Shape sizes_, start_{0};  // numbers of each, and of those before it
  torch::jit::Module module_;
  Signature signature_;
  // The state begins with the counters; how far parameters trail behind is the last of a rule that needs a schedule.
  std::vector<at::Tensor> layout_, state_{at::zeros({5}, at::kLong)};
};

}  // namespace l2o
