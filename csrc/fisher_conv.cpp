#include "fisher_conv.h"

#include <algorithm>
#include <vector>

#include "fisher_groups.h"
#include "fisher_product.h"
#include "turn.h"

namespace wplfast {
namespace {

SamplePatches patches_of(const FisherConvCall& call) {
  SamplePatches patches{};
  patches.data = call.inputs;
  patches.pixel_stride = call.c_in;
  patches.channels = call.c_in / call.groups;
  patches.n_images = call.n_images;
  std::copy_n(call.size, 3, patches.size);
  std::copy_n(call.positions, 3, patches.positions);
  std::copy_n(call.kernel, 3, patches.kernel);
  std::copy_n(call.stride, 3, patches.stride);
  std::copy_n(call.padding, 3, patches.padding);
  std::copy_n(call.dilation, 3, patches.dilation);
  return patches;
}

// Whether patches are the pixels themselves, one after the other.
bool is_linear(const SamplePatches& patches) {
  for (int dim = 0; dim < 3; ++dim) {
    const bool plain = patches.kernel[dim] == 1 && patches.stride[dim] == 1 && patches.padding[dim] == 0;
    if (!plain || patches.positions[dim] != patches.size[dim]) return false;
  }
  return true;
}

}  // namespace

void fisher_conv(const FisherConvCall& call) {
  const SamplePatches patches = patches_of(call);
  if (call.n_samples == 0 || patches.rows() == 0 || patches.columns() == 0 || call.c_out == 0) return;
  const int64_t rows = patches.rows(), group_out = call.c_out / call.groups;
  if (fisher_groups_cost(call) < call.groups * padded_area(group_out, patches.columns(), call.dtype)) {
    if (call.channels_first) {  // which these kernels do not read
      const int64_t bytes = size_of(call.dtype);
      std::vector<char> last(call.n_samples * rows * call.c_out * bytes);
      turn({call.grad_outputs, last.data(), call.n_samples, call.c_out, rows, bytes, call.threads});
      FisherConvCall turned = call;
      turned.grad_outputs = last.data();
      turned.channels_first = false;
      fisher_groups(turned, patches);
      return;
    }
    fisher_groups(call, patches);
    return;
  }
  const int64_t stride_t = call.channels_first ? 1 : call.c_out, stride_d = call.channels_first ? rows : 1;
  Product product{};
  product.rows = {false, {call.grad_outputs, group_out, rows * call.c_out, stride_t, stride_d}, {}, patches.columns()};
  if (is_linear(patches)) {
    product.columns = {false, {call.inputs, patches.channels, rows * call.c_in, call.c_in}, {}, 1};
  } else {
    product.columns = {true, {}, patches, 1};
  }
  product.n_groups = call.groups;
  product.rows_step = group_out * stride_d;
  product.columns_step = patches.channels;
  product.output_step = group_out * patches.columns();
  product.fisher = call.fisher;
  product.gradient = call.gradient;
  product.weights = call.weights;
  product.n_samples = call.n_samples;
  product.n_steps = rows;
  product.dtype = call.dtype;
  product.threads = call.threads;
  fisher_product(product);
}

}  // namespace wplfast
