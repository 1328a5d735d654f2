// What the rows of a sample are, on one side of a Fisher product: rows of a matrix in memory, or patches of images.
#pragma once

#include <cstdint>

namespace wplfast {

// A tensor [N, T, size] whose last dimension is contiguous, or else the one before it, as in images that lie channels
// first; strides count elements.
struct SampleMatrix {
  const void* data;
  int64_t size;
  int64_t stride_n, stride_t;
  int64_t stride_d = 1;
};

// The patches of images [N, M, *S, pixel_stride] that a convolution multiplies by its weight: row (m, l) of a sample
// holds, for each tap k of the kernel, the channels of pixel l * stride - padding + k * dilation, or zeros outside the
// image. They are never in memory; packing copies what a tile needs. One and two dimensions have leading ones.
struct SamplePatches {
  const void* data;      // first pixel's first channel of the group
  int64_t pixel_stride;  // channels of all groups
  int64_t channels;      // of one group
  int64_t n_images;      // M
  int64_t size[3];       // S
  int64_t positions[3];  // L
  int64_t kernel[3];     // K
  int64_t stride[3], padding[3], dilation[3];

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t columns() const { return taps() * channels; }
  int64_t rows() const { return n_images * positions[0] * positions[1] * positions[2]; }
  int64_t image_elements() const { return size[0] * size[1] * size[2] * pixel_stride; }
};

}  // namespace wplfast
