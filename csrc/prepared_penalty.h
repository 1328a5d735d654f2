// The penalty over parameters that stay where they are from call to call. Included by bindings.cpp alone.
//
// PyTorch lets a parameter's memory be exchanged silently, so every call compares all parameters with what the table
// was made from, and reads where their gradients are now: in C++, at a tenth of a microsecond each.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "penalty.h"
#include "tensor_exchange.h"

namespace wplfast {

namespace py = pybind11;

// What parameters were when the table was made. It refers to no Python object, which the garbage collector could not
// see: every call is given the parameters.
class ParameterTable {
 public:
  ParameterTable(const py::capsule& exchange, const py::list& parameters)
      : api_(exchange.get_pointer<const ExchangeApi>()) {
    if (api_->major != ExchangeApi::MAJOR || api_->view == nullptr) {
      throw py::import_error("this version of the DLPack exchange API is not known");
    }
    for (py::handle parameter : parameters) {
      TensorView view;
      if (api_->view(parameter.ptr(), &view) != 0) throw py::error_already_set();
      views_.push_back(view);
      first_dim_.push_back(static_cast<int64_t>(dims_.size()));
      dims_.insert(dims_.end(), view.shape, view.shape + view.n_dims);
      dims_.insert(dims_.end(), view.strides, view.strides + view.n_dims);
    }
  }

  int64_t size() const { return static_cast<int64_t>(views_.size()); }
  uintptr_t address(int64_t index) const { return views_[index].address(); }

  // Tells whether every parameter has the address, device, type, shape and strides that it had, and every link, a
  // (dictionary, key, value), still holds.
  bool unchanged(const py::list& parameters, const py::list& links) const {
    check_size(parameters);
    for (py::handle link : links) {
      PyObject* const entries = link.ptr();  // a tuple
      if (PyDict_GetItem(PyTuple_GET_ITEM(entries, 0), PyTuple_GET_ITEM(entries, 1)) != PyTuple_GET_ITEM(entries, 2)) {
        return false;
      }
    }
    for (int64_t p = 0; p < size(); ++p) {
      TensorView view;
      if (!read(PyList_GET_ITEM(parameters.ptr(), p), view)) return false;
      if (view.address() != address(p) || !same_kind(view, p) ||
          !std::equal(view.strides, view.strides + view.n_dims, strides(p))) {
        return false;
      }
    }
    return true;
  }

  // Reads the gradients' addresses (null for a parameter that requires none) and returns the gradients; returns None
  // where one is missing, or is not laid out as its parameter is.
  py::object gradients(const py::list& parameters, std::vector<void*>& addresses) const {
    check_size(parameters);
    static PyObject* const grad_name = PyUnicode_InternFromString("grad");
    static PyObject* const requires_grad_name = PyUnicode_InternFromString("requires_grad");
    addresses.assign(size(), nullptr);
    py::list found;
    for (int64_t p = 0; p < size(); ++p) {
      PyObject* const parameter = PyList_GET_ITEM(parameters.ptr(), p);
      const auto required = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter, requires_grad_name));
      if (!required) throw py::error_already_set();
      if (required.ptr() != Py_True) continue;
      const auto gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter, grad_name));
      if (!gradient) throw py::error_already_set();
      TensorView view;
      if (gradient.is_none() || !read(gradient.ptr(), view) || !same_kind(view, p) || !same_order(view, p) ||
          (view.address() == 0 && address(p) != 0)) {
        return py::none();
      }
      addresses[p] = reinterpret_cast<void*>(view.address());
      found.append(gradient);
    }
    if (overlap(addresses)) return py::none();
    return found;
  }

 private:
  void check_size(const py::list& parameters) const {
    if (static_cast<int64_t>(parameters.size()) != size())
      throw py::value_error("these are not the table's parameters");
  }

  // A tensor that cannot be viewed (sparse, or without memory) is one that changed; the caller's slow path says how.
  bool read(PyObject* tensor, TensorView& view) const {
    if (api_->view(tensor, &view) == 0) return true;
    PyErr_Clear();
    return false;
  }

  // Tells whether two runs of memory as long as the parameters overlap.
  bool overlap(const std::vector<void*>& addresses) const {
    std::vector<std::pair<uintptr_t, uintptr_t>> runs;
    for (int64_t p = 0; p < size(); ++p) {
      int64_t bytes = views_[p].dtype.bits / 8;
      for (int32_t dim = 0; dim < views_[p].n_dims; ++dim) bytes *= shape(p)[dim];
      const uintptr_t begin = reinterpret_cast<uintptr_t>(addresses[p]);
      if (begin != 0 && bytes > 0) runs.emplace_back(begin, begin + static_cast<uintptr_t>(bytes));
    }
    std::sort(runs.begin(), runs.end());
    for (size_t run = 1; run < runs.size(); ++run) {
      if (runs[run].first < runs[run - 1].second) return true;
    }
    return false;
  }

  const int64_t* shape(int64_t index) const { return dims_.data() + first_dim_[index]; }
  const int64_t* strides(int64_t index) const { return shape(index) + views_[index].n_dims; }

  bool same_kind(const TensorView& view, int64_t index) const {
    const TensorView& known = views_[index];
    return view.n_dims == known.n_dims && view.device.type == known.device.type && view.device.id == known.device.id &&
           view.dtype.code == known.dtype.code && view.dtype.bits == known.dtype.bits &&
           std::equal(view.shape, view.shape + view.n_dims, shape(index));
  }

  bool same_order(const TensorView& view, int64_t index) const {
    for (int32_t dim = 0; dim < view.n_dims; ++dim) {
      if (view.shape[dim] > 1 && view.strides[dim] != strides(index)[dim]) return false;
    }
    return true;
  }

  const ExchangeApi* api_;
  std::vector<TensorView> views_;  // their pointers to shapes and strides are not used: they may dangle
  std::vector<int64_t> first_dim_, dims_;
};

// The arguments of `penalty` for one table of parameters. Whoever calls it keeps all tensors alive meanwhile. Calls may
// bring addresses of an alpha for all parameters and an l2; 0 stands for those that it was made with.
class PreparedPenalty {
 public:
  PreparedPenalty(const ParameterTable& parameters, int dtype, int fisher_dtype, const std::vector<int64_t>& numels,
                  const std::vector<uintptr_t>& theta_hat, const std::vector<uintptr_t>& offset,
                  const std::vector<uintptr_t>& fisher, uintptr_t alpha, bool alpha_per_parameter, uintptr_t constant,
                  uintptr_t l2, int64_t padding)
      : parameters_(parameters),
        alpha_(reinterpret_cast<const double*>(alpha)),
        constant_(reinterpret_cast<const double*>(constant)),
        l2_(reinterpret_cast<const double*>(l2)),
        alpha_per_parameter_(alpha_per_parameter) {
    const size_t n = parameters.size();
    if (numels.size() != n || theta_hat.size() != n || fisher.size() != n || (offset.size() != n && !offset.empty())) {
      throw py::value_error("there must be as many sizes and addresses as parameters");
    }
    for (size_t p = 0; p < n; ++p) {
      anchors_.push_back({reinterpret_cast<void*>(parameters.address(p)), reinterpret_cast<void*>(theta_hat[p]),
                          offset.empty() ? nullptr : reinterpret_cast<void*>(offset[p]),
                          reinterpret_cast<void*>(fisher[p]), nullptr, numels[p], 0.0});
    }
    call_.n_anchors = static_cast<int64_t>(n);
    call_.dtype = static_cast<Dtype>(dtype);
    call_.fisher_dtype = static_cast<Dtype>(fisher_dtype);
    call_.padding = padding;
  }

  void value(uintptr_t value, int threads, uintptr_t alpha, uintptr_t l2) {
    evaluate(PenaltyMode::value, anchors_, 1.0, value, threads, alpha, l2);
  }

  // Stores the gradients one behind the other from `packed` on.
  void store(uintptr_t packed, uintptr_t value, int threads, uintptr_t alpha, uintptr_t l2) {
    std::vector<Anchor> anchors = anchors_;
    for (Anchor& anchor : anchors) {
      anchor.grad = reinterpret_cast<void*>(packed);
      packed += (anchor.numel + call_.padding - 1) / call_.padding * call_.padding * size_of(call_.dtype);
    }
    evaluate(PenaltyMode::store, anchors, 1.0, value, threads, alpha, l2);
  }

  // Adds to the parameters' gradients and returns them; returns None, having done nothing, where one needs more care.
  py::object add(const py::list& parameters, uintptr_t scale, uintptr_t value, int threads) {
    std::vector<void*> addresses;
    py::object gradients = parameters_.gradients(parameters, addresses);
    if (gradients.is_none()) return gradients;
    std::vector<Anchor> anchors = anchors_;
    for (size_t p = 0; p < anchors.size(); ++p) anchors[p].grad = addresses[p];
    evaluate(PenaltyMode::add, anchors, *reinterpret_cast<const double*>(scale), value, threads, 0, 0);
    return gradients;
  }

 private:
  void evaluate(PenaltyMode mode, std::vector<Anchor> anchors, double scale, uintptr_t value, int threads,
                uintptr_t given_alpha, uintptr_t given_l2) const {
    const double* const alpha = given_alpha != 0 ? reinterpret_cast<const double*>(given_alpha) : alpha_;
    const double* const l2 = given_l2 != 0 ? reinterpret_cast<const double*>(given_l2) : l2_;
    const bool per_parameter = given_alpha == 0 && alpha_per_parameter_;
    if (alpha == nullptr || l2 == nullptr) throw py::value_error("neither made with an alpha and an l2 nor given them");
    double constant = 0;
    for (size_t p = 0; p < anchors.size(); ++p) anchors[p].alpha = alpha[per_parameter ? p : 0];
    if (constant_ != nullptr) {
      for (size_t p = 0; p < (per_parameter ? anchors.size() : 1); ++p) constant += alpha[p] * constant_[p];
    }
    PenaltyCall call = call_;
    call.anchors = anchors.data();
    call.mode = mode;
    call.l2 = *l2;
    call.scale = scale;
    call.threads = threads;
    double sum;
    {
      py::gil_scoped_release release;
      sum = penalty(call) + 0.5 * constant;
    }
    if (call.dtype == Dtype::f64) {
      *reinterpret_cast<double*>(value) = sum;
    } else {
      *reinterpret_cast<float*>(value) = static_cast<float>(sum);
    }
  }

  ParameterTable parameters_;
  std::vector<Anchor> anchors_;
  PenaltyCall call_{};
  const double* alpha_;     // one, or one a parameter; null if every call brings its own, as l2
  const double* constant_;  // likewise; null means zero
  const double* l2_;
  bool alpha_per_parameter_;
};

}  // namespace wplfast
