// What a decoder layer does to each token by itself, in one pass over memory each: normalise, rotate, gate, scale.
// Everything is computed in float; a row's result depends on the row alone.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "lanes.h"
#include "parallel.h"

namespace {

// Elements below which calling a thread costs more than it saves: one that sleeps, or one that is awake in a step.
constexpr int64_t kGrain = 1 << 15, kGrainInStep = 1 << 12;

// Calls row(i) for every row; `width` elements are work on a row.
template <typename Row>
void for_each_row(int64_t rows, int64_t width, const Row& row) {
  const int64_t grain = StepThreads::held() == nullptr ? kGrain : kGrainInStep;
  share_out(0, rows, std::max<int64_t>(1, grain / std::max<int64_t>(width, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(i);
  });
}

template <typename Stored>
Lanes inverse_rms(const Stored* x, int64_t d, double eps) {
  Lanes even(0.0f), odd(0.0f);  // two sums, as one would wait for itself
  for (int64_t i = 0; i < d; i += 2 * kLanes) {
    const Lanes first = load_lanes(x + i), second = load_lanes(x + i + kLanes);
    even = at::vec::fmadd(first, first, even);
    odd = at::vec::fmadd(second, second, odd);
  }
  return Lanes(1.0f / std::sqrt(sum_of(even + odd) / static_cast<float>(d) + static_cast<float>(eps)));
}

// Adds update [rows, d] to x [rows, d] in place, if there is one; returns x / rms(x) * weight [d].
at::Tensor add_rms_norm(at::Tensor x, const std::optional<at::Tensor>& update, const at::Tensor& weight, double eps) {
  const int64_t d = x.size(-1), rows = x.numel() / d;
  TORCH_CHECK(x.is_contiguous() && d % 32 == 0 && weight.numel() == d && weight.scalar_type() == x.scalar_type());
  TORCH_CHECK(!update || (update->is_contiguous() && update->sizes() == x.sizes() && update->scalar_type() == x.scalar_type()));
  at::Tensor output = at::empty(x.sizes(), x.options());
  dispatch(x.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    Stored *sums = x.mutable_data_ptr<Stored>(), *target = output.mutable_data_ptr<Stored>();
    const Stored *scales = weight.const_data_ptr<Stored>(), *added = update ? update->const_data_ptr<Stored>() : nullptr;
    for_each_row(rows, d, [&](int64_t row) {
      Stored* own = sums + row * d;
      if (added)
        for (int64_t i = 0; i < d; i += kLanes)
          store_lanes(load_lanes(own + i) + load_lanes(added + row * d + i), own + i);
      const Lanes factor = inverse_rms(own, d, eps);
      for (int64_t i = 0; i < d; i += kLanes)
        store_lanes(load_lanes(own + i) * factor * load_lanes(scales + i), target + row * d + i);
    });
  });
  return output;
}

// Heads x [T, heads, d], normalised by weight [heads, d] if there is one, then rotated: halves (a, b) become
// (a cos - b sin, b cos + a sin). cos and signed_sin [T, 1, d]; the sine of the first half comes negative.
at::Tensor rotate_heads(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps, const at::Tensor& cos,
                        const at::Tensor& signed_sin) {
  const int64_t tokens = x.size(0), heads = x.size(1), d = x.size(2), half = d / 2;
  TORCH_CHECK(x.stride(2) == 1 && x.stride(1) == d && d % 32 == 0 && cos.stride(2) == 1 && signed_sin.stride(2) == 1);
  at::Tensor output = at::empty({tokens, heads, d}, x.options());
  dispatch(x.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    const Stored* scales = weight ? weight->const_data_ptr<Stored>() : nullptr;
    for_each_row(tokens, heads * d, [&](int64_t token) {
      const Stored* cosines = cos.const_data_ptr<Stored>() + token * cos.stride(0);
      const Stored* sines = signed_sin.const_data_ptr<Stored>() + token * signed_sin.stride(0);
      for (int64_t head = 0; head < heads; ++head) {
        const Stored* own = x.const_data_ptr<Stored>() + token * x.stride(0) + head * d;
        Stored* target = output.mutable_data_ptr<Stored>() + (token * heads + head) * d;
        const Lanes factor = weight ? inverse_rms(own, d, eps) : Lanes(1.0f);
        for (int64_t i = 0; i < half; i += kLanes) {
          Lanes a = load_lanes(own + i), b = load_lanes(own + half + i);
          if (weight) {
            a = a * factor * load_lanes(scales + head * d + i);
            b = b * factor * load_lanes(scales + head * d + half + i);
          }
          store_lanes(at::vec::fmadd(b, load_lanes(sines + i), a * load_lanes(cosines + i)), target + i);
          store_lanes(at::vec::fmadd(a, load_lanes(sines + half + i), b * load_lanes(cosines + half + i)), target + half + i);
        }
      }
    });
  });
  return output;
}

// silu(gate) * up of gate_up [rows, 2 d]
at::Tensor gated_silu(const at::Tensor& gate_up) {
  const int64_t rows = gate_up.size(0), d = gate_up.size(1) / 2;
  TORCH_CHECK(gate_up.is_contiguous() && d % 16 == 0);
  at::Tensor output = at::empty({rows, d}, gate_up.options());
  dispatch(gate_up.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    for_each_row(rows, 2 * d, [&](int64_t row) {
      const Stored* gate = gate_up.const_data_ptr<Stored>() + row * 2 * d;
      Stored* target = output.mutable_data_ptr<Stored>() + row * d;
      for (int64_t i = 0; i < d; i += kLanes) {
        const Lanes x = load_lanes(gate + i);
        store_lanes(x / (Lanes(1.0f) + x.neg().exp_u20()) * load_lanes(gate + d + i), target + i);
      }
    });
  });
  return output;
}

// Each row of x [rows, d] divided by its largest magnitude, as float, and those magnitudes [rows, 1].
std::tuple<at::Tensor, at::Tensor> scale_rows(const at::Tensor& x) {
  const int64_t rows = x.size(0), d = x.size(1);
  TORCH_CHECK(x.is_contiguous() && d % 16 == 0);
  at::Tensor scaled = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  at::Tensor largest = at::empty({rows, 1}, scaled.options());
  dispatch(x.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    for_each_row(rows, d, [&](int64_t row) {
      const Stored* own = x.const_data_ptr<Stored>() + row * d;
      Lanes highest(std::numeric_limits<float>::min());
      for (int64_t i = 0; i < d; i += kLanes) highest = at::vec::maximum(highest, load_lanes(own + i).abs());
      const float most = highest_of(highest);
      largest.mutable_data_ptr<float>()[row] = most;
      float* target = scaled.mutable_data_ptr<float>() + row * d;
      for (int64_t i = 0; i < d; i += kLanes) (load_lanes(own + i) / Lanes(most)).store(target + i);
    });
  });
  return {scaled, largest};
}

// The first place of the highest number in each row of x [rows, d]: [rows]; 0 for a row of NaNs.
at::Tensor argmax(const at::Tensor& x) {
  const int64_t rows = x.size(0), d = x.size(1), whole = d / kLanes * kLanes;
  TORCH_CHECK(x.is_contiguous());
  at::Tensor output = at::zeros({rows}, x.options().dtype(at::kLong));
  dispatch(x.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    int64_t* places = output.mutable_data_ptr<int64_t>();
    for_each_row(rows, d, [&](int64_t row) {
      const Stored* own = x.const_data_ptr<Stored>() + row * d;
      Lanes most(-std::numeric_limits<float>::infinity());
      for (int64_t i = 0; i < whole; i += kLanes) most = at::vec::maximum(most, load_lanes(own + i));
      float highest = highest_of(most);
      for (int64_t i = whole; i < d; ++i) highest = std::max(highest, static_cast<float>(own[i]));
      for (int64_t i = 0; i < d; ++i) {
        if (static_cast<float>(own[i]) == highest) {
          places[row] = i;
          break;
        }
      }
    });
  });
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nanovllm, library) {
  library.def("add_rms_norm(Tensor(a!) x, Tensor? update, Tensor weight, float eps) -> Tensor");
  library.def("rotate_heads(Tensor x, Tensor? weight, float eps, Tensor cos, Tensor signed_sin) -> Tensor");
  library.def("gated_silu(Tensor gate_up) -> Tensor");
  library.def("argmax(Tensor x) -> Tensor");
  library.def("scale_rows(Tensor x) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(nanovllm, CPU, library) {
  library.impl("add_rms_norm", add_rms_norm);
  library.impl("rotate_heads", rotate_heads);
  library.impl("gated_silu", gated_silu);
  library.impl("argmax", argmax);
  library.impl("scale_rows", scale_rows);
}
