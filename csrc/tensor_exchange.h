// Reads tensors' addresses, types and shapes through DLPack's C exchange API, without a header of the framework.
//
// A framework publishes the table of functions as type(tensor).__dlpack_c_exchange_api__, a capsule that lives as long
// as the process. The structures below repeat the part of dlpack.h (version 1) that is used here; their layout cannot
// change within a major version. https://github.com/dmlc/dlpack/blob/v1.3/include/dlpack/dlpack.h
#pragma once

#include <cstdint>

namespace wplfast {

struct TensorView {  // DLTensor
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t n_dims;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  const int64_t* shape;    // owned by the tensor, as the strides are
  const int64_t* strides;  // in elements
  uint64_t byte_offset;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data) + byte_offset; }
};

struct ExchangeApi {  // DLPackExchangeAPI
  static constexpr const char* CAPSULE = "dlpack_exchange_api";
  static constexpr uint32_t MAJOR = 1;

  uint32_t major, minor;
  const ExchangeApi* previous;
  void (*allocate)();
  void (*export_owned)();
  void (*import_owned)();
  int (*view)(void* py_object, TensorView* to);  // may be null; returns 0, or -1 with a Python exception set
  void (*current_stream)();
};

}  // namespace wplfast
