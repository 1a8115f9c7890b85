// The bytes of a ring, for C and C++; `record.py` draws the same, and says what the words mean and who may write them when.
// tests/monitor/test_ring.py compares the two.
#ifndef CKPTD_RING_H
#define CKPTD_RING_H

#include <stdint.h>

#define CKPTD_RING_MAGIC 0x31474e5244504b43ull
#define CKPTD_RING_VERSION 1u
#define CKPTD_GROUPS_MAX 64u
#define CKPTD_RANKS_MAX 16384u
#define CKPTD_NO_GROUP 255u
#define CKPTD_EVERYBODY 0xffffffffu
#define CKPTD_GROUPS_AT 4096u
#define CKPTD_RANKS_AT 12288u
#define CKPTD_RECORDS_AT 77824u

typedef struct {
    uint64_t magic;
    uint32_t version, capacity, rank, world_size, local_rank, pid;
    uint64_t pid_start, attempt, head, step;
    uint32_t groups, untabled, layer, phases;
    uint64_t phase_ns, errors, hook_ns, device_lost;
    uint32_t ranks_used;
    int32_t device;
    char job[256];
    uint32_t thread, done;
} ckptd_ring_header;

typedef struct {
    uint64_t key;
    uint32_t size, mine, ranks_at, local_id;
    uint64_t entered, entered_ns, done, done_ns, history, signature, bytes;
    uint8_t op, dtype, p2p_op, p2p_open;
    int32_t p2p_peer;
    uint64_t p2p_entered, p2p_ns, p2p_done, version, spare;
} ckptd_ring_group;

typedef struct {
    uint64_t commit, entered_ns, returned_ns, ended_ns, bytes;
    uint32_t seq, step;
    uint8_t group, op, dtype, flags;
    int32_t peer;
    uint32_t waited_us, inside_us;
} ckptd_ring_record;

enum {
    CKPTD_P2P = 1, CKPTD_ASYNC = 2, CKPTD_FAILED = 4, CKPTD_DEVICE = 8,
    CKPTD_COALESCED = 16, CKPTD_MARK = 32, CKPTD_WAITED = 64, CKPTD_CAPTURED = 128
};
enum {
    CKPTD_OP_UNKNOWN, CKPTD_ALL_REDUCE, CKPTD_REDUCE, CKPTD_BROADCAST, CKPTD_ALL_GATHER, CKPTD_REDUCE_SCATTER, CKPTD_ALL_TO_ALL, CKPTD_GATHER,
    CKPTD_SCATTER, CKPTD_BARRIER, CKPTD_SEND, CKPTD_RECV, CKPTD_ALL_REDUCE_COALESCED, CKPTD_ALL_GATHER_COALESCED,
    CKPTD_REDUCE_SCATTER_COALESCED, CKPTD_RECV_ANY
};
enum {
    CKPTD_DT_UNKNOWN, CKPTD_U8, CKPTD_I8, CKPTD_I16, CKPTD_I32, CKPTD_I64, CKPTD_F16, CKPTD_F32, CKPTD_F64, CKPTD_BF16, CKPTD_BOOL,
    CKPTD_C64, CKPTD_C128, CKPTD_F8, CKPTD_DT_OTHER
};
enum {
    CKPTD_STEP, CKPTD_OPTIMIZER, CKPTD_DATA, CKPTD_GC, CKPTD_CHECKPOINT, CKPTD_EVAL, CKPTD_COMPILE, CKPTD_LOSS, CKPTD_RESTORE, CKPTD_PROBE,
    CKPTD_TRAIN, CKPTD_NCCL
};
enum { CKPTD_LAYER_NONE, CKPTD_LAYER_HOOKS, CKPTD_LAYER_NATIVE, CKPTD_LAYER_PYTHON, CKPTD_LAYER_PATCHED };

#endif
