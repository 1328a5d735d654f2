// A device of its own whose memory happens to be the host's: what would fail on a GPU because tensors are on two devices
// fails here too, with the same words. Every operator runs on the CPU, over the same memory.
//
// It follows CUDA: a 0-d tensor of the CPU goes with any tensor, indices may lie on the CPU, generators may not.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);

// ---- memory ---------------------------------------------------------------------------------------------------------

std::atomic<int64_t> allocated{0}, peak{0};

void release(void* data) {
  if (data != nullptr) allocated -= static_cast<int64_t>(malloc_usable_size(data));
  std::free(data);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    if (data != nullptr) {
      std::memset(data, 0xff, bytes);  // NaN in every floating point type: nobody may rely on what was there
      const int64_t now = allocated += static_cast<int64_t>(malloc_usable_size(data));
      for (int64_t most = peak; most < now && !peak.compare_exchange_weak(most, now);) {
      }
    }
    return {data, data, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(kType, &memory);

// ---- one device, one stream -----------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- what makes the host wait for a GPU -------------------------------------------------------------------------------

std::atomic<int64_t> waits{0};
std::atomic<bool> forbidden{false};

void host_waits(const char* what) {
  ++waits;
  TORCH_CHECK(!forbidden, "called a synchronizing operation: ", what);
}

bool result_depends_on_values(const std::string& name) {
  for (const char* known : {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive",
                            "aten::unique_dim", "aten::equal", "aten::bincount"})
    if (name == known) return true;
  return false;
}

// ---- random numbers: those of the CPU, for the same seed ---------------------------------------------------------------

struct Generator final : c10::GeneratorImpl {
  explicit Generator(at::Generator host = at::Generator(at::detail::getDefaultCPUGenerator().clone()))
      : c10::GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return const_cast<at::Generator&>(host).seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(host.clone()); }
  at::Generator host;
};

at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<Generator>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    auto generator = at::make_generator<Generator>();
    generator.set_current_seed(c10::default_rng_seed_val);
    return generator;
  }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
};

// ---- tensors of the CPU over the same memory ----------------------------------------------------------------------------

bool here(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

// The whole storage, so that an operator that returns a view of its argument can be recognised.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!here(tensor)) return tensor;
  const auto& memory_here = tensor.storage();
  void* data = memory_here.mutable_data();
  c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), memory_here.nbytes(),
      c10::DataPtr(data, nullptr, [](void*) {}, c10::Device(at::kCPU)), c10::GetAllocator(at::kCPU), true));
  auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                       tensor.dtype());
  host.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return host;
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided, "the rehearsal device has strided tensors alone");
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

at::Tensor moved_here(const at::Tensor& host) {
  auto tensor = empty_strided(host.sizes(), host.strides(), host.scalar_type(), {}, {}, {});
  on_host(tensor).copy_(host);
  return tensor;
}

// ---- every other operator: on the CPU ------------------------------------------------------------------------------------

bool takes_indices_of_the_cpu(const std::string& name) {
  return name == "aten::index" || name == "aten::_index_put_impl_" || name == "aten::index_put_" ||
         name == "aten::index_put" || name == "aten::_unsafe_index" || name == "aten::_pack_padded_sequence";
}

struct Call {
  const c10::OperatorHandle& op;
  std::vector<at::Tensor> given, host;

  at::Tensor take(const at::Tensor& tensor) {
    if (tensor.defined()) {
      given.push_back(tensor);
      host.push_back(on_host(tensor));
      return host.back();
    }
    return tensor;
  }

  // The result on this device: one of the arguments, a view of one, or new memory.
  at::Tensor back(const at::Tensor& result) const {
    if (!result.defined()) return result;
    for (size_t i = 0; i < given.size(); ++i) {
      if (!here(given[i])) continue;
      if (result.is_same(host[i])) return given[i];
      if (result.storage().data() != nullptr && result.storage().data() == host[i].storage().data()) {
        auto view = given[i].dtype() == result.dtype() ? given[i].alias() : at::Tensor();
        if (view.defined()) {
          view.unsafeGetTensorImpl()->set_storage_offset(result.storage_offset());
          view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides());
          return view;
        }
      }
    }
    return moved_here(result);
  }
};

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto n = schema.arguments().size();
  const auto start = stack->size() - n;
  Call call{op, {}, {}};
  for (size_t i = start; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.take(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorList()) list.push_back(call.take(tensor));
      value = c10::List<at::Tensor>(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        list.push_back(tensor.has_value() ? std::optional<at::Tensor>(call.take(*tensor)) : std::nullopt);
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == kType) {
      value = c10::Device(at::kCPU);
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == kType, "Expected a 'rehearsal' device type for generator but found '",
                  generator.device(), "' (", schema.operator_name(), ")");
      value = static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
    } else if (value.isNone() && schema.arguments()[i - start].name() == "generator") {
      value = static_cast<Generator*>(default_generator().unsafeGetGeneratorImpl())->host;
    }
  }
  bool any_here = call.given.empty();
  for (const auto& tensor : call.given) any_here = any_here || here(tensor);
  for (const auto& tensor : call.given)
    TORCH_CHECK(!any_here || here(tensor) || tensor.dim() == 0 || takes_indices_of_the_cpu(schema.name()),
                "Expected all tensors to be on the same device, but found at least two devices, rehearsal:0 and ",
                tensor.device(), "! (", schema.operator_name(), ")");
  if (result_depends_on_values(schema.name())) host_waits(schema.name().c_str());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = 0; i < call.given.size(); ++i) {
    const auto& given = call.given[i];
    const auto& host = call.host[i];
    if (!here(given) || given.sizes() == host.sizes()) continue;  // else it was resized, an empty output most likely
    given.resize_(host.sizes());
    on_host(given).copy_(host);
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.back(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorList()) list.push_back(call.back(tensor));
      value = c10::List<at::Tensor>(list);
    }
  }
}

// ---- what a device must have of its own -----------------------------------------------------------------------------------

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  if (here(self) != here(to) && !(non_blocking && here(to))) host_waits("copy between devices");
  on_host(to).copy_(on_host(self));
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  const_cast<at::Tensor&>(to).resize_(self.sizes());
  return copy_from(self, to, false);
}
at::Tensor as_strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
at::Tensor view(const at::Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); }
at::Tensor reshape_alias(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}
at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}
const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, size, format);
}
at::Scalar item(const at::Tensor& self) {
  host_waits("item");
  return on_host(self).item();
}
at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  TORCH_CHECK(source.device().type() == kType, "Attempted to set the storage of a tensor on device \"", self.device(),
              "\" to a storage on different device \"", source.device(), "\".");
  return at::native::set_storage_cpu_(self, source, offset, size, stride);
}
at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const int64_t n = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return self.set_(source, 0, {n}, {});
}
at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return self.set_(source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
at::Tensor& set_nothing(at::Tensor& self) {
  return self.set_(at::Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), 0,
                                                                     memory.allocate(0), &memory, true)),
                   0, {0}, {});
}

// A new device has convolutions under names of their own: the same as those of all others, but for the bias's size.
template <const char* Name>
void convolution(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto usual = c10::Dispatcher::singleton().findSchemaOrThrow(Name, "");
  const auto start = stack->end() - op.schema().arguments().size();
  if (usual.schema().arguments().size() > op.schema().arguments().size())
    stack->insert(start + 3, std::vector<int64_t>{start->toTensor().size(1)});
  on_the_cpu(usual, stack);
}
constexpr char kForward[] = "aten::convolution", kBackward[] = "aten::convolution_backward";

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("resize_", resize);
  m.impl("_local_scalar_dense", item);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_nothing);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution<kForward>>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution<kBackward>>());
  // It has a kernel of its own on CUDA, and a slower way on a new device.
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY(rehearsal, m) {
  m.def("seed(int seed) -> ()", [](int64_t seed) { default_generator().set_current_seed(static_cast<uint64_t>(seed)); });
  m.def("allocated() -> int", []() { return allocated.load(); });
  m.def("peak() -> int", []() { return peak.load(); });
  m.def("reset_peak() -> ()", []() { peak = allocated.load(); });
  m.def("waits() -> int", []() { return waits.load(); });
  m.def("forbid_waits(bool forbid) -> ()", [](bool forbid) { forbidden = forbid; });
  m.def("get_state() -> Tensor", []() { return default_generator().get_state(); });
  m.def("set_state(Tensor state) -> ()", [](const at::Tensor& state) { default_generator().set_state(state); });
}

struct Start {
  Start() {
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    c10::register_privateuse1_backend("rehearsal");
  }
} start;

}  // namespace
