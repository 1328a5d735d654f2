#include "fisher_linear.h"

#include "fisher_product.h"

namespace wplfast {

void fisher_linear(const FisherLinearCall& call) {
  Product product{};
  product.rows = {false, call.grad_outputs, {}, call.activations.size};
  product.columns = {false, call.activations, {}, 1};
  product.n_groups = 1;
  product.fisher = call.fisher;
  product.gradient = call.gradient;
  product.weights = call.weights;
  product.n_samples = call.n_samples;
  product.n_steps = call.n_steps;
  product.dtype = call.dtype;
  product.threads = call.threads;
  fisher_product(product);
}

}  // namespace wplfast
