// A tensor as bindings see it: torch's handle, with sizes and strides at hand. torch::stable::Tensor asks libtorch for
// every single one and shares ownership; a call of an op has a dozen tensors and looks at each a dozen times.
// In a direct call (direct.h) there are no handles: arguments are views of DLPack, results blocks of our own.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <utility>

#include "python/direct.h"

namespace m3::binding {

using torch::headeronly::ScalarType;

inline int32_t shim_dtype(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

inline ScalarType type_of_shim(int32_t type) {
  static const int32_t kFloat = aoti_torch_dtype_float32(), kBFloat16 = aoti_torch_dtype_bfloat16(),
                       kHalf = aoti_torch_dtype_float16(), kInt = aoti_torch_dtype_int32(),
                       kByte = aoti_torch_dtype_uint8(), kLong = aoti_torch_dtype_int64();
  if (type == kFloat) return ScalarType::Float;
  if (type == kBFloat16) return ScalarType::BFloat16;
  if (type == kHalf) return ScalarType::Half;
  if (type == kInt) return ScalarType::Int;
  if (type == kByte) return ScalarType::Byte;
  if (type == kLong) return ScalarType::Long;
  return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(type));
}

// Types without a counterpart become Undefined, which no op takes.
inline ScalarType type_of_dlpack(dlpack::Dtype type) {
  if (type.lanes != 1) return ScalarType::Undefined;
  switch (type.code << 8 | type.bits) {
    case dlpack::kFloat << 8 | 32: return ScalarType::Float;
    case dlpack::kBFloat << 8 | 16: return ScalarType::BFloat16;
    case dlpack::kFloat << 8 | 16: return ScalarType::Half;
    case dlpack::kInt << 8 | 32: return ScalarType::Int;
    case dlpack::kInt << 8 | 64: return ScalarType::Long;
    case dlpack::kUInt << 8 | 8: return ScalarType::Byte;
    default: return ScalarType::Undefined;
  }
}

inline dlpack::Dtype dlpack_of_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return {dlpack::kFloat, 32, 1};
    case ScalarType::BFloat16: return {dlpack::kBFloat, 16, 1};
    case ScalarType::Half: return {dlpack::kFloat, 16, 1};
    case ScalarType::Int: return {dlpack::kInt, 32, 1};
    case ScalarType::Long: return {dlpack::kInt, 64, 1};
    case ScalarType::Byte: return {dlpack::kUInt, 8, 1};
    default: break;
  }
  STD_TORCH_CHECK(false, "no result of a direct call has the type ", torch::headeronly::toString(type));
  return {};
}

class Tensor {
 public:
  Tensor() = default;
  // Somebody else's, who outlives this.
  explicit Tensor(const dlpack::Tensor& view)
      : plain_(&view), dim_(view.dim), sizes_(view.shape), strides_(view.strides) {}
  // Takes the block over.
  explicit Tensor(dlpack::Managed* block) : Tensor(block->tensor) { block_ = block; }
  // Takes the handle over; owned = false: the handle is somebody else's, who outlives this.
  explicit Tensor(AtenTensorHandle handle, bool owned = true) : handle_(handle), owned_(owned) {
    int64_t *sizes, *strides;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    sizes_ = sizes, strides_ = strides;
  }
  Tensor(const torch::stable::Tensor& t) : Tensor(duplicate(t.get())) {}
  Tensor(const Tensor& other) : Tensor(other.handle_ ? Tensor(duplicate(other.handle_)) : other.borrow()) {
    STD_TORCH_CHECK(!other.block_, "a result of a direct call has one owner");
  }
  Tensor(Tensor&& other) noexcept { swap(other); }
  Tensor& operator=(Tensor other) noexcept {
    swap(other);
    return *this;
  }
  ~Tensor() {
    if (handle_ && owned_) aoti_torch_delete_tensor_object(handle_);
    if (block_) block_->deleter(block_);
  }

  operator torch::stable::Tensor() const { return torch::stable::Tensor(duplicate(handle_)); }
  // The same, which must not outlive this.
  Tensor borrow() const {
    if (handle_) return Tensor(handle_, false);
    return plain_ ? Tensor(*plain_) : Tensor();
  }
  AtenTensorHandle handle() const { return handle_; }
  // The handle for whoever owns it from now on.
  AtenTensorHandle release() {
    const AtenTensorHandle given = owned_ ? handle_ : duplicate(handle_);
    owned_ = false;
    return given;
  }
  // The block for whoever calls its deleter from now on.
  dlpack::Managed* release_block() {
    STD_TORCH_CHECK(block_, "not a result of a direct call");
    return std::exchange(block_, nullptr);
  }

  int64_t dim() const { return dim_; }
  torch::headeronly::IntHeaderOnlyArrayRef sizes() const { return {sizes_, static_cast<size_t>(dim_)}; }
  int64_t size(int64_t i) const { return sizes_[checked(i)]; }
  int64_t stride(int64_t i) const { return strides_[checked(i)]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim_; ++i) n *= sizes_[i];
    return n;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim_; i-- > 0;) {
      if (sizes_[i] != 1 && strides_[i] != expected) return numel() == 0;
      expected *= sizes_[i];
    }
    return true;
  }
  ScalarType scalar_type() const {
    if (plain_) return type_of_dlpack(plain_->dtype);
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &type));
    return type_of_shim(type);
  }
  size_t element_size() const {
    if (plain_) return plain_->dtype.bits / 8;
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &type));
    return aoti_torch_dtype_element_size(type);
  }
  const void* const_data_ptr() const {
    if (plain_) return plain_data();
    const void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return data;
  }
  void* mutable_data_ptr() const {
    if (plain_) return plain_data();
    void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }
  // The caller has checked the element type (expect_type).
  template <class T>
  const T* const_data_ptr() const {
    return static_cast<const T*>(const_data_ptr());
  }
  template <class T>
  T* mutable_data_ptr() const {
    return static_cast<T*>(mutable_data_ptr());
  }

 private:
  static AtenTensorHandle duplicate(AtenTensorHandle handle) {
    STD_TORCH_CHECK(handle, "a tensor of a direct call is not torch's");
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &made));
    return made;
  }
  void* plain_data() const { return static_cast<char*>(plain_->data) + plain_->byte_offset; }
  int64_t checked(int64_t i) const {
    STD_TORCH_CHECK(i >= 0 && i < dim_, "dimension ", i, " of a tensor that has ", dim_);
    return i;
  }
  void swap(Tensor& other) noexcept {
    std::swap(handle_, other.handle_), std::swap(owned_, other.owned_), std::swap(dim_, other.dim_);
    std::swap(plain_, other.plain_), std::swap(block_, other.block_);
    std::swap(sizes_, other.sizes_), std::swap(strides_, other.strides_);
  }

  AtenTensorHandle handle_ = nullptr;
  bool owned_ = false;
  const dlpack::Tensor* plain_ = nullptr;  // instead of a handle; of `block_`, where there is one
  dlpack::Managed* block_ = nullptr;
  int64_t dim_ = 0;
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;
};

// torch::stable's functions of these names go through the dispatcher, about a microsecond each: too much for operands
// that are nearly always as they should be, and for outputs whose place and layout are known.

// `t` itself where it is contiguous: the result must not outlive it.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t.borrow() : Tensor(torch::stable::contiguous(t));
}

// The strides of a contiguous tensor.
inline void set_contiguous(int64_t* strides, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
}

// Header, sizes, strides and values in one allocation, uninitialised and contiguous. By malloc: aligned_alloc of glibc
// leaves out the thread's own cache of small pieces.
inline dlpack::Managed* new_block(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type) {
  constexpr uintptr_t kAlign = 64;
  const size_t dims = shape.size(), head = sizeof(dlpack::Managed) + 2 * dims * sizeof(int64_t);
  const dlpack::Dtype dtype = dlpack_of_type(type);
  size_t values = 1;
  for (size_t i = 0; i < dims; ++i) values *= static_cast<size_t>(shape[i]);
  auto* block = static_cast<dlpack::Managed*>(std::malloc(head + kAlign - 1 + values * dtype.bits / 8));
  STD_TORCH_CHECK(block, "no memory for ", values, " values");
  int64_t *sizes = reinterpret_cast<int64_t*>(block + 1), *strides = sizes + dims;
  for (size_t i = 0; i < dims; ++i) sizes[i] = shape[i];
  set_contiguous(strides, shape);
  void* data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block) + head + kAlign - 1) / kAlign * kAlign);
  *block = {{1, 0}, nullptr, [](dlpack::Managed* own) { std::free(own); }, 0,
            {data, {dlpack::kCpu, 0}, static_cast<int32_t>(dims), dtype, sizes, strides, 0}};
  return block;
}

// Set while a direct call runs (direct.h).
inline thread_local bool own_results = false;

// Uninitialised and contiguous.
inline Tensor empty_at(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type, int32_t device_type,
                       int32_t device_index) {
  constexpr size_t kMost = 16;
  const size_t dims = shape.size();
  STD_TORCH_CHECK(dims <= kMost, "a result of ", dims, " dimensions: expected at most ", kMost);
  int64_t strides[kMost];
  set_contiguous(strides, shape);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dims), shape.data(), strides,
                                                         shim_dtype(type), device_type, device_index, &made));
  return Tensor(made);
}
inline Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type) {
  if (own_results) return Tensor(new_block(shape, type));
  return empty_at(shape, type, aoti_torch_device_type_cpu(), 0);
}

}  // namespace m3::binding
