// The ops as PopART would use them, behind a C ABI: found by name, given attributes and inputs, asked for shapes and
// gradients, grown into a program, and run. A failure returns 1 and leaves its message in sim_error().
#include <popart/opmanager.hpp>
#include <popart/popx/opxmanager.hpp>
#include <popart/shapeinference.hpp>

#include "vertex_table.hpp"

namespace popart {

std::map<OperatorIdentifier, RegisteredOp>& registered_ops() {
  static std::map<OperatorIdentifier, RegisteredOp> table;
  return table;
}

std::map<OperatorIdentifier, ShapeFunction>& registered_shapes() {
  static std::map<OperatorIdentifier, ShapeFunction> table;
  return table;
}

namespace popx {
std::map<OperatorIdentifier, OpxFactory>& registered_opxs() {
  static std::map<OperatorIdentifier, OpxFactory> table;
  return table;
}
}  // namespace popx

}  // namespace popart

namespace poplar {

namespace {

// Poplar's rule: in one compute set no element is written by one vertex and touched by another.
void check_conflicts(const Vertices& vertices) {
  std::map<Place, const VertexRecord*> writer;
  const auto is_written = [](const VertexRecord& v, const std::string& edge) {
    static const std::map<std::string, std::set<std::string>> table = {
        {"NmsKeys", {"keys"}},          {"NmsRank", {"ranks"}},
        {"NmsPlace", {"order", "sorted"}}, {"NmsOverlap", {"bits", "diagonal"}},
        {"NmsFlags", {"flags"}},        {"NmsBegin", {"state", "keep"}},
        {"NmsResolve", {"state", "keep", "mask", "more"}}, {"NmsSuppress", {"flags"}},
        {"NmsEmit", {"rows", "boxes"}}, {"RoiAlignForward", {"aligned", "scratch"}},
        {"RoiAlignBackward", {"sums", "scratch"}}, {"RoiAlignSum", {"grad"}}};
    const std::string base = v.name.substr(8, v.name.find('<') - 8);  // behind "popdet::"
    return table.at(base).count(edge) != 0;
  };
  for (const auto& vertex : vertices)
    for (const auto& edge : vertex->edges)
      if (is_written(*vertex, edge.first))
        for (const Place& place : edge.second.places())
          if (!writer.emplace(place, vertex.get()).second)
            throw std::runtime_error(vertex->name + "." + edge.first + ": an element has two writers");
  for (const auto& vertex : vertices)
    for (const auto& edge : vertex->edges)
      for (const Place& place : edge.second.places()) {
        const auto found = writer.find(place);
        if (found != writer.end() && found->second != vertex.get())
          throw std::runtime_error(vertex->name + "." + edge.first + ": another vertex writes what this one reads");
      }
}

}  // namespace

void run_vertices(const Vertices& vertices) {
  static const std::map<std::string, simulator::Runner> table = simulator::all_vertices();
  check_conflicts(vertices);
  for (const auto& vertex : vertices) {
    const auto found = table.find(vertex->name);
    if (found == table.end()) throw std::runtime_error("there is no vertex " + vertex->name);
    if (vertex->tile < 0) throw std::runtime_error(vertex->name + " lies on no tile");
    if (vertex->cycles == 0) throw std::runtime_error(vertex->name + " has no estimate");
    for (const auto& edge : vertex->edges)
      for (const Place& place : edge.second.places())
        if (place.variable->tiles[place.at] < 0)
          throw std::runtime_error(vertex->name + "." + edge.first + " lies on no tile");
    found->second(*vertex);
  }
}

}  // namespace poplar

namespace {

std::string g_error;

template <typename Function>
int guarded(Function function) {
  try {
    function();
    return 0;
  } catch (const std::exception& error) {
    g_error = error.what();
    return 1;
  }
}

// One op from its name to its results.
struct Session {
  popart::OperatorIdentifier id{"", "", 0};
  popart::Attributes attributes;
  std::map<int, popart::TensorInfo> inputs;
  std::map<int, std::vector<unsigned char>> data;
  std::unique_ptr<popart::Op> op;
  std::unique_ptr<popart::popx::Devicex> device;
  std::string text;

  void make() {
    const auto found = popart::registered_ops().find(id);
    if (found == popart::registered_ops().end()) throw std::runtime_error("no such op: " + id.type);
    op = found->second.factory({id, {}, attributes});
    op->inputs = inputs;
    op->setup();
    op->setup();  // PopART may call it again
  }

  // Runs the program of the op on `tiles` tiles; features are laid out by the op if it asks to.
  void run(unsigned tiles, unsigned bytes) {
    device.reset(new popart::popx::Devicex(poplar::Target(tiles, bytes)));
    const auto opx = popart::popx::registered_opxs().at(op->opid)(op.get(), device.get());
    for (const auto& input : op->inputs) {
      const bool creates = opx->getInputCreatorType(input.first) == popart::popx::InputCreatorType::CanCreate;
      if (creates && !opx->mustExistBeforeCreate(input.first).empty()) throw std::runtime_error("cannot wait");
      device->inputs[input.first] = creates ? opx->createInput(input.first, {"input"}) : plain_input(input.second);
      write_input(input.first);
    }
    poplar::program::Sequence program;
    opx->grow(program);
    device->graph.check_mapping();
    program.run();
    for (const auto& output : op->outputs) check_output(output.first, output.second);
  }

  poplar::Tensor plain_input(const popart::TensorInfo& info) {
    const poplar::Sizes shape(info.shape().begin(), info.shape().end());
    return device->graph.addVariable(popart::popx::popType(info), shape, poplar::VariableMappingMethod::LINEAR);
  }

  void write_input(int at) {
    const poplar::Tensor& tensor = device->inputs[at];
    const std::size_t bytes = tensor.elementType().bytes();
    for (std::size_t i = 0; i < tensor.numElements(); ++i)
      std::memcpy(tensor.places()[i].data(), data.at(at).data() + i * bytes, bytes);
  }

  void check_output(int at, const popart::TensorInfo& info) {
    const poplar::Tensor& tensor = device->outputs.at(at);
    if (tensor.shape() != poplar::Sizes(info.shape().begin(), info.shape().end()) ||
        tensor.elementType() != popart::popx::popType(info))
      throw std::runtime_error("an output has not the shape or type that setup() said");
    for (const poplar::Place& place : tensor.places()) {
      if (place.variable->tiles[place.at] < 0) throw std::runtime_error("an output lies on no tile");
      for (const auto& input : device->inputs)
        if (input.second.numElements() && input.second.places()[0].variable == place.variable)
          throw std::runtime_error("an output is an alias of an input");
    }
  }
};

int put(const popart::TensorInfo& info, int64_t* out) {
  out[0] = static_cast<int64_t>(info.dataType());
  out[1] = info.rank();
  for (int i = 0; i < info.rank(); ++i) out[2 + i] = info.dim(i);
  return 0;
}

}  // namespace

// Data types are numbered 0 float, 1 half, 2 int32.
extern "C" {

const char* sim_error() { return g_error.c_str(); }

Session* sim_new(const char* domain, const char* type) {
  Session* session = new Session;
  session->id = popart::OperatorIdentifier(domain, type, 1);
  return session;
}

void sim_delete(Session* session) { delete session; }
void sim_int(Session* session, const char* name, int64_t value) { session->attributes.set(name, value); }
void sim_float(Session* session, const char* name, float value) { session->attributes.set(name, value); }

void sim_input(Session* session, int at, int type, int rank, const int64_t* shape, const unsigned char* data,
               int64_t bytes) {
  session->inputs[at] = popart::TensorInfo(static_cast<popart::DataType>(type), popart::Shape(shape, shape + rank));
  session->data[at].assign(data, data + bytes);
}

int sim_make(Session* session) {
  return guarded([&]() { session->make(); });
}

// Type, rank and dimensions of an output as setup() says, or, inferred, as the Builder is told.
int sim_output_info(Session* session, int at, int inferred, int64_t* out) {
  return guarded([&]() {
    if (!inferred) return put(session->op->outputs.at(at), out);
    popart::ShapeInferenceContext context(session->inputs, session->attributes);
    popart::registered_shapes().at(session->id)(context);
    return put(context.outputs.at(at), out);
  });
}

int sim_run(Session* session, int tiles, int bytes) {
  return guarded([&]() { session->run(tiles, bytes); });
}

void sim_output(Session* session, int at, unsigned char* out) {
  const poplar::Tensor& tensor = session->device->outputs.at(at);
  const std::size_t bytes = tensor.elementType().bytes();
  for (std::size_t i = 0; i < tensor.numElements(); ++i) std::memcpy(out + i * bytes, tensor.places()[i].data(), bytes);
}

// The most bytes that a compute set touches on a tile; the op's inputs count where they are sent.
int64_t sim_busiest_tile(Session* session) {
  std::set<const poplar::Variable*> inputs;
  for (const auto& input : session->device->inputs)
    for (const poplar::Place& place : input.second.places()) inputs.insert(place.variable);
  return static_cast<int64_t>(session->device->graph.busiest_tile(inputs));
}

int sim_codelet_files(Session* session) { return static_cast<int>(session->device->graph.codelets().size()); }
int sim_count_vertices(Session* session, const char* name) {
  return static_cast<int>(session->device->graph.count_vertices(name));
}

// Attributes of the definition, in order of their names.
const char* sim_definition(Session* session) {
  session->text.clear();
  for (const auto& entry : popart::registered_ops().at(session->id).definition.attributes) session->text += entry.first + " ";
  return session->text.c_str();
}

// What goes into the hash of the IR, or of the outliner; of a clone, which must not differ.
const char* sim_serialised(Session* session, int outline) {
  popart::OpSerialiserBase os;
  const std::unique_ptr<popart::Op> twin = session->op->clone();
  outline ? twin->appendOutlineAttributes(os) : twin->appendAttributes(os);
  session->text = os.text();
  return session->text.c_str();
}

// How many gradient ops there are.
int sim_count_gradients(Session* session) { return static_cast<int>(session->op->getGradOps().size()); }

// The gradient op, its inputs taken from `session` by gradInputInfo; `grad` is the gradient of output 0.
Session* sim_gradient(Session* session, const unsigned char* grad, int64_t bytes) {
  Session* result = new Session;
  result->op = std::move(session->op->getGradOps().at(0));
  result->id = result->op->opid;
  for (const popart::GradInOutMapper& input : result->op->gradInputInfo()) {
    const bool from_grad = input.type == popart::GradOpInType::GradOut;
    result->op->inputs[input.iGrad] = from_grad ? session->op->outputs.at(input.iNonGrad) : session->inputs.at(input.iNonGrad);
    result->data[input.iGrad] = from_grad ? std::vector<unsigned char>(grad, grad + bytes) : session->data.at(input.iNonGrad);
  }
  result->op->setup();
  return result;
}

// The input of the forward op that output `at` of a gradient op belongs to.
int sim_gradient_of(Session* session, int at) { return session->op->gradOutToNonGradIn().at(at); }
}
