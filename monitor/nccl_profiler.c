// A profiler plugin for NCCL: what the device did, added to the ring of the rank. NCCL loads it by NCCL_PROFILER_PLUGIN (`nccl.py` sets it, and gives the ring).
//
//     NCCL (2.26 and newer)  --start, stop, state of events-->  here  --inside_us, ended_ns-->  the record that the tap made of the same operation
//
// Who counts: the tap. An operation that c10d entered has one record, the tap's; this plugin finds it (the call is still open, or it is the oldest alike that nobody
// has taken) and adds `inside_us` (first channel's start to last channel's end, by the GPU's own timer) and `ended_ns`, if nobody else did. Nothing is counted twice.
// What no call of c10d stands behind (the replay of a CUDA graph, NCCL called directly) becomes a mark of kind CKPTD_NCCL: `dtype` is its operation (OPS), `bytes` its
// bytes, flags MARK | DEVICE. Marks of kind CKPTD_NCCL with MARK | P2P exist only while waits are watched: one per transfer of a proxy to one peer (`peer`: rank within
// the communicator), `inside_us`: standing for the network, `seq`: microseconds standing for the peer's credit, `waited_us`: standing for this GPU.
//
// What NCCL promises (its ext-profiler documentation and src/plugin/profiler.cc, 2.28): `stopEvent` of a collective means enqueued, not done; kernel channels and proxies
// name it as their parent later, from other threads. A mask of events is read anew for each outermost group: so one in `every` groups is timed by its kernel channels,
// which cost a proxy's attention, and the others cost a few calls that return at once. Groups with one rank never reach a profiler.
//
// Invariants
// - no call waits: no lock, no allocation, no file or socket but in `init`; bounded loops;
// - a handle is a number (generation, place), never an address: one that is stale, foreign or invented is recognised and ignored;
// - places are bounded: when all are open, the event is lost, and counted;
// - nothing is written into a ring record whose commit word is not the expected one; no record is claimed unless the ring's writer is native code, which claims atomically;
// - every call returns success: a profiler's failure must not become the job's.
//
// One plugin only can be loaded (nccl#1981): the user's is loaded from here ($CKPTD_NCCL_PROFILER_NEXT), with the same version of the interface, and hears what its own
// mask asked for, with its own contexts and handles. $CKPTD_NCCL_PROFILER=0 switches off all but that.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ring.h"

#define EXPORT __attribute__((visibility("default")))
#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define STORE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELAXED)
#define ADD(x, v) __atomic_fetch_add(&(x), (v), __ATOMIC_RELAXED)

// --- NCCL's interface, versions 3 to 6: what of it is used ------------------------------------------------------------------

enum {
    T_GROUP = 1 << 0, T_COLL = 1 << 1, T_P2P = 1 << 2, T_PROXY_OP = 1 << 3, T_PROXY_STEP = 1 << 4, T_PROXY_CTRL = 1 << 5, T_KERNEL_CH = 1 << 6, T_NET = 1 << 7,
    T_GROUP_API = 1 << 8, T_COLL_API = 1 << 9, T_P2P_API = 1 << 10, T_LAUNCH = 1 << 11, T_CE_COLL = 1 << 12, T_CE_SYNC = 1 << 13, T_CE_BATCH = 1 << 14
};
enum { S_SEND_GPU = 8, S_SEND_NET = 9, S_RECV_NET = 10, S_RECV_FLUSH = 11, S_RECV_GPU = 12, S_SEND_PEER = 20, S_KERNEL_STOP = 22, S_LAST = 64 };

// The head is alike in all versions; `type` is a byte before version 5 (what follows it is padding) and a word from then on.
typedef struct {
    uint64_t type;
    void *parent;
    int rank;
    union {
        struct { const char *name; uint64_t comm, seq; const char *func; const void *from; void *to; size_t count; int root; const char *dtype; uint8_t channels, warps; const char *algo, *proto; } coll3;
        struct { uint64_t seq; const char *func; const void *from; void *to; size_t count; int root; const char *dtype; uint8_t channels, warps; const char *algo, *proto; void *group; } coll;
        struct { const char *name; uint64_t comm; const char *func; void *at; const char *dtype; size_t count; int peer; } p2p3;
        struct { const char *func; void *at; const char *dtype; size_t count; int peer; uint8_t channels; void *group; } p2p;
        struct { const char *func; size_t count; const char *dtype; int root; void *stream; bool captured; } coll_api;
        struct { const char *func; size_t count; const char *dtype; void *stream; bool captured; } p2p_api;
        struct { pid_t pid; uint8_t channel; int peer, steps, chunk, is_send; } proxy_op;
        struct { uint8_t channel; uint64_t timer; } kernel_ch;
        struct { uint64_t seq; const char *func; const void *from; void *to; size_t count; int root; const char *dtype, *sync; bool intra; uint32_t batch, batches, number; void *stream; } ce;
    };
} descr;
typedef union { size_t bytes; int appended; void *data; uint64_t timer; } state_args;
typedef void (*log_fn)(int, unsigned long, const char *, int, const char *, ...);

// Bytes of a descriptor in each version: what may be copied for the user's plugin.
#define HEAD_BYTES offsetof(descr, coll)
static const size_t DESCR_BYTES[7] = {
    [3] = HEAD_BYTES + sizeof(((descr *)0)->coll3), [4] = HEAD_BYTES + offsetof(descr, coll.group) - HEAD_BYTES,
    [5] = HEAD_BYTES + sizeof(((descr *)0)->coll), [6] = HEAD_BYTES + sizeof(((descr *)0)->ce),
};

typedef struct {
    const char *name;
    void (*init)(void);  // its arguments differ by version
    int (*start)(void *context, void **handle, descr *d);
    int (*stop)(void *handle);
    int (*state)(void *handle, int state, state_args *args);
    int (*finalize)(void *context);
} profiler;
typedef int (*init3_fn)(void **, int *);
typedef int (*init4_fn)(void **, int *, const char *, uint64_t, int, int, int, log_fn);
typedef int (*init5_fn)(void **, uint64_t, int *, const char *, int, int, int, log_fn);

// --- what is kept -----------------------------------------------------------------------------------------------------------

enum { PLACES = 8192, PLACE_BITS = 13, COMMS = 512, LOOK_BACK = 64, TRIES = 16 };
#define FITTING_NS 1000000000ull

typedef struct {
    uint32_t open, epoch, ranks;
    int version;
    void *theirs;
} comm;

typedef struct {
    uint64_t generation;  // 0 while it is filled; content stays readable after `open` fell, until the place is taken again
    uint32_t open, type;
    comm *comm;
    uint32_t comm_epoch;
    int version;
    void *theirs;     // the user's plugin's handle
    uint64_t parent;  // ours
    uint64_t begun_ns;
    // of an operation
    uint64_t record, leader, first, last, bytes, entered_ns, ended_ns;  // record: index + 1; leader: the operation whose times this one adds to
    uint32_t started, ended;
    uint8_t op;
    // of a kernel channel, a proxy's transfer, a step of it
    uint64_t timer, moved, at_ns, step_bytes;
    uint64_t net_ns, peer_ns, gpu_ns;
    int32_t peer, at, is_send;
} event;

static event places[PLACES];
static comm comms[COMMS];
static uint64_t next_place, next_comm, generations;

static uint8_t *ring_at;
static uint64_t ring_capacity;
static uint64_t taken[LOOK_BACK];  // record index + 1, by index % LOOK_BACK

static int *mask_at;  // NCCL's own word
static int theirs_mask, open_comms, off = -1;
static uint32_t every = 16, time_graphs, graphs_seen, watch_waits;
static uint64_t groups_seen;
static profiler *next_of[7];
static int next_loaded;

enum { N_INITS, N_OPS, N_MATCHED, N_TIMED, N_MARKS, N_LOST, N_STALE, N_WAITS, N_FORWARDED, N_GRAPHS, N_COUNTS };
static uint64_t counts[N_COUNTS];

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

// --- handles ----------------------------------------------------------------------------------------------------------------

static void *handle_of(const event *e) { return (void *)(uintptr_t)(LOAD(e->generation) << PLACE_BITS | (uint64_t)(e - places)); }

// The event of a handle, or NULL: the place is taken by another one now, or it never was a handle of ours.
static event *event_of(uint64_t handle) {
    event *e = &places[handle & (PLACES - 1)];
    uint64_t generation = handle >> PLACE_BITS;
    if (!generation) return NULL;
    if (__atomic_load_n(&e->generation, __ATOMIC_ACQUIRE) == generation) return e;
    ADD(counts[N_STALE], 1);
    return NULL;
}

static event *take_place(comm *c, uint32_t type, uint64_t parent) {
    for (int i = 0; i < TRIES; i++) {
        event *e = &places[ADD(next_place, 1) & (PLACES - 1)];
        uint32_t closed = 0;
        if (!__atomic_compare_exchange_n(&e->open, &closed, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) continue;
        __atomic_store_n(&e->generation, 0, __ATOMIC_SEQ_CST);
        e->type = type;
        e->comm = c;
        e->comm_epoch = c ? LOAD(c->epoch) : 0;
        e->version = c ? c->version : 0;
        e->theirs = NULL;
        e->parent = parent;
        e->begun_ns = now_ns();
        e->record = e->leader = e->first = e->last = e->bytes = e->entered_ns = e->ended_ns = 0;
        e->started = e->ended = 0;
        e->op = 0;
        e->timer = e->moved = e->at_ns = e->step_bytes = e->net_ns = e->peer_ns = e->gpu_ns = 0;
        e->peer = -1;
        e->at = e->is_send = 0;
        __atomic_store_n(&e->generation, ADD(generations, 1) + 1, __ATOMIC_RELEASE);
        return e;
    }
    ADD(counts[N_LOST], 1);
    return NULL;
}

// --- the ring ---------------------------------------------------------------------------------------------------------------

static ckptd_ring_record *record_at(uint8_t *ring, uint64_t index) {
    return (ckptd_ring_record *)(ring + CKPTD_RECORDS_AT) + (index & (ring_capacity - 1));
}

// Hand over a ring (or NULL: stop writing). The mapping has to stay for the rest of the process. 0, or -1: this is no ring of this version.
EXPORT int ckptd_nccl_attach(void *ring, uint64_t bytes) {
    __atomic_store_n(&ring_at, NULL, __ATOMIC_SEQ_CST);
    if (!ring) return 0;
    const ckptd_ring_header *h = ring;
    if (bytes < CKPTD_RECORDS_AT + sizeof(ckptd_ring_record) || h->magic != CKPTD_RING_MAGIC || h->version != CKPTD_RING_VERSION) return -1;
    uint64_t capacity = h->capacity;
    if (!capacity || capacity & (capacity - 1) || CKPTD_RECORDS_AT + capacity * sizeof(ckptd_ring_record) > bytes) return -1;
    STORE(ring_capacity, capacity);
    __atomic_store_n(&ring_at, (uint8_t *)ring, __ATOMIC_SEQ_CST);
    return 0;
}

#define OP(x) (1u << CKPTD_##x)
static const struct { const char *func; uint8_t op; uint32_t fits; } FUNCS[] = {
    {"AllReduce", CKPTD_ALL_REDUCE, OP(ALL_REDUCE) | OP(ALL_REDUCE_COALESCED) | OP(BARRIER)},
    {"AllGather", CKPTD_ALL_GATHER, OP(ALL_GATHER) | OP(ALL_GATHER_COALESCED)},
    {"ReduceScatter", CKPTD_REDUCE_SCATTER, OP(REDUCE_SCATTER) | OP(REDUCE_SCATTER_COALESCED)},
    {"Broadcast", CKPTD_BROADCAST, OP(BROADCAST) | OP(ALL_GATHER) | OP(SCATTER)},
    {"Reduce", CKPTD_REDUCE, OP(REDUCE) | OP(REDUCE_SCATTER)},
    {"Send", CKPTD_SEND, OP(SEND) | OP(ALL_TO_ALL) | OP(GATHER) | OP(SCATTER)},
    {"Recv", CKPTD_RECV, OP(RECV) | OP(RECV_ANY) | OP(ALL_TO_ALL) | OP(GATHER) | OP(SCATTER)},
    {"AlltoAll", CKPTD_ALL_TO_ALL, OP(ALL_TO_ALL)},
    {"Gather", CKPTD_GATHER, OP(GATHER)},
    {"Scatter", CKPTD_SCATTER, OP(SCATTER)},
    {"SendRecv", CKPTD_SEND, OP(SEND) | OP(RECV) | OP(ALL_TO_ALL)},
};
#define MANY (OP(ALL_TO_ALL) | OP(GATHER) | OP(SCATTER) | OP(ALL_REDUCE_COALESCED) | OP(ALL_GATHER_COALESCED) | OP(REDUCE_SCATTER_COALESCED))

static int func_of(const char *name) {
    for (size_t i = 0; name && i < sizeof FUNCS / sizeof *FUNCS; i++)
        if (!strcmp(name, FUNCS[i].func)) return (int)i;
    return -1;
}

static unsigned bytes_of_dtype(const char *name) {
    static const struct { const char *name; unsigned bytes; } sizes[] = {
        {"ncclFloat32", 4}, {"ncclBfloat16", 2}, {"ncclFloat16", 2}, {"ncclInt64", 8}, {"ncclInt32", 4}, {"ncclInt8", 1}, {"ncclUint8", 1}, {"ncclFloat64", 8},
        {"ncclUint32", 4}, {"ncclUint64", 8}, {"ncclFloat8e4m3", 1}, {"ncclFloat8e5m2", 1},
    };
    for (size_t i = 0; name && i < sizeof sizes / sizeof *sizes; i++)
        if (!strcmp(name, sizes[i].name)) return sizes[i].bytes;
    return 1;
}

// Members of the record's group; 0: not known.
static uint32_t members_of(uint8_t *ring, const ckptd_ring_record *r) {
    return r->group < CKPTD_GROUPS_MAX ? LOAD(((ckptd_ring_group *)(ring + CKPTD_GROUPS_AT))[r->group].size) : 0;
}

// May this be the record of what NCCL was given? A group of another size is not this communicator (`ranks` 0: not told, before version 4). Where one call of c10d becomes
// several of NCCL their bytes differ; of a reduce-scatter NCCL counts one rank's part.
static bool fits(uint8_t *ring, const ckptd_ring_record *r, int func, uint64_t bytes, uint32_t ranks) {
    if (r->flags & (CKPTD_MARK | CKPTD_CAPTURED) || r->op > 31 || !(FUNCS[func].fits >> r->op & 1)) return false;
    uint32_t members = members_of(ring, r);
    if (ranks && members && ranks != members && !(r->flags & CKPTD_P2P)) return false;  // torch makes pairs of ranks communicators of their own
    if (r->op == CKPTD_BARRIER) return bytes <= sizeof(double);  // c10d's barrier has no tensor that says where it is; over NCCL it is an all-reduce of one element
    if (!(r->flags & CKPTD_DEVICE)) return false;
    return MANY >> r->op & 1 || r->bytes == bytes || r->bytes == bytes * (members ? members : ranks) || r->bytes == 0;
}

// Index + 1 of the record that the tap made of this operation; 0: there is none.
static uint64_t match(uint8_t *ring, int func, uint64_t bytes, uint32_t ranks, uint64_t now) {
    uint64_t head = __atomic_load_n(&((ckptd_ring_header *)ring)->head, __ATOMIC_ACQUIRE), oldest = 0;
    for (uint64_t n = 1; n <= LOOK_BACK && n <= head && n <= LOAD(ring_capacity); n++) {
        uint64_t i = head - n;
        ckptd_ring_record *r = record_at(ring, i);
        if (__atomic_load_n(&r->commit, __ATOMIC_ACQUIRE) != i + 1) continue;
        if (!fits(ring, r, func, bytes, ranks)) continue;
        if (!LOAD(r->returned_ns)) return i + 1;  // we are inside that call
        if (LOAD(taken[i % LOOK_BACK]) != i + 1 && r->entered_ns + FITTING_NS > now) oldest = i + 1;
    }
    return oldest;
}

// A record of our own. Only beside a writer that claims as we do, by one atomic addition.
static uint64_t claim_mark(uint8_t *ring, const ckptd_ring_record *of) {
    ckptd_ring_header *h = (ckptd_ring_header *)ring;
    if (LOAD(h->layer) != CKPTD_LAYER_NATIVE) return 0;
    uint64_t i = __atomic_fetch_add(&h->head, 1, __ATOMIC_ACQ_REL);
    ckptd_ring_record *r = record_at(ring, i);
    __atomic_store_n(&r->commit, 0, __ATOMIC_SEQ_CST);
    STORE(r->entered_ns, of->entered_ns);
    STORE(r->returned_ns, of->entered_ns);
    STORE(r->ended_ns, of->ended_ns);
    STORE(r->bytes, of->bytes);
    STORE(r->seq, of->seq);
    STORE(r->step, (uint32_t)LOAD(h->step) + 1);
    STORE(r->group, (uint8_t)CKPTD_NO_GROUP);
    STORE(r->op, (uint8_t)CKPTD_NCCL);
    STORE(r->dtype, of->dtype);
    STORE(r->flags, of->flags);
    STORE(r->peer, of->peer);
    STORE(r->waited_us, of->waited_us);
    STORE(r->inside_us, of->inside_us);
    __atomic_store_n(&r->commit, i + 1, __ATOMIC_RELEASE);
    ADD(counts[N_MARKS], 1);
    return i + 1;
}

static uint32_t us(uint64_t ns) {
    uint64_t rounded = (ns + 999) / 1000;
    return rounded > UINT32_MAX ? UINT32_MAX : (uint32_t)rounded;
}

// All channels that have started are done: say how long, and that it is over. Told again if another channel of it begins later.
static void tell(event *e) {
    uint8_t *ring = __atomic_load_n(&ring_at, __ATOMIC_ACQUIRE);
    uint64_t first = LOAD(e->first), last = LOAD(e->last), now = now_ns(), record = LOAD(e->record);
    if (!ring || !first || last < first) return;
    uint32_t inside = us(last - first);
    inside += !inside;
    if (!record) {
        uint64_t ns = last - first;
        ckptd_ring_record of = {
            .entered_ns = now - ns, .ended_ns = now, .bytes = e->bytes, .dtype = e->op, .flags = CKPTD_MARK | CKPTD_DEVICE, .peer = e->peer, .inside_us = inside,
        };
        STORE(e->record, claim_mark(ring, &of));
        return;
    }
    ckptd_ring_record *r = record_at(ring, record - 1);
    if (__atomic_load_n(&r->commit, __ATOMIC_ACQUIRE) != record) return;
    STORE(r->inside_us, inside);
    uint64_t known = LOAD(e->ended_ns);  // 0, or what we wrote when fewer channels were known
    if (__atomic_compare_exchange_n(&r->ended_ns, &known, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) STORE(e->ended_ns, now);
    ADD(counts[N_TIMED], 1);
}

// --- events -----------------------------------------------------------------------------------------------------------------

static void set_mask(void) {
    int *at = __atomic_load_n(&mask_at, __ATOMIC_ACQUIRE);
    if (!at) return;
    int mask = LOAD(theirs_mask);
    if (!LOAD(off)) {
        uint32_t n = LOAD(every);
        mask |= T_COLL | T_P2P;
        if (n && (LOAD(time_graphs) || !LOAD(graphs_seen)) && LOAD(groups_seen) % n == 0) mask |= T_KERNEL_CH;
        if (LOAD(watch_waits)) mask |= T_PROXY_OP | T_PROXY_STEP;
    }
    STORE(*at, mask);
}

// The thread's newest operation that stands for a whole call of c10d: later ones of the same call add to its times.
static __thread uint64_t led_record, led_by;

static void begin_operation(event *e, const descr *d, bool p2p) {
    int v = e->version;
    const char *name = p2p ? (v == 3 ? d->p2p3.func : d->p2p.func) : (v == 3 ? d->coll3.func : d->coll.func);
    const char *dtype = p2p ? (v == 3 ? d->p2p3.dtype : d->p2p.dtype) : (v == 3 ? d->coll3.dtype : d->coll.dtype);
    uint64_t count = p2p ? (v == 3 ? d->p2p3.count : d->p2p.count) : (v == 3 ? d->coll3.count : d->coll.count);
    int func = func_of(name);
    e->entered_ns = e->begun_ns;
    e->bytes = count * bytes_of_dtype(dtype);
    e->op = func < 0 ? CKPTD_OP_UNKNOWN : FUNCS[func].op;
    e->peer = p2p ? (v == 3 ? d->p2p3.peer : d->p2p.peer) : -1;
    ADD(counts[N_OPS], 1);
    uint8_t *ring = __atomic_load_n(&ring_at, __ATOMIC_ACQUIRE);
    if (!ring || func < 0) return;
    uint64_t record = match(ring, func, e->bytes, e->comm ? e->comm->ranks : 0, e->begun_ns);
    e->record = record;
    if (!record) return;
    ADD(counts[N_MATCHED], 1);
    STORE(taken[(record - 1) % LOOK_BACK], record);
    if (led_record == record && event_of(led_by)) {
        e->leader = led_by;
    } else {
        led_record = record;
        led_by = (uint64_t)(uintptr_t)handle_of(e);
    }
}

static event *leader_of(event *e) {
    event *leader = e->leader ? event_of(e->leader) : NULL;
    return leader ? leader : e;
}

static event *operation_above(uint64_t parent) {
    event *e = event_of(parent);
    return e && e->type & (T_COLL | T_P2P) ? leader_of(e) : NULL;
}

static void begin_channel(event *e, const descr *d) {
    e->timer = e->version >= 4 ? d->kernel_ch.timer : 0;
    uint64_t at = e->timer ? e->timer : e->begun_ns;
    event *op = operation_above(e->parent);
    if (!op) return;
    uint64_t first = LOAD(op->first);
    while ((!first || at < first) && !__atomic_compare_exchange_n(&op->first, &first, at, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    ADD(op->started, 1);
}

static void end_channel(event *e) {
    uint64_t at = LOAD(e->moved);  // the GPU's timer at its stop, if the interface has one
    if (!e->timer || !at) at = e->timer ? 0 : now_ns();
    event *op = operation_above(e->parent);
    if (!op || !at) return;
    uint64_t last = LOAD(op->last);
    while (at > last && !__atomic_compare_exchange_n(&op->last, &last, at, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    if (__atomic_add_fetch(&op->ended, 1, __ATOMIC_ACQ_REL) >= LOAD(op->started)) tell(op);
}

static void account(event *step, uint64_t now) {
    event *op = event_of(step->parent);
    uint64_t since = step->at_ns;
    if (!op || !since || now < since || op->type != T_PROXY_OP) return;
    switch (step->at) {
        case S_SEND_NET: case S_RECV_NET: ADD(op->net_ns, now - since); break;
        case S_SEND_PEER: ADD(op->peer_ns, now - since); break;
        case S_SEND_GPU: case S_RECV_GPU: case S_RECV_FLUSH: ADD(op->gpu_ns, now - since); break;
        default: break;
    }
}

static void end_transfer(event *e) {
    uint8_t *ring = __atomic_load_n(&ring_at, __ATOMIC_ACQUIRE);
    if (!ring || !LOAD(watch_waits)) return;
    ckptd_ring_record of = {
        .entered_ns = e->begun_ns, .ended_ns = now_ns(), .bytes = LOAD(e->moved), .seq = us(LOAD(e->peer_ns)), .dtype = e->is_send ? CKPTD_SEND : CKPTD_RECV,
        .flags = CKPTD_MARK | CKPTD_P2P, .peer = e->peer, .waited_us = us(LOAD(e->gpu_ns)), .inside_us = us(LOAD(e->net_ns)),
    };
    if (claim_mark(ring, &of)) ADD(counts[N_WAITS], 1);
}

// --- the user's plugin ------------------------------------------------------------------------------------------------------

// Which bits of a mask make NCCL send an event of a type: the user's plugin hears what it would have heard alone.
static int asked_by(uint32_t type) {
    enum { BELOW = T_PROXY_OP | T_PROXY_STEP | T_KERNEL_CH | T_NET, CE = T_CE_COLL | T_CE_SYNC | T_CE_BATCH };
    switch (type) {
        case T_GROUP_API: return T_GROUP_API | T_P2P_API | T_COLL_API | T_LAUNCH | T_GROUP | T_COLL | T_P2P | BELOW | CE;
        case T_COLL_API: return T_COLL_API | T_COLL | BELOW | CE;
        case T_P2P_API: return T_P2P_API | T_P2P | BELOW;
        case T_GROUP: return T_GROUP | T_COLL | T_P2P | BELOW;
        case T_COLL: return T_COLL | BELOW;
        case T_P2P: return T_P2P | BELOW;
        case T_PROXY_OP: return T_PROXY_OP | T_PROXY_STEP | T_NET;
        case T_PROXY_STEP: return T_PROXY_STEP | T_NET;
        case T_CE_COLL: return CE;
        default: return (int)type;
    }
}

static bool forwards(const comm *c, uint32_t type) {
    return c && c->theirs && next_of[c->version] && LOAD(theirs_mask) & asked_by(type);
}

static bool still_theirs(const event *e) {
    return e->theirs && e->comm && LOAD(e->comm->open) && LOAD(e->comm->epoch) == e->comm_epoch && next_of[e->version];
}

static void *their_handle(void *ours) {
    event *e = event_of((uint64_t)(uintptr_t)ours);
    return e ? e->theirs : NULL;
}

static void forward_start(event *e, const descr *d) {
    descr copy = {0};
    memcpy(&copy, d, DESCR_BYTES[e->version]);
    bool foreign = e->type == T_PROXY_OP && d->proxy_op.pid != getpid();  // its parent lies in another process
    copy.parent = foreign ? d->parent : their_handle(d->parent);
    if (e->version >= 5 && e->type == T_COLL) copy.coll.group = their_handle(d->coll.group);
    if (e->version >= 5 && e->type == T_P2P) copy.p2p.group = their_handle(d->p2p.group);
    next_of[e->version]->start(e->comm->theirs, &e->theirs, &copy);
    ADD(counts[N_FORWARDED], 1);
}

static void load_next(void) {
    int before = 0;
    if (!__atomic_compare_exchange_n(&next_loaded, &before, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
    const char *name = getenv("CKPTD_NCCL_PROFILER_NEXT");
    if (!name || !*name) return;
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library && !strchr(name, '/')) {  // as NCCL finds one by its short name
        char path[512];
        snprintf(path, sizeof path, "libnccl-profiler-%s.so", name);
        library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    for (int v = 3; library && v <= 6; v++) {
        char symbol[32];
        snprintf(symbol, sizeof symbol, "ncclProfiler_v%d", v);
        next_of[v] = dlsym(library, symbol);
    }
}

// --- the interface ----------------------------------------------------------------------------------------------------------

static void read_settings(void) {
    const char *value = getenv("CKPTD_NCCL_PROFILER");
    STORE(off, value && !strcmp(value, "0"));
    if ((value = getenv("CKPTD_NCCL_TIMES")) && *value) STORE(every, (uint32_t)strtoul(value, NULL, 10));
    if ((value = getenv("CKPTD_NCCL_GRAPHS"))) STORE(time_graphs, !strcmp(value, "1"));
}

static comm *new_comm(int version, uint32_t ranks) {
    for (int i = 0; i < COMMS; i++) {
        comm *c = &comms[ADD(next_comm, 1) % COMMS];
        uint32_t closed = 0;
        if (!__atomic_compare_exchange_n(&c->open, &closed, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) continue;
        ADD(c->epoch, 1);
        c->version = version;
        c->ranks = ranks;
        c->theirs = NULL;
        return c;
    }
    return NULL;  // more communicators than places: this one is not watched
}

static comm *begin_comm(int version, int *mask, int ranks) {
    if (LOAD(off) < 0) read_settings();
    load_next();
    ADD(counts[N_INITS], 1);
    comm *c = new_comm(version, ranks > 0 ? (uint32_t)ranks : 0);
    ADD(open_comms, 1);
    if (mask) __atomic_store_n(&mask_at, mask, __ATOMIC_RELEASE);
    return c;
}

static int end_init(void **context, comm *c, int rc, void *theirs, int version) {
    if (c && next_of[version] && !rc) c->theirs = theirs;
    if (context) *context = c;
    set_mask();
    return 0;
}

__attribute__((unused)) static int init3(void **context, int *mask) {
    comm *c = begin_comm(3, mask, 0);
    void *theirs = NULL;
    int rc = next_of[3] ? ((init3_fn)next_of[3]->init)(&theirs, &theirs_mask) : 0;
    return end_init(context, c, rc, theirs, 3);
}

__attribute__((unused)) static int init4(void **context, int *mask, const char *name, uint64_t id, int nodes, int ranks, int rank, log_fn log) {
    comm *c = begin_comm(4, mask, ranks);
    void *theirs = NULL;
    int rc = next_of[4] ? ((init4_fn)next_of[4]->init)(&theirs, &theirs_mask, name, id, nodes, ranks, rank, log) : 0;
    return end_init(context, c, rc, theirs, 4);
}

static int init56(int version, void **context, uint64_t id, int *mask, const char *name, int nodes, int ranks, int rank, log_fn log) {
    comm *c = begin_comm(version, mask, ranks);
    void *theirs = NULL;
    int rc = next_of[version] ? ((init5_fn)next_of[version]->init)(&theirs, id, &theirs_mask, name, nodes, ranks, rank, log) : 0;
    return end_init(context, c, rc, theirs, version);
}

__attribute__((unused)) static int init5(void **context, uint64_t id, int *mask, const char *name, int nodes, int ranks, int rank, log_fn log) {
    return init56(5, context, id, mask, name, nodes, ranks, rank, log);
}

__attribute__((unused)) static int init6(void **context, uint64_t id, int *mask, const char *name, int nodes, int ranks, int rank, log_fn log) {
    return init56(6, context, id, mask, name, nodes, ranks, rank, log);
}

static void saw_capture(bool captured) {
    if (!captured) return;
    ADD(counts[N_GRAPHS], 1);
    STORE(graphs_seen, 1);
}

static bool ours(uint32_t type) {
    if (LOAD(off)) return false;
    if (type & (T_COLL | T_P2P | T_KERNEL_CH)) return true;
    return type & (T_PROXY_OP | T_PROXY_STEP) && LOAD(watch_waits);
}

static void begin_ours(event *e, const descr *d) {
    switch (e->type) {
        case T_COLL: begin_operation(e, d, false); break;
        case T_P2P: begin_operation(e, d, true); break;
        case T_KERNEL_CH: begin_channel(e, d); break;
        case T_PROXY_OP:
            e->peer = d->proxy_op.peer;
            e->is_send = d->proxy_op.is_send;
            break;
        default: break;
    }
}

static int start(void *context, void **handle, descr *d) {
    if (!handle) return 0;
    *handle = NULL;
    if (!d || !context) return 0;
    comm *c = context;
    if (c < comms || c >= comms + COMMS) return 0;
    uint32_t type = c->version >= 5 ? (uint32_t)d->type : (uint32_t)(uint8_t)d->type;
    if (type == T_COLL_API) saw_capture(d->coll_api.captured);
    if (type == T_P2P_API) saw_capture(d->p2p_api.captured);
    if (type == (c->version >= 5 ? T_GROUP_API : T_GROUP)) {
        ADD(groups_seen, 1);
        set_mask();
    }
    bool forwarded = forwards(c, type);
    if (!forwarded && !ours(type)) return 0;
    bool foreign = type == T_PROXY_OP && d->proxy_op.pid != getpid();
    event *e = take_place(c, type, foreign ? 0 : (uint64_t)(uintptr_t)d->parent);
    if (!e) return 0;
    *handle = handle_of(e);
    if (ours(type)) begin_ours(e, d);
    if (forwarded) forward_start(e, d);
    return 0;
}

static int stop(void *handle) {
    event *e = event_of((uint64_t)(uintptr_t)handle);
    if (!e || !LOAD(e->open)) return 0;
    if (e->type == T_KERNEL_CH) end_channel(e);
    if (e->type == T_PROXY_OP) end_transfer(e);
    if (e->type == T_PROXY_STEP) {
        event *op = event_of(e->parent);
        account(e, now_ns());
        if (op && op->type == T_PROXY_OP) ADD(op->moved, e->step_bytes);
    }
    if (still_theirs(e)) next_of[e->version]->stop(e->theirs);
    __atomic_store_n(&e->open, 0, __ATOMIC_RELEASE);
    return 0;
}

static int state(void *handle, int what, state_args *args) {
    event *e = event_of((uint64_t)(uintptr_t)handle);
    if (!e || !LOAD(e->open)) return 0;
    if (e->type == T_KERNEL_CH && what == S_KERNEL_STOP && args) STORE(e->moved, args->timer);
    if (e->type == T_PROXY_STEP) {
        uint64_t now = now_ns();
        account(e, now);
        e->at = what;
        e->at_ns = now;
        if (args && e->version >= 4) e->step_bytes = args->bytes;
    }
    if (still_theirs(e)) next_of[e->version]->state(e->theirs, what, args);
    return 0;
}

static int finalize(void *context) {
    comm *c = context;
    if (c < comms || c >= comms + COMMS) return 0;
    void *theirs = c->theirs;
    uint32_t opened = 1;
    if (!__atomic_compare_exchange_n(&c->open, &opened, 2, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return 0;
    c->theirs = NULL;
    ADD(c->epoch, 1);  // what is still open must not reach a plugin that has finalized
    if (theirs && next_of[c->version]) next_of[c->version]->finalize(theirs);
    if (__atomic_sub_fetch(&open_comms, 1, __ATOMIC_ACQ_REL) <= 0) __atomic_store_n(&mask_at, NULL, __ATOMIC_RELEASE);
    __atomic_store_n(&c->open, 0, __ATOMIC_RELEASE);
    return 0;
}

// CKPTD_VERSIONS: a bit for each version to be offered. NCCL takes the newest that it finds, and the user's plugin must have that one too.
#ifndef CKPTD_VERSIONS
#define CKPTD_VERSIONS (1 << 3 | 1 << 4 | 1 << 5 | 1 << 6)
#endif
#define PLUGIN(n) EXPORT profiler ncclProfiler_v##n = {"ckptd", (void (*)(void))init##n, start, stop, state, finalize}
#if CKPTD_VERSIONS >> 3 & 1
PLUGIN(3);
#endif
#if CKPTD_VERSIONS >> 4 & 1
PLUGIN(4);
#endif
#if CKPTD_VERSIONS >> 5 & 1
PLUGIN(5);
#endif
#if CKPTD_VERSIONS >> 6 & 1
PLUGIN(6);
#endif

// --- what Python asks -------------------------------------------------------------------------------------------------------

// One in `n` groups is timed by its kernel channels (0: none); `graphs`: also once CUDA graphs were captured, whose replays then carry a host callback each.
EXPORT void ckptd_nccl_times(uint32_t n, int graphs) {
    STORE(every, n);
    STORE(time_graphs, (uint32_t)(graphs != 0));
    set_mask();
}

// Watch what proxies wait for, peer by peer, from now on or no longer.
EXPORT void ckptd_nccl_waits(int on) {
    STORE(watch_waits, (uint32_t)(on != 0));
    set_mask();
}

// communicators, operations, of these matched with the tap's records, times written, marks written, events lost, stale handles, transfers told, events forwarded, captures
EXPORT int ckptd_nccl_counts(uint64_t *into, int room) {
    int n = room < N_COUNTS ? room : N_COUNTS;
    for (int i = 0; i < n; i++) into[i] = LOAD(counts[i]);
    return n;
}
