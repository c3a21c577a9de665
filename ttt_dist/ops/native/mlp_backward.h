// The way back through one mini-batch of TTT-MLP: gradients by hand, as in
// ttt_dist/ops/mlp_backward.py; layouts as in mlp.h.
#pragma once

#include "mlp.h"

namespace ttt {

// Where one mini-batch's gradients go, [count, d] and [count], and where those of the norm are summed up.
template <class T>
struct Gradients {
    T *q, *k, *v, *eta, *gamma, *beta;
};

template <class T>
struct Backward {
    const Sizes<T> &s;
    const MiniBatch<T> &step;
    // [h, C]
    T *dY1, *dG1, *dP, *dX2, *dZ1;
    // [C, d], and transposed
    T *d_out, *dY2, *dG2, *dZ2, *da, *sums, *dY2_T, *dZ2_T;
    // [C, C]
    T *A1, *S1_T, *S2, *S2_T;

    Backward(const Sizes<T> &s, const MiniBatch<T> &step, Arena &arena) : s(s), step(step) {
        for (T **x : {&dY1, &dG1, &dP, &dX2, &dZ1}) *x = arena.take<T>(s.h * s.tokens);
        for (T **x : {&d_out, &dY2, &dG2, &dZ2, &da, &sums}) *x = arena.take<T>(s.C * s.width);
        for (T **x : {&dY2_T, &dZ2_T}) *x = arena.take<T>(s.d * s.tokens);
        for (T **x : {&A1, &S1_T, &S2, &S2_T}) *x = arena.take<T>(s.C * s.tokens);
    }

    // `w`: the weights that `learnt` came from; `read`: those that the queries see, from which `seen`
    // came. `U`: gradient of the weights after the mini-batch, replaced by that of `w`. `pending`:
    // where the gradient of `w - read` goes, or null.
    void walk_back(const Weights<T> &w, const Weights<T> &read, const Tokens<T> &x,
                   const Learnt<T> &learnt, Read<T> &seen, Rows<T> given, Weights<T> &U,
                   const Gradients<T> &to, Weights<T> *pending) {
        x.take(s, given, d_out);
        outputs(seen, to);
        queries(read, learnt, seen);
        keys(w, x, learnt, seen, U, to);
        tokens(w, read, x, seen, U, to);
        if (pending) pending_gradient(x, seen, U, *pending);
        update(x, learnt, seen, U);
    }

   private:
    // dY2, and the output norm's part of the gradients of gamma and beta. Y2 becomes x̂.
    void outputs(Read<T> &seen, const Gradients<T> &to) {
        const T *gamma = step.norm.gamma;
        for (Size c = 0; c < s.C; ++c) {
            T *y = seen.Y2 + c * s.width, *row = dY2 + c * s.width;
            const T *given = d_out + c * s.width;
            const T r = normalise(s.d, y, s.eps, y);
            for (Size j = 0; j < s.d; ++j) {
                row[j] = given[j] * gamma[j];
                to.gamma[j] += given[j] * y[j];
                to.beta[j] += given[j];
            }
            project(s.d, row, y, r, row);
        }
        transpose(s.C, s.d, dY2, s.width, dY2_T, s.tokens);
    }

    // S2, dY1, S1: what the outputs' gradients say to the queries' hidden values and scores.
    void queries(const Weights<T> &read, const Learnt<T> &learnt, const Read<T> &seen) {
        product<T>(s.C, s.C, {}, {{{learnt.G2, s.width, 1}, {dY2_T, s.tokens}, s.d, true}}, S2_T,
                   s.tokens);
        step.mask(S2_T);
        product<T>(s.h, s.C, {},
                   {{step.w2(read), {dY2_T, s.tokens}, s.d},
                    {step.by_hidden(learnt.X2), {S2_T, s.tokens}, s.C}},
                   dY1, s.tokens);
        for (Size i = 0; i < s.h * s.tokens; ++i) dY1[i] *= seen.slope_y[i];
        product<T>(s.C, s.C, {}, {{step.by_token(seen.G1), {dY1, s.tokens}, s.h, true}}, S1_T,
                   s.tokens);
        step.mask(S1_T);
        transpose(s.C, s.C, S2_T, s.tokens, S2, s.tokens);
        transpose(s.C, s.C, seen.A1_T, s.tokens, A1, s.tokens);
    }

    // Back through the inner gradients: dG1, dP, dG2, dZ2, da, dX2, dZ1, and eta's gradient.
    void keys(const Weights<T> &w, const Tokens<T> &x, const Learnt<T> &learnt, Read<T> &seen,
              const Weights<T> &U, const Gradients<T> &to) {
        const Size hidden = s.h * s.tokens;
        const bool through = x.completed;
        const Start<T> nothing{};
        product<T>(s.h, s.C, through ? Start<T>{U.b1, 1, 0, true} : nothing,
                   {{step.by_hidden(dY1), {A1, s.tokens}, s.C, true},
                    {step.w1(U), {x.K_T, s.tokens}, through ? s.d : 0, true}},
                   dG1, s.tokens);
        for (Size i = 0; i < hidden; ++i) dP[i] = dG1[i] * learnt.slope[i];
        product<T>(s.C, s.d, through ? Start<T>{U.b2, 0, 1, true} : nothing,
                   {{step.by_hidden(seen.A2_T), {dY2, s.width}, s.C, true},
                    {step.by_token(learnt.X2), step.w2_rows(U), through ? s.h : 0, true},
                    {step.by_token(dP), step.w2_rows(w), s.h}},
                   dG2, s.width);
        for (Size c = 0; c < s.C; ++c) loss_backward(x, learnt, c, to);
        transpose(s.C, s.d, dZ2, s.width, dZ2_T, s.tokens);
        transpose(s.C, s.d, learnt.G2, s.width, seen.G2_T, s.tokens);
        product<T>(s.h, s.C, nothing,
                   {{step.by_hidden(seen.Xb), {S2, s.tokens}, s.C},
                    {step.w2(U), {seen.G2_T, s.tokens}, through ? s.d : 0, true},
                    {step.w2(w), {dZ2_T, s.tokens}, s.d}},
                   dX2, s.tokens);
        for (Size i = 0; i < hidden; ++i) dG1[i] *= learnt.P[i];
        Gelu<T>::curvature(hidden, learnt.Z1, dG1, dX2, learnt.slope, dZ1);
    }

    // From dG2: gradients of eta, of z and of the loss's a; and what gamma, beta, v get from there.
    void loss_backward(const Tokens<T> &x, const Learnt<T> &learnt, Size c, const Gradients<T> &to) {
        const T *gamma = step.norm.gamma, *beta = step.norm.beta;
        const Size at = c * s.width;
        const T *x_hat = learnt.x_hat + at, *a = learnt.a + at, *g_hat = learnt.g_hat + at;
        const T *k = x.K + at, *v = x.V + at;
        T *u = dG2 + at, *dz = dZ2 + at, *of_a = da + at;
        if (c < x.count) to.eta[c] = learnt.r[c] * dot(s.d, u, g_hat);
        for (Size j = 0; j < s.d; ++j) u[j] *= learnt.rate[c];
        project(s.d, u, x_hat, T(1), of_a);
        const T part = T(1) / T(s.d);
        const T along_x = part * dot(s.d, u, x_hat), a_along_x = part * dot(s.d, a, x_hat);
        const T along_g = part * dot(s.d, u, g_hat);
        for (Size j = 0; j < s.d; ++j)
            dz[j] = gamma[j] * gamma[j] * of_a[j] - u[j] * a_along_x - a[j] * along_x;
        project(s.d, dz, x_hat, T(1), dz);
        for (Size j = 0; j < s.d; ++j) dz[j] = (dz[j] - x_hat[j] * along_g) * learnt.r[c];
        for (Size j = 0; j < s.d; ++j) {
            const T error = gamma[j] * x_hat[j] + beta[j] - (v[j] - k[j]), de = of_a[j] * gamma[j];
            to.gamma[j] += of_a[j] * error + de * x_hat[j];
            to.beta[j] += de;
            of_a[j] = de;  // from here on
        }
        if (c < x.count)
            for (Size j = 0; j < s.d; ++j) to.v[c * s.d + j] = -of_a[j];
    }

    // Gradients of q and k.
    void tokens(const Weights<T> &w, const Weights<T> &read, const Tokens<T> &x,
                const Read<T> &seen, const Weights<T> &U, const Gradients<T> &to) {
        product<T>(s.C, s.d, {d_out, s.width},
                   {{step.by_token(dY1), step.w1_rows(read), s.h},
                    {step.by_token(S1_T), {x.K, s.width}, s.C}},
                   sums, s.width);
        copy_rows(x.count, s.d, sums, s.width, to.q, s.d);
        product<T>(s.C, s.d, {da, s.width},
                   {{step.by_hidden(S1_T), {x.Q, s.width}, s.C},
                    {step.by_token(seen.G1), step.w1_rows(U), x.completed ? s.h : 0, true},
                    {step.by_token(dZ1), step.w1_rows(w), s.h}},
                   sums, s.width);
        copy_rows(x.count, s.d, sums, s.width, to.k, s.d);
    }

    // The queries' share of the weights' gradient, and that of the weights after, both negative.
    void pending_gradient(const Tokens<T> &x, const Read<T> &seen, const Weights<T> &U,
                          Weights<T> &to) {
        const T share = x.completed ? T(-1) : T(0);
        for (Size i = 0; i < s.h * s.width; ++i) to.W1[i] = share * U.W1[i];
        for (Size i = 0; i < s.h * s.width; ++i) to.W2[i] = share * U.W2[i];
        for (Size i = 0; i < s.h; ++i) to.b1[i] = share * U.b1[i] - sum(s.C, dY1 + i * s.tokens);
        for (Size j = 0; j < s.d; ++j) to.b2[j] = share * U.b2[j];
        add_rows(dY2, T(-1), to.b2);
        product<T>(s.h, s.d, {to.W1, s.width}, {{step.by_hidden(dY1), {x.Q, s.width}, s.C, true}},
                   to.W1, s.width);
        product<T>(s.h, s.d, {to.W2, s.width}, {{step.by_hidden(seen.Xb), {dY2, s.width}, s.C, true}},
                   to.W2, s.width);
    }

    void update(const Tokens<T> &x, const Learnt<T> &learnt, const Read<T> &seen, Weights<T> &U) {
        product<T>(s.h, s.d, {U.W1, s.width},
                   {{step.by_hidden(dZ1), {x.K, s.width}, s.C},
                    {step.by_hidden(dY1), {x.Q, s.width}, s.C}},
                   U.W1, s.width);
        product<T>(s.h, s.d, {U.W2, s.width},
                   {{step.by_hidden(learnt.X2), {dZ2, s.width}, s.C},
                    {step.by_hidden(seen.Xb), {dY2, s.width}, s.C},
                    {step.by_hidden(dP), {learnt.G2, s.width}, s.C}},
                   U.W2, s.width);
        for (Size i = 0; i < s.h; ++i)
            U.b1[i] += sum(s.C, dZ1 + i * s.tokens) + sum(s.C, dY1 + i * s.tokens);
        add_rows(dZ2, T(1), U.b2);
        add_rows(dY2, T(1), U.b2);
    }

    void add_rows(const T *rows, T sign, T *to) const {
        for (Size c = 0; c < s.C; ++c)
            for (Size j = 0; j < s.d; ++j) to[j] += sign * rows[c * s.width + j];
    }
};

}  // namespace ttt
