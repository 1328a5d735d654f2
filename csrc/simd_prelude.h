// What every kernel file needs before for_each_isa.inl opens its target regions: standard headers must come first.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "isa.h"

#if WPLFAST_X86_DISPATCH
#  include <immintrin.h>
#endif

#define WPLFAST_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#  define WPLFAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#  define WPLFAST_UNROLL _Pragma("GCC unroll 32")
#endif

// The kernel table of the instruction set in use: `function` has one definition per namespace.
#if WPLFAST_X86_DISPATCH
#  define WPLFAST_PICK(isa, function)                   \
    ((isa) == ::wplfast::Isa::avx512 ? avx512::function \
     : (isa) == ::wplfast::Isa::avx2 ? avx2::function   \
                                     : portable::function)
#else
#  define WPLFAST_PICK(isa, function) ((void)(isa), portable::function)
#endif
