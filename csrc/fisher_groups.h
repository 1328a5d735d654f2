// The Fisher diagonal of a convolution in which a group has few channels, depthwise above all: vectors hold output
// channels of many groups there, where the tiles of a product would be mostly padding.
#pragma once

#include <cstdint>

#include "fisher_conv.h"
#include "sample_rows.h"

namespace wplfast {

struct GroupsPlan {
  SamplePatches patches;  // of the first group
  const void* grad_outputs;
  const double* weights;  // or null
  int64_t n_samples, unit_samples;
  int64_t c_out, group_out;
  bool has_gradient;
};

// A strip is `lanes_per_strip` output channels; its sums lie as [taps, channels of a group, lanes_per_strip].
struct GroupsKernel {
  int64_t lanes_per_strip;
  int64_t (*workspace_elements)(const GroupsPlan& plan);  // of one thread
  // Stores the sums of one unit of samples, and the plain sums if plan.has_gradient.
  void (*sum_strip)(const GroupsPlan& plan, int64_t strip, int64_t unit, void* workspace, void* sums, void* gradient);
};

// About the multiply-adds per row that it takes, as padded_area() counts them.
int64_t fisher_groups_cost(const FisherConvCall& call);

// Gives the same bits for every number of threads.
void fisher_groups(const FisherConvCall& call, const SamplePatches& patches);

}  // namespace wplfast
