// Compiles the file named by WPLFAST_KERNEL once per instruction set, in namespaces wplfast::avx512, ::avx2,
// ::portable.
//
// Everything inside is in unnamed namespaces, and kernels use no standard library templates: an inline function that
// was compiled for AVX-512 could otherwise be the copy which the linker keeps for the whole program, and stop it on
// older machines. The vector width follows the instruction set, since GCC splits wider vectors very badly.

#if WPLFAST_X86_DISPATCH
#  define WPLFAST_VECTOR_BYTES 64
#  define WPLFAST_AVX512 1
#  pragma GCC push_options
#  pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace wplfast::avx512 {
namespace {
#  include "simd.inl"
#  include WPLFAST_KERNEL
}  // namespace
}  // namespace wplfast::avx512
#  pragma GCC pop_options
#  undef WPLFAST_AVX512
#  undef WPLFAST_VECTOR_BYTES

#  define WPLFAST_VECTOR_BYTES 32
#  define WPLFAST_AVX2 1
#  pragma GCC push_options
#  pragma GCC target("avx2,fma,f16c")
namespace wplfast::avx2 {
namespace {
#  include "simd.inl"
#  include WPLFAST_KERNEL
}  // namespace
}  // namespace wplfast::avx2
#  pragma GCC pop_options
#  undef WPLFAST_AVX2
#  undef WPLFAST_VECTOR_BYTES
#endif

#define WPLFAST_VECTOR_BYTES 16
namespace wplfast::portable {
namespace {
#include "simd.inl"
#include WPLFAST_KERNEL
}  // namespace
}  // namespace wplfast::portable
#undef WPLFAST_VECTOR_BYTES
