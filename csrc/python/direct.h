// The straight way from Python to a kernel: what the interpreter's side (direct.cpp) and the binding's (torch/direct.h)
// say to each other. Neither knows the other's headers: a call is an array of plain values, tensors as DLPack has them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace m3::dlpack {

// The binary interface of DLPack 1 (https://dmlc.github.io/dlpack/latest/c_api.html), as far as it is used here.
enum : int32_t { kCpu = 1 };
enum : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6 };

struct Device {
  int32_t type, index;
};
struct Dtype {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t dim;
  Dtype dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
// A tensor with its owner: whoever has it calls the deleter once.
struct Managed {
  Version version;
  void* context;
  void (*deleter)(Managed*);
  uint64_t flags;
  Tensor tensor;
};
// What a framework offers beside __dlpack__ to those who only call it: type(tensor).__dlpack_c_exchange_api__.
struct Exchange {
  Version version;
  Exchange* previous;
  int (*allocate)(Tensor*, Managed**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, Managed**);
  int (*object_from_managed)(Managed*, void**);  // takes the tensor over
  int (*tensor_from_object)(void*, Tensor*);     // borrows; may be null
  int (*current_stream)(int32_t, int32_t, void**);
};

}  // namespace m3::dlpack

namespace m3::direct {

constexpr uint32_t kAbi = 1;  // of what follows: binding and module may come from different builds
constexpr int32_t kMostInputs = 32, kMostOutputs = 8;

enum class Kind : uint8_t { kTensor, kMaybeTensor, kNumber, kInteger, kBoolean, kDtype, kText, kIntegers };

// One argument; which members count is its kind's.
struct Value {
  dlpack::Tensor tensor;
  dlpack::Dtype dtype;
  double number;
  int64_t integer;          // 0 and 1 for a boolean; of an optional tensor, whether there is one
  const char* text;         // `count` bytes
  const int64_t* integers;  // `count` of them
  size_t count;
};

struct Op {
  uint32_t abi;
  const char* name;
  int32_t inputs, outputs;
  const Kind* kinds;
  // False, and no results, where the values are not what the kernel takes: the dispatcher then does it, or says why not.
  bool (*call)(const Value* values, dlpack::Managed** results);
};

}  // namespace m3::direct
