// One square problem: its logits by tiles, their distribution over threads, and the kept ones.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <type_traits>
#include <vector>

#include "labels.h"
#include "products.h"
#include "rows.h"

namespace fasterase {

using at::Tensor;

// exp(66) times 2^20 columns, also times the KL's (s0 - s), still fits fp32.
constexpr double kHeadroom = 66.0;
// A smaller sum may have lost terms to underflow: fp32 is normal down to 2^-126.
constexpr double kUnderflow = 0x1p-80;

// Runs tensor calls below autograd, autocast and dispatch modes; each worker thread needs one.
struct PlainTensors {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autograd_dispatch_keyset |
                                                 c10::autocast_dispatch_keyset};
};

struct Span {
  int64_t begin, size;
};

// A group's rows, and likewise its columns, in `count` nearly equal parts.
struct Parts {
  int64_t n, count;

  // Parts of at most `tile` rows, a multiple of the number of threads where they stay large enough.
  static Parts choose(int64_t n, int64_t width, int64_t tile) {
    constexpr int64_t smallest_tile = 64;
    // Below this many multiply-adds a second thread costs more than it saves.
    constexpr int64_t least_work = int64_t(1) << 22;
    const int64_t few = std::max<int64_t>(1, at::divup(n, tile));
    const int64_t threads = at::get_num_threads();
    if (threads == 1 || n * n * width < least_work) return {n, few};
    const int64_t even = at::divup(few, threads) * threads;
    return {n, std::max(few, std::min(even, at::divup(n, smallest_tile)))};
  }

  int64_t largest() const { return at::divup(n, count); }

  Span operator[](int64_t k) const {
    const int64_t begin = n * k / count;
    return {begin, n * (k + 1) / count - begin};
  }

  // Calls visit(rows) for every part, in parallel.
  template <typename Visit>
  void for_each_part(const Visit& visit) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      PlainTensors guard;
      for (int64_t k = begin; k < end; ++k) visit((*this)[k]);
    });
  }

  // Calls visit(row part, column part) for every tile. In a step no two threads share rows or
  // columns, so each may add to sums of either; the order of additions is the same for any number
  // of threads.
  template <typename Visit>
  void for_each_tile(const Visit& visit) const {
    for (int64_t step = 0; step < count; ++step) {
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        PlainTensors guard;
        ReleaseTiles release;
        for (int64_t r = begin; r < end; ++r) visit(r, (r + step) % count);
      });
    }
  }
};

// The softmax over S, in O(n). Index 0: rows, 1: columns.
template <typename T>
struct Softmax {
  T* shift[2];             // subtracted from the logits before exp
  T* sums[2];              // of exp(s - shift) beside the diagonal
  T* miss_probability[2];  // the probability beside the diagonal
  bool is_shared;          // one shift everywhere, so one exp is enough for both directions
};

// Some rows of features, converted to T where they are of another type.
template <typename T>
class Rows {
 public:
  Rows(const Tensor& side, Span rows) : size_(rows.size), width_(side.size(1)) {
    constexpr auto type = c10::CppTypeToScalarType<T>::value;
    if (side.scalar_type() != type) converted_ = side.narrow(0, rows.begin, size_).to(type);
    const Tensor& read = converted_.defined() ? converted_ : side;
    stride_ = read.stride(0);
    data_ = read.const_data_ptr<T>() + (converted_.defined() ? 0 : rows.begin * stride_);
  }

  const T* operator[](int64_t i) const { return data_ + i * stride_; }
  int64_t width() const { return width_; }
  Factor<T> factor() const { return {data_, size_, width_, stride_}; }

 private:
  int64_t size_, width_, stride_;
  Tensor converted_;
  const T* data_;
};

// Rows rounded to bf16, padded as left factors are read.
inline Tensor round_rows(const Tensor& side) {
  const int64_t n = side.size(0), width = side.size(1);
  Tensor rounded = at::zeros({n + kBlock - 1, pad(width)}, at::kBFloat16);
  rounded.narrow(0, 0, n).narrow(1, 0, width).copy_(side);
  return rounded;
}

// Right factors made of rounded rows, one for each part: [D, rows of the part] if they are turned,
// else [rows of the part, D].
struct RightFactors {
  Tensor packed;

  RightFactors() = default;
  RightFactors(const Tensor& rounded, const Parts& parts, bool is_turned)
      : packed(at::empty({parts.count, pad(parts.largest()) * rounded.size(1)}, at::kBFloat16)) {
    const int64_t width = rounded.size(1);
    at::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const Span rows = parts[k];
        const Bf16* data = rounded.const_data_ptr<Bf16>() + rows.begin * width;
        Bf16* to = packed.mutable_data_ptr<Bf16>() + k * packed.stride(0);
        if (is_turned) pack(data, 1, width, width, rows.size, to);
        else pack(data, width, 1, rows.size, width, to);
      }
    });
  }

  const Bf16* operator[](int64_t part) const {
    return packed.const_data_ptr<Bf16>() + part * packed.stride(0);
  }
};

// S = scale * image @ text.T of one group, in T, or from features rounded to bf16.
template <typename T>
struct Logits {
  Tensor image, text;  // [n, D]
  T scale;
  Tensor rounded_image;  // undefined unless products are in bf16
  RightFactors turned_text;

  Rows<T> image_rows(Span rows) const { return {image, rows}; }
  Rows<T> text_rows(Span cols) const { return {text, cols}; }

  void round(const Parts& parts) {
    rounded_image = round_rows(image);
    turned_text = RightFactors(round_rows(text), parts, /*is_turned=*/true);
  }

  // A tile of S.
  void multiply(const Parts& parts, int64_t r, int64_t c, T* s) const {
    const Span rows = parts[r], cols = parts[c];
    if constexpr (std::is_same_v<T, float>) {
      if (rounded_image.defined()) {
        const int64_t width = rounded_image.size(1);
        const Bf16* left = rounded_image.const_data_ptr<Bf16>() + rows.begin * width;
        multiply_bf16(left, width, turned_text[c], rows.size, width, cols.size, scale,
                      /*adds=*/false, s, cols.size);
        return;
      }
    }
    const Rows<T> left = image_rows(rows), right = text_rows(cols);
    fasterase::multiply(left.factor(), right.factor().turn(), scale, /*adds=*/false, s,
                        cols.size);
  }
};

// One tile of the group's matrices, `logits[1]` of the original's where there is a reference.
template <typename T>
struct Tile {
  int64_t row_part, col_part;
  Span rows, cols;
  const T* logits[2];
};

// Memory of each thread. `tile(k)` holds an edge x edge tile, `line(k)` one row of it.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t edge, int64_t tiles, int64_t lines)
      : edge_(edge),
        tiles_(tiles),
        each_(tiles * edge * edge + lines * edge),
        memory_(at::empty({at::get_num_threads(), each_}, c10::CppTypeToScalarType<T>::value)) {}

  T* tile(int64_t k) const { return mine() + k * edge_ * edge_; }
  T* line(int64_t k) const { return mine() + tiles_ * edge_ * edge_ + k * edge_; }

 private:
  T* mine() const { return memory_.template mutable_data_ptr<T>() + at::get_thread_num() * each_; }

  int64_t edge_, tiles_, each_;
  Tensor memory_;
};

// The matrices of one group: the current one and, where there is a reference, the original's.
template <typename T>
struct Group {
  // Far below every logit and far from overflow: its exp is 0, and a difference of two is 0.
  static constexpr T nothing = T(-1e30);

  std::vector<Logits<T>> matrices;
  std::vector<Softmax<T>> softmaxes;
  Labels<T> labels;
  Parts parts;
  T* kept;                // tiles of the first `kept_parts` parts of rows
  int64_t kept_parts;
  int64_t kept_matrices;  // for each tile, how many matrices are kept, one after another
  bool is_filled;         // whether the kept logits have been computed
  bool is_bf16;           // whether features are multiplied in bf16

  // Where logits are still to be computed, and in bf16.
  void round_features() {
    if (!is_bf16 || parts.n < 2 || (is_filled && kept_parts == parts.count)) return;
    for (Logits<T>& logits : matrices) logits.round(parts);
  }

  int64_t rows() const { return parts.n; }
  bool has_ref() const { return matrices.size() > 1; }

  // Calls visit(tile) for every tile of all matrices; two tiles of `scratch` hold those not kept.
  template <typename Visit>
  void for_each_tile(const Scratch<T>& scratch, const Visit& visit) const {
    parts.for_each_tile([&](int64_t r, int64_t c) {
      const T* s = compute_tile(0, r, c, scratch.tile(0));
      const T* s0 = has_ref() ? compute_tile(1, r, c, scratch.tile(1)) : nullptr;
      visit(Tile<T>{r, c, parts[r], parts[c], {s, s0}});
    });
  }

  // Calls visit(exps) for row i of a tile of matrix k.
  template <typename Visit>
  void visit_exps(int64_t k, const Tile<T>& tile, int64_t i, const Visit& visit) const {
    const Softmax<T>& softmax = softmaxes[k];
    const T* s = tile.logits[k] + i * tile.cols.size;
    const T row_shift = softmax.shift[0][tile.rows.begin + i];
    if (softmax.is_shared) {
      visit(Exponentials<true, T>{s, row_shift, nullptr});
    } else {
      visit(Exponentials<false, T>{s, row_shift, softmax.shift[1] + tile.cols.begin});
    }
  }

  // Where the diagonal lies in row i of a tile; -1: in another tile.
  static int64_t find_diagonal(const Tile<T>& tile, int64_t i) {
    return tile.rows.begin == tile.cols.begin ? i : -1;
  }

  // Tile (r, c) of matrix k with `nothing` on the group's diagonal; in `scratch` unless it is kept.
  T* compute_tile(int64_t k, int64_t r, int64_t c, T* scratch) const {
    const Span rows = parts[r], cols = parts[c];
    const bool is_kept = r < kept_parts;
    T* s = is_kept ? kept + kept_matrices * (rows.begin * parts.n + rows.size * cols.begin) +
                         k * rows.size * cols.size
                   : scratch;
    if (is_kept && is_filled) return s;
    matrices[k].multiply(parts, r, c, s);
    if (r == c) {
      for (int64_t i = 0; i < rows.size; ++i) s[i * cols.size + i] = nothing;
    }
    return s;
  }
};

}  // namespace fasterase
