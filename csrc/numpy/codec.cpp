// The decoder for numpy arrays, through the C ABI.
#include "numpy/module.h"

#include "m3/vq_dequantize.h"

namespace m3::numpy {
namespace {

using Table = py::array;  // float32 or float16, C-contiguous after as_table

Table as_table(const py::array& array, const char* name) {
  const bool known = array.dtype().equal(py::dtype("float32")) || array.dtype().equal(py::dtype("float16"));
  if (array.ndim() != 3 || !known)
    throw py::value_error(std::string(name) + ": expected a 3-dimensional float32 or float16 array, got " +
                          describe(array));
  return py::array::ensure(array, py::array::c_style);
}

int64_t bits_of(const Table& table, const char* name) {
  for (int64_t bits = M3_BOOK_MIN_BITS; bits <= M3_BOOK_MAX_BITS; ++bits)
    if (table.shape(1) == py::ssize_t{1} << bits) return bits;
  throw py::value_error(std::string(name) + ": expected 2^4 to 2^14 entries, got " + std::to_string(table.shape(1)));
}

M3Book book_of(const Table& coarse, const Table& fine) {
  if (coarse.shape(0) != 2) throw py::value_error("coarse: expected shape [2, 2^b, D/2], got " + describe(coarse));
  if (fine.dtype().itemsize() != coarse.dtype().itemsize())
    throw py::value_error("fine: expected the dtype of coarse, got " + describe(fine));
  M3Book book{};
  book.dim = 2 * coarse.shape(2), book.fine_parts = fine.shape(0);
  book.coarse_bits = bits_of(coarse, "coarse"), book.fine_bits = bits_of(fine, "fine");
  book.dtype = coarse.dtype().itemsize() == 4 ? M3_F32 : M3_F16;
  if (book.fine_parts * fine.shape(2) != book.dim)
    throw py::value_error("fine: expected pieces that make up " + std::to_string(book.dim) + " values together, got " +
                          describe(fine));
  book.coarse = coarse.data(), book.fine = fine.data();
  return book;
}

int64_t code_bytes(const py::array& coarse, const py::array& fine) {
  const M3Book book = book_of(as_table(coarse, "coarse"), as_table(fine, "fine"));
  return m3_book_code_bytes(&book);
}

py::array vq_dequantize(const py::array& codes, const py::array& coarse, const py::array& fine, const py::object& rot,
                        const std::string& dtype) {
  const Table first = as_table(coarse, "coarse"), second = as_table(fine, "fine");
  M3VqDequantizeParams p{};
  p.book = book_of(first, second);
  const int64_t width = m3_book_code_bytes(&p.book);
  if (!py::isinstance<py::array_t<uint8_t>>(codes) || codes.ndim() < 1 || codes.shape(codes.ndim() - 1) != width)
    throw py::value_error("codes: expected uint8 [..., " + std::to_string(width) + "], got " + describe(codes));
  const py::array rows = py::array::ensure(codes, py::array::c_style);
  py::array_t<float, py::array::c_style> rotation;
  if (!rot.is_none()) {
    const py::array given = py::array::ensure(rot);
    if (!py::isinstance<py::array_t<float>>(given) || given.ndim() != 2 || given.shape(0) != p.book.dim ||
        given.shape(1) != p.book.dim)
      throw py::value_error("rot: expected float32 [D, D] with D = " + std::to_string(p.book.dim) + ", got " +
                            describe(given));
    rotation = py::array_t<float, py::array::c_style>::ensure(given);
    p.book.rot = rotation.data();
  }
  if (dtype != "float32" && dtype != "float16")
    throw py::value_error("dtype: expected float32 or float16, got " + dtype);
  p.dtype = dtype == "float32" ? M3_F32 : M3_F16;
  std::vector<py::ssize_t> shape(rows.shape(), rows.shape() + rows.ndim() - 1);
  p.vectors = 1;
  for (const py::ssize_t n : shape) p.vectors *= n;
  shape.push_back(p.book.dim);
  py::array out(py::dtype(dtype), shape);
  p.codes = static_cast<const uint8_t*>(rows.data()), p.code_stride = width, p.out = out.mutable_data();
  m3_status status;
  {
    py::gil_scoped_release release;
    status = m3_vq_dequantize_cpu(&p);
  }
  check(status);
  return out;
}

}  // namespace

void add_codec(py::module_& module) {
  module.def("code_bytes", &code_bytes, py::arg("coarse"), py::arg("fine"));
  module.def("vq_dequantize", &vq_dequantize, py::arg("codes"), py::arg("coarse"), py::arg("fine"), py::arg("rot"),
             py::arg("dtype"));
}

}  // namespace m3::numpy
