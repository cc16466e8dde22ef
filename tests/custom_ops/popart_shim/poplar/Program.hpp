// Poplar's programs, which run here one step after another.
#pragma once

#include <initializer_list>

#include "Graph.hpp"

namespace poplar {

void run_vertices(const Vertices& vertices);  // simulator.cpp

namespace program {

struct Step {
  virtual ~Step() = default;
  virtual void run() const = 0;
};

class Program {
 public:
  void run() const { step_->run(); }

 protected:
  explicit Program(std::shared_ptr<Step> step) : step_(std::move(step)) {}
  std::shared_ptr<Step> step_;
};

class Sequence : public Program {
 public:
  Sequence(std::initializer_list<Program> steps = {}, const DebugContext& = {}) : Program(std::make_shared<Steps>()) {
    for (const Program& step : steps) add(step);
  }
  void add(const Program& step) { static_cast<Steps&>(*step_).all.push_back(step); }

 private:
  struct Steps : Step {
    std::vector<Program> all;
    void run() const override {
      for (const Program& step : all) step.run();
    }
  };
};

class Copy : public Program {
 public:
  Copy(const Tensor& from, const Tensor& to, bool = false, const DebugContext& = {})
      : Program(std::make_shared<Move>(from, to)) {
    if (from.shape() != to.shape() || from.elementType() != to.elementType())
      throw std::runtime_error("a copy between tensors that do not match");
  }

 private:
  struct Move : Step {
    Move(const Tensor& a, const Tensor& b) : from(a), to(b) {}
    Tensor from, to;
    void run() const override {
      for (std::size_t i = 0; i < from.numElements(); ++i)
        std::memcpy(to.places()[i].data(), from.places()[i].data(), from.elementType().bytes());
    }
  };
};

class WriteUndef : public Program {
 public:
  explicit WriteUndef(const Tensor& tensor, const DebugContext& = {}) : Program(std::make_shared<Spoil>(tensor)) {}

 private:
  struct Spoil : Step {
    explicit Spoil(const Tensor& t) : tensor(t) {}
    Tensor tensor;
    void run() const override {
      for (const Place& place : tensor.places()) std::memset(place.data(), 0xCD, tensor.elementType().bytes());
    }
  };
};

class Execute : public Program {
 public:
  explicit Execute(const ComputeSet& set, const DebugContext& = {}) : Program(std::make_shared<All>(set)) {}

 private:
  struct All : Step {
    explicit All(const ComputeSet& s) : set(s) {}
    ComputeSet set;
    void run() const override { run_vertices(*set.vertices()); }
  };
};

class RepeatWhileTrue : public Program {
 public:
  RepeatWhileTrue(const Program& condition, const Tensor& predicate, const Program& body, const DebugContext& = {})
      : Program(std::make_shared<Loop>(condition, predicate, body)) {
    if (predicate.elementType() != BOOL || predicate.rank() != 0) throw std::runtime_error("a predicate is one bool");
  }

 private:
  struct Loop : Step {
    Loop(const Program& c, const Tensor& p, const Program& b) : condition(c), body(b), predicate(p) {}
    Program condition, body;
    Tensor predicate;
    void run() const override {
      for (condition.run(); *predicate.places()[0].data() == 1; condition.run()) body.run();
    }
  };
};

}  // namespace program

}  // namespace poplar
