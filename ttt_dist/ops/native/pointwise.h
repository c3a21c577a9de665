// GELU in its tanh form with two derivatives, LayerNorm, and the inner loss, on plain arrays.
//
// The same formulas as in ttt_dist/ops/activation.py and inner_loss.py, which have them derived.
// Loops are left to the compiler to vectorise; NaN and infinities come through.
#pragma once

#include <cmath>
#include <cstring>

#include "products.h"

namespace ttt {

// e^x to 2 units in the last place; 0 or close to the largest number where x is far out.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
    // x - n ln 2, ln 2 in two parts, the first of few enough bits that n times it is exact.
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;  // the Cephes library's polynomial
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

inline double exponential(double x) { return std::exp(x); }

template <class T>
struct Gelu {
    static constexpr T kLinear = T(1.5957691216057308);  // 2 sqrt(2 / pi)
    static constexpr T kCubic = T(0.044715) * kLinear;

    static T scale(T x) { return kLinear + kCubic * x * x; }
    static T sigmoid(T y) { return T(1) / (T(1) + exponential(-y)); }

    static void value(Size count, const T *__restrict x, T *__restrict out) {
        for (Size i = 0; i < count; ++i) out[i] = x[i] * sigmoid(scale(x[i]) * x[i]);
    }

    // `slope` may be x.
    static void value_and_slope(Size count, const T *x, T *__restrict out, T *slope) {
#pragma GCC ivdep
        for (Size i = 0; i < count; ++i) {
            const T part = scale(x[i]), s = sigmoid(part * x[i]), g = x[i] * s;
            out[i] = g;
            slope[i] = s + (g - g * s) * (T(3) * part - T(2) * kLinear);
        }
    }

    // The second derivative times `factor`, plus a b.
    static void curvature(Size count, const T *__restrict x, const T *__restrict factor,
                          const T *__restrict a, const T *__restrict b, T *__restrict out) {
        for (Size i = 0; i < count; ++i) {
            const T part = scale(x[i]), s = sigmoid(part * x[i]), p = s - s * s;
            const T slope = T(3) * part - T(2) * kLinear;
            const T bend = x[i] * slope * slope * (T(1) - T(2) * s) + T(4) * slope;
            out[i] = factor[i] * (bend - T(2) * kLinear) * p + a[i] * b[i];
        }
    }
};

template <class T>
T sum(Size d, const T *__restrict x) {
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (Size i = 0; i < d; ++i) total += x[i];
    return total;
}

template <class T>
T dot(Size d, const T *__restrict x, const T *__restrict y) {
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (Size i = 0; i < d; ++i) total += x[i] * y[i];
    return total;
}

// x_hat of one token; returns r = (var + eps)^-1/2. `x_hat` may be z.
template <class T>
T normalise(Size d, const T *z, T eps, T *x_hat) {
    const T mean = sum(d, z) / T(d);
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (Size i = 0; i < d; ++i) squares += (z[i] - mean) * (z[i] - mean);
    const T r = T(1) / std::sqrt(squares / T(d) + eps);
#pragma GCC ivdep
    for (Size i = 0; i < d; ++i) x_hat[i] = (z[i] - mean) * r;
    return r;
}

// P(g) = g - mean(g) - x_hat mean(g x_hat), times `factor`; `out` may be g.
template <class T>
void project(Size d, const T *g, const T *__restrict x_hat, T factor, T *out) {
    const T mean = sum(d, g) / T(d), along = dot(d, g, x_hat) / T(d);
#pragma GCC ivdep
    for (Size i = 0; i < d; ++i) out[i] = (g[i] - mean - x_hat[i] * along) * factor;
}

// Matrix `[rows, columns]` with rows `from_row` apart, transposed.
template <class T>
void transpose(Size rows, Size columns, const T *__restrict from, Size from_row, T *__restrict to,
               Size to_row) {
    constexpr Size kBlock = 16;
    for (Size i0 = 0; i0 < rows; i0 += kBlock)
        for (Size j0 = 0; j0 < columns; j0 += kBlock) {
            const Size i1 = std::min(rows, i0 + kBlock), j1 = std::min(columns, j0 + kBlock);
            for (Size j = j0; j < j1; ++j)
                for (Size i = i0; i < i1; ++i) to[j * to_row + i] = from[i * from_row + j];
        }
}

template <class T>
void copy_rows(Size rows, Size columns, const T *from, Size from_row, T *to, Size to_row) {
    for (Size i = 0; i < rows; ++i)
        std::memcpy(to + i * to_row, from + i * from_row, columns * sizeof(T));
}

}  // namespace ttt
