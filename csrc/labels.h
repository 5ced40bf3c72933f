// Repeated labels: the terms that they add to the losses, and their gradients, one kind of rows
// after the other. fasterase/ops/contrastive/labels.py gives the formulas and the meaning of kinds.
#pragma once

#include <numeric>

#include "group.h"

namespace fasterase {

// Longer runs are added up in pieces: rounding errors grow with the length of a chain.
constexpr int64_t kPiece = 64;

// The fields of `Kinds`, stacked, [4, N].
inline Tensor find_kinds(const Tensor& labels, at::IntArrayRef groups) {
  const Tensor keys = labels.to(at::kLong).contiguous();
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int64_t total = keys.numel();
  Tensor kinds = at::zeros({4, total}, at::kLong);
  int64_t* const of_row = kinds.mutable_data_ptr<int64_t>();
  int64_t *piece_of_row = of_row + total, *rows_of_kind = piece_of_row + total,
          *of_piece = rows_of_kind + total;
  std::vector<int64_t> order(total);
  std::iota(order.begin(), order.end(), 0);
  int64_t kind = 0, piece = 0, begin = 0;
  for (const int64_t n : groups) {
    const auto is_before = [key](int64_t i, int64_t j) {
      return key[i] != key[j] ? key[i] < key[j] : i < j;
    };
    std::sort(order.begin() + begin, order.begin() + begin + n, is_before);
    const int64_t end_of_group = begin + n;
    for (int64_t end = begin; begin < end_of_group; begin = end, ++kind) {
      while (end < end_of_group && key[order[end]] == key[order[begin]]) ++end;
      for (int64_t i = begin; i < end; ++i) {
        piece += i > begin && (i - begin) % kPiece == 0;
        of_row[order[i]] = of_piece[piece] = kind;
        piece_of_row[order[i]] = piece;
        rows_of_kind[order[i]] = end - begin;
      }
      ++piece;
    }
  }
  return kinds;
}

// Calls visit(rows, count) for every kind, in parallel; the rows of one ascend.
template <typename Visit>
void for_each_kind(const Tensor& kinds, int64_t width, const Visit& visit) {
  // Below this many elements a second thread costs more than it saves.
  constexpr int64_t least_work = int64_t(1) << 16;
  const int64_t total = kinds.size(1);
  const int64_t* const of_row = kinds.const_data_ptr<int64_t>();
  std::vector<int64_t> starts(total + 1), order(total);
  for (int64_t i = 0; i < total; ++i) ++starts[of_row[i] + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int64_t> next(starts);
  for (int64_t i = 0; i < total; ++i) order[next[of_row[i]]++] = i;
  at::parallel_for(0, total, at::divup(least_work, std::max<int64_t>(width, 1)),
                   [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t first = starts[of_row[order[i]]], last = starts[of_row[order[i]] + 1];
      if (i == first) visit(order.data() + first, last - first);
      i = last;
    }
  });
}

// sum = the sum over the rows, at least one, of weights[row] * x[row], [width]; null weights are 1.
template <typename T>
void add_up_rows(const T* x, const T* weights, const int64_t* rows, int64_t count, int64_t width,
                 T* sum) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = x + rows[i] * width;
    const T weight = weights ? weights[rows[i]] : T(1);
    if (i == 0) {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) sum[j] = weight * row[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) sum[j] += weight * row[j];
    }
  }
}

// mean = such a sum over the number of rows. Memory: piece, [width], is scratch.
template <typename T>
void average_rows(const T* x, const T* weights, const int64_t* rows, int64_t count, int64_t width,
                  T* piece, T* mean) {
  add_up_rows(x, weights, rows, std::min(kPiece, count), width, mean);
  for (int64_t begin = kPiece; begin < count; begin += kPiece) {
    add_up_rows(x, weights, rows + begin, std::min(kPiece, count - begin), width, piece);
    add_row(piece, mean, width);
  }
  const T share = T(1) / T(count);
  for (int64_t j = 0; j < width; ++j) mean[j] *= share;
}

template <typename T>
Tensor compute_terms(const Tensor& image, const Tensor& text, const Tensor& kinds) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  const Tensor sides[2] = {image.to(type).contiguous(), text.to(type).contiguous()};
  const int64_t total = image.size(0), width = image.size(1);
  Tensor terms = at::zeros({2, total}, type);
  T* const out = terms.mutable_data_ptr<T>();
  for_each_kind(kinds, width, [&](const int64_t* rows, int64_t count) {
    if (count == 1) return;
    std::vector<T> piece(width), mean(width);
    for (int way = 0; way < 2; ++way) {
      const T* own = sides[way].template const_data_ptr<T>();
      const T* other = sides[1 - way].template const_data_ptr<T>();
      average_rows<T>(other, nullptr, rows, count, width, piece.data(), mean.data());
      for (int64_t i = 0; i < count; ++i) {
        const T *x = own + rows[i] * width, *y = other + rows[i] * width;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; ++j) sum += x[j] * (y[j] - mean[j]);
        out[way * total + rows[i]] = sum;
      }
    }
  });
  return terms;
}

// The gradient of one side: own * (y - mean y) + (other * y - mean of other * y), y the other side.
template <typename T>
Tensor differentiate_terms(const Tensor& other_side, const T* own, const T* other,
                           const Tensor& kinds) {
  const Tensor features = other_side.to(c10::CppTypeToScalarType<T>::value).contiguous();
  Tensor gradient = at::empty_like(features);
  const int64_t width = features.size(1);
  const T* const side = features.template const_data_ptr<T>();
  T* const to = gradient.template mutable_data_ptr<T>();
  for_each_kind(kinds, width, [&](const int64_t* rows, int64_t count) {
    if (count == 1) {
      std::fill_n(to + rows[0] * width, width, T(0));
      return;
    }
    std::vector<T> piece(width), mean(width), weighed(width);
    average_rows<T>(side, nullptr, rows, count, width, piece.data(), mean.data());
    average_rows<T>(side, other, rows, count, width, piece.data(), weighed.data());
    for (int64_t i = 0; i < count; ++i) {
      const T* y = side + rows[i] * width;
      T* d = to + rows[i] * width;
      const T own_weight = own[rows[i]], other_weight = other[rows[i]];
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        d[j] = own_weight * (y[j] - mean[j]) + (other_weight * y[j] - weighed[j]);
      }
    }
  });
  return gradient;
}

}  // namespace fasterase
