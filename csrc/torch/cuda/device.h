// What the CUDA bindings add to csrc/torch: one device for all tensors, outputs and workspaces on it, its current stream,
// and another backend for calls that the CUDA kernels do not take.
//
// With -DM3_SIMT the same bindings are tests: CPU tensors, kernels on the host of tests/simt, ops in memory3_simt.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "m3/cuda.h"
#include "torch/tensor_args.h"

#if defined(M3_SIMT)
extern "C" void simt_note_memory(const void* data, size_t bytes, int fresh);
#else
// Of libtorch_cuda, which a torch for CPUs has not: there no tensor lies on a GPU, and nobody asks.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace m3::binding {

struct Unsupported {
  std::string reason;
};

inline void check_cuda(m3_status status) {
  if (status == M3_UNSUPPORTED) throw Unsupported{m3_cuda_last_error()};
  STD_TORCH_CHECK(status == M3_OK, m3_cuda_last_error());
}

inline int32_t device_type(const Tensor& t) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.handle(), &type));
  return type;
}
inline int32_t device_index(const Tensor& t) {
  int32_t index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.handle(), &index));
  return index;
}

// Uninitialised and contiguous, where `like` is.
inline Tensor empty_beside(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type) {
  const Tensor made = empty_at(shape, type, device_type(like), device_index(like));
#if defined(M3_SIMT)
  simt_note_memory(made.const_data_ptr(), static_cast<size_t>(made.numel()) * made.element_size(), 1);
#endif
  return made;
}

// A workspace; an empty tensor's pointer may be null.
inline Tensor workspace_beside(const Tensor& like, int64_t bytes) {
  return empty_beside(like, {(bytes + 3) / 4}, ScalarType::Float);
}

inline void* current_stream([[maybe_unused]] const Tensor& t) {
#if defined(M3_SIMT)
  return nullptr;
#else
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index(t), &stream));
  return stream;
#endif
}

// ---- arguments of any kind -------------------------------------------------------------------------------------------

struct OneDevice {
  const Tensor* first = nullptr;

  void see(const Tensor& t) {
    if (first == nullptr) first = &t;
    STD_TORCH_CHECK(device_type(t) == device_type(*first) && device_index(t) == device_index(*first),
                    "expected all tensors on one device, got types and indices ", device_type(*first), ":",
                    device_index(*first), " and ", device_type(t), ":", device_index(t));
#if defined(M3_SIMT)
    int64_t reach = t.numel() > 0 ? 1 : 0;
    for (int64_t i = 0; i < t.dim() && reach > 0; ++i) reach += (t.size(i) - 1) * t.stride(i);
    simt_note_memory(t.const_data_ptr(), static_cast<size_t>(reach) * t.element_size(), 0);
#endif
  }
  void see(const std::optional<Tensor>& t) {
    if (t) see(*t);
  }
  template <class T>
  void see(const T&) {}
};

inline StableIValue rebox(Tensor& t) { return boxed(std::move(t)); }
inline StableIValue rebox(std::optional<Tensor>& t) {
  StableIValue* inner = t ? new StableIValue(boxed(std::move(*t))) : nullptr;
  return torch::stable::detail::from(inner);
}
template <class T>
StableIValue rebox(T& value) {
  return torch::stable::detail::from(value);
}

// What becomes of a call that the CUDA kernels do not take.
enum class Refused { kHandOn, kRaise };

// The same call for memory3_fallback::<op> (Triton's kernel or the reference: memory3_kernels/_registry.py); its results
// replace the arguments in `stack`.
template <class... Args>
void hand_on(const char* op, const Unsupported& why, StableIValue* stack, std::tuple<Args...>& args) {
  StableIValue* next = stack;
  std::apply([&](Args&... each) { ((*next++ = rebox(each)), ...); }, args);
  const std::string name = std::string("memory3_fallback::") + op;
  const auto error = torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION);
  STD_TORCH_CHECK(error == 0, op, ": ", why.reason, ", and the backend after it failed (see above)");
}

template <class Result, class... Args, size_t... I>
void call_on_device(const char* op, Refused refused, Result (*function)(Args...), StableIValue* stack,
                    std::index_sequence<I...>) {
  std::tuple<std::decay_t<Args>...> args{Unbox<std::decay_t<Args>>::from(stack[I])...};  // braces: in order
  OneDevice device;
  (device.see(std::get<I>(args)), ...);
  try {
#if !defined(M3_SIMT)
    const torch::stable::accelerator::DeviceGuard guard(device_index(*device.first));
#endif
    // Nothing is moved into the call: it may have to be handed on.
    if constexpr (std::is_void_v<Result>)
      function(std::get<I>(args)...);
    else
      put_results(stack, function(std::get<I>(args)...));
  } catch (const Unsupported& why) {
    STD_TORCH_CHECK(refused == Refused::kHandOn, op, ": ", why.reason);
    hand_on(op, why, stack, args);
  }
}

template <class Result, class... Args>
void call_on_device(const char* op, Refused refused, Result (*function)(Args...), StableIValue* stack,
                    uint64_t count) {
  STD_TORCH_CHECK(count == sizeof...(Args), "the schema has ", count, " arguments, the kernel ", sizeof...(Args));
  call_on_device(op, refused, function, stack, std::index_sequence_for<Args...>{});
}

}  // namespace m3::binding

#define M3_BOXED_ON_DEVICE(op, function, suffix, refused)                               \
  namespace m3::binding {                                                               \
  static void op##_##suffix(StableIValue* stack, uint64_t inputs, uint64_t) {           \
    call_on_device(#op, refused, &function, stack, inputs);                             \
  }                                                                                     \
  }

// Registers `function` as the CUDA kernel of memory3::op, of its twin without autograd, and of memory3_cuda::op, which
// is what a caller gets who asked for CUDA and nothing else.
#if defined(M3_SIMT)
#define M3_REGISTER_CUDA(op, function)                                                                     \
  M3_BOXED_ON_DEVICE(op, function, or_hand_on, Refused::kHandOn)                                           \
  M3_BOXED_ON_DEVICE(op, function, or_raise, Refused::kRaise)                                              \
  STABLE_TORCH_LIBRARY_IMPL(memory3_simt, CPU, m) { m.impl(#op, &::m3::binding::op##_or_raise); }          \
  STABLE_TORCH_LIBRARY_IMPL(memory3_simt_or_else, CPU, m) { m.impl(#op, &::m3::binding::op##_or_hand_on); }
#else
#define M3_REGISTER_CUDA(op, function)                                                                     \
  M3_BOXED_ON_DEVICE(op, function, or_hand_on, Refused::kHandOn)                                           \
  M3_BOXED_ON_DEVICE(op, function, or_raise, Refused::kRaise)                                              \
  STABLE_TORCH_LIBRARY_IMPL(memory3, CUDA, m) { m.impl(#op, &::m3::binding::op##_or_hand_on); }            \
  STABLE_TORCH_LIBRARY_IMPL(memory3_forward, CUDA, m) { m.impl(#op, &::m3::binding::op##_or_hand_on); }    \
  STABLE_TORCH_LIBRARY_IMPL(memory3_cuda, CUDA, m) { m.impl(#op, &::m3::binding::op##_or_raise); }
#endif
