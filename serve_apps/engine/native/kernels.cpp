// One step of a decoder on a CPU: every layer's work in one parallel region, without Python between.
//
// Two facts shape it. At a few rows a step is bound by reading the weights, so these are kept narrow
// (bfloat16, int8) and widened in registers. At many rows it is bound by arithmetic, so a panel of
// weights is widened once and used for all rows, as in Goto and van de Geijn, "Anatomy of
// High-Performance Matrix Multiplication" (ACM TOMS 34, 2008).
//
// Each output element is one chain of fused multiply-adds over k in ascending order, whatever the
// number of rows and threads. So a token's result does not depend on the batch around it, on how
// its prompt was cut into chunks, or on what the prefix cache gave: equal to the last bit.
//
// Built by build.py as a plain C library; OpenMP's symbols come from the one that torch brings.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>
#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int NR = 16;     // columns of a panel, and tokens of a cache block
constexpr int TILE = 12;   // query rows that attend together

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int MR = 12;     // rows whose sums live in registers at once
#else
constexpr int W = 8;
constexpr int MR = 6;
#endif
constexpr int VN = NR / W;  // vectors of a panel's row
constexpr int ACCUMULATORS = MR * VN;
typedef float vf __attribute__((vector_size(W * 4)));

enum Type : int32_t { F32 = 0, BF16 = 1, INT8 = 2 };
struct bf16 {
    uint16_t bits;
};

inline vf splat(float v) { return v - vf{}; }  // folded to a broadcast; v + 0 is not: of -0 it is 0

inline vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
inline vf load(const bf16 *p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline vf load(const int8_t *p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
#elif defined(__AVX2__)
inline vf load(const bf16 *p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return (vf)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline vf load(const int8_t *p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
#else
inline float widen(bf16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline vf load(const bf16 *p) {
    vf v;
    for (int i = 0; i < W; i++) v[i] = widen(p[i]);
    return v;
}
inline vf load(const int8_t *p) {
    vf v;
    for (int i = 0; i < W; i++) v[i] = float(p[i]);
    return v;
}
#endif

inline uint16_t narrow(float f) {  // to nearest, ties to even; not for NaN payloads
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void put(float *p, float f) { *p = f; }
inline void put(bf16 *p, float f) { p->bits = narrow(f); }

inline vf greater(vf a, vf b) { return a > b ? a : b; }

inline float total(vf v) {
    float sum = 0;
    for (int i = 0; i < W; i++) sum += v[i];
    return sum;
}

// e**x by 2**n * p(r), |r| <= ln(2)/2: Cephes' polynomial, within two units in the last place.
inline vf exponential(vf x) {
    x = x < splat(-87.33f) ? splat(-87.33f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    const vf magic = splat(12582912.0f);  // adding 1.5 * 2**23 rounds to an integer
    const vf n = (x * splat(1.44269504f) + magic) - magic;
    const vf r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    typedef int32_t vi __attribute__((vector_size(W * 4)));
    const vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
    return p * (vf)scale;
}

inline vf silu(vf x) { return x / (splat(1.0f) + exponential(-x)); }

inline vf gelu_tanh(vf x) {
    const vf inner = splat(0.7978845608f) * (x + splat(0.044715f) * x * x * x);
    // tanh(u) = 1 - 2 / (exp(2u) + 1)
    const vf t = splat(1.0f) - splat(2.0f) / (exponential(inner + inner) + splat(1.0f));
    return splat(0.5f) * x * (splat(1.0f) + t);
}

// Sums of M rows times P neighbouring panels, over all of K. Meanwhile `ahead`, if not null, comes
// from memory, as many bytes of it as a panel of U has.
template <int M, int P, class U = float, class T>
inline void sums(const float *a, int64_t lda, const T *panel, int64_t k_count, vf acc[M][P * VN],
                 const U *ahead = nullptr) {
    for (int m = 0; m < M; m++)
        for (int v = 0; v < P * VN; v++) acc[m][v] = vf{};
    for (int64_t k = 0; k < k_count; k++) {
        if (ahead) __builtin_prefetch(ahead + k * NR);
        vf w[P * VN];
        for (int p = 0; p < P; p++)
            for (int v = 0; v < VN; v++)
                w[p * VN + v] = load(panel + (p * k_count + k) * NR + v * W);
        for (int m = 0; m < M; m++) {
            const vf x = splat(a[m * lda + k]);
            for (int v = 0; v < P * VN; v++) acc[m][v] += x * w[v];
        }
    }
}

// Calls f with the number of rows as a constant of the compiler.
template <int M = 1, class F>
inline void with_rows(int rows, F &&f) {
    if constexpr (M < MR) {
        if (rows > M) return with_rows<M + 1>(rows, f);
    }
    f(std::integral_constant<int, M>{});
}

struct Matrix {  // [outputs, inputs], as panels of 16 outputs, each panel [inputs, 16]
    const void *data;
    const float *scale;  // of int8: one for each output
    const float *bias;
    int32_t type;
    int32_t outputs;
    int32_t inputs;
    int32_t unused;
};

// Which tasks of a phase are taken; one for each phase of a step, so that none needs a reset.
struct Counters {
    std::vector<std::atomic<int32_t>> taken;
    explicit Counters(size_t n) : taken(n) {}
    int32_t next(size_t phase) { return taken[phase].fetch_add(1, std::memory_order_relaxed); }
};

// Where the threads of a step meet, some hundred times in it. OpenMP's own barrier spins on
// for long; whoever waits here soon gives the core away. On a machine that has other work, the
// thread that all wait for may be the one that needs that core.
class Meeting {
    std::atomic<int32_t> arrived{0}, round{0};

  public:
    void wait() {
        const int32_t threads = omp_get_num_threads();  // maybe fewer than were asked for
        const int32_t now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
            if (spins < 2000) {
#if defined(__x86_64__)
                _mm_pause();
#endif
            } else {
                sched_yield();
            }
        }
    }
};

// How rows are cut into near-equal groups of at most MR.
struct Groups {
    int count, base, extra;
    explicit Groups(int rows) : count((rows + MR - 1) / MR) {
        base = count ? rows / count : 0;
        extra = count ? rows % count : 0;
    }
    int begin(int g) const { return g * base + (g < extra ? g : extra); }
    int size(int g) const { return base + (g < extra); }
};

// What an adapter adds to one product: x A^T B^T, of low rank (Hu et al., "LoRA", 2021). A product
// of several layers side by side (query, key and value) has an A for each, one above another.
struct Low {
    const void *down;     // all A, as panels of 16 sums, each panel [inputs, 16]
    const void *up;       // B, its scale multiplied in: for each panel of outputs [rank, 16]
    const int32_t *starts;  // for each panel of outputs, where its layer's sums begin; -1: no addition
    int32_t down_type, up_type;
    int32_t width;        // sums of a token, padded to whole panels
    int32_t rank;         // sums of one layer
};

struct Adapted {  // a step's tokens with an adapter; those of one adapter are best side by side
    int32_t count, unused;
    const int32_t *spans;    // [count][3]: first token, tokens, number of the adapter
    const Low *const *low;   // [adapters][layers * 4]
    int64_t stride;          // the largest width
};

struct Added {  // the same as one product sees it
    const Adapted *adapted;
    int part;
    const int32_t *adapter_of;  // [tokens], -1: none
    float *sums;                // [tokens, stride]
};

template <class T>
void add_up(const float *sums, const T *up, int rank, vf *acc) {
    vf odd[VN] = {};  // two chains: one would wait for itself
    int k = 0;
    for (; k + 2 <= rank; k += 2) {
        const vf x = splat(sums[k]), y = splat(sums[k + 1]);
        for (int v = 0; v < VN; v++) {
            acc[v] += x * load(up + k * NR + v * W);
            odd[v] += y * load(up + (k + 1) * NR + v * W);
        }
    }
    if (k < rank)
        for (int v = 0; v < VN; v++) acc[v] += splat(sums[k]) * load(up + k * NR + v * W);
    for (int v = 0; v < VN; v++) acc[v] += odd[v];
}

__attribute__((noinline)) void add_low(const Added &added, int row, int panel, vf *acc) {
    const int32_t adapter = added.adapter_of[row];
    if (adapter < 0) return;
    const Low &low = added.adapted->low[adapter][added.part];
    if (!low.width || low.starts[panel] < 0) return;
    const float *sums = added.sums + row * added.adapted->stride + low.starts[panel];
    const int64_t at = int64_t(panel) * low.rank * NR;
    if (low.up_type == BF16)
        add_up(sums, static_cast<const bf16 *>(low.up) + at, low.rank, acc);
    else
        add_up(sums, static_cast<const float *>(low.up) + at, low.rank, acc);
}

// Where a product's results go. One function for all products: the loops above it are instantiated
// for each type and number of rows, this is not.
struct Sink {
    enum Mode { SET, ADD, GATE } mode;
    float *to;
    int64_t stride;
    int activation;
    const Added *added;  // or null: no token has an adapter
};

__attribute__((noinline)) void finish(const Matrix &w, const Sink &sink, int row, int panel, vf *acc) {
    for (int v = 0; v < VN; v++) {
        if (w.scale) acc[v] *= load(w.scale + panel * NR + v * W);
        if (w.bias) acc[v] += load(w.bias + panel * NR + v * W);
    }
    if (sink.added) add_low(*sink.added, row, panel, acc);
    if (sink.mode == Sink::GATE) {  // the gate's panel comes first and waits for its partner
        float *to = sink.to + row * sink.stride + panel / 2 * NR;
        for (int v = 0; v < VN; v++, to += W) {
            if (panel % 2) {
                store(to, load(to) * acc[v]);
            } else {
                store(to, sink.activation ? gelu_tanh(acc[v]) : silu(acc[v]));
            }
        }
        return;
    }
    float *to = sink.to + row * sink.stride + panel * NR;
    const bool add = sink.mode == Sink::ADD;
    if ((panel + 1) * NR <= w.outputs) {
        for (int v = 0; v < VN; v++, to += W) store(to, add ? load(to) + acc[v] : acc[v]);
        return;
    }
    float tail[NR];  // the last panel is partly padding
    for (int v = 0; v < VN; v++) store(tail + v * W, acc[v]);
    for (int i = 0; i < w.outputs - panel * NR; i++) to[i] = add ? to[i] + tail[i] : tail[i];
}

// P neighbouring panels from p on, for all of at most MR rows.
template <int P, class T>
void few_rows(const float *a, int rows, const Matrix &w, int p, const Sink &sink) {
    const T *panel = static_cast<const T *>(w.data) + int64_t(p) * w.inputs * NR;
    with_rows(rows, [&](auto constant) {
        constexpr int M = constant;
        if constexpr (M * P * VN <= ACCUMULATORS) {
            vf acc[M][P * VN];
            sums<M, P>(a, w.inputs, panel, w.inputs, acc);
            for (int m = 0; m < M; m++)
                for (int i = 0; i < P; i++) finish(w, sink, m, p + i, &acc[m][i * VN]);
        }
    });
}

// All groups of rows against one panel; while the last is computed the next panel comes.
template <class T, class U>
void group_rows(const float *a, const Groups &groups, const Matrix &w, const T *panel, int p,
                const Sink &sink, const U *next) {
    for (int g = 0; g < groups.count; g++) {
        const int r0 = groups.begin(g);
        const float *rows = a + int64_t(r0) * w.inputs;
        with_rows(groups.size(g), [&](auto constant) {
            constexpr int M = constant;
            vf acc[M][VN];
            if (g + 1 < groups.count)
                sums<M, 1>(rows, w.inputs, panel, w.inputs, acc);
            else
                sums<M, 1, U>(rows, w.inputs, panel, w.inputs, acc, next);
            for (int m = 0; m < M; m++) finish(w, sink, r0 + m, p, acc[m]);
        });
    }
}

// One panel for more rows than registers hold; widening a narrow one ahead pays from some rows on.
template <class T>
void many_rows(const float *a, int rows, const Matrix &w, int p, int next, const Sink &sink,
               std::vector<float> &wide) {
    const Groups groups(rows);
    const int64_t count = int64_t(w.inputs) * NR;
    const T *panel = static_cast<const T *>(w.data) + p * count;
    // Among many groups the memory has time enough by itself.
    const T *ahead = groups.count > 6 ? nullptr : static_cast<const T *>(w.data) + next * count;
    if constexpr (!std::is_same_v<T, float>) {
        if (groups.count > 2) {
            wide.resize(count);
            for (int64_t i = 0; i < count; i += W) store(&wide[i], load(panel + i));
            return group_rows<float, T>(a, groups, w, wide.data(), p, sink, ahead);
        }
    }
    group_rows<T, T>(a, groups, w, panel, p, sink, ahead);
}

template <class T>
void product_of(const float *a, int rows, const Matrix &w, const Sink &sink, Counters &counters,
                size_t phase, std::vector<float> &wide) {
    const int panels = (w.outputs + NR - 1) / NR;
    // Few rows leave registers for several panels: more reads of weights under way at once.
    const int together = rows * 4 * VN <= ACCUMULATORS ? 4 : rows * 2 * VN <= ACCUMULATORS ? 2 : 1;
    // A gate's panel and its partner must not meet in two threads.
    const int span = together == 1 && sink.mode == Sink::GATE ? 2 : together;
    for (int task; (task = counters.next(phase)) * span < panels;) {
        int p = task * span;
        const int end = p + span < panels ? p + span : panels;
        if (rows > MR) {
            for (; p < end; p++) {
                // Threads take tasks in turn, so this one's next is likely that far on.
                int next = p + 1 < end ? p + 1 : end + span * (omp_get_num_threads() - 1);
                many_rows<T>(a, rows, w, p, next < panels ? next : p, sink, wide);
            }
        } else {
            for (; together == 4 && p + 4 <= end; p += 4) few_rows<4, T>(a, rows, w, p, sink);
            for (; together >= 2 && p + 2 <= end; p += 2) few_rows<2, T>(a, rows, w, p, sink);
            for (; p < end; p++) few_rows<1, T>(a, rows, w, p, sink);
        }
    }
}

// This thread's share of a[rows, inputs] @ w.T; threads take panels as they get free.
void product(const float *a, int rows, const Matrix &w, const Sink &sink, Counters &counters,
             size_t phase, std::vector<float> &wide) {
    if (w.type == F32) product_of<float>(a, rows, w, sink, counters, phase, wide);
    if (w.type == BF16) product_of<bf16>(a, rows, w, sink, counters, phase, wide);
    if (w.type == INT8) product_of<int8_t>(a, rows, w, sink, counters, phase, wide);
}

template <class T>
void down_panel(const float *x, int64_t inputs, int rows, const T *panel, float *to,
                int64_t stride) {
    const Groups groups(rows);
    for (int g = 0; g < groups.count; g++) {
        const int r0 = groups.begin(g);
        with_rows(groups.size(g), [&](auto constant) {
            constexpr int M = constant;
            vf acc[M][VN];
            sums<M, 1>(x + r0 * inputs, inputs, panel, inputs, acc);
            for (int m = 0; m < M; m++)
                for (int v = 0; v < VN; v++) store(to + (r0 + m) * stride + v * W, acc[m][v]);
        });
    }
}

// This thread's share of the sums x A^T, of all tokens with an adapter.
void product_down(const float *x, int64_t inputs, const Added &added, Counters &counters,
                  size_t phase) {
    const Adapted &adapted = *added.adapted;
    int t = counters.next(phase), task = 0;
    for (int s = 0; s < adapted.count; s++) {
        const int32_t *span = adapted.spans + 3 * s;
        const Low &low = adapted.low[span[2]][added.part];
        const int upto = task + low.width / NR;
        for (; t < upto; t = counters.next(phase)) {
            const int64_t at = (t - task) * inputs * NR;
            const float *from = x + span[0] * inputs;
            float *to = added.sums + span[0] * adapted.stride + (t - task) * NR;
            if (low.down_type == BF16)
                down_panel(from, inputs, span[1], static_cast<const bf16 *>(low.down) + at, to,
                           adapted.stride);
            else
                down_panel(from, inputs, span[1], static_cast<const float *>(low.down) + at, to,
                           adapted.stride);
        }
        task = upto;
    }
}

void rms_norm(const float *x, const float *weight, float eps, int width, float *out) {
    vf squares = {};
    int i = 0;
    for (; i + W <= width; i += W) squares += load(x + i) * load(x + i);
    float sum = total(squares);
    for (; i < width; i++) sum += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum / width + eps);
    for (i = 0; i + W <= width; i += W) store(out + i, load(x + i) * splat(scale) * load(weight + i));
    for (; i < width; i++) out[i] = x[i] * scale * weight[i];
}

// Rotates pairs (i, i + E/2) in place; Su et al., "RoFormer", 2021, in the halves' layout.
void rotate(float *head, const float *cos, const float *sin, int width) {
    const int half = width / 2;
    for (int i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

struct Cache {  // keys [blocks, heads, E, 16], values [blocks, heads, 16, E]
    void *key, *value;
    int32_t type, heads, width, window;  // window 0: all
};

struct Rows {  // of one step: tokens t0 .. t0+count of a request, from position start on
    int32_t count, table_stride;
    const int32_t *t0, *start, *counts, *tables;
};

template <class T>
void write_token(const Cache &cache, int block, int at, const float *key, const float *value) {
    const int64_t size = int64_t(cache.width) * NR;
    T *keys = static_cast<T *>(cache.key) + int64_t(block) * cache.heads * size;
    T *values = static_cast<T *>(cache.value) + int64_t(block) * cache.heads * size;
    for (int h = 0; h < cache.heads; h++) {
        for (int e = 0; e < cache.width; e++) {
            put(keys + h * size + int64_t(e) * NR + at, key[h * cache.width + e]);
            put(values + h * size + int64_t(at) * cache.width + e, value[h * cache.width + e]);
        }
    }
}

struct Scratch {  // of one thread
    std::vector<float> wide, query, scores;
};

// Attention of up to TILE query rows (some tokens of one request, all query heads of one key head).
template <class T>
void attend_tile(const Cache &cache, const int32_t *table, int first, int tokens, int start,
                 int head, int group, const float *query, int64_t token_stride, float scale,
                 float *out, int64_t out_stride, Scratch &scratch) {
    const int width = cache.width, rows = tokens * group;
    const int64_t size = int64_t(width) * NR;
    const int end = start + first + tokens;  // keys that the last of them sees
    const int oldest = start + first;
    const int low = cache.window && oldest + 1 > cache.window ? oldest + 1 - cache.window : 0;
    const int b0 = low / NR, b1 = (end + NR - 1) / NR;
    const int64_t lds = int64_t(b1 - b0) * NR;
    scratch.query.resize(int64_t(TILE) * width);
    scratch.scores.resize(TILE * lds);
    float *q = scratch.query.data(), *s = scratch.scores.data();
    for (int t = 0; t < tokens; t++)
        for (int g = 0; g < group; g++) {
            const float *from = query + (first + t) * token_stride + (head * group + g) * width;
            for (int e = 0; e < width; e++) q[(t * group + g) * width + e] = from[e] * scale;
        }
    const T *keys = static_cast<const T *>(cache.key);
    const T *values = static_cast<const T *>(cache.value);
    const Groups groups(rows);
    for (int g = 0; g < groups.count; g++) {
        const int r0 = groups.begin(g);
        with_rows(groups.size(g), [&](auto constant) {
            constexpr int M = constant;
            constexpr int P = M * 2 * VN <= ACCUMULATORS ? 2 : 1;
            for (int b = b0; b < b1; b += P) {
                const T *panel[P];  // of an odd last block: that block twice
                for (int p = 0; p < P; p++)
                    panel[p] = keys + (int64_t(table[b + p < b1 ? b + p : b]) * cache.heads + head) * size;
                vf acc[M][P * VN] = {};
                for (int e = 0; e < width; e++) {
                    vf x[P * VN];
                    for (int i = 0; i < P * VN; i++)
                        x[i] = load(panel[i / VN] + e * NR + i % VN * W);
                    for (int m = 0; m < M; m++) {
                        const vf y = splat(q[(r0 + m) * width + e]);
                        for (int i = 0; i < P * VN; i++) acc[m][i] += y * x[i];
                    }
                }
                for (int m = 0; m < M; m++)
                    for (int i = 0; i < P * VN && b + i / VN < b1; i++)
                        store(s + (r0 + m) * lds + (b - b0) * NR + i * W, acc[m][i]);
            }
        });
    }
    float inverse[TILE];
    for (int r = 0; r < rows; r++) {
        float *row = s + r * lds;
        const int position = oldest + r / group;
        const int from = cache.window && position + 1 > cache.window
                             ? position + 1 - cache.window - b0 * NR : 0;
        const int upto = position + 1 - b0 * NR;
        for (int i = 0; i < from; i++) row[i] = -INFINITY;
        for (int64_t i = upto; i < lds; i++) row[i] = -INFINITY;
        vf most = splat(-INFINITY);
        for (int64_t i = 0; i < lds; i += W) most = greater(load(row + i), most);
        float top = -INFINITY;
        for (int i = 0; i < W; i++) top = most[i] > top ? most[i] : top;
        vf sum = {};
        for (int64_t i = 0; i < lds; i += W) {
            const vf x = load(row + i);
            const vf e = x == splat(-INFINITY) ? vf{} : exponential(x - splat(top));
            store(row + i, e);
            sum += e;
        }
        inverse[r] = 1.0f / total(sum);
    }
    for (int g = 0; g < groups.count; g++) {
        const int r0 = groups.begin(g);
        with_rows(groups.size(g), [&](auto constant) {
            constexpr int M = constant;
            constexpr int P = M * 2 * VN <= ACCUMULATORS ? 2 : 1;
            for (int e0 = 0; e0 < width; e0 += P * NR) {
                const int have = (width - e0) / NR < P ? VN : P * VN;  // vectors
                vf acc[M][P * VN] = {};
                for (int b = b0; b < b1; b++) {
                    // Only what was written: what lies behind may be another request's remains.
                    const int written = end - b * NR < NR ? end - b * NR : NR;
                    const T *from = values + (int64_t(table[b]) * cache.heads + head) * size + e0;
                    const float *p = s + r0 * lds + (b - b0) * NR;
                    for (int k = 0; k < written; k++) {
                        vf x[P * VN];
                        for (int v = 0; v < P * VN; v++)
                            x[v] = v < have ? load(from + k * width + v * W) : vf{};
                        for (int m = 0; m < M; m++) {
                            const vf y = splat(p[m * lds + k]);
                            for (int v = 0; v < P * VN; v++) acc[m][v] += y * x[v];
                        }
                    }
                }
                for (int m = 0; m < M; m++) {
                    const int r = r0 + m;
                    float *to = out + (first + r / group) * out_stride
                                + (head * group + r % group) * width + e0;
                    for (int v = 0; v < have; v++) store(to + v * W, acc[m][v] * splat(inverse[r]));
                }
            }
        });
    }
}

// This thread's share of a step's attention.
template <class T>
void attend_rows(const Cache &cache, const Rows &rows, int group, const float *query,
                 int64_t token_stride, float scale, float *out, int64_t out_stride,
                 Counters &counters, size_t phase, Scratch &scratch) {
    const int tile = TILE / group > 1 ? TILE / group : 1;
    int t = counters.next(phase), task = 0;
    // Tasks are numbered row by row, tile by tile, head by head; long tiles come last in a row.
    for (int r = 0; r < rows.count; r++) {
        const int tiles = (rows.counts[r] + tile - 1) / tile;
        const int upto = task + tiles * cache.heads;
        for (; t < upto; t = counters.next(phase)) {
            const int at = t - task, first = at / cache.heads * tile;
            const int left = rows.counts[r] - first;
            attend_tile<T>(cache, rows.tables + int64_t(r) * rows.table_stride, first,
                           left < tile ? left : tile, rows.start[r], at % cache.heads, group,
                           query + rows.t0[r] * token_stride, token_stride, scale,
                           out + rows.t0[r] * out_stride, out_stride, scratch);
        }
        task = upto;
    }
}

template <class T>
void write_rows(const Cache &cache, const Rows &rows, int r, int t, const float *key,
                const float *value) {
    const int position = rows.start[r] + t;
    const int block = rows.tables[int64_t(r) * rows.table_stride + position / NR];
    write_token<T>(cache, block, position % NR, key, value);
}

}  // namespace

extern "C" {

struct Layer {
    const float *input_norm, *query_norm, *key_norm, *inner_norm;  // query and key: may be null
    Matrix qkv, output, gate_up, down;  // gate_up: panels of both take turns
    Cache cache;
};

struct Decoder {
    int32_t layers, hidden, heads, kv_heads, width, inner, vocab, activation;  // 0 silu, 1 gelu
    float eps, scale;
    const Layer *layer;
    const float *last_norm;
    Matrix head;
};

struct Step {
    int32_t tokens, wanted, threads, unused;
    Rows rows;
    float *x;                   // [tokens, hidden], embedded; overwritten
    const float *cos, *sin;     // [tokens, width]
    const int32_t *wanted_at;   // [wanted] tokens whose logits are asked for
    float *logits;              // [wanted, vocab]
    Adapted adapted;
    double *seconds;            // [6] or null: what each part of a layer took, and the head
};

enum Part { QKV, ATTENTION, OUTPUT, GATE_UP, DOWN, HEAD };
constexpr int PRODUCTS = 4;  // of a layer: all parts but the attention

// Computes a step through all layers. Buffers are kept between calls of the same thread.
void rh_step(const Decoder *d, const Step *step) {
    const int tokens = step->tokens, hidden = d->hidden, width = d->width;
    const int group = d->heads / d->kv_heads;
    const int64_t qkv_width = int64_t(d->heads + 2 * d->kv_heads) * width;
    const int64_t attended = int64_t(d->heads) * width;
    static thread_local std::vector<float> normed, qkv, mixed, inner, lowered;
    normed.resize(int64_t(tokens > step->wanted ? tokens : step->wanted) * hidden);
    qkv.resize(tokens * qkv_width);
    mixed.resize(tokens * attended);
    inner.resize(int64_t(tokens) * d->inner);
    float *x = step->x, *h = normed.data(), *a = qkv.data(), *m = mixed.data(), *f = inner.data();
    const size_t last_phase = d->layers * (5 + PRODUCTS);
    Counters counters(last_phase + 1);
    std::vector<int32_t> row_of(tokens);
    for (int r = 0; r < step->rows.count; r++)
        for (int t = 0; t < step->rows.counts[r]; t++) row_of[step->rows.t0[r] + t] = r;
    const Adapted &adapted = step->adapted;
    std::vector<int32_t> adapter_of;
    if (adapted.count) {
        adapter_of.resize(tokens, -1);
        for (int s = 0; s < adapted.count; s++)
            for (int t = 0; t < adapted.spans[3 * s + 1]; t++)
                adapter_of[adapted.spans[3 * s] + t] = adapted.spans[3 * s + 2];
        lowered.resize(tokens * adapted.stride);
    }
    float *u = lowered.data();
    Meeting meeting;
#pragma omp parallel num_threads(step->threads)
    {
        static thread_local Scratch scratch;
        Added added{&adapted, 0, adapter_of.data(), u};
        // A layer's products in their order, each with what adapters add to it.
        auto multiply = [&](const float *from, const Matrix &w, int layer, int n, Sink sink) {
            if (adapted.count) {
                added.part = layer * PRODUCTS + n;
                product_down(from, w.inputs, added, counters,
                             d->layers * 5 + layer * PRODUCTS + n);
                meeting.wait();
                sink.added = &added;
            }
            const size_t phase = layer * 5 + n + (n > 0);  // attention comes after the first
            product(from, tokens, w, sink, counters, phase, scratch.wide);
            meeting.wait();
        };
        const bool timed = step->seconds && omp_get_thread_num() == 0;
        double since = timed ? omp_get_wtime() : 0;
        auto took = [&](Part part) {
            if (!timed) return;
            const double now = omp_get_wtime();
            step->seconds[part] += now - since;
            since = now;
        };
        for (int l = 0; l < d->layers; l++) {
            const Layer &layer = d->layer[l];
            const size_t phase = l * 5;
#pragma omp for schedule(static) nowait
            for (int t = 0; t < tokens; t++)
                rms_norm(x + int64_t(t) * hidden, layer.input_norm, d->eps, hidden,
                         h + int64_t(t) * hidden);
            meeting.wait();
            multiply(h, layer.qkv, l, 0, {Sink::SET, a, qkv_width, 0, nullptr});
            took(QKV);
#pragma omp for schedule(static) nowait
            for (int t = 0; t < tokens; t++) {
                float *query = a + t * qkv_width, *key = query + attended;
                float *value = key + int64_t(d->kv_heads) * width;
                const float *cos = step->cos + int64_t(t) * width;
                const float *sin = step->sin + int64_t(t) * width;
                for (int i = 0; i < d->heads; i++) {
                    float *head = query + i * width;
                    if (layer.query_norm) rms_norm(head, layer.query_norm, d->eps, width, head);
                    rotate(head, cos, sin, width);
                }
                for (int i = 0; i < d->kv_heads; i++) {
                    float *head = key + i * width;
                    if (layer.key_norm) rms_norm(head, layer.key_norm, d->eps, width, head);
                    rotate(head, cos, sin, width);
                }
                const int r = row_of[t], at = t - step->rows.t0[r];
                if (layer.cache.type == BF16)
                    write_rows<bf16>(layer.cache, step->rows, r, at, key, value);
                else
                    write_rows<float>(layer.cache, step->rows, r, at, key, value);
            }
            meeting.wait();
            if (layer.cache.type == BF16)
                attend_rows<bf16>(layer.cache, step->rows, group, a, qkv_width, d->scale, m,
                                  attended, counters, phase + 1, scratch);
            else
                attend_rows<float>(layer.cache, step->rows, group, a, qkv_width, d->scale, m,
                                   attended, counters, phase + 1, scratch);
            meeting.wait();
            took(ATTENTION);
            multiply(m, layer.output, l, 1, {Sink::ADD, x, hidden, 0, nullptr});
            took(OUTPUT);
#pragma omp for schedule(static) nowait
            for (int t = 0; t < tokens; t++)
                rms_norm(x + int64_t(t) * hidden, layer.inner_norm, d->eps, hidden,
                         h + int64_t(t) * hidden);
            meeting.wait();
            multiply(h, layer.gate_up, l, 2, {Sink::GATE, f, d->inner, d->activation, nullptr});
            took(GATE_UP);
            multiply(f, layer.down, l, 3, {Sink::ADD, x, hidden, 0, nullptr});
            took(DOWN);
        }
#pragma omp for schedule(static) nowait
        for (int i = 0; i < step->wanted; i++)
            rms_norm(x + int64_t(step->wanted_at[i]) * hidden, d->last_norm, d->eps, hidden,
                     h + int64_t(i) * hidden);
        meeting.wait();
        if (step->wanted)
            product(h, step->wanted, d->head, {Sink::SET, step->logits, d->vocab, 0, nullptr},
                    counters, last_phase, scratch.wide);
        meeting.wait();
        took(HEAD);
    }
}

// out[rows, outputs] = x[rows, inputs] @ w.T
void rh_linear(const Matrix *w, const float *x, int32_t rows, float *out, int32_t threads) {
    Counters counters(1);
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> wide;
        product(x, rows, *w, {Sink::SET, out, w->outputs, 0, nullptr}, counters, 0, wide);
    }
}

// Sizes that Python checks its own description of the structures against.
int32_t rh_sizes(int32_t *out) {
    const int32_t sizes[] = {sizeof(Matrix), sizeof(Cache), sizeof(Rows), sizeof(Layer),
                             sizeof(Decoder), sizeof(Step), sizeof(Low)};
    memcpy(out, sizes, sizeof sizes);
    return sizeof sizes / sizeof sizes[0];
}

}  // extern "C"
