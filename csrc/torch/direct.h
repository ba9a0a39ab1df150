// A function on Tensors as what csrc/python/direct.cpp calls, beside the dispatcher.
#pragma once

#include <array>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "python/direct.h"
#include "torch/tensor.h"

namespace m3::binding {

template <class T>
struct FromValue;
template <>
struct FromValue<Tensor> {
  static constexpr direct::Kind kind = direct::Kind::kTensor;
  static Tensor from(const direct::Value& value) { return Tensor(value.tensor); }
};
template <>
struct FromValue<std::optional<Tensor>> {
  static constexpr direct::Kind kind = direct::Kind::kMaybeTensor;
  static std::optional<Tensor> from(const direct::Value& value) {
    if (!value.integer) return std::nullopt;
    return Tensor(value.tensor);
  }
};
template <>
struct FromValue<double> {
  static constexpr direct::Kind kind = direct::Kind::kNumber;
  static double from(const direct::Value& value) { return value.number; }
};
template <>
struct FromValue<int64_t> {
  static constexpr direct::Kind kind = direct::Kind::kInteger;
  static int64_t from(const direct::Value& value) { return value.integer; }
};
template <>
struct FromValue<bool> {
  static constexpr direct::Kind kind = direct::Kind::kBoolean;
  static bool from(const direct::Value& value) { return value.integer != 0; }
};
template <>
struct FromValue<ScalarType> {
  static constexpr direct::Kind kind = direct::Kind::kDtype;
  static ScalarType from(const direct::Value& value) { return type_of_dlpack(value.dtype); }
};
template <>
struct FromValue<std::string> {
  static constexpr direct::Kind kind = direct::Kind::kText;
  static std::string from(const direct::Value& value) { return {value.text, value.count}; }
};
template <>
struct FromValue<std::vector<int64_t>> {
  static constexpr direct::Kind kind = direct::Kind::kIntegers;
  static std::vector<int64_t> from(const direct::Value& value) { return {value.integers, value.integers + value.count}; }
};

template <class T>
struct Outputs {
  static constexpr int32_t count = 1;
  static void put(dlpack::Managed** to, Tensor&& result) { *to = result.release_block(); }
};
template <>
struct Outputs<void> {
  static constexpr int32_t count = 0;
};
template <class... T>
struct Outputs<std::tuple<T...>> {
  static constexpr int32_t count = sizeof...(T);
  static void put(dlpack::Managed** to, std::tuple<T...>&& results) {
    std::apply([&](T&... each) { ((*to++ = each.release_block()), ...); }, results);
  }
};

// Results of the calls inside are blocks of our own.
struct OwnResults {
  OwnResults() { own_results = true; }
  ~OwnResults() { own_results = false; }
};

template <auto Function, class Signature = decltype(Function)>
struct DirectCall;
template <auto Function, class Result, class... Args>
struct DirectCall<Function, Result (*)(Args...)> {
  static constexpr std::array<direct::Kind, sizeof...(Args)> kinds{FromValue<std::decay_t<Args>>::kind...};
  static constexpr int32_t outputs = Outputs<Result>::count;
  static_assert(kinds.size() <= direct::kMostInputs && outputs <= direct::kMostOutputs);

  template <size_t... I>
  static void run(const direct::Value* values, dlpack::Managed** results, std::index_sequence<I...>) {
    std::tuple<std::decay_t<Args>...> args{FromValue<std::decay_t<Args>>::from(values[I])...};
    if constexpr (std::is_void_v<Result>)
      Function(static_cast<Args&&>(std::get<I>(args))...);
    else
      Outputs<Result>::put(results, Function(static_cast<Args&&>(std::get<I>(args))...));
  }
  static bool call(const direct::Value* values, dlpack::Managed** results) {
    const OwnResults here;
    try {
      run(values, results, std::index_sequence_for<Args...>{});
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }
};

// All of them, by name (module.cpp).
std::vector<direct::Op>& direct_ops();

template <auto Function>
bool add_direct(const char* name) {
  using Call = DirectCall<Function>;
  direct_ops().push_back(
      {direct::kAbi, name, static_cast<int32_t>(Call::kinds.size()), Call::outputs, Call::kinds.data(), &Call::call});
  return true;
}

}  // namespace m3::binding
