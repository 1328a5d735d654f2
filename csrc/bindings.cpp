// The Python module wplfast._C: addresses and sizes in, nothing of torch. wplfast/backends/cpp/ is its only caller
// and has checked every argument through the op contract; tensors must stay alive during a call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "consolidate.h"
#include "fisher_conv.h"
#include "fisher_embedding.h"
#include "fisher_linear.h"
#include "isa.h"
#include "launch_table.h"
#include "parallel.h"
#include "penalty.h"
#include "prepared_penalty.h"
#include "scale_grads.h"
#include "squares.h"
#include "turn.h"

namespace py = pybind11;

namespace wplfast {
namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Reads integers of a list without pybind11's per-element casters, which cost more than a small tensor's arithmetic.
struct Integers {
  PyObject* list;

  explicit Integers(const py::list& integers) : list(integers.ptr()) {}
  int64_t size() const { return PyList_GET_SIZE(list); }
  uint64_t operator[](int64_t index) const {
    const uint64_t value = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(list, index));
    if (value == static_cast<uint64_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  void* pointer_at(int64_t index) const { return pointer(static_cast<uintptr_t>((*this)[index])); }
};

void check_lengths(int64_t expected, const Integers& list, const char* what, bool may_be_empty) {
  if (list.size() != expected && !(may_be_empty && list.size() == 0)) {
    throw py::value_error(std::string(what) + " must have " + std::to_string(expected) + " entries, got " +
                          std::to_string(list.size()));
  }
}

void penalty_binding(int mode, int dtype, int fisher_dtype, const py::list& numels, const py::list& theta,
                     const py::list& theta_hat, const py::list& offset, const py::list& fisher, const py::list& grad,
                     uintptr_t alpha, bool alpha_per_parameter, uintptr_t l2, uintptr_t scale, int64_t padding,
                     uintptr_t value, int threads) {
  const Integers sizes(numels), thetas(theta), hats(theta_hat), offsets(offset), fishers(fisher), grads(grad);
  const int64_t n = sizes.size();
  check_lengths(n, thetas, "theta", false);
  check_lengths(n, hats, "theta_hat", false);
  check_lengths(n, offsets, "offset", true);
  check_lengths(n, fishers, "fisher", false);
  check_lengths(n, grads, "grad", mode == static_cast<int>(PenaltyMode::value));
  const double* alphas = static_cast<const double*>(pointer(alpha));
  std::vector<Anchor> anchors(n);
  for (int64_t p = 0; p < n; ++p) {
    anchors[p] = {thetas.pointer_at(p),
                  hats.pointer_at(p),
                  offsets.size() > 0 ? offsets.pointer_at(p) : nullptr,
                  fishers.pointer_at(p),
                  grads.size() > 0 ? grads.pointer_at(p) : nullptr,
                  static_cast<int64_t>(sizes[p]),
                  alphas[alpha_per_parameter ? p : 0]};
    const Anchor& a = anchors[p];
    if (a.numel > 0 && !(a.theta && a.theta_hat && a.fisher)) {
      throw py::value_error("theta, theta_hat or fisher " + std::to_string(p) +
                            " has no memory: its storage was freed");
    }
  }
  PenaltyCall call{anchors.data(),
                   n,
                   static_cast<Dtype>(dtype),
                   static_cast<Dtype>(fisher_dtype),
                   static_cast<PenaltyMode>(mode),
                   *static_cast<const double*>(pointer(l2)),
                   scale == 0 ? 1.0 : *static_cast<const double*>(pointer(scale)),
                   padding,
                   threads};
  double sum;
  {
    py::gil_scoped_release release;
    sum = penalty(call);
  }
  if (call.dtype == Dtype::f64) {
    *static_cast<double*>(pointer(value)) = sum;
  } else {
    *static_cast<float*>(pointer(value)) = static_cast<float>(sum);
  }
}

// Changes the anchors where `measured`, an address of 2 n doubles, is 0; otherwise writes there what it would come to.
// `dtypes` has theta_hat's, F's and the newer F's of every parameter; `factors`, an address of n doubles, scales both
// F.
void consolidate_binding(bool merge, double decay, double weight, const py::list& numels, const py::list& dtypes,
                         const py::list& theta_hat, const py::list& offset, const py::list& fisher,
                         const py::list& new_theta_hat, const py::list& new_fisher, uintptr_t factors,
                         uintptr_t measured, int threads) {
  const Integers sizes(numels), types(dtypes), hats(theta_hat), offsets(offset), fishers(fisher);
  const Integers new_hats(new_theta_hat), new_fishers(new_fisher);
  const int64_t n = sizes.size();
  check_lengths(3 * n, types, "dtypes", false);
  check_lengths(n, hats, "theta_hat", false);
  check_lengths(n, offsets, "offset", !merge);
  check_lengths(n, fishers, "fisher", false);
  check_lengths(n, new_hats, "new_theta_hat", false);
  check_lengths(n, new_fishers, "new_fisher", false);
  std::vector<AnchorUpdate> updates(n);
  for (int64_t p = 0; p < n; ++p) {
    const double factor = factors == 0 ? 1.0 : static_cast<const double*>(pointer(factors))[p];
    updates[p] = {hats.pointer_at(p),
                  offsets.size() > 0 ? offsets.pointer_at(p) : nullptr,
                  fishers.pointer_at(p),
                  new_hats.pointer_at(p),
                  new_fishers.pointer_at(p),
                  static_cast<int64_t>(sizes[p]),
                  static_cast<Dtype>(types[3 * p]),
                  static_cast<Dtype>(types[3 * p + 1]),
                  static_cast<Dtype>(types[3 * p + 2]),
                  factor * decay,
                  factor * weight};
    const AnchorUpdate& u = updates[p];
    if (u.numel > 0 && !(u.theta_hat && u.fisher && u.new_theta_hat && u.new_fisher)) {
      throw py::value_error("tensor " + std::to_string(p) + " has no memory: its storage was freed, or is elsewhere");
    }
  }
  const ConsolidateCall call{updates.data(), n, merge, threads};
  py::gil_scoped_release release;
  if (measured == 0) {
    consolidate(call);
  } else {
    double* const sums = static_cast<double*>(pointer(measured));
    measure_consolidation(call, sums, sums + n);
  }
}

// (gradients, their addresses as bytes of int64), or None
py::object gradients_binding(const ParameterTable& table, const py::list& parameters) {
  std::vector<void*> addresses;
  const py::object gradients = table.gradients(parameters, addresses);
  if (gradients.is_none()) return gradients;
  return py::make_tuple(gradients,
                        py::bytes(reinterpret_cast<const char*>(addresses.data()), addresses.size() * sizeof(void*)));
}

// (address, size of the last dimension, stride of n, stride of t)
SampleMatrix sample_matrix(const py::tuple& matrix) {
  return {pointer(matrix[0].cast<uintptr_t>()), matrix[1].cast<int64_t>(), matrix[2].cast<int64_t>(),
          matrix[3].cast<int64_t>()};
}

void fisher_linear_binding(int dtype, uintptr_t fisher, uintptr_t gradient, const py::tuple& grad_outputs,
                           const py::tuple& activations, uintptr_t weights, int64_t n_samples, int64_t n_steps,
                           int threads) {
  const FisherLinearCall call{pointer(fisher),
                              pointer(gradient),
                              sample_matrix(grad_outputs),
                              sample_matrix(activations),
                              static_cast<const double*>(pointer(weights)),
                              n_samples,
                              n_steps,
                              static_cast<Dtype>(dtype),
                              threads};
  py::gil_scoped_release release;
  fisher_linear(call);
}

// (S, L, K, stride, padding, dilation), each with one to three integers; `absent` stands for missing leading ones.
void read_spatial(const py::tuple& geometry, int which, int64_t absent, int64_t (&to)[3]) {
  const py::sequence values = geometry[which].cast<py::sequence>();
  const int n_spatial = static_cast<int>(values.size());
  for (int dim = 0; dim < 3; ++dim) {
    to[dim] = dim < 3 - n_spatial ? absent : values[dim - (3 - n_spatial)].cast<int64_t>();
  }
}

void fisher_conv_binding(int dtype, uintptr_t fisher, uintptr_t gradient, uintptr_t inputs, uintptr_t grad_outputs,
                         bool channels_first, uintptr_t weights, int64_t n_samples, int64_t n_images, int64_t c_in,
                         int64_t c_out, int64_t groups, const py::tuple& geometry, int threads) {
  FisherConvCall call{};
  call.fisher = pointer(fisher);
  call.gradient = pointer(gradient);
  call.inputs = pointer(inputs);
  call.grad_outputs = pointer(grad_outputs);
  call.channels_first = channels_first;
  call.weights = static_cast<const double*>(pointer(weights));
  call.n_samples = n_samples;
  call.n_images = n_images;
  call.c_in = c_in;
  call.c_out = c_out;
  call.groups = groups;
  read_spatial(geometry, 0, 1, call.size);
  read_spatial(geometry, 1, 1, call.positions);
  read_spatial(geometry, 2, 1, call.kernel);
  read_spatial(geometry, 3, 1, call.stride);
  read_spatial(geometry, 4, 0, call.padding);
  read_spatial(geometry, 5, 1, call.dilation);
  call.dtype = static_cast<Dtype>(dtype);
  call.threads = threads;
  py::gil_scoped_release release;
  fisher_conv(call);
}

void fisher_embedding_binding(int dtype, uintptr_t fisher, uintptr_t gradient, uintptr_t indices,
                              uintptr_t grad_outputs, uintptr_t weights, int64_t n_samples, int64_t n_steps,
                              int64_t n_rows, int64_t size, int threads) {
  const FisherEmbeddingCall call{pointer(fisher),
                                 pointer(gradient),
                                 static_cast<const int64_t*>(pointer(indices)),
                                 pointer(grad_outputs),
                                 static_cast<const double*>(pointer(weights)),
                                 n_samples,
                                 n_steps,
                                 n_rows,
                                 size,
                                 static_cast<Dtype>(dtype),
                                 threads};
  py::gil_scoped_release release;
  fisher_embedding(call);
}

// (address, stride of n, stride of t, stride of d)
Strided strided(const py::tuple& tensor) {
  return {pointer(tensor[0].cast<uintptr_t>()), tensor[1].cast<int64_t>(), tensor[2].cast<int64_t>(),
          tensor[3].cast<int64_t>()};
}

void scale_grads_binding(int dtype, uintptr_t grads, const py::tuple& activations, const py::tuple& grad_outputs,
                         int64_t n_samples, int64_t n_steps, int64_t size, bool steps_are_contiguous, int threads) {
  const ScaleGradsCall call{pointer(grads), strided(activations), strided(grad_outputs),     n_samples, n_steps,
                            size,           steps_are_contiguous, static_cast<Dtype>(dtype), threads};
  py::gil_scoped_release release;
  scale_grads(call);
}

void turn_binding(uintptr_t from, uintptr_t to, int64_t n_matrices, int64_t n_rows, int64_t n_columns,
                  int64_t element_bytes, int threads) {
  const TurnCall call{pointer(from), pointer(to), n_matrices, n_rows, n_columns, element_bytes, threads};
  py::gil_scoped_release release;
  turn(call);
}

void accumulate_squares_binding(int dtype, uintptr_t fisher, uintptr_t grads, uintptr_t weights, int64_t n_samples,
                                int64_t numel, int threads) {
  const SquaresCall call{pointer(fisher), pointer(grads), static_cast<const double*>(pointer(weights)),
                         n_samples,       numel,          static_cast<Dtype>(dtype),
                         threads};
  py::gil_scoped_release release;
  accumulate_squares(call);
}

}  // namespace
}  // namespace wplfast

PYBIND11_MODULE(_C, m) {
  using namespace wplfast;
  m.doc() = "CPU kernels of wplfast over raw addresses; see wplfast/backends/cpp/.";
  m.def("penalty", &penalty_binding, "Value of the penalty, optionally storing or adding its gradient.");
  m.def("consolidate", &consolidate_binding, "A newer anchor enters the anchors, or what it would come to.");
  py::class_<ParameterTable>(m, "ParameterTable", py::module_local(),
                             "What parameters were when a table of them was made.")
      .def(py::init<const py::capsule&, const py::list&>())
      .def("unchanged", &ParameterTable::unchanged, "Whether all are what and where they were.")
      .def("gradients", &gradients_binding, "Their gradients and the addresses of these, or None.");
  py::class_<PreparedPenalty>(m, "PreparedPenalty", py::module_local(),
                              "The penalty over parameters that stay where they are.")
      .def(py::init<const ParameterTable&, int, int, const std::vector<int64_t>&, const std::vector<uintptr_t>&,
                    const std::vector<uintptr_t>&, const std::vector<uintptr_t>&, uintptr_t, bool, uintptr_t, uintptr_t,
                    int64_t>())
      .def("value", &PreparedPenalty::value, py::arg(), py::arg(), py::arg() = 0, py::arg() = 0, "Writes the value.")
      .def("store", &PreparedPenalty::store, py::arg(), py::arg(), py::arg(), py::arg() = 0, py::arg() = 0,
           "Writes the value and the packed gradient.")
      .def("add", &PreparedPenalty::add, "Writes the value and adds the gradient to .grad.");
  m.def("fisher_linear", &fisher_linear_binding, "Fisher diagonal of a linear layer.");
  m.def("fisher_conv", &fisher_conv_binding, "Fisher diagonal of a convolution's weight.");
  m.def("fisher_embedding", &fisher_embedding_binding, "Fisher diagonal of a table that rows are taken from.");
  m.def("scale_grads", &scale_grads_binding, "Per-sample gradients of an elementwise scale.");
  m.def("turn", &turn_binding, "Transpose matrices in memory.");
  m.def("accumulate_squares", &accumulate_squares_binding, "Weighted sum of squared per-sample gradients.");
  py::class_<TensorReader>(m, "TensorReader", py::module_local(), "Reads tensors' addresses and types.")
      .def(py::init<const py::type&, const py::dict&, const py::object&>());
  py::class_<LoadedKernel>(m, "LoadedKernel", py::module_local(), "A precompiled kernel on one device.")
      .def(py::init<const TensorReader&, const py::object&, int, const py::bytes&, const std::string&, uint32_t,
                    uint32_t, std::string>(),
           py::keep_alive<1, 2>())
      .def("launch", py::overload_cast<const py::tuple&, const py::tuple&>(&LoadedKernel::launch, py::const_),
           "Launches it; the arguments must be like those it was compiled for.");
  py::class_<LaunchTable>(m, "LaunchTable", py::module_local(), "Loaded kernels by what their arguments are like.")
      .def(py::init<const TensorReader&, const py::sequence&, const std::vector<int>&, const py::sequence&,
                    const py::dict&>(),
           py::keep_alive<1, 2>())
      .def("add", &LaunchTable::add, "Adds a loaded kernel.")
      .def("key", &LaunchTable::key, "What arguments are like, or None.")
      .def("launch", &LaunchTable::launch, "Launches and returns a loaded kernel; otherwise returns the key, or None.");
  m.def("isa", [] { return isa_name(selected_isa()); }, "Instruction set in use: avx512, avx2 or portable.");
  m.def("max_threads", &max_threads, "Most threads OpenMP would use; 1 in a serial build.");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.attr("compiler") =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "g++ " __VERSION__;
#endif
}
