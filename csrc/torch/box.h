// A function on Tensors as the boxed kernel that torch calls: boxed_kernel<&f>. Arguments come in a stack of 64-bit values that
// the kernel owns and replaces by the results.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "torch/tensor.h"

namespace m3::binding {

template <class T>
struct Unbox {
  static T from(StableIValue value) { return torch::stable::detail::to<T>(value); }
};
template <>
struct Unbox<Tensor> {
  static Tensor from(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
};
template <>
struct Unbox<std::optional<Tensor>> {
  static std::optional<Tensor> from(StableIValue value) {
    StableIValue* inner = torch::stable::detail::to<StableIValue*>(value);  // null or on the heap
    if (inner == nullptr) return std::nullopt;
    const StableIValue found = *inner;
    delete inner;
    return Unbox<Tensor>::from(found);
  }
};
inline StableIValue boxed(Tensor&& t) { return torch::stable::detail::from(t.release()); }

inline void put_results(StableIValue* stack, Tensor&& result) { stack[0] = boxed(std::move(result)); }
template <class... T>
void put_results(StableIValue* stack, std::tuple<T...>&& results) {
  std::apply([&](T&... each) { ((*stack++ = boxed(std::move(each))), ...); }, results);
}

template <class Result, class... Args, size_t... I>
void call_boxed(Result (*function)(Args...), StableIValue* stack, std::index_sequence<I...>) {
  std::tuple<std::decay_t<Args>...> args{Unbox<std::decay_t<Args>>::from(stack[I])...};  // braces: in order
  if constexpr (std::is_void_v<Result>)
    function(static_cast<Args&&>(std::get<I>(args))...);
  else
    put_results(stack, function(static_cast<Args&&>(std::get<I>(args))...));
}
template <class Result, class... Args>
void call_boxed(Result (*function)(Args...), StableIValue* stack, uint64_t count) {
  STD_TORCH_CHECK(count == sizeof...(Args), "the schema has ", count, " arguments, the kernel ", sizeof...(Args));
  call_boxed(function, stack, std::index_sequence_for<Args...>{});
}

template <auto Function>
void boxed_kernel(StableIValue* stack, uint64_t inputs, uint64_t) {
  call_boxed(Function, stack, inputs);
}

}  // namespace m3::binding
