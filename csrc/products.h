// Products of tiles: by BLAS, and of bf16 matrices with fp32 sums by torch's kernels for AMX, the
// matrix units of Intel's Xeons.
//
// torch compiles a kernel for each shape of bf16 products and keeps it: here all their factors are
// padded to multiples of `kBlock`, so that only the depth makes a difference.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <type_traits>

#ifdef __x86_64__
#include <ATen/native/CPUBlas.h>
#endif

// Null where torch does not export its BLAS.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*,
                                  const float*, const float*, const int*, const float*,
                                  const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*,
                                  const double*, const double*, const int*, const double*,
                                  const int*, const double*, double*, const int*);
}

namespace fasterase {

// A matrix [rows, cols] whose rows are `stride` apart or, turned, whose columns are.
template <typename T>
struct Factor {
  const T* data;
  int64_t rows, cols, stride;
  bool is_turned = false;

  Factor turn() const { return {data, cols, rows, stride, !is_turned}; }

  // Even where there are no columns, BLAS wants a stride of at least 1.
  int blas_stride() const { return std::max({stride, is_turned ? rows : cols, int64_t(1)}); }

  at::Tensor view() const {
    return at::from_blob(const_cast<T*>(data), {rows, cols},
                         is_turned ? at::IntArrayRef{1, stride} : at::IntArrayRef{stride, 1},
                         c10::CppTypeToScalarType<T>::value);
  }
};

// out = scale * left @ right, or adds that; rows of out are `out_stride` apart.
//
// Not by tensors: of tiles with 64 rows, making those takes a tenth of the time of the products.
// Processors other than x86-64 may have something better than BLAS, which torch knows.
template <typename T>
inline void multiply(const Factor<T>& left, const Factor<T>& right, T scale, bool adds, T* out,
                     int64_t out_stride) {
  const Factor<T> to{out, left.rows, right.cols, out_stride};
  const T beta = adds ? 1 : 0;
#ifdef __x86_64__
  const auto gemm = [] {
    if constexpr (std::is_same_v<T, float>) return sgemm_;
    else return dgemm_;
  }();
  if (gemm != nullptr) {
    // BLAS reads columns first: it computes out.T = right.T @ left.T.
    const auto mode = [](const Factor<T>& side) { return side.is_turned ? 'T' : 'N'; };
    const char modes[] = {mode(right), mode(left)};
    const int rows = left.rows, cols = right.cols, depth = left.cols;
    const int strides[] = {right.blas_stride(), left.blas_stride(), to.blas_stride()};
    gemm(&modes[0], &modes[1], &cols, &rows, &depth, &scale, right.data, &strides[0], left.data,
         &strides[1], &beta, out, &strides[2]);
    return;
  }
#endif
  at::Tensor tensor = to.view();
  at::addmm_out(tensor, tensor, left.view(), right.view(), beta, scale);
}

using Bf16 = at::BFloat16;

constexpr int64_t kBlock = 64;

inline int64_t pad(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

inline bool has_amx() {
#ifdef __x86_64__
  return at::native::cpublas::could_pack(at::kBFloat16);
#else
  return false;
#endif
}

// Others that use AMX configure a thread's tiles anew, which torch does not notice: each thread must
// let go of them before it runs something else.
struct ReleaseTiles {
  ~ReleaseTiles() {
#ifdef __x86_64__
    if (has_amx()) at::native::cpublas::brgemm_release();
#endif
  }
};

// Packs a right factor, [depth, cols], whose element (k, j) is at data[k * down + j * across]:
// blocks of 64 columns, pairs of rows interleaved, as AMX reads them. Columns up to pad(cols) are
// read, rows beyond `depth` are 0.
inline void pack(const Bf16* data, int64_t down, int64_t across, int64_t depth, int64_t cols,
                 Bf16* packed) {
  for (int64_t block = 0; block < cols; block += kBlock) {
    for (int64_t k = 0; k < pad(depth); ++k) {
      Bf16* line = packed + block * pad(depth) + k / 2 * 2 * kBlock + k % 2;
      const Bf16* from = data + k * down + block * across;
      for (int64_t j = 0; j < kBlock; ++j) line[2 * j] = k < depth ? from[j * across] : Bf16(0);
    }
  }
}

// [64, 64] = left @ right. Without AMX in plain loops over the same memory, for tests.
inline void multiply_block(const Bf16* left, int64_t stride, const Bf16* right, int64_t depth,
                           float* block) {
#ifdef __x86_64__
  if (has_amx()) {
    at::native::cpublas::brgemm(kBlock, kBlock, depth, stride, /*ld_b=*/kBlock, /*ld_c=*/kBlock,
                                /*add_C=*/false, left, right, block);
    return;
  }
#endif
  std::fill_n(block, kBlock * kBlock, 0.f);
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t k = 0; k < depth; ++k) {
      const float factor = left[i * stride + k];
      const Bf16* line = right + k / 2 * 2 * kBlock + k % 2;
      for (int64_t j = 0; j < kBlock; ++j) block[i * kBlock + j] += factor * float(line[2 * j]);
    }
  }
}

// out = factor * left @ right, or adds that; out is [rows, cols]. Of left, pad(rows) rows are read.
inline void multiply_bf16(const Bf16* left, int64_t stride, const Bf16* right, int64_t rows,
                          int64_t depth, int64_t cols, float factor, bool adds, float* out,
                          int64_t out_stride) {
  alignas(64) float block[kBlock * kBlock];
  for (int64_t c = 0; c < cols; c += kBlock) {
    for (int64_t r = 0; r < rows; r += kBlock) {
      multiply_block(left + r * stride, stride, right + c * pad(depth), pad(depth), block);
      const int64_t height = std::min(kBlock, rows - r), width = std::min(kBlock, cols - c);
      for (int64_t i = 0; i < height; ++i) {
        float* to = out + (r + i) * out_stride + c;
        const float* from = block + i * kBlock;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) to[j] = factor * from[j] + (adds ? to[j] : 0.f);
      }
    }
  }
}

// Rounds g, [rows, cols], to left factors [pad(rows), pad(cols)], and turned.
inline void round_tile(const float* g, int64_t rows, int64_t cols, Bf16* rounded, Bf16* turned) {
  const int64_t height = pad(rows), width = pad(cols);
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      rounded[i * width + j] = i < rows && j < cols ? Bf16(g[i * cols + j]) : Bf16(0);
    }
  }
  // By blocks, which the fastest cache holds.
  for (int64_t r = 0; r < height; r += kBlock) {
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t i = r; i < r + kBlock; ++i) turned[j * height + i] = rounded[i * width + j];
    }
  }
}

}  // namespace fasterase
