// The kernels of vq_dequantize and gather_dequantize: every warp takes 16 vectors at a time from codes to the result,
// with the next tile's codes on their way.
//
// Looking up, neighbouring lanes take neighbouring elements, so that an entry is read in whole sectors and few lines. A
// rotation is one product per tile on tensor cores: 16 vectors in shared memory times the rotation, rounded to the
// result's type once per block.
#pragma once

#include "common/cuda/shapes.cuh"
#include "common/cuda/softmax_tile.cuh"
#include "vq_dequantize/code_tile.cuh"

namespace m3::gpu {

constexpr int kDequantizeThreads = 32 * kDequantizeWarps;

struct DequantizePlan {
  CodeSource source;
  CodeFormat format;
  const void *coarse, *fine;
  const float* rot;
  void* out;
  Divider row_units, width;  // units of a vector; elements of a fine entry
  int32_t dim, unit;         // unit: 4 elements, or 2 where fine entries are no multiple of that
  int32_t tile_bytes;        // of a warp's CodeTile
  int32_t staged_bytes;      // of the fine table, if it lies in shared memory
};

M3_DEVICE float widen(float x) { return x; }
M3_DEVICE float widen(Fp16 x) { return to_float(x); }

// N values in the result's type.
template <class Out, int N>
struct Narrow {
  Group<uint32_t, N / 2> pairs;
  M3_DEVICE explicit Narrow(const float (&x)[N]) {
    M3_UNROLL
    for (int i = 0; i < N / 2; ++i) pairs.at[i] = pack<Out>(x[2 * i], x[2 * i + 1]);
  }
};
template <int N>
struct Narrow<float, N> {
  Group<float, N> values;
  M3_DEVICE explicit Narrow(const float (&x)[N]) {
    M3_UNROLL
    for (int i = 0; i < N; ++i) values.at[i] = x[i];
  }
};

constexpr int kElementsAhead = 8;  // a lane asks for, before it needs the first

// put(vector, d, values) for every unit of `rows` vectors in the coded basis; zeros for absent ones.
template <class Table, int kUnit, class Put>
M3_DEVICE void look_up_units(const DequantizePlan& p, const CodeTile& tile, const Table* fine, uint32_t present,
                             int rows, const Put& put) {
  const Table* coarse = static_cast<const Table*>(p.coarse);
  const int units = static_cast<int>(p.row_units.divisor), parts = static_cast<int>(p.format.parts.divisor);
  const int all = rows * units;
  constexpr int kAhead = kElementsAhead / kUnit;
  M3_ROLLED
  for (int from = lane_index(); from < all; from += 32 * kAhead) {
    Group<Table, kUnit> whole[kAhead], rest[kAhead];
    bool here[kAhead];
    int vector[kAhead], d[kAhead];
    M3_UNROLL
    for (int n = 0; n < kAhead; ++n) {
      const int i = from + 32 * n;
      vector[n] = p.row_units.quotient(i), d[n] = (i - vector[n] * units) * kUnit;
      here[n] = i < all && (present >> vector[n] & 1);
      if (here[n]) {
        const int part = p.width.quotient(d[n]), half = d[n] >= p.format.half ? 1 : 0;
        whole[n] = load_as<Group<Table, kUnit>>(coarse + tile.coarse_at[2 * vector[n] + half] + d[n]);
        rest[n] = load_as<Group<Table, kUnit>>(fine + tile.fine_at[vector[n] * parts + part] + d[n]);
      }
    }
    M3_UNROLL
    for (int n = 0; n < kAhead; ++n) {
      if (from + 32 * n >= all) break;
      float x[kUnit] = {};
      if (here[n]) {
        M3_UNROLL
        for (int i = 0; i < kUnit; ++i) x[i] = widen(whole[n].at[i]) + widen(rest[n].at[i]);
      }
      put(vector[n], d[n], x);
    }
  }
}

template <class Table, class Put>
M3_DEVICE void look_up(const DequantizePlan& p, const CodeTile& tile, const Table* fine, uint32_t present, int rows,
                       const Put& put) {
  if (p.unit == 4)
    look_up_units<Table, 4>(p, tile, fine, present, rows, put);
  else
    look_up_units<Table, 2>(p, tile, fine, present, rows, put);
}

// The fine table where look-ups find it: in memory, or copied to `shared` by the whole block.
template <class Table>
M3_DEVICE const Table* fine_table(const DequantizePlan& p, char* shared) {
  if (p.staged_bytes == 0) return static_cast<const Table*>(p.fine);
  for (int at = thread_index() * 16; at < p.staged_bytes; at += kDequantizeThreads * 16)
    copy_async16(shared + at, static_cast<const char*>(p.fine) + at, true);
  commit_copies();
  wait_copies<0>();
  return reinterpret_cast<const Table*>(shared);
}

// Calls body(first vector, how many, which are present) for the warp's tiles, codes unpacked.
template <bool kGather, class Body>
M3_DEVICE void for_tiles(const DequantizePlan& p, const CodeTile& tile, const Body& body) {
  const int64_t step = grid_size() * kBlockVectors;
  const int stage_bytes = kTileVectors * static_cast<int>(p.format.bytes.divisor);
  const auto copy = [&](int64_t first, int stage) {
    uint32_t present = 0;
    if (first < p.source.vectors)
      present = copy_codes<kGather>(p.source, p.format, first, tile.stage + stage * stage_bytes);
    commit_copies();
    return present;
  };
  int64_t first = block_index() * kBlockVectors + warp_index() * kTileVectors;
  uint32_t present = copy(first, 0);
  M3_ROLLED
  for (int stage = 0; first < p.source.vectors; first += step, stage ^= 1) {
    const uint32_t next = copy(first + step, stage ^ 1);
    wait_copies<1>();
    sync_warp();
    unpack_codes(tile, p.format, tile.stage + stage * stage_bytes);
    sync_warp();
    const int64_t left = p.source.vectors - first;
    body(first, left < kTileVectors ? static_cast<int>(left) : kTileVectors, present);
    sync_warp();
    present = next;
  }
}

// Vectors in the coded basis.
template <bool kGather, class Table, class Out>
M3_KERNEL void M3_THREADS(kDequantizeThreads, 8) look_up_rows(DequantizePlan p) {
  char* shared = shared_memory();
  const Table* fine = fine_table<Table>(p, shared);
  sync_block();
  const CodeTile tile(shared + p.staged_bytes + warp_index() * p.tile_bytes, p.format);
  for_tiles<kGather>(p, tile, [&](int64_t first, int rows, uint32_t present) {
    Out* out = static_cast<Out*>(p.out) + first * p.dim;
    look_up(p, tile, fine, present, rows, [&](int vector, int d, const auto& x) {
      constexpr int kUnit = sizeof(x) / sizeof(float);
      store_global(out + vector * p.dim + d, Narrow<Out, kUnit>(x));
    });
  });
}

// The rotation in the result's type, rows as in tile_at: by the whole block.
template <class T, int D>
M3_DEVICE void round_rotation(const float* rot, T* to) {
  for (int i = thread_index(); i < D * D / 4; i += kDequantizeThreads) {
    const int row = i / (D / 4), d = i % (D / 4) * 4;
    float x[4];
    load16(x, rot + i * 4);
    store_shared(to + tile_at<D>(row, d / 8) + d % 8, Narrow<T, 4>(x));
  }
}

// rows [16, D] becomes rows times rot.
template <class T, int D>
M3_DEVICE void rotate(T* rows, const T* rot) {
  QueryFragments<T, D> y;
  y.load(rows);
  sync_warp();
  M3_ROLLED
  for (int n = 0; n < D / 16; ++n) {
    float sum[2][4] = {};
    M3_UNROLL
    for (int k = 0; k < D / 16; ++k) {
      uint32_t b[4];
      load_matrices_transposed(b, rot + tile_at<D>(16 * k + lane_index() % 16, 2 * n + lane_index() / 16));
      mma<T>(sum[0], y.a[k], b[0], b[1]);
      mma<T>(sum[1], y.a[k], b[2], b[3]);
    }
    M3_UNROLL
    for (int j = 0; j < 2; ++j) {
      M3_UNROLL
      for (int h = 0; h < 2; ++h)
        store_as(rows + tile_at<D>(lane_index() / 4 + 8 * h, 2 * n + j) + lane_index() % 4 * 2,
                 pack<T>(sum[j][2 * h], sum[j][2 * h + 1]));
    }
  }
  sync_warp();
}

template <bool kGather, class Table, class T, int D>
M3_KERNEL void M3_THREADS(kDequantizeThreads, 4) rotate_rows(DequantizePlan p) {
  T* rot = reinterpret_cast<T*>(shared_memory());
  T* rows = rot + D * D + warp_index() * kTileVectors * D;
  char* shared = reinterpret_cast<char*>(rot + D * D + kDequantizeWarps * kTileVectors * D);
  round_rotation<T, D>(p.rot, rot);
  const Table* fine = fine_table<Table>(p, shared);
  sync_block();
  const CodeTile tile(shared + p.staged_bytes + warp_index() * p.tile_bytes, p.format);
  for_tiles<kGather>(p, tile, [&](int64_t first, int count, uint32_t present) {
    look_up(p, tile, fine, present, kTileVectors, [&](int vector, int d, const auto& x) {
      constexpr int kUnit = sizeof(x) / sizeof(float);
      store_shared(rows + tile_at<D>(vector, d / 8) + d % 8, Narrow<T, kUnit>(x));
    });
    sync_warp();
    rotate<T, D>(rows, rot);
    T* out = static_cast<T*>(p.out) + first * D;
    M3_ROLLED
    for (int piece = lane_index(); piece < count * (D / 8); piece += 32)
      store_global(out + piece * 8, load_as<Words>(rows + tile_at<D>(piece / (D / 8), piece % (D / 8))));
  });
}

// ---- launching -----------------------------------------------------------------------------------------------------

constexpr int64_t kMostParts = 64, kMostLookUpDim = 256;

inline m3_status check_tables(const M3Book& book) {
  if (book.dim > kMostLookUpDim || book.fine_parts > kMostParts)
    return fail(M3_UNSUPPORTED, "fine: expected at most %lld parts of %lld values together for the CUDA kernel, got "
                "%lld of %lld", static_cast<long long>(kMostParts), static_cast<long long>(kMostLookUpDim),
                static_cast<long long>(book.fine_parts), static_cast<long long>(book.dim));
  if (book.dim / book.fine_parts % 2 != 0)
    return fail(M3_UNSUPPORTED, "fine: expected entries of an even number of values for the CUDA kernel, got %lld",
                static_cast<long long>(book.dim / book.fine_parts));
  for (const void* table : {book.coarse, book.fine, static_cast<const void*>(book.rot)})
    if (reinterpret_cast<uintptr_t>(table) % 16 != 0)
      return fail(M3_UNSUPPORTED, "coarse, fine, rot: expected tables at multiples of 16 bytes for the CUDA kernel");
  return M3_OK;
}

inline CodeFormat code_format(const M3Book& book) {
  CodeFormat f;
  f.bytes = Divider(m3_book_code_bytes(&book)), f.parts = Divider(book.fine_parts);
  f.first = static_cast<int32_t>(8 * m3_book_coarse_bytes(&book));
  f.coarse_bits = static_cast<int32_t>(book.coarse_bits), f.fine_bits = static_cast<int32_t>(book.fine_bits);
  f.half = static_cast<int32_t>(book.dim / 2), f.width = static_cast<int32_t>(book.dim / book.fine_parts);
  return f;
}

// fn(element of the tables)
template <class Fn>
m3_status with_table(const M3Book& book, const Fn& fn) {
  return book.dtype == M3_F32 ? fn(float{}) : fn(Fp16{});
}

template <bool kGather>
m3_status launch_look_up(const DequantizePlan& plan, const M3Book& book, m3_dtype dtype, const Grid& grid,
                         void* stream) {
  return with_table(book, [&](auto table) -> m3_status {
    using Table = decltype(table);
    if (dtype == M3_BF16) return launch(&look_up_rows<kGather, Table, Bf16>, grid, stream, plan);
#if !defined(M3_ONE_SHAPE)
    if (dtype == M3_F16) return launch(&look_up_rows<kGather, Table, Fp16>, grid, stream, plan);
    if (dtype == M3_F32) return launch(&look_up_rows<kGather, Table, float>, grid, stream, plan);
#endif
    return fail(M3_UNSUPPORTED, "dtype: expected bfloat16, float16 or float32 for the CUDA kernel");
  });
}

template <bool kGather>
m3_status launch_rotation(const DequantizePlan& plan, const M3Book& book, m3_dtype dtype, Grid grid, void* stream) {
  if (dtype == M3_F32)
    return fail(M3_UNSUPPORTED, "dtype: expected bfloat16 or float16 with a rotation for the CUDA kernel");
  if (book.dim != 64 && book.dim != 80 && book.dim != 128)
    return fail(M3_UNSUPPORTED, "rot: expected a dimension of 64, 80 or 128 for the CUDA kernel, got %lld",
                static_cast<long long>(book.dim));
  return with_shape(dtype, book.dim, [&](auto type, auto dim) {
    return with_table(book, [&](auto table) -> m3_status {
      constexpr int D = decltype(dim)::value;
      grid.shared += (D * D + kDequantizeWarps * kTileVectors * D) * 2;
      return launch(&rotate_rows<kGather, decltype(table), decltype(type), D>, grid, stream, plan);
    });
  });
}

template <bool kGather>
m3_status dequantize(const CodeSource& source, const M3Book& book, m3_dtype dtype, void* out, void* stream) {
  if (source.vectors == 0) return M3_OK;
  if (source.vectors > kMostBlocks)
    return fail(M3_UNSUPPORTED, "codes: expected at most %lld vectors for the CUDA kernel, got %lld",
                static_cast<long long>(kMostBlocks), static_cast<long long>(source.vectors));
  M3_GPU_TRY(check_tables(book));
  DequantizePlan plan{};
  plan.source = source, plan.format = code_format(book);
  plan.coarse = book.coarse, plan.fine = book.fine, plan.rot = book.rot, plan.out = out;
  plan.dim = static_cast<int32_t>(book.dim), plan.unit = plan.format.width % 4 == 0 ? 4 : 2;
  plan.row_units = Divider(book.dim / plan.unit), plan.width = Divider(plan.format.width);
  const int64_t fine_bytes = (book.dim << book.fine_bits) * (book.dtype == M3_F32 ? 4 : 2);
  const DequantizeShape shape =
      dequantize_shape(source.vectors, fine_bytes, int64_t{1} << book.fine_bits, book.rot != nullptr);
  plan.staged_bytes = shape.staged ? static_cast<int32_t>(fine_bytes) : 0;
  plan.tile_bytes = static_cast<int32_t>(code_tile_bytes(plan.format));
  const Grid grid{shape.blocks, kDequantizeThreads, plan.staged_bytes + kDequantizeWarps * plan.tile_bytes};
  return book.rot ? launch_rotation<kGather>(plan, book, dtype, grid, stream)
                  : launch_look_up<kGather>(plan, book, dtype, grid, stream);
}

}  // namespace m3::gpu
