#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace wplfast {
namespace {

Isa best_supported() {
#if WPLFAST_X86_DISPATCH
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa choose() {
  const Isa best = best_supported();
  const char* cap = std::getenv("WPLFAST_ISA");
  if (cap == nullptr || *cap == '\0') return best;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::string(cap) == isa_name(isa)) return isa < best ? isa : best;
  }
  throw std::invalid_argument("WPLFAST_ISA must be 'avx512', 'avx2' or 'portable', got '" + std::string(cap) + "'");
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable"; }

}  // namespace wplfast
