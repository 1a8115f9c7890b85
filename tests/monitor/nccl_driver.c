// Drives a profiler plugin as NCCL does, without a GPU: `nccl_driver PLUGIN MODE VERSION`. Its declarations of the interface are its own, so that a wrong offset shows.
// Modes: match (one operation of each kind beside a tap's record; prints what the records say), storm (threads, lost events, wrong handles, early finalize),
// chain (with a user's plugin behind it), cost (nanoseconds of one collective's events).
#define _GNU_SOURCE
#include <assert.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../monitor/ring.h"

enum { GROUP = 1, COLL = 2, P2P = 4, PROXY_OP = 8, PROXY_STEP = 16, KERNEL_CH = 64, GROUP_API = 256, COLL_API = 512, P2P_API = 1024, LAUNCH = 2048 };

// The interface, version by version, as its documentation lists the fields.
typedef struct {
    uint8_t type; void *parentObj; int rank;
    union {
        struct { const char *name; uint64_t commHash, seqNumber; const char *func; void const *sendBuff; void *recvBuff; size_t count; int root; const char *datatype; uint8_t nMaxChannels, nWarps; const char *algo, *proto; } coll;
        struct { const char *name; uint64_t commHash; const char *func; void *buff; const char *datatype; size_t count; int peer; } p2p;
        struct { pid_t pid; uint8_t channelId; int peer, nSteps, chunkSize, isSend; } proxyOp;
        struct { uint8_t channelId; } kernelCh;
    };
} descr3;
typedef struct {
    uint8_t type; void *parentObj; int rank;
    union {
        struct { uint64_t seqNumber; const char *func; void const *sendBuff; void *recvBuff; size_t count; int root; const char *datatype; uint8_t nChannels, nWarps; const char *algo, *proto; } coll;
        struct { const char *func; void *buff; const char *datatype; size_t count; int peer; uint8_t nChannels; } p2p;
        struct { pid_t pid; uint8_t channelId; int peer, nSteps, chunkSize, isSend; } proxyOp;
        struct { uint8_t channelId; uint64_t pTimer; } kernelCh;
    };
} descr4;
typedef struct {
    uint64_t type; void *parentObj; int rank;
    union {
        struct { bool graphCaptured; int groupDepth; } groupApi;
        struct { const char *func; size_t count; const char *datatype; int root; void *stream; bool graphCaptured; } collApi;
        struct { const char *func; size_t count; const char *datatype; void *stream; bool graphCaptured; } p2pApi;
        struct { uint64_t seqNumber; const char *func; void const *sendBuff; void *recvBuff; size_t count; int root; const char *datatype; uint8_t nChannels, nWarps; const char *algo, *proto; void *parentGroup; } coll;
        struct { const char *func; void *buff; const char *datatype; size_t count; int peer; uint8_t nChannels; void *parentGroup; } p2p;
        struct { pid_t pid; uint8_t channelId; int peer, nSteps, chunkSize, isSend; } proxyOp;
        struct { uint8_t channelId; uint64_t pTimer; } kernelCh;
    };
} descr5;
typedef union { struct { size_t transSize; } proxyStep; struct { uint64_t pTimer; } kernelCh; } args_t;
typedef struct { const char *name; void *init; int (*start)(void *, void **, void *); int (*stop)(void *); int (*record)(void *, int, args_t *); int (*finalize)(void *); } plugin;

static int version, mask;
static plugin *p;
static int (*attach)(void *, uint64_t);
static void (*times)(uint32_t, int);
static void (*waits)(int);
static int (*get_counts)(uint64_t *, int);
static uint8_t *ring;
static uint64_t ring_bytes;
#define CAPACITY 1024u

static void *init_comm(int ranks) {
    void *context = NULL;
    if (version == 3) assert(!((int (*)(void **, int *))p->init)(&context, &mask));
    else if (version == 4) assert(!((int (*)(void **, int *, const char *, uint64_t, int, int, int, void *))p->init)(&context, &mask, "comm", 77, 1, ranks, 0, NULL));
    else assert(!((int (*)(void **, uint64_t, int *, const char *, int, int, int, void *))p->init)(&context, 77, &mask, NULL, 1, ranks, 0, NULL));
    return context;
}

static void *begin(void *context, int type, void *parent, void *filled) {
    size_t bytes = version == 3 ? sizeof(descr3) : version == 4 ? sizeof(descr4) : version == 5 ? sizeof(descr5) : sizeof(descr5) + 8;  // version 6: its `ceColl` is longer
    char *d = malloc(bytes);  // on the heap, that a look beyond its end is found
    memset(d, 0xA5, bytes);   // what a version does not set is not zero
    if (filled) memcpy(d, filled, version == 6 ? sizeof(descr5) : bytes);
    if (version >= 5) ((descr5 *)d)->type = (uint64_t)type;
    else *(uint8_t *)d = (uint8_t)type;
    ((descr5 *)d)->parentObj = parent;
    ((descr5 *)d)->rank = 0;
    void *handle = (void *)0x1;
    assert(!p->start(context, &handle, d));
    free(d);
    return handle;
}

static void *begin_coll(void *context, const char *func, size_t count, const char *dtype, void *parent, void *group) {
    descr3 d3 = {.coll = {.func = func, .count = count, .datatype = dtype, .nMaxChannels = 2}};
    descr4 d4 = {.coll = {.func = func, .count = count, .datatype = dtype, .nChannels = 2}};
    descr5 d5 = {.coll = {.func = func, .count = count, .datatype = dtype, .nChannels = 2, .parentGroup = group}};
    return begin(context, COLL, version < 5 ? group : parent, version == 3 ? (void *)&d3 : version == 4 ? (void *)&d4 : &d5);
}

static void *begin_p2p(void *context, const char *func, size_t count, const char *dtype, int peer) {
    descr3 d3 = {.p2p = {.func = func, .count = count, .datatype = dtype, .peer = peer}};
    descr4 d4 = {.p2p = {.func = func, .count = count, .datatype = dtype, .peer = peer}};
    descr5 d5 = {.p2p = {.func = func, .count = count, .datatype = dtype, .peer = peer}};
    return begin(context, P2P, NULL, version == 3 ? (void *)&d3 : version == 4 ? (void *)&d4 : &d5);
}

static void *begin_channel(void *context, void *op, int channel, uint64_t timer) {
    descr3 d3 = {.kernelCh = {.channelId = (uint8_t)channel}};
    descr4 d4 = {.kernelCh = {.channelId = (uint8_t)channel, .pTimer = timer}};
    descr5 d5 = {.kernelCh = {.channelId = (uint8_t)channel, .pTimer = timer}};
    return begin(context, KERNEL_CH, op, version == 3 ? (void *)&d3 : version == 4 ? (void *)&d4 : &d5);
}

static void end_channel(void *handle, uint64_t timer) {
    args_t a = {.kernelCh = {.pTimer = timer}};
    if (version >= 4) p->record(handle, 22, &a);
    p->stop(handle);
}

static void *begin_transfer(void *context, void *op, int peer, int is_send, pid_t pid) {
    descr3 d3 = {.proxyOp = {.pid = pid, .peer = peer, .nSteps = 2, .isSend = is_send}};
    descr4 d4 = {.proxyOp = {.pid = pid, .peer = peer, .nSteps = 2, .isSend = is_send}};
    descr5 d5 = {.proxyOp = {.pid = pid, .peer = peer, .nSteps = 2, .isSend = is_send}};
    return begin(context, PROXY_OP, op, version == 3 ? (void *)&d3 : version == 4 ? (void *)&d4 : &d5);
}

static void sleep_us(long us) {
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&t, NULL);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static ckptd_ring_header *header(void) { return (ckptd_ring_header *)ring; }
static ckptd_ring_record *at(uint64_t i) { return (ckptd_ring_record *)(ring + CKPTD_RECORDS_AT) + i % CAPACITY; }

// As the tap does: committed at its entry, `returned_ns` still 0.
static uint64_t tap(int op, uint64_t bytes, int flags) {
    uint64_t i = __atomic_fetch_add(&header()->head, 1, __ATOMIC_ACQ_REL);
    ckptd_ring_record *r = at(i);
    __atomic_store_n(&r->commit, 0, __ATOMIC_SEQ_CST);
    r->entered_ns = now_ns();
    r->returned_ns = r->ended_ns = 0;
    r->bytes = bytes;
    r->seq = (uint32_t)i + 1;
    r->group = 0;
    r->op = (uint8_t)op;
    r->dtype = CKPTD_F32;
    r->flags = (uint8_t)flags;
    r->peer = -1;
    r->waited_us = r->inside_us = 0;
    __atomic_store_n(&r->commit, i + 1, __ATOMIC_RELEASE);
    return i;
}

static void returned(uint64_t i) { at(i)->returned_ns = now_ns(); }

static void show(const char *name, uint64_t i) {
    const ckptd_ring_record *r = at(i);
    printf("{\"case\": \"%s\", \"op\": %u, \"flags\": %u, \"bytes\": %lu, \"inside_us\": %u, \"ended\": %d, \"dtype\": %u, \"peer\": %d, \"waited_us\": %u, \"seq\": %u, \"group\": %u}\n",
           name, r->op, r->flags, r->bytes, r->inside_us, r->ended_ns >= r->entered_ns && r->ended_ns, r->dtype, r->peer, r->waited_us, r->seq, r->group);
}

// One call of c10d that becomes one collective of NCCL, as a group of its own. The channels' events come after the operation's stop, from elsewhere.
static void one(void *context, const char *func, size_t count, uint64_t took_ns, int channels) {
    descr5 api = {.groupApi = {.groupDepth = 1}};
    void *group_api = version >= 5 ? begin(context, GROUP_API, NULL, &api) : NULL;
    void *group = begin(context, GROUP, NULL, NULL);
    void *op = begin_coll(context, func, count, "ncclFloat32", NULL, group);
    if (op) p->stop(op);
    if (group) p->stop(group);
    if (group_api) p->stop(group_api);
    void *channel[8] = {0};
    uint64_t start = 5000000000ull;
    for (int c = 0; c < channels; c++) channel[c] = begin_channel(context, op, c, start + (uint64_t)c * 1000);
    if (version == 3) sleep_us((long)(took_ns / 1000));
    for (int c = 0; c < channels; c++) end_channel(channel[c], start + took_ns - (uint64_t)(channels - 1 - c) * 1000);
}

static void match(void) {
    void *context = init_comm(4);
    uint64_t i = tap(CKPTD_ALL_REDUCE, 4096, CKPTD_DEVICE);
    one(context, "AllReduce", 1024, 2000000, 2);
    returned(i);
    show("all_reduce", i);

    i = tap(CKPTD_ALL_REDUCE, 4096, 0);  // gloo's, of the same size, and open
    one(context, "AllReduce", 1024, 2000000, 2);
    show("cpu", i);
    show("called directly", i + 1);

    i = tap(CKPTD_BARRIER, 0, 0);
    one(context, "AllReduce", 1024, 9000, 1);
    show("no barrier", i);
    one(context, "AllReduce", 1, 9000, 1);
    returned(i);
    show("barrier", i);

    i = tap(CKPTD_REDUCE_SCATTER, 4096 * 4, CKPTD_DEVICE);
    one(context, "ReduceScatter", 1024, 7000, 1);
    returned(i);
    show("reduce_scatter", i);

    i = tap(CKPTD_ALL_REDUCE, 4096, CKPTD_DEVICE | CKPTD_CAPTURED);
    one(context, "AllReduce", 1024, 5000000, 2);
    returned(i);
    show("captured", i);
    show("replayed", i + 1);

    // Two sends and a receive in a batch: the calls have returned when NCCL begins.
    uint64_t s1 = tap(CKPTD_SEND, 400, CKPTD_DEVICE | CKPTD_P2P | CKPTD_COALESCED), s2 = tap(CKPTD_SEND, 400, CKPTD_DEVICE | CKPTD_P2P | CKPTD_COALESCED);
    uint64_t r1 = tap(CKPTD_RECV, 800, CKPTD_DEVICE | CKPTD_P2P | CKPTD_COALESCED);
    returned(s1), returned(s2), returned(r1);
    void *ops[3] = {begin_p2p(context, "Send", 100, "ncclFloat32", 1), begin_p2p(context, "Send", 200, "ncclFloat16", 2), begin_p2p(context, "Recv", 100, "ncclInt64", 1)};
    for (int k = 0; k < 3; k++) end_channel(begin_channel(context, ops[k], 0, 1000000), 1000000 + 1000000 * ((uint64_t)k + 1)), p->stop(ops[k]);
    show("batch 1", s1), show("batch 2", s2), show("batch 3", r1);

    // A pair's own communicator, within a call of the group of four.
    void *pair = init_comm(2);
    i = tap(CKPTD_SEND, 40, CKPTD_DEVICE | CKPTD_P2P);
    void *send = begin_p2p(pair, "Send", 10, "ncclFloat32", 1);
    p->stop(send);
    end_channel(begin_channel(pair, send, 0, 1000000), 1600000);
    returned(i);
    show("pair", i);
    p->finalize(pair);

    // One call that becomes many operations: the time is that of all of them.
    i = tap(CKPTD_ALL_TO_ALL, 999, CKPTD_DEVICE);
    for (int k = 0; k < 4; k++) {
        void *op = begin_p2p(context, k & 1 ? "Recv" : "Send", 1, "ncclInt8", k / 2);
        p->stop(op);
        end_channel(begin_channel(context, op, 0, 1000000 + 100000 * (uint64_t)k), 1500000 + 100000 * (uint64_t)k);
    }
    returned(i);
    show("all_to_all", i);

    // What proxies wait for, once that is asked for.
    uint64_t before = header()->head;
    void *op = begin_coll(context, "AllReduce", 8, "ncclFloat32", NULL, NULL);
    void *none = begin_transfer(context, op, 3, 1, getpid());
    assert(!none);
    waits(1);
    assert(mask & PROXY_STEP);
    void *transfer = begin_transfer(context, op, 3, 1, getpid());
    for (int k = 0; k < 2; k++) {
        void *step = begin(context, PROXY_STEP, transfer, NULL);
        args_t a = {.proxyStep = {.transSize = 500}};
        p->record(step, 8, &a), sleep_us(2000);
        p->record(step, 20, &a), sleep_us(4000);
        p->record(step, 9, &a), sleep_us(8000);
        p->stop(step);
    }
    p->stop(transfer);
    p->stop(op);
    show("transfer", before);
    void *elsewhere = begin_transfer(context, (void *)0xdeadbeef, 1, 0, getpid() + 1);  // its parent lies in another process
    p->stop(elsewhere);
    waits(0);
    assert(!(mask & PROXY_STEP));

    // No record of our own beside a writer that does not claim as we do.
    header()->layer = CKPTD_LAYER_PYTHON;
    before = header()->head;
    one(context, "AllReduce", 77, 1000000, 1);
    assert(header()->head == before);
    header()->layer = CKPTD_LAYER_NATIVE;

    // A record that was overwritten meanwhile is left alone.
    i = tap(CKPTD_BROADCAST, 4096, CKPTD_DEVICE);
    op = begin_coll(context, "Broadcast", 1024, "ncclFloat32", NULL, NULL);
    for (uint32_t k = 0; k < CAPACITY; k++) tap(CKPTD_BARRIER, 0, CKPTD_DEVICE);
    end_channel(begin_channel(context, op, 0, 1000), 900000);
    assert(at(i)->inside_us == 0);

    // One in three groups is timed; none; and no more once a graph was captured.
    int timed = 0;
    times(3, 0);
    for (int k = 0; k < 30; k++) one(context, "AllReduce", 1, 1000, 0), timed += (mask & KERNEL_CH) != 0;
    assert(timed == 10);
    times(0, 0);
    one(context, "AllReduce", 1, 1000, 0);
    assert(!(mask & KERNEL_CH) && mask & COLL);
    if (version >= 5) {
        times(1, 0);
        assert(mask & KERNEL_CH);
        descr5 api = {.collApi = {.func = "AllReduce", .graphCaptured = true}};
        begin(context, COLL_API, NULL, &api);
        one(context, "AllReduce", 1, 1000, 0);
        assert(!(mask & KERNEL_CH));
        times(1, 1);
        assert(mask & KERNEL_CH);
    }
    p->finalize(context);
    p->finalize(context);
}

static void *hammer(void *seed_) {
    unsigned seed = (unsigned)(uintptr_t)seed_;
    void *old[64] = {0};
    for (int round = 0; round < 60; round++) {
        void *context = init_comm(2);
        for (int k = 0; k < 100; k++) {
            void *api = begin(context, version >= 5 ? GROUP_API : GROUP, NULL, NULL);
            uint64_t i = tap(CKPTD_ALL_REDUCE, 4, CKPTD_DEVICE);
            void *op = begin_coll(context, "AllReduce", 1, "ncclFloat32", NULL, NULL);
            if (rand_r(&seed) % 8) p->stop(op);  // else it is lost
            void *channel = begin_channel(context, op, 0, 1000000);
            if (rand_r(&seed) % 8) end_channel(channel, 3000000);
            returned(i);
            if (api) p->stop(api);
            void *transfer = begin_transfer(context, op, 1, 1, getpid());
            void *step = begin(context, PROXY_STEP, transfer, NULL);
            p->record(step, (int)(rand_r(&seed) % 30), NULL);
            if (rand_r(&seed) % 4) p->stop(step);
            if (rand_r(&seed) % 4) p->stop(transfer);
            p->stop(old[k % 64]);  // long gone, or still open: stopped twice
            p->record(old[(k + 7) % 64], 22, NULL);
            old[k % 64] = op;
            p->stop((void *)(uintptr_t)(((uint64_t)rand_r(&seed) << 32) | (uint64_t)rand_r(&seed)));  // never ours
            static const char zeros[128];
            begin(k % 3 ? context : NULL, 1 << (rand_r(&seed) % 16), (void *)(uintptr_t)rand_r(&seed), (void *)zeros);
        }
        if (seed % 3 == 0) attach(round % 2 ? ring : NULL, ring_bytes);
        waits(round & 1);
        p->finalize(context);  // with events open
        begin_coll(context, NULL, 1, NULL, NULL, NULL);
    }
    return NULL;
}

static void storm(void) {
    pthread_t threads[6];
    for (uintptr_t t = 0; t < 6; t++) pthread_create(&threads[t], NULL, hammer, (void *)(t * 977 + 1));
    for (int t = 0; t < 6; t++) pthread_join(threads[t], NULL);
    assert(!p->start(NULL, NULL, NULL) && !p->stop(NULL) && !p->record(NULL, 3, NULL) && !p->finalize(NULL));
    assert(attach(ring, 100) == -1 && attach(ring, ring_bytes - 64) == -1);
}

// A chained plugin of the user hears what its mask asked for, and its own handles: it counts what is wrong itself.
static void chain(void) {
    void *context = init_comm(4);
    for (int k = 0; k < 20; k++) {
        tap(CKPTD_ALL_REDUCE, 4096, CKPTD_DEVICE);
        one(context, "AllReduce", 1024, 1000000, 2);
    }
    void *open = begin_coll(context, "AllReduce", 1024, "ncclFloat32", NULL, NULL);
    p->finalize(context);
    p->stop(open);  // late: must not reach a plugin that has finalized
}

static void cost(void) {
    void *context = init_comm(4);
    times(16, 0);
    enum { ROUNDS = 200000 };
    uint64_t took = now_ns();
    for (int k = 0; k < ROUNDS; k++) {  // as NCCL sends them for one collective without kernel channels
        uint64_t i = __atomic_fetch_add(&header()->head, 1, __ATOMIC_RELAXED);
        at(i)->op = CKPTD_ALL_REDUCE, at(i)->flags = CKPTD_DEVICE, at(i)->bytes = 4096, at(i)->returned_ns = 0, at(i)->commit = i + 1;
        descr5 d = {.type = GROUP_API};
        void *h, *op;
        p->start(context, &h, &d);
        d.type = COLL_API, d.collApi.graphCaptured = false;
        p->start(context, &h, &d);
        d.type = GROUP;
        p->start(context, &h, &d);
        d.type = COLL, d.coll.func = "AllReduce", d.coll.datatype = "ncclFloat32", d.coll.count = 1024, d.parentObj = h;
        p->start(context, &op, &d);
        p->stop(op);
    }
    took = now_ns() - took;
    printf("{\"case\": \"cost\", \"ns\": %lu}\n", took / ROUNDS);
    p->finalize(context);
}

int main(int argc, char **argv) {
    assert(argc == 4);
    version = atoi(argv[3]);
    void *library = dlopen(argv[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    char symbol[32];
    snprintf(symbol, sizeof symbol, "ncclProfiler_v%d", version);
    p = dlsym(library, symbol);
    attach = (int (*)(void *, uint64_t))dlsym(library, "ckptd_nccl_attach");
    times = (void (*)(uint32_t, int))dlsym(library, "ckptd_nccl_times");
    waits = (void (*)(int))dlsym(library, "ckptd_nccl_waits");
    get_counts = (int (*)(uint64_t *, int))dlsym(library, "ckptd_nccl_counts");
    assert(p && attach && times && waits && get_counts);
    ring_bytes = CKPTD_RECORDS_AT + CAPACITY * sizeof(ckptd_ring_record);
    ring = calloc(1, ring_bytes);
    header()->magic = CKPTD_RING_MAGIC, header()->version = CKPTD_RING_VERSION, header()->capacity = CAPACITY, header()->layer = CKPTD_LAYER_NATIVE;
    header()->groups = 1;
    ((ckptd_ring_group *)(ring + CKPTD_GROUPS_AT))->size = !strcmp(argv[2], "storm") ? 2 : 4;
    assert(!attach(ring, ring_bytes));
    if (!strcmp(argv[2], "match")) match();
    if (!strcmp(argv[2], "storm")) storm();
    if (!strcmp(argv[2], "cost")) cost();
    if (!strcmp(argv[2], "chain")) chain();
    uint64_t n[16] = {0};
    int count = get_counts(n, 16);
    printf("{\"case\": \"counts\", \"mask\": %d, \"counts\": [", mask);
    for (int k = 0; k < count; k++) printf("%s%lu", k ? ", " : "", n[k]);
    printf("]}\n");
    fflush(stdout);
    attach(NULL, 0);
    free(ring);
    return 0;
}
