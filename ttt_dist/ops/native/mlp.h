// One mini-batch of TTT-MLP, forward and backward, for one head of one lane.
//
// Equations and names as in ttt_dist/ops/mlp_forward.py and mlp_backward.py. What belongs to the
// hidden layer lies transposed, a row for every hidden value and a column for every token, `[h, C]`,
// and W1 too, `[h, d]`: so no product ever needs a transposed matrix (products.h), and the weights
// are read and written in the order in which they lie.
#pragma once

#include "pointwise.h"

namespace ttt {

// Sizes of one head's mini-batch; rows are padded to whole vectors.
template <class T>
struct Sizes {
    Size C, d, h;
    bool causal;
    T eps;
    Size tokens, width;  // padded C, padded d: distances between rows

    Sizes(Size C, Size d, Size h, bool causal, double eps)
        : C(C), d(d), h(h), causal(causal), eps(T(eps)), tokens(padded<T>(C)), width(padded<T>(d)) {}
};

// Hands out pieces of one block of memory; without a block it counts what would be needed.
class Arena {
   public:
    explicit Arena(void *block) : start_(reinterpret_cast<std::uintptr_t>(block)) {}

    template <class T>
    T *take(Size count) {
        T *piece = reinterpret_cast<T *>(start_ + used_);
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return piece;
    }

    Size used() const { return used_; }

   private:
    std::uintptr_t start_;
    Size used_ = 0;
};

// One head's weights as tensors hold them.
template <class T>
struct Plain {
    T *W1, *b1, *W2, *b2;
};

// W1 [h, d] (transposed) and W2 [h, d], rows `width` apart; b1 [h], b2 [d].
template <class T>
struct Weights {
    T *W1, *b1, *W2, *b2;

    Weights(const Sizes<T> &s, Arena &arena)
        : W1(arena.take<T>(s.h * s.width)),
          b1(arena.take<T>(s.h)),
          W2(arena.take<T>(s.h * s.width)),
          b2(arena.take<T>(s.width)) {}

    // From and to W1 [d, h], b1, W2 [h, d], b2.
    void load(const Sizes<T> &s, const Plain<const T> &from) {
        transpose(s.d, s.h, from.W1, s.h, W1, s.width);
        std::memcpy(b1, from.b1, s.h * sizeof(T));
        copy_rows(s.h, s.d, from.W2, s.d, W2, s.width);
        std::memcpy(b2, from.b2, s.d * sizeof(T));
    }

    void store(const Sizes<T> &s, const Plain<T> &to) const {
        transpose(s.h, s.d, W1, s.width, to.W1, s.h);
        std::memcpy(to.b1, b1, s.h * sizeof(T));
        copy_rows(s.h, s.d, W2, s.width, to.W2, s.d);
        std::memcpy(to.b2, b2, s.d * sizeof(T));
    }

    // Between groups: W1 and b1 one after the other, W2 and b2 as well, W1 as it lies here.
    void load_border(const Sizes<T> &s, const T *first, const T *second) {
        copy_rows(s.h, s.d, first, s.d, W1, s.width);
        std::memcpy(b1, first + s.h * s.d, s.h * sizeof(T));
        copy_rows(s.h, s.d, second, s.d, W2, s.width);
        std::memcpy(b2, second + s.h * s.d, s.d * sizeof(T));
    }

    void store_border(const Sizes<T> &s, T *first, T *second) const {
        copy_rows(s.h, s.d, W1, s.width, first, s.d);
        std::memcpy(first + s.h * s.d, b1, s.h * sizeof(T));
        copy_rows(s.h, s.d, W2, s.width, second, s.d);
        std::memcpy(second + s.h * s.d, b2, s.d * sizeof(T));
    }

    // a - b
    void difference(const Sizes<T> &s, const Weights &a, const Weights &b) {
        for (Size i = 0; i < s.h * s.width; ++i) W1[i] = a.W1[i] - b.W1[i];
        for (Size i = 0; i < s.h * s.width; ++i) W2[i] = a.W2[i] - b.W2[i];
        for (Size i = 0; i < s.h; ++i) b1[i] = a.b1[i] - b.b1[i];
        for (Size i = 0; i < s.d; ++i) b2[i] = a.b2[i] - b.b2[i];
    }

    void copy(const Sizes<T> &s, const Weights &from) {
        std::memcpy(W1, from.W1, s.h * s.width * sizeof(T));
        std::memcpy(W2, from.W2, s.h * s.width * sizeof(T));
        std::memcpy(b1, from.b1, s.h * sizeof(T));
        std::memcpy(b2, from.b2, s.d * sizeof(T));
    }
};

// Rows of a tensor, `row` apart.
template <class T>
struct Rows {
    const T *data;
    Size row;
};

// What a mini-batch is given: K, Q, V [C, d]; K_T, Q_T [d, C]; eta [C]. Zeros at tokens past the end.
template <class T>
struct Tokens {
    T *K, *Q, *V, *K_T, *Q_T, *eta;
    Size count;      // tokens before the end
    bool completed;  // the weights change after it

    Tokens(const Sizes<T> &s, Arena &arena) {
        for (T **x : {&K, &Q, &V}) *x = arena.take<T>(s.C * s.width);
        for (T **x : {&K_T, &Q_T}) *x = arena.take<T>(s.d * s.tokens);
        eta = arena.take<T>(s.C);
    }

    void load(const Sizes<T> &s, Size given, bool complete, Rows<T> k, Rows<T> q, Rows<T> v,
              Rows<T> rates) {
        count = given;
        completed = complete;
        take(s, k, K);
        take(s, q, Q);
        take(s, v, V);
        transpose(s.C, s.d, K, s.width, K_T, s.tokens);
        transpose(s.C, s.d, Q, s.width, Q_T, s.tokens);
        for (Size c = 0; c < s.C; ++c) eta[c] = c < count ? rates.data[c * rates.row] : T(0);
    }

    // Up to C rows of d numbers, and zeros after them.
    void take(const Sizes<T> &s, Rows<T> from, T *to) const {
        copy_rows(count, s.d, from.data, from.row, to, s.width);
        for (Size c = count; c < s.C; ++c) std::memset(to + c * s.width, 0, s.d * sizeof(T));
    }
};

// What keys leave behind: Z1, X2, slope = gelu'(Z1), P [h, C]; G2 and the loss's terms [C, d].
template <class T>
struct Learnt {
    T *Z1, *X2, *slope, *P, *G2, *x_hat, *a, *g_hat, *r, *rate;

    Learnt(const Sizes<T> &s, Arena &arena) {
        for (T **hidden : {&Z1, &X2, &slope, &P}) *hidden = arena.take<T>(s.h * s.tokens);
        for (T **rows : {&G2, &x_hat, &a, &g_hat}) *rows = arena.take<T>(s.C * s.width);
        for (T **numbers : {&r, &rate}) *numbers = arena.take<T>(s.C);
    }
};

// What queries see: G1, Xb, slope_y = gelu'(Y1) [h, C]; A1_T, A2_T [C, C]; Y2 [C, d]. Scratch too.
template <class T>
struct Read {
    T *G1, *Xb, *slope_y, *A1_T, *A2_T, *Y2, *G2_T;

    Read(const Sizes<T> &s, Arena &arena) {
        for (T **hidden : {&G1, &Xb, &slope_y}) *hidden = arena.take<T>(s.h * s.tokens);
        for (T **scores : {&A1_T, &A2_T}) *scores = arena.take<T>(s.C * s.tokens);
        Y2 = arena.take<T>(s.C * s.width);
        G2_T = arena.take<T>(s.d * s.tokens);
    }
};

// The inner LayerNorm of one head.
template <class T>
struct Norm {
    const T *gamma, *beta;
};

template <class T>
struct MiniBatch {
    const Sizes<T> &s;
    const Norm<T> norm;

    MiniBatch(const Sizes<T> &sizes, Norm<T> norm) : s(sizes), norm(norm) {}

    // What the keys leave at the weights `w`; `scratch.G2_T` is written.
    void learn(const Weights<T> &w, const Tokens<T> &x, Learnt<T> &to, Read<T> &scratch) const {
        product<T>(s.h, s.C, column(w.b1), {{w1(w), {x.K_T, s.tokens}, s.d}}, to.Z1, s.tokens);
        Gelu<T>::value_and_slope(s.h * s.tokens, to.Z1, to.X2, to.slope);
        T *z = to.G2;
        product<T>(s.C, s.d, every_row(w.b2), {{by_token(to.X2), w2_rows(w), s.h}}, z, s.width);
        for (Size c = 0; c < s.C; ++c) loss_gradient(x, c, to);
        transpose(s.C, s.d, to.G2, s.width, scratch.G2_T, s.tokens);
        product<T>(s.h, s.C, {}, {{w2(w), {scratch.G2_T, s.tokens}, s.d}}, to.P, s.tokens);
    }

    // What the queries see at the weights `w`, from which `learnt` came. `slope_y` if asked for.
    void read(const Weights<T> &w, const Tokens<T> &x, const Learnt<T> &learnt, Read<T> &to,
              bool slopes) const {
        const Size hidden = s.h * s.tokens;
        first_gradients(learnt, to.G1);
        scores({x.K, s.width, 1}, {x.Q_T, s.tokens}, s.d, to.A1_T);
        T *Y1 = to.slope_y;
        product<T>(s.h, s.C, column(w.b1),
                   {{w1(w), {x.Q_T, s.tokens}, s.d},
                    {by_hidden(to.G1), {to.A1_T, s.tokens}, s.C, true}},
                   Y1, s.tokens);
        if (slopes)
            Gelu<T>::value_and_slope(hidden, Y1, to.Xb, to.slope_y);
        else
            Gelu<T>::value(hidden, Y1, to.Xb);
        scores(by_token(learnt.X2), {to.Xb, s.tokens}, s.h, to.A2_T);
        product<T>(s.C, s.d, every_row(w.b2),
                   {{by_token(to.Xb), w2_rows(w), s.h},
                    {by_token(to.A2_T), {learnt.G2, s.width}, s.C, true}},
                   to.Y2, s.width);
    }

    // G1 [h, C]
    void first_gradients(const Learnt<T> &learnt, T *G1) const {
        for (Size i = 0; i < s.h * s.tokens; ++i) G1[i] = learnt.P[i] * learnt.slope[i];
    }

    // `q + γ x̂ + β`, `x̂` that of Y2, into the rows of `out` [C, d].
    void write_output(const Tokens<T> &x, const Read<T> &from, T *out) const {
        for (Size c = 0; c < x.count; ++c) {
            T *y = from.Y2 + c * s.width, *row = out + c * s.d;
            normalise(s.d, y, s.eps, y);
            for (Size j = 0; j < s.d; ++j)
                row[j] = x.Q[c * s.width + j] + norm.gamma[j] * y[j] + norm.beta[j];
        }
    }

    // The weights after the mini-batch; `to` may be `w`. G1 [h, C].
    void update(const Weights<T> &w, const Tokens<T> &x, const Learnt<T> &learnt, const T *G1,
                Weights<T> &to) const {
        product<T>(s.h, s.d, {w.W1, s.width}, {{by_hidden(G1), {x.K, s.width}, s.C, true}}, to.W1,
                   s.width);
        product<T>(s.h, s.d, {w.W2, s.width},
                   {{by_hidden(learnt.X2), {learnt.G2, s.width}, s.C, true}}, to.W2, s.width);
        for (Size i = 0; i < s.h; ++i) to.b1[i] = w.b1[i] - sum(s.C, G1 + i * s.tokens);
        for (Size j = 0; j < s.d; ++j) to.b2[j] = w.b2[j];
        for (Size c = 0; c < s.C; ++c)
            for (Size j = 0; j < s.d; ++j) to.b2[j] -= learnt.G2[c * s.width + j];
    }

    Start<T> column(const T *bias) const { return {bias, 1, 0}; }
    Start<T> every_row(const T *bias) const { return {bias, 0, 1}; }
    Left<T> w1(const Weights<T> &w) const { return {w.W1, s.width, 1}; }
    Left<T> w2(const Weights<T> &w) const { return {w.W2, s.width, 1}; }
    Right<T> w1_rows(const Weights<T> &w) const { return {w.W1, s.width}; }
    Right<T> w2_rows(const Weights<T> &w) const { return {w.W2, s.width}; }
    // Of `[h, C]` or `[C, C]`: its rows as they lie, or its columns.
    Left<T> by_hidden(const T *x) const { return {x, s.tokens, 1}; }
    Left<T> by_token(const T *x) const { return {x, 1, s.tokens}; }

    // Scores [key, query], plus 1 for the bias; zero from later keys.
    void scores(Left<T> keys, Right<T> queries, Size inner, T *to) const {
        const T one = 1;
        product<T>(s.C, s.C, {&one, 0, 0}, {{keys, queries, inner}}, to, s.tokens);
        mask(to);
    }

    // Nothing flows from key j to query c < j where causal. [key, query]
    void mask(T *scores) const {
        if (!s.causal) return;
        for (Size j = 1; j < s.C; ++j) std::memset(scores + j * s.tokens, 0, j * sizeof(T));
    }

    // In: z in G2's row. Out: the inner loss's terms and `G2 = η r ĝ`.
    void loss_gradient(const Tokens<T> &x, Size c, Learnt<T> &to) const {
        const Size at = c * s.width;
        T *x_hat = to.x_hat + at, *a = to.a + at, *g_hat = to.g_hat + at, *G2 = to.G2 + at;
        const T *k = x.K + at, *v = x.V + at;
        to.r[c] = normalise(s.d, G2, s.eps, x_hat);
        to.rate[c] = to.r[c] * x.eta[c];
        for (Size j = 0; j < s.d; ++j)
            a[j] = norm.gamma[j] * (norm.gamma[j] * x_hat[j] + norm.beta[j] - (v[j] - k[j]));
        project(s.d, a, x_hat, T(1), g_hat);
        for (Size j = 0; j < s.d; ++j) G2[j] = g_hat[j] * to.rate[c];
    }
};

}  // namespace ttt
