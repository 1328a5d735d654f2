// The few functions of the CUDA driver that it takes to load and launch a compiled kernel.
//
// The driver, libcuda.so.1, is looked for when it is first needed: neither a CUDA header nor a library is used to
// build, and a machine without a GPU imports the extension as ever. Errors are std::runtime_error with the driver's own
// words.
#pragma once

#include <cstdint>

namespace wplfast::cuda {

struct Grid {
  uint32_t x, y, z;
};

// Loads a cubin on a device, whose primary context is made current if none is, and returns its kernel of that name.
// It stays loaded: who holds a kernel cannot know when the device is done with it. May be called while a stream is
// captured: the loading thread is taken out of the capture's checks meanwhile, as loading puts nothing in the stream.
void* load(int device, const void* image, const char* name, uint32_t threads, uint32_t shared);

// Launches as `cuLaunchKernel` does; a grid of no programs is left out.
void launch(int device, void* function, Grid grid, uint32_t threads, uint32_t shared, uintptr_t stream,
            void** parameters);

}  // namespace wplfast::cuda
