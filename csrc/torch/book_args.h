// The tables of a book as tensors -> M3Book, with the checks of memory3_kernels/ops/_codec.py.
#pragma once

#include "m3/book.h"
#include "torch/tensor_args.h"

namespace m3::binding {

// Keeps contiguous tables alive while `view` points into them.
struct BookArgs {
  Tensor coarse, fine;
  std::optional<Tensor> rot;
  M3Book view{};
};

// log2 of a table's entries; an error unless it is a power of two within the format's bits.
inline int64_t table_bits(const Tensor& table, const std::string& name) {
  for (int64_t bits = M3_BOOK_MIN_BITS; bits <= M3_BOOK_MAX_BITS; ++bits)
    if (table.size(1) == int64_t{1} << bits) return bits;
  STD_TORCH_CHECK(false, name, ": expected 2^", M3_BOOK_MIN_BITS, " to 2^", M3_BOOK_MAX_BITS, " entries, got ",
                  table.size(1));
  return 0;
}

// `side` goes before the names of the tables in errors.
inline BookArgs book_args(const Tensor& coarse, const Tensor& fine, const std::optional<Tensor>& rot,
                          const std::string& side = "") {
  const std::string coarse_name = side + "coarse", fine_name = side + "fine", rot_name = side + "rot";
  expect_shape(coarse, coarse_name.c_str(), {2, -1, -1});
  expect_shape(fine, fine_name.c_str(), {-1, -1, -1});
  const bool half = coarse.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(half || coarse.scalar_type() == ScalarType::Float,
                  coarse_name, ": expected float32 or float16 tables, got ",
                  torch::headeronly::toString(coarse.scalar_type()));
  expect_type(fine, fine_name.c_str(), coarse.scalar_type());
  BookArgs args{as_contiguous(coarse), as_contiguous(fine), std::nullopt, {}};
  M3Book& book = args.view;
  book.dtype = half ? M3_F16 : M3_F32;
  book.coarse_bits = table_bits(coarse, coarse_name), book.fine_bits = table_bits(fine, fine_name);
  book.dim = 2 * coarse.size(2), book.fine_parts = fine.size(0);
  STD_TORCH_CHECK(book.dim >= 8 && book.dim % 8 == 0 && book.dim <= M3_BOOK_MAX_DIM,
                  coarse_name, ": expected entries of half a head dimension that is a multiple of 8 up to ",
                  M3_BOOK_MAX_DIM, ", got ", coarse.size(2));
  STD_TORCH_CHECK(book.fine_parts > 0 && book.fine_parts * fine.size(2) == book.dim,
                  fine_name, ": expected pieces that make up ", book.dim, " values together, got ", book.fine_parts,
                  " x ", fine.size(2));
  if (rot) {
    expect_shape(*rot, rot_name.c_str(), {book.dim, book.dim});
    expect_type(*rot, rot_name.c_str(), ScalarType::Float);
    args.rot = as_contiguous(*rot);
    book.rot = args.rot->const_data_ptr<float>();
  }
  book.coarse = args.coarse.const_data_ptr(), book.fine = args.fine.const_data_ptr();
  return args;
}

}  // namespace m3::binding
