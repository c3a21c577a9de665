// TTT-MLP over whole sequences: the entry points that ttt_dist/ops/native/scan.py calls.
//
// Heads of lanes are independent of each other: threads take one after the other.
#include <atomic>
#include <thread>
#include <vector>

#include "mlp_backward.h"

namespace ttt {

// A tensor [B, H, L] or [B, H, L, d], rows of d numbers side by side; `strides` of the first three.
struct Frames {
    const void *data;
    Size strides[3];
};

// W1, b1, W2, b2 [B, H, ...], contiguous.
struct Layers {
    void *W1, *b1, *W2, *b2;
};

// One scan, as `scan._Scan` has it. Everything but what is `Frames` is contiguous.
struct Scan {
    Size B, H, L, C, d, h, group, causal, threads;
    double eps;
    Frames q, k, v, eta;
    const void *gamma, *beta;  // [H, d]
    const Size *end;           // [B]
    Layers weights, pending;   // pending: null where there is none
    void *borders1, *borders2; // [groups, B, H, ...]
    // Forward alone.
    void *out;  // [B, H, L, d]
    Layers after;
    // Backward alone; gamma's and beta's gradients are sums, [B, H, d], and start from zero.
    Frames d_out;
    Layers d_after;
    void *d_q, *d_k, *d_v, *d_eta, *d_gamma, *d_beta;
    Layers d_weights, d_pending;
    void *workspace;  // of each thread, one after the other
};

// One head of one lane.
template <class T>
struct Lane {
    const Scan &g;
    const Size index;
    const Sizes<T> s{g.C, g.d, g.h, g.causal != 0, g.eps};

    Size mini_batches() const { return (g.L + g.C - 1) / g.C; }
    Size groups() const { return (mini_batches() + g.group - 1) / g.group; }
    Size batch() const { return index / g.H; }
    Size head() const { return index % g.H; }

    Norm<T> norm() const {
        return {static_cast<const T *>(g.gamma) + head() * g.d,
                static_cast<const T *>(g.beta) + head() * g.d};
    }
    template <class P>
    Plain<P> layers(const Layers &all) const {
        return {static_cast<P *>(all.W1) + index * g.d * g.h, static_cast<P *>(all.b1) + index * g.h,
                static_cast<P *>(all.W2) + index * g.h * g.d, static_cast<P *>(all.b2) + index * g.d};
    }
    // Of a contiguous tensor [B, H, L, width].
    T *frames(void *all, Size m, Size width) const {
        return static_cast<T *>(all) + (index * g.L + m * g.C) * width;
    }
    T *sums(void *all) const { return static_cast<T *>(all) + index * g.d; }
    T *border(void *all, Size group, Size size) const {
        return static_cast<T *>(all) + (group * g.B * g.H + index) * size;
    }
    T *border1(Size group) const { return border(g.borders1, group, (g.d + 1) * g.h); }
    T *border2(Size group) const { return border(g.borders2, group, (g.h + 1) * g.d); }

    Rows<T> rows(const Frames &x, Size m) const {
        const Size at = batch() * x.strides[0] + head() * x.strides[1] + m * g.C * x.strides[2];
        return {static_cast<const T *>(x.data) + at, x.strides[2]};
    }
    void tokens(Size m, Tokens<T> &to) const {
        const Size count = std::min(g.C, g.L - m * g.C);
        to.load(s, count, g.end[batch()] >= (m + 1) * g.C, rows(g.k, m), rows(g.q, m), rows(g.v, m),
                rows(g.eta, m));
    }
};

template <class T>
struct ForwardBuffers {
    Weights<T> w, read;
    Tokens<T> x;
    Learnt<T> learnt;
    Read<T> seen;

    ForwardBuffers(const Lane<T> &lane, Arena &arena)
        : w(lane.s, arena),
          read(lane.s, arena),
          x(lane.s, arena),
          learnt(lane.s, arena),
          seen(lane.s, arena) {}
};

// The weights that the first mini-batch's queries see: without what is pending.
template <class T>
void without_pending(const Lane<T> &lane, const Weights<T> &w, Weights<T> &to) {
    to.load(lane.s, lane.template layers<const T>(lane.g.pending));
    to.difference(lane.s, w, to);
}

template <class T>
void forward_lane(const Lane<T> &lane, void *memory) {
    const Sizes<T> &s = lane.s;
    const Scan &g = lane.g;
    Arena arena(memory);
    ForwardBuffers<T> b(lane, arena);
    const MiniBatch<T> step(s, lane.norm());
    b.w.load(s, lane.template layers<const T>(g.weights));
    for (Size m = 0; m < lane.mini_batches(); ++m) {
        if (m % g.group == 0)
            b.w.store_border(s, lane.border1(m / g.group), lane.border2(m / g.group));
        lane.tokens(m, b.x);
        step.learn(b.w, b.x, b.learnt, b.seen);
        const bool pending = m == 0 && g.pending.W1;
        if (pending) without_pending(lane, b.w, b.read);
        const Weights<T> &read = pending ? b.read : b.w;
        step.read(read, b.x, b.learnt, b.seen, false);
        step.write_output(b.x, b.seen, lane.frames(g.out, m, g.d));
        if (b.x.completed) step.update(read, b.x, b.learnt, b.seen.G1, b.w);
    }
    b.w.store(s, lane.template layers<T>(g.after));
}

// Of the mini-batches of one group.
template <class T>
struct BackwardBuffers {
    Weights<T> U;
    Tokens<T> x;
    Read<T> seen;
    std::vector<Weights<T>> states, pending;
    std::vector<Learnt<T>> learnt;

    BackwardBuffers(const Lane<T> &lane, Arena &arena)
        : U(lane.s, arena), x(lane.s, arena), seen(lane.s, arena) {
        for (Size m = 0; m < std::min(lane.g.group, lane.mini_batches()); ++m) {
            states.emplace_back(lane.s, arena);
            learnt.emplace_back(lane.s, arena);
        }
        // What the first mini-batch's queries see, and the gradient of what is pending.
        for (Size i = 0; i < (lane.g.pending.W1 ? 2 : 0); ++i) pending.emplace_back(lane.s, arena);
    }
};

template <class T>
void backward_group(const Lane<T> &lane, Size group, const MiniBatch<T> &step,
                    BackwardBuffers<T> &b, Backward<T> &back) {
    const Sizes<T> &s = lane.s;
    const Scan &g = lane.g;
    const Size first = group * g.group, n = std::min(g.group, lane.mini_batches() - first);
    const bool pending = group == 0 && g.pending.W1;
    const auto reading = [&](Size i) -> const Weights<T> & {
        return i == 0 && pending ? b.pending[0] : b.states[i];
    };

    // The chain of states, all of which are kept, and what led from each to the next.
    b.states[0].load_border(s, lane.border1(group), lane.border2(group));
    if (pending) without_pending(lane, b.states[0], b.pending[0]);
    for (Size i = 0; i < n; ++i) {
        lane.tokens(first + i, b.x);
        step.learn(b.states[i], b.x, b.learnt[i], b.seen);
        if (i + 1 == n) break;  // nothing reads the weights after the group
        if (b.x.completed) {
            step.first_gradients(b.learnt[i], b.seen.G1);
            step.update(reading(i), b.x, b.learnt[i], b.seen.G1, b.states[i + 1]);
        } else {
            b.states[i + 1].copy(s, b.states[i]);
        }
    }

    for (Size i = n - 1; i >= 0; --i) {
        const Size m = first + i;
        const Gradients<T> to{lane.frames(g.d_q, m, g.d),   lane.frames(g.d_k, m, g.d),
                              lane.frames(g.d_v, m, g.d),   lane.frames(g.d_eta, m, 1),
                              lane.sums(g.d_gamma),         lane.sums(g.d_beta)};
        lane.tokens(m, b.x);
        step.read(reading(i), b.x, b.learnt[i], b.seen, true);
        back.walk_back(b.states[i], reading(i), b.x, b.learnt[i], b.seen, lane.rows(g.d_out, m), b.U,
                       to, i == 0 && pending ? &b.pending[1] : nullptr);
    }
    if (pending) b.pending[1].store(s, lane.template layers<T>(g.d_pending));
}

template <class T>
void backward_lane(const Lane<T> &lane, void *memory) {
    Arena arena(memory);
    BackwardBuffers<T> b(lane, arena);
    const MiniBatch<T> step(lane.s, lane.norm());
    Backward<T> back(lane.s, step, arena);
    b.U.load(lane.s, lane.template layers<const T>(lane.g.d_after));
    for (Size group = lane.groups() - 1; group >= 0; --group)
        backward_group(lane, group, step, b, back);
    b.U.store(lane.s, lane.template layers<T>(lane.g.d_weights));
}

// Bytes that a thread needs.
template <class T>
Size forward_bytes(const Scan &g) {
    Arena counting(nullptr);
    ForwardBuffers<T>(Lane<T>{g, 0}, counting);
    return counting.used();
}

template <class T>
Size backward_bytes(const Scan &g) {
    Arena counting(nullptr);
    const Lane<T> lane{g, 0};
    BackwardBuffers<T>(lane, counting);
    Backward<T>(lane.s, MiniBatch<T>(lane.s, {nullptr, nullptr}), counting);
    return counting.used();
}

template <class T>
void over_lanes(const Scan &g, Size bytes, void (*run)(const Lane<T> &, void *)) {
    std::atomic<Size> next{0};
    const auto work = [&](Size thread) {
        for (Size index = next++; index < g.B * g.H; index = next++)
            run(Lane<T>{g, index}, static_cast<char *>(g.workspace) + thread * bytes);
    };
    std::vector<std::thread> threads;
    for (Size t = 1; t < g.threads; ++t) threads.emplace_back(work, t);
    work(0);
    for (std::thread &thread : threads) thread.join();
}

}  // namespace ttt

#define TTT_ENTRY_POINTS(T)                                                                    \
    std::int64_t ttt_scan_bytes_##T(const ttt::Scan *g) { return ttt::forward_bytes<T>(*g); }  \
    std::int64_t ttt_scan_backward_bytes_##T(const ttt::Scan *g) {                             \
        return ttt::backward_bytes<T>(*g);                                                     \
    }                                                                                          \
    void ttt_scan_##T(const ttt::Scan *g) {                                                    \
        ttt::over_lanes<T>(*g, ttt::forward_bytes<T>(*g), ttt::forward_lane<T>);               \
    }                                                                                          \
    void ttt_scan_backward_##T(const ttt::Scan *g) {                                           \
        ttt::over_lanes<T>(*g, ttt::backward_bytes<T>(*g), ttt::backward_lane<T>);             \
    }

extern "C" {
TTT_ENTRY_POINTS(float)
TTT_ENTRY_POINTS(double)
}
