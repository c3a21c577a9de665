// Small matrix products out of one core's caches: out = start + Σ_s ± a_s b_s.
//
// Every product of the scan is written so that what is summed over multiplies a number of `a`, read
// from any place, with a row of `b`, whose numbers lie side by side: a tile of the result stays in
// registers while all terms are added up. Sums over the inner dim run in order, one number after the
// other, so a result doesn't depend on how it is cut into tiles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ttt {

using Size = std::int64_t;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

// Rows of a tile that is 1, 2 or 4 vectors wide: sums enough to hide a multiplication's latency, few
// enough to stay in registers beside a row of `b`. Measured on a core with AVX-512.
constexpr int rows_of_tile(int vectors) {
    const bool many = kRegisters == 32;
    return vectors == 1 ? (many ? 12 : 8) : vectors == 2 ? (many ? 8 : 4) : (many ? 5 : 2);
}

// Bytes of `b` that a pass over the rows of a result reads again and again: within a first-level
// cache, beside the rows of `a`.
constexpr Size kPanelBytes = 24 * 1024;

// Vectors of a register's size that may lie at any address.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float Type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
    typedef double Type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::Type;
template <class T>
constexpr Size kWidth = kVectorBytes / sizeof(T);

// Up to a whole number of vectors.
template <class T>
constexpr Size padded(Size n) {
    return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// a[i, k] = data[i row + k inner], any strides.
template <class T>
struct Left {
    const T *data;
    Size row, inner;
};

// b[k, j] = data[k row + j], rows readable up to a whole number of vectors.
template <class T>
struct Right {
    const T *data;
    Size row;
};

// A term a b of `inner` summands, added or subtracted.
template <class T>
struct Term {
    Left<T> a;
    Right<T> b;
    Size inner;
    bool subtract = false;
};

// What the sums start from: start[i, j] = data[i row + j column], column 0 or 1; zeros where null.
template <class T>
struct Start {
    const T *data = nullptr;
    Size row = 0, column = 1;
    bool subtract = false;
};

template <class T, int R, int V>
struct Tile {
    using Vec = Vector<T>;
    Vec sums[R][V];

    inline void load(const Start<T> &start, Size i, Size j) {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) {
                const T *at = start.data + (i + r) * start.row + (j + v * kWidth<T>)*start.column;
                if (!start.data)
                    sums[r][v] = Vec{};
                else if (start.column)
                    sums[r][v] = *reinterpret_cast<const Vec *>(at);
                else
                    sums[r][v] = Vec{} + *at;
                if (start.subtract) sums[r][v] = -sums[r][v];
            }
    }

    template <bool kSubtract>
    inline void add(const Term<T> &term, Size i, Size j) {
        const T *a = term.a.data + i * term.a.row;
        const T *b = term.b.data + j;
        const Size a_row = term.a.row, a_inner = term.a.inner, b_row = term.b.row;
        for (Size k = 0; k < term.inner; ++k, a += a_inner, b += b_row) {
            Vec row[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v)
                row[v] = *reinterpret_cast<const Vec *>(b + v * kWidth<T>);
#pragma GCC unroll 32
            for (int r = 0; r < R; ++r) {
                const T factor = a[r * a_row];
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) {
                    if constexpr (kSubtract)
                        sums[r][v] -= factor * row[v];
                    else
                        sums[r][v] += factor * row[v];
                }
            }
        }
    }

    inline void store(T *out, Size out_row, Size i, Size j) const {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v)
                *reinterpret_cast<Vec *>(out + (i + r) * out_row + j + v * kWidth<T>) = sums[r][v];
    }
};

// Rows [i, rows) of a column of tiles, V vectors wide at j; tiles of R rows, then of half as many.
template <class T, int R, int V>
void tiles(Size i, Size rows, Size j, const Start<T> &start, const Term<T> *terms, int count,
           T *out, Size out_row) {
    for (; i + R <= rows; i += R) {
        Tile<T, R, V> tile;
        tile.load(start, i, j);
        for (int s = 0; s < count; ++s) {
            if (terms[s].subtract)
                tile.template add<true>(terms[s], i, j);
            else
                tile.template add<false>(terms[s], i, j);
        }
        tile.store(out, out_row, i, j);
    }
    if constexpr (R > 1) {
        if (i < rows) tiles<T, R / 2, V>(i, rows, j, start, terms, count, out, out_row);
    }
}

// Columns [j, j + V vectors) of the result, in passes whose part of all `b` stays in cache.
template <class T, int V>
void columns(Size rows, Size j, Start<T> start, const Term<T> *terms, int count, T *out,
             Size out_row) {
    constexpr int R = rows_of_tile(V);
    const Size most = std::max<Size>(16, kPanelBytes / (V * kVectorBytes));
    constexpr int kPieces = 4;
    Term<T> pass[kPieces];
    int pieces = 0;
    Size held = 0;
    const auto finish = [&] {
        tiles<T, R, V>(0, rows, j, start, pass, pieces, out, out_row);
        start = Start<T>{out, out_row};
        pieces = 0;
        held = 0;
    };
    for (int s = 0; s < count; ++s) {
        Term<T> rest = terms[s];
        while (rest.inner > 0) {
            if (pieces == kPieces || held == most) finish();
            Term<T> piece = rest;
            // Few rows make one tile, which reads `b` once in any case.
            piece.inner = rows <= R ? rest.inner : std::min(rest.inner, most - held);
            pass[pieces++] = piece;
            held = rows <= R ? 0 : held + piece.inner;
            rest.a.data += piece.inner * rest.a.inner;
            rest.b.data += piece.inner * rest.b.row;
            rest.inner -= piece.inner;
        }
    }
    finish();
}

// out[i, j] for i < rows and j < columns, rounded up to whole vectors; `out` may be `start`.
template <class T, int N>
void product(Size rows, Size width, Start<T> start, const Term<T> (&terms)[N], T *out,
             Size out_row) {
    Size j = 0;
    const Size end = padded<T>(width);
    for (; j + 4 * kWidth<T> <= end; j += 4 * kWidth<T>)
        columns<T, 4>(rows, j, start, terms, N, out, out_row);
    for (; j + 2 * kWidth<T> <= end; j += 2 * kWidth<T>)
        columns<T, 2>(rows, j, start, terms, N, out, out_row);
    for (; j < end; j += kWidth<T>) columns<T, 1>(rows, j, start, terms, N, out, out_row);
}

}  // namespace ttt
