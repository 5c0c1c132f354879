// A CUDA device made of host memory, for builds of PyTorch without CUDA.
//
// What a CPU build leaves open is filled in: device guard, hooks, allocators, and for the dispatch key CUDA a fallback
// that runs each operator's CPU kernel on the same memory. Numbers are therefore the CPU kernels'; where tensors are is
// CUDA's: an operator that is given both devices is refused, and fresh memory is NaN, so that what is read before it
// is written shows. There are no streams: everything is done when a call returns.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <mutex>
#include <set>
#include <unordered_map>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IntArrayRef;
using c10::Stream;

constexpr DeviceIndex kDevices = 8;
constexpr size_t kBlock = 512;  // bytes that CUDA's allocator rounds up to

thread_local DeviceIndex current_index = 0;

Device current_device() {
  return Device(DeviceType::CUDA, current_index);
}

DeviceIndex exchange_index(DeviceIndex index) {
  const DeviceIndex before = current_index;
  if (index >= 0) current_index = index;
  return before;
}

// ---- memory ----

std::mutex memory_lock;
std::unordered_map<void*, size_t> device_blocks;
std::set<void*> pinned_blocks;
size_t live_bytes = 0, peak_bytes = 0;

void free_on_device(void* memory) {
  if (memory == nullptr) return;
  {
    std::lock_guard<std::mutex> guard(memory_lock);
    const auto block = device_blocks.find(memory);
    live_bytes -= block->second;
    device_blocks.erase(block);
  }
  ::free(memory);
}

void free_pinned(void* memory) {
  if (memory == nullptr) return;
  {
    std::lock_guard<std::mutex> guard(memory_lock);
    pinned_blocks.erase(memory);
  }
  ::free(memory);
}

size_t rounded(size_t bytes) {
  return (bytes + kBlock - 1) / kBlock * kBlock;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &free_on_device, current_device()};
    const size_t size = rounded(bytes);
    void* memory = ::aligned_alloc(kBlock, size);
    TORCH_CHECK(memory != nullptr, "the simulated device is out of memory");
    ::memset(memory, 0xFF, size);  // NaN in every floating-point format
    std::lock_guard<std::mutex> guard(memory_lock);
    device_blocks[memory] = size;
    live_bytes += size;
    peak_bytes = std::max(peak_bytes, live_bytes);
    return {memory, memory, &free_on_device, current_device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_on_device; }
  void copy_data(void* to, const void* from, size_t bytes) const override { ::memcpy(to, from, bytes); }
} device_allocator;

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = ::aligned_alloc(kBlock, rounded(bytes + 1));
    std::lock_guard<std::mutex> guard(memory_lock);
    pinned_blocks.insert(memory);
    return {memory, memory, &free_pinned, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { ::memcpy(to, from, bytes); }
} pinned_allocator;

struct RegisterAllocator {
  RegisterAllocator() { c10::SetAllocator(c10::kCUDA, &device_allocator, 100); }
} register_allocator;

// ---- the guard ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(DeviceType) {}
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    return Device(DeviceType::CUDA, exchange_index(device.index()));
  }
  Device getDevice() const override { return current_device(); }
  void setDevice(Device device) const override { exchange_index(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { exchange_index(device.index()); }
  Stream getStream(Device device) const override {
    const DeviceIndex index = device.index() < 0 ? current_index : device.index();
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, index));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {

struct CUDAHooks : CUDAHooksInterface {  // the name that torch looks up in its registry
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex current_device() const override { return current_index; }
  DeviceIndex getCurrentDevice() const override { return current_index; }
  void setCurrentDevice(DeviceIndex index) const override { exchange_index(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return exchange_index(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchange_index(index); }
  bool isPinnedPtr(const void* memory) const override {
    std::lock_guard<std::mutex> guard(memory_lock);
    return pinned_blocks.count(const_cast<void*>(memory)) > 0;
  }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  Device getDeviceFromPtr(void*) const override { return ::current_device(); }
  void deviceSynchronize(DeviceIndex) const override {}
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    return globalContext().defaultGenerator(Device(DeviceType::CPU));
  }
  Generator getNewGenerator(DeviceIndex) const override {
    return globalContext().defaultGenerator(Device(DeviceType::CPU)).clone();
  }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace {

// ---- tensors ----

c10::DeviceGuard on(std::optional<Device> device) {
  const bool named = device.has_value() && device->index() >= 0;
  return c10::DeviceGuard(Device(DeviceType::CUDA, named ? device->index() : current_index));
}

Tensor empty_memory_format(
    IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  const auto guard = on(device);
  return at::detail::empty_generic(
      size, &device_allocator, DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  const auto guard = on(device);
  return at::detail::empty_strided_generic(
      size, stride, &device_allocator, DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

// A CPU tensor over the same memory, of the same shape.
Tensor host_view(const Tensor& tensor) {
  auto* device_storage = tensor.storage().unsafeGetStorageImpl();
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), static_cast<int64_t>(device_storage->nbytes()),
      c10::DataPtr(device_storage->mutable_data(), nullptr, [](void*) {}, Device(DeviceType::CPU)),
      c10::GetCPUAllocator(), /*resizable=*/true);
  Tensor view = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(storage)), DispatchKeySet(DispatchKey::CPU), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) view._set_conj(true);
  if (tensor.is_neg()) view._set_neg(true);
  return view;
}

void copy_on_host(const Tensor& to, const Tensor& from) {
  at::AutoDispatchBelowADInplaceOrView guard;
  if (from.numel() > 0) to.copy_(from);
}

// A tensor on the device with the contents of one on the host.
Tensor on_device(const Tensor& tensor) {
  Tensor copy = at::detail::empty_strided_generic(
      tensor.sizes(), tensor.strides(), &device_allocator, DispatchKeySet(DispatchKey::CUDA), tensor.scalar_type());
  copy_on_host(host_view(copy), tensor);
  return copy;
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const size_t needed =
      at::detail::computeStorageNbytesContiguous(size, self.dtype().itemsize(), self.storage_offset());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (storage->nbytes() < needed) {
    auto memory = device_allocator.allocate(needed);
    if (storage->nbytes() > 0) ::memcpy(memory.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(memory));
    storage->set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format.has_value() && *format != at::MemoryFormat::Preserve) {
    self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  }
  return self;
}

Tensor& copy_(Tensor& self, const Tensor& from, bool /*non_blocking*/) {
  copy_on_host(self.is_cuda() ? host_view(self) : self, from.is_cuda() ? host_view(from) : from);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  copy_(target, self, non_blocking);
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) const_cast<Tensor&>(to).resize_(self.sizes());
  return copy_from(self, to, false);
}

Tensor& set_storage(Tensor& self, at::Storage from, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(from));
  const auto contiguous = c10::contiguous_strides(size);
  impl->set_sizes_and_strides(size, stride.empty() ? IntArrayRef(contiguous) : stride, offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage from) {
  const auto elements = static_cast<int64_t>(from.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(from), 0, {elements}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return set_storage(self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

bool is_pinned(const Tensor&, std::optional<Device>) {
  return false;
}

bool is_set_to(const Tensor& self, const Tensor& other) {
  return self.storage().data() == other.storage().data() && self.storage_offset() == other.storage_offset() &&
      self.sizes() == other.sizes() && self.strides() == other.strides();
}

void record_stream(Tensor&, Stream) {}

// ---- every other operator ----

// CUDA's kernels take numbers of the host, tensors without dimensions, and these take indices.
bool takes_host_indices(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  return names.count(name) > 0;
}

bool refuses_host_numbers(const std::string& name) {
  return name.rfind("aten::_fused_adam", 0) == 0;  // whose kernel reads the steps on the device
}

class HostCall {
 public:
  explicit HostCall(const c10::OperatorHandle& op) : op_(op), name_(op.schema().name()) {
    if (!op.schema().overload_name().empty()) name_ += "." + op.schema().overload_name();
  }

  void run(torch::jit::Stack* stack) {
    const auto first = stack->size() - op_.schema().arguments().size();
    for (auto i = first; i < stack->size(); ++i) (*stack)[i] = argument((*stack)[i]);
    op_.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
    for (const auto& pair : pairs_) follow_resizing(pair.device, pair.host);
    for (auto i = stack->size() - op_.schema().returns().size(); i < stack->size(); ++i) {
      (*stack)[i] = result((*stack)[i]);
    }
  }

 private:
  struct Pair {
    Tensor device, host;
  };

  Tensor to_host(const Tensor& tensor, bool may_be_there = false) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cuda()) {
      makes_device_tensors_ = true;
      pairs_.push_back({tensor, host_view(tensor)});
      return pairs_.back().host;
    }
    const bool is_number = tensor.dim() == 0 && !refuses_host_numbers(name_);
    TORCH_CHECK(
        is_number || may_be_there || !tensor.device().is_cpu(),
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (in ", name_,
        ")");
    return tensor;
  }

  c10::IValue argument(const c10::IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(to_host(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& entry : value.toOptionalTensorList()) {
        const std::optional<Tensor> tensor = entry;
        list.push_back(tensor.has_value() ? std::optional<Tensor>(to_host(*tensor, takes_host_indices(name_))) : tensor);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      makes_device_tensors_ = true;
      return Device(DeviceType::CPU);
    }
    return value;
  }

  // What was written in place may have another shape, or other memory, than before.
  static void follow_resizing(const Tensor& device, const Tensor& host) {
    if (host.sizes() == device.sizes() && host.strides() == device.strides()) return;
    if (host.storage().data() == device.storage().data()) {
      device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      return;
    }
    resize_(device, host.sizes(), std::nullopt);
    copy_on_host(host_view(device), host);
  }

  Tensor to_device(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (const auto& pair : pairs_) {
      if (pair.host.is_same(tensor)) return pair.device;
    }
    const bool leaves_device = name_ == "aten::_to_copy" || name_ == "aten::to.device";
    if (!makes_device_tensors_ || leaves_device) return tensor;
    for (const auto& pair : pairs_) {
      if (tensor.numel() == 0 || pair.host.storage().data() != tensor.storage().data()) continue;
      Tensor view = at::detail::make_tensor<c10::TensorImpl>(
          c10::Storage(pair.device.storage()), DispatchKeySet(DispatchKey::CUDA), tensor.dtype());
      view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
      return view;
    }
    return on_device(tensor);
  }

  c10::IValue result(const c10::IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(to_device(tensor));
      return list;
    }
    return value;
  }

  const c10::OperatorHandle& op_;
  std::string name_;
  std::vector<Pair> pairs_;
  bool makes_device_tensors_ = false;
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  HostCall(op).run(stack);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty_memory_format));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("is_pinned", TORCH_FN(is_pinned));
  m.impl("is_set_to", TORCH_FN(is_set_to));
  m.impl("record_stream", TORCH_FN(record_stream));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("host_view", &host_view);
  m.def("live_bytes", [] {
    std::lock_guard<std::mutex> guard(memory_lock);
    return live_bytes;
  });
  m.def("peak_bytes", [] {
    std::lock_guard<std::mutex> guard(memory_lock);
    return peak_bytes;
  });
  m.def("reset_peak", [] {
    std::lock_guard<std::mutex> guard(memory_lock);
    peak_bytes = live_bytes;
  });
}
