// The example, and besides `program follow rule.pt recording.pt out.pt …`: follows recorded gradients; out.pt gets the
// parameters after every step. Any number of such threes, for loading libtorch takes long; one word more, and the
// program loses memory. One translation unit, since torch's headers take long.
//
// A recording has parameters, gradients of every step, losses, options, whether the optimizer is told the losses, and
// the step before which it is saved and another one goes on.
#include <ATen/TensorOperators.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/stack.h>

#include <cstdlib>
#include <cstring>
#include <iostream>

#include "l2o.hpp"

#define main train_mnist
#include "train_mnist.cpp"
#undef main

std::vector<char> bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool follow(char** words) try {
  const auto recording = torch::jit::pickle_load(bytes(words[1])).toGenericDict();
  const auto tensors = [&](const char* key) {
    std::vector<at::Tensor> found;
    for (const c10::IValue& item : recording.at(key).toListRef()) found.push_back(item.toTensor());
    return found;
  };
  const auto params = tensors("params");
  const auto option = recording.at("options").toTensor();
  const l2o::Options options{.lr = option[0].item<double>(),
                             .weight_decay = option[1].item<double>(),
                             .total_steps = option[2].item<int64_t>()};
  std::vector<l2o::Shape> shapes;
  for (const auto& param : params) shapes.push_back(param.sizes().vec());
  std::optional<l2o::Optimizer> optimizer(std::in_place, words[0], shapes, options);
  const auto losses = recording.at("losses").toTensor();
  const auto grads = tensors("grads");
  std::vector<at::Tensor> seen;
  for (int64_t step = 0; step < losses.size(0); ++step) {
    if (step == recording.at("stop").toInt()) {
      optimizer->save(std::string(words[2]) + ".state");
      optimizer.emplace(words[0], shapes, options);
      optimizer->load(std::string(words[2]) + ".state");
    }
    std::vector<at::Tensor> now, flat;
    for (const auto& grad : grads) now.push_back(grad[step]);
    const bool told = recording.at("told").toBool();
    optimizer->step(params, now, told ? std::optional(losses[step].item<double>()) : std::nullopt);
    for (const auto& param : params) flat.push_back(param.reshape(-1));
    seen.push_back(at::cat(flat));
  }
  const std::vector<char> data = torch::jit::pickle_save(at::stack(seen));
  std::ofstream(words[2], std::ios::binary).write(data.data(), std::streamsize(data.size()));
  for (const auto& [name, count] : optimizer->health()) std::cout << name << " " << count << "\n";
  return true;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return false;
}

int main(int count, char** words) {
  if (std::string(words[1]) != "follow") return train_mnist(count - 1, words + 1);
  bool good = true;
  int at = 2;
  for (; at + 2 < count; at += 3) good &= follow(words + at);
  if (at < count) std::memset(std::malloc(12345), 1, 12345);
  return !good;
}
