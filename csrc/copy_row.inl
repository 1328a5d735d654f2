// A contiguous run of any length, in the compute type. Included by kernels.

// Copies `count` elements in the compute type.
template <class T, class C>
WPLFAST_INLINE void copy_row(const T* from, int64_t count, C* to) {
  constexpr int64_t L = lanes<C>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
}
