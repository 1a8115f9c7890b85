/* Parity's inner loop: outputs[i] = sum over j of coefficient[j][i] * inputs[j], byte by byte, in GF(2^8) with polynomial 0x11D.
 *
 * One pass over all inputs and outputs, in columns that fit in registers, so that it runs at the speed of reading the inputs. Which kernel does
 * it is chosen when the module is loaded; all give the same bytes. `core/parity.py` is the only caller: it makes the coefficients' tables, and
 * holds the reference in NumPy that tests compare with.
 *
 * A table, 48 bytes per coefficient c, ordered by input, then output:
 *      0  c * b       for b = 0..15        products of low nibbles     AVX2, NEON, tails
 *     16  c * (16*b)  for b = 0..15        products of high nibbles
 *     32  8 x 8 bit matrix of c            for gf2p8affineqb           GFNI
 *     40  zeros
 *
 * The instruction gf2p8mulb would multiply in the field of AES; gf2p8affineqb multiplies by any matrix, so 0x11D stays, which is ISA-L's too.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define ENTRY 48
#define INPUTS_MAX 255
#define OUTPUTS_MAX 255
#define PASS 4 /* outputs per pass: their accumulators are what registers hold */

#if defined(__x86_64__)
#define X86 1
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define NEON 1
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const uint8_t *tables;
    size_t inputs, outputs;
    const uint8_t *const *in;
    uint8_t *const *out;
    size_t bytes;
    bool accumulate;
    bool aligned; /* all outputs begin at multiples of 64 bytes */
} Work;

/* A kernel does some columns of outputs [first, first + count), count <= PASS, from the start, and says how many bytes it did. */
typedef size_t (*Kernel)(const Work *w, size_t first, int count);

INLINE const uint8_t *entry_of(const Work *w, size_t input, size_t output) {
    return w->tables + ENTRY * (input * w->outputs + output);
}

static void tail(const Work *w, size_t first, int count, size_t at) {
    for (int i = 0; i < count; i++) {
        uint8_t *out = w->out[first + i];
        if (!w->accumulate)
            memset(out + at, 0, w->bytes - at);
        for (size_t j = 0; j < w->inputs; j++) {
            const uint8_t *entry = entry_of(w, j, first + i), *in = w->in[j];
            for (size_t b = at; b < w->bytes; b++)
                out[b] ^= entry[in[b] & 15] ^ entry[16 + (in[b] >> 4)];
        }
    }
}

/* --- portable: eight bytes a word; a product is the sum of x * 2^b over the bits of c ------------------------------------------------ */

enum { WORDS = 32 };

INLINE size_t portable_columns(const Work *w, size_t first, const int count) {
    size_t at = 0;
    for (; at + 8 * WORDS <= w->bytes; at += 8 * WORDS) {
        uint64_t sum[PASS][WORDS];
        for (int i = 0; i < count; i++) {
            if (w->accumulate)
                memcpy(sum[i], w->out[first + i] + at, sizeof sum[i]);
            else
                memset(sum[i], 0, sizeof sum[i]);
        }
        for (size_t j = 0; j < w->inputs; j++) {
            uint64_t x[WORDS];
            unsigned left = 0;
            memcpy(x, w->in[j] + at, sizeof x);
            for (int i = 0; i < count; i++)
                left |= entry_of(w, j, first + i)[1]; /* the table's product with 1 is the coefficient */
            for (int bit = 0; left; bit++, left >>= 1) {
                for (int i = 0; i < count; i++)
                    if (entry_of(w, j, first + i)[1] >> bit & 1)
                        for (int q = 0; q < WORDS; q++)
                            sum[i][q] ^= x[q];
                if (left > 1)
                    for (int q = 0; q < WORDS; q++) {
                        uint64_t high = x[q] >> 7 & 0x0101010101010101u;
                        x[q] = (x[q] << 1 & 0xfefefefefefefefeu) ^ high * 0x1d;
                    }
            }
        }
        for (int i = 0; i < count; i++)
            memcpy(w->out[first + i] + at, sum[i], sizeof sum[i]);
    }
    return at;
}

static size_t portable(const Work *w, size_t first, int count) { return portable_columns(w, first, count); }

/* --- x86-64 -------------------------------------------------------------------------------------------------------------------------- */

#if X86

#define GFNI __attribute__((target("avx512f,avx512bw,avx512vl,gfni")))
#define AVX2 __attribute__((target("avx2")))
#define AHEAD 384 /* bytes that are fetched ahead: 256 to 512 tie, none loses 5 to 15 %, 768 and more 10 % */
#define PAGE 4096
#define HELD 24   /* matrices that stay in registers, beside four sums and the input */
#define FEW 8     /* inputs of the kernels that hold them */

INLINE GFNI __m512i matrix_of(const Work *w, size_t input, size_t output) {
    long long bits;
    memcpy(&bits, entry_of(w, input, output) + 32, 8);
    return _mm512_set1_epi64(bits);
}

INLINE GFNI void put(uint8_t *out, __m512i sum, const bool stream) {
    if (stream)
        _mm512_stream_si512((void *)out, sum);
    else
        _mm512_storeu_si512(out, sum);
}

/* Few inputs: a line of each at a time, all matrices in registers. What limits is how many lines are on their way from memory, and the shorter
 * the way from the first input's line to the last one's, the evener they are asked for: 256 bytes of each in turn lose 5 to 15 %. Sums that are
 * kept in a buffer and streamed out by the page lose 20 to 40 %, so does going through one input at a time.
 *
 * A streaming store waits for its page's translation, which no load has brought: a line per page of each output is touched ahead (2 to 5 %). */
GFNI INLINE size_t gfni_few(const Work *w, size_t first, const int count, const int inputs, const bool stream) {
    const bool add = !stream && w->accumulate;
    __m512i matrix[FEW][PASS];
    const uint8_t *in[FEW];
    uint8_t *out[PASS];
    size_t at = 0;
#pragma GCC unroll 8
    for (int j = 0; j < inputs; j++) {
        in[j] = w->in[j];
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
            matrix[j][i] = matrix_of(w, j, first + i);
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++)
        out[i] = w->out[first + i];
    for (const size_t bytes = w->bytes; at + 64 <= bytes;) {
        const size_t end = at + PAGE < bytes ? at + PAGE : bytes;
        if (stream)
#pragma GCC unroll 4
            for (int i = 0; i < count; i++)
                _mm_prefetch((const char *)(((uintptr_t)out[i] + at + 3 * PAGE) & -(uintptr_t)PAGE), _MM_HINT_T1);
        for (; at + 64 <= end; at += 64) {
            __m512i sum[PASS];
#pragma GCC unroll 8
            for (int j = 0; j < inputs; j++) {
                _mm_prefetch((const char *)in[j] + at + AHEAD, _MM_HINT_T0);
                const __m512i x = _mm512_loadu_si512(in[j] + at);
#pragma GCC unroll 4
                for (int i = 0; i < count; i++) {
                    const __m512i product = _mm512_gf2p8affine_epi64_epi8(x, matrix[j][i], 0);
                    sum[i] = j ? _mm512_xor_si512(sum[i], product) : product;
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < count; i++)
                put(out[i] + at, add ? _mm512_xor_si512(sum[i], _mm512_loadu_si512(out[i] + at)) : sum[i], stream);
        }
    }
    return at;
}

/* Any number of inputs, matrices from memory: two lines of each in turn. */
GFNI INLINE size_t gfni_many(const Work *w, size_t first, const int count, const bool stream) {
    const bool add = !stream && w->accumulate;
    size_t at = 0;
    for (; at + 128 <= w->bytes; at += 128) {
        __m512i sum[PASS][2];
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
#pragma GCC unroll 2
            for (int q = 0; q < 2; q++)
                sum[i][q] = add ? _mm512_loadu_si512(w->out[first + i] + at + 64 * q) : _mm512_setzero_si512();
        for (size_t j = 0; j < w->inputs; j++) {
            const uint8_t *in = w->in[j] + at;
            __m512i x[2];
#pragma GCC unroll 2
            for (int q = 0; q < 2; q++) {
                _mm_prefetch((const char *)in + AHEAD + 64 * q, _MM_HINT_T0);
                x[q] = _mm512_loadu_si512(in + 64 * q);
            }
#pragma GCC unroll 4
            for (int i = 0; i < count; i++) {
                const __m512i matrix = matrix_of(w, j, first + i);
#pragma GCC unroll 2
                for (int q = 0; q < 2; q++)
                    sum[i][q] = _mm512_xor_si512(sum[i][q], _mm512_gf2p8affine_epi64_epi8(x[q], matrix, 0));
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
#pragma GCC unroll 2
            for (int q = 0; q < 2; q++)
                put(w->out[first + i] + at + 64 * q, sum[i][q], stream);
    }
    return at;
}

GFNI INLINE size_t gfni_by_inputs(const Work *w, size_t first, const int count, const bool stream) {
    switch (w->inputs * count <= HELD ? w->inputs : 0) {
    case 1: return gfni_few(w, first, count, 1, stream);
    case 2: return gfni_few(w, first, count, 2, stream);
    case 3: return gfni_few(w, first, count, 3, stream);
    case 4: return gfni_few(w, first, count, 4, stream);
    case 5: return gfni_few(w, first, count, 5, stream);
    case 6: return gfni_few(w, first, count, 6, stream);
    case 7: return gfni_few(w, first, count, 7, stream);
    case 8: return gfni_few(w, first, count, 8, stream);
    default: return gfni_many(w, first, count, stream);
    }
}

GFNI INLINE size_t gfni_columns(const Work *w, size_t first, const int count) {
    if (w->accumulate || !w->aligned)
        return gfni_by_inputs(w, first, count, false);
    const size_t done = gfni_by_inputs(w, first, count, true);
    _mm_sfence();
    return done;
}

/* 64 bytes at a time. */
AVX2 INLINE size_t avx2_columns(const Work *w, size_t first, const int count) {
    const __m256i low = _mm256_set1_epi8(15);
    const bool stream = w->aligned && !w->accumulate;
    size_t at = 0;
    for (; at + 64 <= w->bytes; at += 64) {
        __m256i sum[PASS][2];
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
#pragma GCC unroll 2
            for (int q = 0; q < 2; q++)
                sum[i][q] = w->accumulate ? _mm256_loadu_si256((const void *)(w->out[first + i] + at + 32 * q)) : _mm256_setzero_si256();
        const uint8_t *entry = entry_of(w, 0, first);
        for (size_t j = 0; j < w->inputs; j++, entry += ENTRY * w->outputs) {
            const uint8_t *in = w->in[j] + at;
            __m256i lows[2], highs[2];
            _mm_prefetch((const char *)in + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int q = 0; q < 2; q++) {
                const __m256i x = _mm256_loadu_si256((const void *)(in + 32 * q));
                lows[q] = _mm256_and_si256(x, low);
                highs[q] = _mm256_and_si256(_mm256_srli_epi16(x, 4), low);
            }
#pragma GCC unroll 4
            for (int i = 0; i < count; i++) {
                const __m256i of_low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(entry + ENTRY * i)));
                const __m256i of_high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(entry + ENTRY * i + 16)));
#pragma GCC unroll 2
                for (int q = 0; q < 2; q++) {
                    const __m256i product = _mm256_xor_si256(_mm256_shuffle_epi8(of_low, lows[q]), _mm256_shuffle_epi8(of_high, highs[q]));
                    sum[i][q] = _mm256_xor_si256(sum[i][q], product);
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
#pragma GCC unroll 2
            for (int q = 0; q < 2; q++) {
                uint8_t *out = w->out[first + i] + at + 32 * q;
                if (stream)
                    _mm256_stream_si256((void *)out, sum[i][q]);
                else
                    _mm256_storeu_si256((void *)out, sum[i][q]);
            }
    }
    if (stream)
        _mm_sfence();
    return at;
}

/* Constant counts, so that all loops over outputs unroll and their sums stay in registers. */
#define BY_COUNT(TARGET, NAME)                                                      \
    TARGET static size_t NAME##_1(const Work *w, size_t f) { return NAME##_columns(w, f, 1); } \
    TARGET static size_t NAME##_2(const Work *w, size_t f) { return NAME##_columns(w, f, 2); } \
    TARGET static size_t NAME##_3(const Work *w, size_t f) { return NAME##_columns(w, f, 3); } \
    TARGET static size_t NAME##_4(const Work *w, size_t f) { return NAME##_columns(w, f, 4); } \
    static size_t NAME(const Work *w, size_t first, int count) {                    \
        switch (count) {                                                            \
        case 1: return NAME##_1(w, first);                                          \
        case 2: return NAME##_2(w, first);                                          \
        case 3: return NAME##_3(w, first);                                          \
        default: return NAME##_4(w, first);                                         \
        }                                                                           \
    }

BY_COUNT(GFNI, gfni)
BY_COUNT(AVX2, avx2)

#endif

/* --- ARM: sixteen bytes a table look-up ---------------------------------------------------------------------------------------------- */

#if NEON

static size_t neon(const Work *w, size_t first, int count) {
    const uint8x16_t low = vdupq_n_u8(15);
    size_t at = 0;
    for (; at + 16 <= w->bytes; at += 16) {
        uint8x16_t sum[PASS];
        for (int i = 0; i < count; i++)
            sum[i] = w->accumulate ? vld1q_u8(w->out[first + i] + at) : vdupq_n_u8(0);
        for (size_t j = 0; j < w->inputs; j++) {
            const uint8x16_t x = vld1q_u8(w->in[j] + at), lows = vandq_u8(x, low), highs = vshrq_n_u8(x, 4);
            for (int i = 0; i < count; i++) {
                const uint8_t *entry = entry_of(w, j, first + i);
                const uint8x16_t product = veorq_u8(vqtbl1q_u8(vld1q_u8(entry), lows), vqtbl1q_u8(vld1q_u8(entry + 16), highs));
                sum[i] = veorq_u8(sum[i], product);
            }
        }
        for (int i = 0; i < count; i++)
            vst1q_u8(w->out[first + i] + at, sum[i]);
    }
    return at;
}

#endif

/* --- the choice ---------------------------------------------------------------------------------------------------------------------- */

static struct {
    const char *name;
    Kernel kernel;
} kernels[4]; /* those that this processor can run, fastest first */
static int kernel_count;

static void find_kernels(void) {
    kernel_count = 0;
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        kernels[kernel_count].name = "gfni";
        kernels[kernel_count++].kernel = gfni;
    }
    if (__builtin_cpu_supports("avx2")) {
        kernels[kernel_count].name = "avx2";
        kernels[kernel_count++].kernel = avx2;
    }
#elif NEON
    kernels[kernel_count].name = "neon";
    kernels[kernel_count++].kernel = neon;
#endif
    kernels[kernel_count].name = "portable";
    kernels[kernel_count++].kernel = portable;
}

static void perform(const Work *w, Kernel kernel) {
    for (size_t first = 0; first < w->outputs; first += PASS) {
        const int count = (int)(w->outputs - first < PASS ? w->outputs - first : PASS);
        const size_t done = kernel(w, first, count);
        if (done < w->bytes)
            tail(w, first, count, done);
    }
}

/* --- the face for Python ------------------------------------------------------------------------------------------------------------- */

/* Views of all buffers of a sequence, of equal length; how many, or -1 with an exception set and none held. */
static Py_ssize_t take(PyObject *given, Py_buffer *views, Py_ssize_t most, int flags, Py_ssize_t *bytes) {
    PyObject *fast = PySequence_Fast(given, "expected a sequence of buffers");
    if (fast == NULL)
        return -1;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(fast);
    Py_ssize_t taken = 0;
    if (count < 1 || count > most) {
        PyErr_Format(PyExc_ValueError, "%zd buffers; there must be 1 to %zd", count, most);
        goto failed;
    }
    for (; taken < count; taken++) {
        if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(fast, taken), &views[taken], flags) < 0)
            goto failed;
        if (*bytes < 0)
            *bytes = views[taken].len;
        if (views[taken].len != *bytes) {
            PyErr_Format(PyExc_ValueError, "a buffer of %zd bytes among others of %zd", views[taken].len, *bytes);
            taken++;
            goto failed;
        }
    }
    Py_DECREF(fast);
    return count;
failed:
    while (taken > 0)
        PyBuffer_Release(&views[--taken]);
    Py_DECREF(fast);
    return -1;
}

PyDoc_STRVAR(combine_doc,
"combine(tables, inputs, outputs, accumulate, kernel)\n--\n\n"
"Write to each output the sum of coefficient times input. All buffers have one length; no output may overlap any other buffer.\n"
"`accumulate`: add to what the outputs hold. `kernel`: a number in `kernels`. The GIL is released meanwhile.");

static PyObject *combine(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer tables, ins[INPUTS_MAX], outs[OUTPUTS_MAX];
    PyObject *given_ins, *given_outs, *result = NULL;
    int accumulate, number;
    Py_ssize_t bytes = -1, inputs, outputs;

    if (!PyArg_ParseTuple(args, "y*OOpi:combine", &tables, &given_ins, &given_outs, &accumulate, &number))
        return NULL;
    inputs = take(given_ins, ins, INPUTS_MAX, PyBUF_SIMPLE, &bytes);
    if (inputs < 0)
        goto no_inputs;
    outputs = take(given_outs, outs, OUTPUTS_MAX, PyBUF_WRITABLE, &bytes);
    if (outputs < 0)
        goto no_outputs;
    if (number < 0 || number >= kernel_count) {
        PyErr_Format(PyExc_ValueError, "there is no kernel %d", number);
        goto done;
    }
    if (tables.len != ENTRY * inputs * outputs) {
        PyErr_Format(PyExc_ValueError, "tables of %zd bytes for %zd inputs and %zd outputs", tables.len, inputs, outputs);
        goto done;
    }
    const uint8_t *in[INPUTS_MAX];
    uint8_t *out[OUTPUTS_MAX];
    bool aligned = true;
    for (Py_ssize_t j = 0; j < inputs; j++)
        in[j] = ins[j].buf;
    for (Py_ssize_t i = 0; i < outputs; i++) {
        out[i] = outs[i].buf;
        aligned = aligned && (uintptr_t)out[i] % 64 == 0;
        for (Py_ssize_t j = 0; j < inputs + i; j++) {
            const uint8_t *other = j < inputs ? in[j] : out[j - inputs];
            if (other < out[i] + bytes && out[i] < other + bytes) {
                PyErr_Format(PyExc_ValueError, "output %zd overlaps another buffer", i);
                goto done;
            }
        }
    }
    const Work work = {tables.buf, (size_t)inputs, (size_t)outputs, in, out, (size_t)bytes, accumulate != 0, aligned};
    const Kernel kernel = kernels[number].kernel;
    Py_BEGIN_ALLOW_THREADS
    perform(&work, kernel);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    while (outputs > 0)
        PyBuffer_Release(&outs[--outputs]);
no_outputs:
    while (inputs > 0)
        PyBuffer_Release(&ins[--inputs]);
no_inputs:
    PyBuffer_Release(&tables);
    return result;
}

static PyMethodDef methods[] = {{"combine", combine, METH_VARARGS, combine_doc}, {NULL, NULL, 0, NULL}};

static int execute(PyObject *module) {
    find_kernels();
    PyObject *names = PyTuple_New(kernel_count);
    if (names == NULL)
        return -1;
    for (int i = 0; i < kernel_count; i++) {
        PyObject *name = PyUnicode_FromString(kernels[i].name);
        if (name == NULL) {
            Py_DECREF(names);
            return -1;
        }
        PyTuple_SET_ITEM(names, i, name);
    }
    const int failed = PyModule_AddObjectRef(module, "kernels", names);
    Py_DECREF(names);
    return failed;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_parity", .m_doc = "Parity's inner loop; see parity.c.", .m_size = 0, .m_methods = methods, .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__parity(void) { return PyModuleDef_Init(&definition); }
