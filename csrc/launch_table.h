// Launches of precompiled Triton kernels: finds the one that was compiled for arguments like these, and launches it.
// Included by bindings.cpp alone.
//
// Triton compiles a kernel anew for every kind of arguments. What it distinguishes is written down as text, one part
// for each parameter: `*bf16D` is a pointer to bfloat16 on a 16-byte boundary, `i32D` a number that 16 divides, `=64` a
// constant, as are 1 and None where an address or a number may be specialised on. The build derives the same text from
// what Triton has compiled and compares (wplfast/backends/triton/packs/precompile.py), so that neither can drift.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "tensor_exchange.h"

namespace wplfast {

namespace py = pybind11;

// A tensor's address and its element type as Triton calls it.
struct TensorArgument {
  uintptr_t address;
  const char* type;
};

// Reads tensors: through the exchange API where there is one, otherwise as Triton does, by attributes.
class TensorReader {
 public:
  // `types` has Triton's name of every dtype object; `exchange` is a capsule of the tensors' class, or None.
  TensorReader(const py::type& tensors, const py::dict& types, const py::object& exchange)
      : tensors_(tensors), types_(types) {
    if (!exchange.is_none()) api_ = py::capsule(exchange).get_pointer<const ExchangeApi>();
  }

  uintptr_t address(PyObject* tensor) const {
    TensorView view;
    return exported(tensor, view) ? view.address() : attribute_address(tensor);
  }

  // Returns false for what is no tensor of a type that has a name.
  bool read(PyObject* object, TensorArgument& to) const {
    TensorView view;
    if (exported(object, view)) {
      to = {view.address(), name(view)};
      return to.type != nullptr;
    }
    static PyObject* const dtype_name = PyUnicode_InternFromString("dtype");
    const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, dtype_name));
    if (!dtype) {
      PyErr_Clear();
      return false;
    }
    PyObject* const type = PyDict_GetItem(types_.ptr(), dtype.ptr());
    if (type == nullptr) return false;
    to = {attribute_address(object), PyUnicode_AsUTF8(type)};
    return true;
  }

 private:
  bool exported(PyObject* tensor, TensorView& view) const {
    if (api_ == nullptr || !PyObject_TypeCheck(tensor, reinterpret_cast<PyTypeObject*>(tensors_.ptr()))) return false;
    if (api_->view(tensor, &view) == 0) return true;
    PyErr_Clear();
    return false;
  }

  static uintptr_t attribute_address(PyObject* tensor) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, data_ptr));
    if (!address) throw py::error_already_set();
    const uintptr_t value = PyLong_AsUnsignedLongLong(address.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  static const char* name(const TensorView& view) {
    enum Code : uint8_t { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4 };
    if (view.dtype.lanes != 1) return nullptr;
    const int bits = view.dtype.bits;
    switch (view.dtype.code) {
      case INT:
        return bits == 64 ? "i64" : bits == 32 ? "i32" : bits == 16 ? "i16" : bits == 8 ? "i8" : nullptr;
      case UINT:
        return bits == 64 ? "u64" : bits == 32 ? "u32" : bits == 16 ? "u16" : bits == 8 ? "u8" : nullptr;
      case FLOAT:
        return bits == 64 ? "fp64" : bits == 32 ? "fp32" : bits == 16 ? "fp16" : nullptr;
      case BFLOAT:
        return bits == 16 ? "bf16" : nullptr;
      default:
        return nullptr;
    }
  }

  py::type tensors_;
  py::dict types_;
  const ExchangeApi* api_ = nullptr;
};

// Arguments of a call by their place in the signature, and the options beside them.
class Arguments {
 public:
  Arguments(const std::vector<py::str>& names, const py::tuple& args, const py::dict& options)
      : args_(args.ptr()), options_(options.ptr()), n_args_(PyTuple_GET_SIZE(args.ptr())) {
    values_.reserve(names.size());
    for (size_t i = 0; i < names.size(); ++i) {
      PyObject* const value = i < n_args_ ? PyTuple_GET_ITEM(args_, i) : PyDict_GetItem(options_, names[i].ptr());
      if (value == nullptr) return;
      taken_ += i >= n_args_;
      values_.push_back(value);
    }
    complete_ = n_args_ <= names.size();
  }

  bool complete() const { return complete_; }
  // Whether nothing but parameters and `n` options were given.
  bool nothing_but(size_t n) const { return taken_ + n == static_cast<size_t>(PyDict_GET_SIZE(options_)); }
  PyObject* option(const py::str& name) const { return PyDict_GetItem(options_, name.ptr()); }
  const std::vector<PyObject*>& values() const { return values_; }

 private:
  PyObject *args_, *options_;
  size_t n_args_, taken_ = 0;
  bool complete_ = false;
  std::vector<PyObject*> values_;
};

// A kernel on one device, and which of its parameters it takes at run time.
class LoadedKernel {
 public:
  // `kinds` has a character for each parameter: `p` an address, `i` and `l` a number of 32 or 64 bits, `-` nothing.
  // `current_stream` is a function that returns the stream to launch in for the number of the device.
  LoadedKernel(const TensorReader& reader, const py::object& current_stream, int device, const py::bytes& image,
               const std::string& name, uint32_t warps, uint32_t shared, std::string kinds)
      : reader_(reader),
        current_stream_(current_stream),
        number_(device),
        device_(device),
        threads_(32 * warps),
        shared_(shared),
        kinds_(std::move(kinds)) {
    char* bytes = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(image.ptr(), &bytes, &size) != 0) throw py::error_already_set();
    py::gil_scoped_release release;
    function_ = cuda::load(device_, bytes, name.c_str(), threads_, shared_);
  }

  void launch(const py::tuple& grid, const py::tuple& args) const {
    if (PyTuple_GET_SIZE(args.ptr()) != static_cast<Py_ssize_t>(kinds_.size())) {
      throw py::type_error("the kernel takes " + std::to_string(kinds_.size()) + " arguments, got " +
                           std::to_string(args.size()));
    }
    launch(grid, &PyTuple_GET_ITEM(args.ptr(), 0));
  }

  void launch(const py::tuple& grid, PyObject* const* values) const {
    constexpr size_t MOST = 64;
    uint64_t storage[MOST];
    void* parameters[MOST];
    size_t n = 0;
    if (kinds_.size() + 2 > MOST) throw py::value_error("a kernel has too many parameters");
    for (size_t i = 0; i < kinds_.size(); ++i) {
      if (kinds_[i] == '-') continue;
      parameters[n] = &storage[n];
      storage[n++] = kinds_[i] == 'p' ? reader_.address(values[i]) : number(values[i], kinds_[i]);
    }
    for (int scratch = 0; scratch < 2; ++scratch) {  // Triton's global and profiling memory; no kernel here has any
      parameters[n] = &storage[n];
      storage[n++] = 0;
    }
    const cuda::Grid size{extent(grid, 0), extent(grid, 1), extent(grid, 2)};
    const auto stream = py::reinterpret_steal<py::object>(PyObject_CallOneArg(current_stream_.ptr(), number_.ptr()));
    if (!stream) throw py::error_already_set();
    const uintptr_t handle = PyLong_AsUnsignedLongLong(stream.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    py::gil_scoped_release release;  // a launch waits where the queue is full
    cuda::launch(device_, function_, size, threads_, shared_, handle, parameters);
  }

 private:
  static uint64_t number(PyObject* value, char kind) {
    const long long wide = PyLong_AsLongLong(value);
    if (wide == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (kind == 'i' && wide != static_cast<int32_t>(wide)) {
      throw py::value_error("a kernel compiled for 32-bit sizes was given " + std::to_string(wide));
    }
    return static_cast<uint64_t>(wide);  // the driver reads the low bytes
  }

  static uint32_t extent(const py::tuple& grid, Py_ssize_t axis) {
    if (axis >= PyTuple_GET_SIZE(grid.ptr())) return 1;
    const unsigned long value = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(grid.ptr(), axis));
    if (PyErr_Occurred()) throw py::error_already_set();
    if (value > INT32_MAX) throw py::value_error("a grid of " + std::to_string(value) + " programs is too large");
    return static_cast<uint32_t>(value);
  }

  const TensorReader& reader_;
  py::object current_stream_;
  py::int_ number_;
  int device_;
  uint32_t threads_, shared_;
  std::string kinds_;
  void* function_;
};

// The loaded kernels of one Triton function on one device, by what their arguments are like.
class LaunchTable {
 public:
  enum Flag { CONSTANT = 1, SPECIALISED = 2, ALIGNED = 4 };

  // `flags` has a combination of flags for each parameter; `option_names` are the compiler's options that are known.
  LaunchTable(const TensorReader& reader, const py::sequence& names, const std::vector<int>& flags,
              const py::sequence& option_names, const py::dict& constants)
      : reader_(reader), flags_(flags), constants_(constants) {
    for (py::handle name : names) names_.push_back(interned(name));
    for (py::handle name : option_names) option_names_.push_back(interned(name));
    if (names_.size() != flags_.size()) throw py::value_error("there must be as many flags as names");
  }

  void add(const std::string& key, py::object kernel) {
    const auto& loaded = kernel.cast<const LoadedKernel&>();
    kernels_[key] = {std::move(kernel), &loaded};
  }

  // What arguments are like, or None if only Triton can tell.
  py::object key(const py::tuple& args, const py::dict& options) const {
    const Arguments arguments(names_, args, options);
    std::string text;
    if (!describe(arguments, text)) return py::none();
    return py::str(text);
  }

  // Launches and returns the kernel; returns the key where it is not loaded, or None where there is no key.
  py::object launch(const py::tuple& grid, const py::tuple& args, const py::dict& options) const {
    const Arguments arguments(names_, args, options);
    std::string text;
    if (!describe(arguments, text)) return py::none();
    const auto found = kernels_.find(text);
    if (found == kernels_.end()) return py::str(text);
    const auto [kernel, loaded] = found->second;
    loaded->launch(grid, arguments.values().data());
    return kernel;
  }

 private:
  static py::str interned(py::handle name) {
    PyObject* text = py::cast<py::str>(name).release().ptr();
    PyUnicode_InternInPlace(&text);
    return py::reinterpret_steal<py::str>(text);
  }

  bool describe(const Arguments& arguments, std::string& text) const {
    if (!arguments.complete()) return false;
    text.reserve(256);
    for (size_t i = 0; i < flags_.size(); ++i) {
      PyObject* const value = arguments.values()[i];
      if (!((flags_[i] & CONSTANT) != 0 ? constant(value, text) : argument(value, flags_[i], text))) return false;
      text += ',';
    }
    size_t n = 0;
    for (const py::str& name : option_names_) {
      text += '/';
      PyObject* const value = arguments.option(name);
      if (value == nullptr) continue;
      ++n;
      if (!constant(value, text)) return false;
    }
    return arguments.nothing_but(n);
  }

  bool argument(PyObject* value, int flags, std::string& text) const {
    const bool specialised = (flags & SPECIALISED) != 0, aligned = specialised && (flags & ALIGNED) != 0;
    if (value == Py_None) return constant(value, text);
    if (PyLong_CheckExact(value)) {
      int overflow = 0;
      const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
      if (overflow != 0) return false;
      if (specialised && number == 1) return constant(value, text);
      text += number == static_cast<int32_t>(number) ? "i32" : "i64";
      if (aligned && number % 16 == 0) text += 'D';
      return true;
    }
    if (PyLong_Check(value) || PyFloat_Check(value)) return false;  // bool and numbers of other libraries
    TensorArgument tensor;
    if (!reader_.read(value, tensor)) return false;
    text += '*';
    text += tensor.type;
    if (aligned && tensor.address % 16 == 0) text += 'D';
    return true;
  }

  bool constant(PyObject* value, std::string& text) const {
    text += '=';
    if (value == Py_None) return text += "None", true;
    if (value == Py_True) return text += "True", true;
    if (value == Py_False) return text += "False", true;
    if (PyLong_CheckExact(value)) {
      int overflow = 0;
      const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
      return text += std::to_string(number), overflow == 0;
    }
    if (PyUnicode_CheckExact(value)) {
      const char* const characters = PyUnicode_AsUTF8(value);
      if (characters == nullptr || std::strpbrk(characters, ",'/=") != nullptr) return PyErr_Clear(), false;
      return text += '\'', text += characters, text += '\'', true;
    }
    for (const auto& [known, name] : constants_) {  // Triton's types; there are few
      if (known.ptr() == value) return text += PyUnicode_AsUTF8(name.ptr()), true;
    }
    return false;
  }

  struct Entry {
    py::object kernel;
    const LoadedKernel* loaded;
  };

  const TensorReader& reader_;
  std::vector<py::str> names_, option_names_;
  std::vector<int> flags_;
  py::dict constants_;
  std::unordered_map<std::string, Entry> kernels_;
};

}  // namespace wplfast
