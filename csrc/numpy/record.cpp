// A bank's record: a 64-byte little-endian head and a body of key-values, positions and perhaps a bias.
//
//    0 magic "M3RC"    4 version u16     6 flags u16 (1 coded, 2 bias)   8 n_valid u16   10 n_tokens u16
//   12 crc32 of body  16 body bytes u64  24 kv bytes u64                32 record id, 16 bytes
//   48 pos bytes u32  52 bias bytes u32  56 zero u32                    60 crc32 of bytes 0..59
#include <cstring>

#include "numpy/module.h"

namespace m3::numpy {
namespace {

constexpr uint16_t kVersion = 1;
constexpr uint16_t kCoded = 1, kBias = 2;
constexpr char kMagic[4] = {'M', '3', 'R', 'C'};
constexpr size_t kHeadBytes = 64, kIdBytes = 16;

struct Head {
  char magic[4];
  uint16_t version, flags, n_valid, n_tokens;
  uint32_t body_crc;
  uint64_t body_bytes, kv_bytes;
  char id[kIdBytes];
  uint32_t pos_bytes, bias_bytes, zero, head_crc;
};
static_assert(sizeof(Head) == kHeadBytes && offsetof(Head, head_crc) == 60);
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are little-endian");

// zlib's, as the Python side of the project uses it.
uint32_t crc32(const char* data, size_t size) {
  const auto view = py::memoryview::from_memory(static_cast<const void*>(data), static_cast<py::ssize_t>(size));
  return py::module_::import("zlib").attr("crc32")(view).cast<uint32_t>();
}

[[noreturn]] void refuse(const std::string& reason) { throw py::value_error("record: " + reason); }

// A read-only array over part of `owner`'s memory, which it keeps alive.
py::array part(const py::object& owner, const char* data, size_t bytes, const char* dtype) {
  const py::dtype type(dtype);
  py::array array(type, static_cast<py::ssize_t>(bytes) / type.itemsize(), data, owner);
  array.attr("flags").attr("writeable") = false;
  return array;
}

py::dict parse_record(const py::array& value, bool check_body) {
  if (!py::isinstance<py::array_t<uint8_t>>(value) || value.ndim() != 1 || value.strides(0) != 1)
    refuse("expected contiguous bytes, got " + describe(value));
  const char* data = static_cast<const char*>(value.data());
  const size_t size = static_cast<size_t>(value.size());
  if (size < kHeadBytes) refuse("expected a head of 64 bytes, got " + std::to_string(size) + " bytes");
  Head head;
  std::memcpy(&head, data, kHeadBytes);
  if (std::memcmp(head.magic, kMagic, 4) != 0) refuse("expected the magic M3RC, its head is something else");
  if (head.head_crc != crc32(data, 60)) refuse("the checksum of its head is wrong: it is damaged");
  if (head.version != kVersion)
    refuse("expected version " + std::to_string(kVersion) + ", got " + std::to_string(head.version));
  if ((head.flags & ~(kCoded | kBias)) != 0) refuse("unknown flags " + std::to_string(head.flags));
  const uint64_t parts = head.kv_bytes + head.pos_bytes + head.bias_bytes;
  if (head.kv_bytes > size || parts != head.body_bytes || size != kHeadBytes + parts)
    refuse("expected " + std::to_string(head.body_bytes) + " bytes of body, made of " +
           std::to_string(head.kv_bytes) + " + " + std::to_string(head.pos_bytes) + " + " +
           std::to_string(head.bias_bytes) + ", got " + std::to_string(size - kHeadBytes));
  const bool has_bias = head.flags & kBias;
  if (head.bias_bytes != (has_bias ? 2 * uint64_t{head.pos_bytes} : 0) || head.pos_bytes % 2 != 0)
    refuse("its bias has " + std::to_string(head.bias_bytes) + " bytes, its positions " +
           std::to_string(head.pos_bytes));
  const char* body = data + kHeadBytes;
  if (check_body && head.body_crc != crc32(body, parts)) refuse("the checksum of its body is wrong: it is damaged");
  py::dict out;
  out["record_id"] = py::bytes(head.id, kIdBytes);
  out["n_valid"] = head.n_valid;
  out["n_tokens"] = head.n_tokens;
  out["coded"] = static_cast<bool>(head.flags & kCoded);
  out["kv"] = part(value, body, head.kv_bytes, "uint8");
  out["pos"] = part(value, body + head.kv_bytes, head.pos_bytes, "uint16");
  out["bias"] = py::none();
  if (has_bias) out["bias"] = part(value, body + head.kv_bytes + head.pos_bytes, head.bias_bytes, "float32");
  return out;
}

py::bytes pack_record(const std::string& id, const py::array& kv, const py::array& pos, int64_t n_valid,
                      int64_t n_tokens, const py::object& bias, bool coded) {
  if (id.size() != kIdBytes)
    throw py::value_error("record_id: expected 16 bytes, got " + std::to_string(id.size()));
  if (!py::isinstance<py::array_t<uint16_t>>(pos)) throw py::value_error("pos: expected uint16, got " + describe(pos));
  for (const auto& [name, number] : {std::pair{"n_valid", n_valid}, std::pair{"n_tokens", n_tokens}})
    if (number < 0 || number > 0xffff)
      throw py::value_error(std::string(name) + ": expected 0..65535, got " + std::to_string(number));
  const py::array keys = py::array::ensure(kv, py::array::c_style), places = py::array::ensure(pos, py::array::c_style);
  py::array weights;
  Head head{};
  std::memcpy(head.magic, kMagic, 4);
  head.version = kVersion, head.flags = coded ? kCoded : 0;
  head.n_valid = static_cast<uint16_t>(n_valid), head.n_tokens = static_cast<uint16_t>(n_tokens);
  head.kv_bytes = static_cast<uint64_t>(keys.nbytes());
  head.pos_bytes = static_cast<uint32_t>(places.nbytes());
  if (!bias.is_none()) {
    weights = py::array::ensure(bias, py::array::c_style);
    if (!py::isinstance<py::array_t<float>>(weights) || weights.size() != places.size())
      throw py::value_error("bias: expected float32, one per entry of pos, got " + describe(weights));
    head.flags |= kBias, head.bias_bytes = static_cast<uint32_t>(weights.nbytes());
  }
  head.body_bytes = head.kv_bytes + head.pos_bytes + head.bias_bytes;
  std::memcpy(head.id, id.data(), kIdBytes);
  std::string value(kHeadBytes, '\0');
  value.append(static_cast<const char*>(keys.data()), head.kv_bytes);
  value.append(static_cast<const char*>(places.data()), head.pos_bytes);
  if (head.bias_bytes != 0) value.append(static_cast<const char*>(weights.data()), head.bias_bytes);
  head.body_crc = crc32(value.data() + kHeadBytes, head.body_bytes);
  std::memcpy(value.data(), &head, 60);
  head.head_crc = crc32(value.data(), 60);
  std::memcpy(value.data() + 60, &head.head_crc, 4);
  return py::bytes(value);
}

}  // namespace

void add_record(py::module_& module) {
  module.def("parse_record", &parse_record, py::arg("value"), py::arg("check_body"));
  module.def("pack_record", &pack_record, py::arg("record_id"), py::arg("kv"), py::arg("pos"), py::arg("n_valid"),
             py::arg("n_tokens"), py::arg("bias"), py::arg("coded"));
}

}  // namespace m3::numpy
