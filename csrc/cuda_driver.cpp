#include "cuda_driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace wplfast::cuda {
namespace {

using Result = int;  // CUresult
constexpr Result SUCCESS = 0;

// Values from cuda.h; the driver's interface keeps them.
constexpr int MAX_THREADS_PER_BLOCK = 0, SHARED_SIZE_BYTES = 1,
              MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;       // CUfunction_attribute
constexpr int MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;  // CUdevice_attribute
constexpr int CACHE_PREFER_SHARED = 1;                 // CUfunc_cache
constexpr int CAPTURE_RELAXED = 2;                     // CUstreamCaptureMode
// A kernel gets this much shared memory without asking for more.
constexpr uint32_t SHARED_WITHOUT_ASKING = 48 << 10;

template <typename Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("libcuda.so.1 has no function ") + name);
}

struct Driver {
  Result (*init)(unsigned);
  Result (*get_error_string)(Result, const char**);
  Result (*get_device)(int*, int);
  Result (*get_device_attribute)(int*, int, int);
  Result (*retain_primary_context)(void**, int);
  Result (*get_context)(void**);
  Result (*set_context)(void*);
  Result (*load_module)(void**, const void*);
  Result (*unload_module)(void*);
  Result (*get_function)(void**, void*, const char*);
  Result (*get_function_attribute)(int*, int, void*);
  Result (*set_function_attribute)(void*, int, int);
  Result (*set_cache)(void*, int);
  Result (*exchange_capture_mode)(int*);
  Result (*launch_kernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                          void**);

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      const char* const reason = dlerror();
      throw std::runtime_error(std::string("the CUDA driver cannot be loaded: ") + (reason == nullptr ? "" : reason));
    }
    find(library, "cuInit", init);
    find(library, "cuGetErrorString", get_error_string);
    find(library, "cuDeviceGet", get_device);
    find(library, "cuDeviceGetAttribute", get_device_attribute);
    find(library, "cuDevicePrimaryCtxRetain", retain_primary_context);
    find(library, "cuCtxGetCurrent", get_context);
    find(library, "cuCtxSetCurrent", set_context);
    find(library, "cuModuleLoadData", load_module);
    find(library, "cuModuleUnload", unload_module);
    find(library, "cuModuleGetFunction", get_function);
    find(library, "cuFuncGetAttribute", get_function_attribute);
    find(library, "cuFuncSetAttribute", set_function_attribute);
    find(library, "cuFuncSetCacheConfig", set_cache);
    find(library, "cuThreadExchangeStreamCaptureMode", exchange_capture_mode);
    find(library, "cuLaunchKernel", launch_kernel);
    check(init(0), "cuInit");
  }

  void check(Result result, const char* what) const {
    if (result == SUCCESS) return;
    const char* reason = nullptr;
    if (get_error_string(result, &reason) != SUCCESS || reason == nullptr) reason = "unknown error";
    throw std::runtime_error(std::string(what) + ": " + reason + " (CUDA error " + std::to_string(result) + ")");
  }

  // A thread that PyTorch has not used has no context yet.
  void ensure_context(int ordinal) const {
    void* context = nullptr;
    check(get_context(&context), "cuCtxGetCurrent");
    if (context != nullptr) return;
    int device;
    check(get_device(&device, ordinal), "cuDeviceGet");
    check(retain_primary_context(&context, device), "cuDevicePrimaryCtxRetain");
    check(set_context(context), "cuCtxSetCurrent");
  }
};

const Driver& driver() {
  static const Driver driver;  // a constructor that throws is tried again by the next call
  return driver;
}

// Lets this thread do what a capture on another stream, or on this one, would otherwise take for a mistake.
class OutsideCapture {
 public:
  OutsideCapture() { driver().check(driver().exchange_capture_mode(&mode_), "cuThreadExchangeStreamCaptureMode"); }
  ~OutsideCapture() { driver().exchange_capture_mode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  int mode_ = CAPTURE_RELAXED;
};

// Allows a kernel the shared memory it was compiled for, and more of the cache's memory, as Triton does.
void allow_shared(void* function, uint32_t shared, int ordinal) {
  int device, most, fixed;
  driver().check(driver().get_device(&device, ordinal), "cuDeviceGet");
  driver().check(driver().get_device_attribute(&most, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device),
                 "cuDeviceGetAttribute");
  if (shared > static_cast<uint32_t>(most)) {
    throw std::runtime_error("the kernel takes " + std::to_string(shared) + " bytes of shared memory, the GPU has " +
                             std::to_string(most));
  }
  if (shared <= SHARED_WITHOUT_ASKING || static_cast<uint32_t>(most) <= SHARED_WITHOUT_ASKING) return;
  driver().check(driver().set_cache(function, CACHE_PREFER_SHARED), "cuFuncSetCacheConfig");
  driver().check(driver().get_function_attribute(&fixed, SHARED_SIZE_BYTES, function), "cuFuncGetAttribute");
  driver().check(driver().set_function_attribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, most - fixed),
                 "cuFuncSetAttribute");
}

}  // namespace

void* load(int device, const void* image, const char* name, uint32_t threads, uint32_t shared) {
  const Driver& cuda = driver();
  cuda.ensure_context(device);
  const OutsideCapture outside;
  void *module = nullptr, *function = nullptr;
  cuda.check(cuda.load_module(&module, image), "cuModuleLoadData");
  try {
    cuda.check(cuda.get_function(&function, module, name), "cuModuleGetFunction");
    int most_threads;  // asking also makes a driver that loads lazily load now, and not in a capture
    cuda.check(cuda.get_function_attribute(&most_threads, MAX_THREADS_PER_BLOCK, function), "cuFuncGetAttribute");
    if (threads > static_cast<uint32_t>(most_threads)) {
      throw std::runtime_error("the kernel takes " + std::to_string(threads) + " threads, the GPU can run " +
                               std::to_string(most_threads) + " of its");
    }
    allow_shared(function, shared, device);
  } catch (...) {
    cuda.unload_module(module);
    throw;
  }
  return function;
}

void launch(int device, void* function, Grid grid, uint32_t threads, uint32_t shared, uintptr_t stream,
            void** parameters) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const Driver& cuda = driver();
  cuda.ensure_context(device);
  cuda.check(cuda.launch_kernel(function, grid.x, grid.y, grid.z, threads, 1, 1, shared,
                                reinterpret_cast<void*>(stream), parameters, nullptr),
             "cuLaunchKernel");
}

}  // namespace wplfast::cuda
