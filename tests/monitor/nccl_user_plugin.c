// A profiler plugin as a user may have one: its handles are addresses, it looks into them and into its parents, and prints at its end what it heard.
// -DVERSION=4 or 5: the one version of the interface that it has.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#ifdef REAL  // behind a real NCCL
#define CHECK(id, ranks) (!(id) || (ranks) < 1)
#else
#define CHECK(id, ranks) ((id) != 77 || (ranks) != 4)
#endif

typedef struct { int magic, open, type; } mine;
static int initialised, colls, channels, stops, states, wrong, odd[6];  // odd: what was wrong, by kind

typedef struct { uint64_t type; void *parent; int rank; union { uint64_t words[11]; }; } descr;

static int start(void *context, void **handle, void *d_) {
    descr *d = d_;
    int type = VERSION >= 5 ? (int)d->type : *(uint8_t *)d;
    *handle = NULL;
    wrong += *(int *)context != 4711 || !initialised;
    mine *parent = d->parent;
    if (type == 64) {  // of a collective, or of a send or receive: who asks for channels gets their parents too
        int bad = parent && (parent->magic != 42 || (parent->type != 2 && parent->type != 4));
        channels++, wrong += bad, odd[1] += bad;
    }
    if (type == 2) {
        colls++;
        mine *group = VERSION >= 5 ? (mine *)d->words[10] : parent;  // parentGroup
        int bad = group && (group->magic != 42 || group->type != 1);
        wrong += bad, odd[2] += bad;
    }
    mine *m = malloc(sizeof *m);
    *m = (mine){42, 1, type};
    *handle = m;
    return 0;
}

static int stop(void *handle) {
    mine *m = handle;
    int bad = m->magic != 42 || !m->open || !initialised;
    wrong += bad, odd[3] += bad;
    m->open = 0;
    stops++;
    return 0;
}

static int state(void *handle, int what, void *args) {
    (void)args;
    mine *m = handle;
    int bad = m->magic != 42 || (m->type == 64 && what != 22);
    wrong += bad, odd[4] += bad;
    states++;
    return 0;
}

static int finalize(void *context) {
    wrong += *(int *)context != 4711;
    initialised = 0;
    free(context);
    fprintf(stderr, "user's plugin: version %d, colls %d, channels %d, stops %d, states %d, wrong %d (%d %d %d %d)\n", VERSION, colls, channels, stops, states, wrong, odd[1], odd[2], odd[3], odd[4]);
    return 0;
}

static int begin(void **context, int *mask) {
    int *own = malloc(sizeof *own);
    *own = 4711;
    *context = own;
    *mask = 2 | 64;
    initialised = 1;
    return 0;
}

#if VERSION >= 5
static int init(void **context, uint64_t id, int *mask, const char *name, int nodes, int ranks, int rank, void *log) {
    wrong += CHECK(id, ranks);
#else
static int init(void **context, int *mask, const char *name, uint64_t id, int nodes, int ranks, int rank, void *log) {
    wrong += CHECK(id, ranks);
#endif
    (void)name, (void)nodes, (void)rank, (void)log;
    return begin(context, mask);
}

struct plugin { const char *name; void *init; int (*start)(void *, void **, void *); int (*stop)(void *); int (*state)(void *, int, void *); int (*finalize)(void *); };
#define NAME_(n) ncclProfiler_v##n
#define NAME(n) NAME_(n)
struct plugin NAME(VERSION) = {"user", init, start, stop, state, finalize};
