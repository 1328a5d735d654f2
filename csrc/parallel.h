// Thread counts and parallel regions; serial where the compiler has no OpenMP.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#  include <omp.h>
#endif

namespace wplfast {

inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Runs body(index, count) on `count` threads. The body must not throw.
template <class Body>
void parallel(int count, const Body& body) {
#ifdef _OPENMP
  if (count > 1) {
#  pragma omp parallel num_threads(count)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)count;
  body(0, 1);
}

// Runs body(thread, item) for every item, handing items to whichever thread is free. The body must not throw.
template <class Body>
void parallel_each(int threads, int64_t items, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#  pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) body(omp_get_thread_num(), item);
    return;
  }
#endif
  (void)threads;
  for (int64_t item = 0; item < items; ++item) body(0, item);
}

// Threads worth waking for `work` units when each should get at least `grain` of them.
inline int threads_for(int64_t work, int64_t grain, int threads) {
  const int64_t useful = work / grain;
  return static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
}

}  // namespace wplfast
