// Run-time choice of the instruction set: one build serves every x86-64 machine.
#pragma once

// Kernels are compiled once per instruction set inside `#pragma GCC target` regions (for_each_isa.inl). Other compilers
// and processors get the portable kernels, which use 16-byte vectors (SSE2, NEON).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#  define WPLFAST_X86_DISPATCH 1
#else
#  define WPLFAST_X86_DISPATCH 0
#endif

namespace wplfast {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// Best instruction set that this machine has, capped by the environment variable WPLFAST_ISA; read once.
// Throws std::invalid_argument where that variable has another value than avx512, avx2 or portable.
Isa selected_isa();

const char* isa_name(Isa isa);

}  // namespace wplfast
