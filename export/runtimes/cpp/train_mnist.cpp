// Trains a network with one hidden layer on MNIST's idx files, without Python:
//
//     ./build/train_mnist rule.pt FOLDER [steps]
//
// FOLDER has train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte,
// unpacked.
#include <ATen/TensorOperators.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/rand.h>

#include <iostream>

#include "l2o.hpp"

using at::Tensor;

// An idx file: 0, 0, type 8 (bytes), number of dimensions, their sizes as 4 bytes each, largest first; then the bytes.
Tensor read_idx(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto byte = [&](size_t at) { return int64_t(static_cast<unsigned char>(bytes[at])); };
  l2o::require(bytes.size() >= 4 && byte(2) == 8 && byte(3) >= 1 && byte(3) <= 3, path + ": missing, or no idx file");
  const size_t dimensions = size_t(byte(3)), header = 4 + 4 * dimensions;
  l2o::require(bytes.size() >= header, path + ": cut short");
  l2o::Shape shape;
  int64_t count = 1;
  for (size_t at = 4; at < header; at += 4) {
    shape.push_back(byte(at) << 24 | byte(at + 1) << 16 | byte(at + 2) << 8 | byte(at + 3));
    count *= shape.back();
  }
  l2o::require(count > 0 && bytes.size() == header + size_t(count), path + ": of another size than it says");
  return at::from_blob(bytes.data() + header, shape, at::kByte).clone();
}

Tensor images(const std::string& path) { return read_idx(path).flatten(1).to(at::kFloat).div(255); }
Tensor labels(const std::string& path) { return read_idx(path).to(at::kLong); }

// Logits of a 784-32-10 network with tanh.
struct Network {
  std::vector<Tensor> params;

  Tensor hidden(const Tensor& x) const { return x.matmul(params[0].t()).add(params[1]).tanh(); }
  Tensor logits(const Tensor& h) const { return h.matmul(params[2].t()).add(params[3]); }

  double accuracy(const Tensor& x, const Tensor& y) const {
    return logits(hidden(x)).argmax(1).eq(y).to(at::kFloat).mean().item<double>();
  }

  // Mean cross-entropy of a minibatch, and its gradient: backward by hand, so that nothing else of torch is needed.
  std::pair<double, std::vector<Tensor>> gradient(const Tensor& x, const Tensor& y) const {
    const Tensor h = hidden(x), logs = logits(h).log_softmax(1), target = y.unsqueeze(1);
    const Tensor error = logs.exp().scatter_add(1, target, at::full(target.sizes(), -1.0f)).div(x.size(0));
    const Tensor inner = error.matmul(params[2]) * (1 - h * h);
    return {-logs.gather(1, target).mean().item<double>(),
            {inner.t().matmul(x), inner.sum(0), error.t().matmul(h), error.sum(0)}};
  }
};

int main(int count, char** words) try {
  l2o::require(count == 3 || count == 4, "usage: train_mnist rule.pt FOLDER [steps]");
  const std::string folder = std::string(words[2]) + "/";
  const int64_t steps = count == 4 ? std::atoll(words[3]) : 500;
  l2o::require(steps >= 1, "steps: expected a whole number, 1 or more");
  const std::vector<l2o::Shape> shapes{{32, 784}, {32}, {10, 32}, {10}};
  l2o::Optimizer optimizer(words[1], shapes, {.total_steps = steps});

  const Tensor x = images(folder + "train-images-idx3-ubyte"), y = labels(folder + "train-labels-idx1-ubyte");
  Network network;
  for (const auto& shape : shapes) network.params.push_back((at::rand(shape) - 0.5).mul(shape.size() > 1 ? 0.08 : 0));
  for (int64_t step = 1; step <= steps; ++step) {
    const Tensor batch = at::rand({64}).mul(double(x.size(0))).to(at::kLong);
    const auto [loss, grads] = network.gradient(x.index_select(0, batch), y.index_select(0, batch));
    optimizer.step(network.params, grads, loss);
    if (step % 100 == 0 || step == steps) std::cout << "step " << step << " loss " << loss << std::endl;
  }
  const Tensor unseen = images(folder + "t10k-images-idx3-ubyte"), digits = labels(folder + "t10k-labels-idx1-ubyte");
  std::cout << "accuracy " << network.accuracy(unseen, digits) << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return 1;
}
