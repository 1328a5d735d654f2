// Memory that a calling thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace wplfast {

// About a megabyte per worker, whose pages would otherwise be returned and faulted in again by each call, which costs
// more than a small product. Aligned to 64 bytes.
class Scratch {
 public:
  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Delete> memory_;
  int64_t size_ = 0;
};

}  // namespace wplfast
