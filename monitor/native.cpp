// The tap in C++: a boxed kernel for every operator of the library `c10d` at the dispatch key BackendSelect, which all callers pass (Python, DDP's reducer, functional
// collectives, compiled code), on CPU and on devices. It writes the ring (`ring.h`; `record.py` has the rules) and hands the operation on. For the operators of every
// training step there is a kernel with their types besides, at the keys of autograd, which comes before and is cheaper (Typed).
//
//     enter      record claimed, group's row moved on                    before the operation
//     returned   the call came back                                      after it
//     ended      the work's future says done, or a wait returned         any thread; on a device: the end event is seen (below)
//     waited     `Work.wait`, `wait_tensor`                              the thread that waits
//
// Built against the torch that is installed (tap_build.py), for 2.9 and newer; loaded as a Python module. `tap_ops.py` has the same table of operators and the same hashes.
//
// Invariants
// - the path of an operation takes no GIL, allocates nothing of its own (the future's callback and the first sight of a group excepted), and waits for nothing but
//   another thread's few stores into the same group's row;
// - nothing thrown here reaches the caller; what the operation throws does, unchanged;
// - no synchronisation with a device, ever: events are recorded and asked; none is asked while a CUDA graph is captured;
// - a ring that was used stays mapped for ever (its owner in Python sees to that), so a late callback writes where nobody reads, at worst;
// - a forked child writes nothing.
//
// Device time (1 in `every` operations of a group, and those that come some time after the last timed one): a pair of events, the start on the stream that the operation is called on, the end inside the callback of the work's
// future, whose stream torch lets wait for the work. A thread of our own asks once in a millisecond while a pair is out.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <typeinfo>
#include <unordered_map>
#include <vector>

#include <pthread.h>
#include <time.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/library.h>
#include <torch/version.h>

#include <pybind11/chrono.h>

#include "ring.h"

namespace {

namespace py = pybind11;
using c10::DispatchKey;
using c10::DispatchKeySet;
using Stack = torch::jit::Stack;

template <class T>
T load(const T& word) { return __atomic_load_n(&word, __ATOMIC_RELAXED); }
template <class T, class V>
void store(T& word, V value) { __atomic_store_n(&word, static_cast<T>(value), __ATOMIC_RELAXED); }

uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return uint64_t(t.tv_sec) * 1000000000ull + uint64_t(t.tv_nsec);
}

// --- hashes: as in tap_ops.py -----------------------------------------------------------------------------------------------

uint64_t mix(uint64_t word) {
    uint64_t z = word + 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

uint64_t signature(uint8_t op, uint8_t dtype, uint64_t bytes) { return mix(((uint64_t(op) << 56) | (uint64_t(dtype) << 48)) ^ bytes); }

uint64_t group_key(const std::string& name, std::vector<int64_t> ranks) {
    std::sort(ranks.begin(), ranks.end());
    std::string text = name + "|";
    for (size_t i = 0; i < ranks.size(); i++) text += (i ? "," : "") + std::to_string(ranks[i]);
    uint64_t key = 0xCBF29CE484222325ull;
    for (unsigned char c : text) key = (key ^ c) * 0x100000001B3ull;
    return key ? key : 1;
}

// --- the ring ---------------------------------------------------------------------------------------------------------------

struct Ring {
    ckptd_ring_header* header = nullptr;
    ckptd_ring_group* groups = nullptr;
    uint32_t* ranks = nullptr;
    ckptd_ring_record* records = nullptr;
    uint64_t mask = 0;
};

struct Members {  // of a group as this process knows it; never freed: a process has few, and threads read them
    c10::weak_intrusive_ptr<c10d::ProcessGroup> alive;  // keeps the address from being used again
    c10d::ProcessGroup* group;
    std::string name;
    std::vector<int64_t> ranks;
    int size, mine;
    std::atomic<int> row{-1};
    std::atomic<uint32_t> epoch{0};
    std::atomic<uint32_t> device_ops{0};
    std::atomic<uint64_t> timed_ns{0};  // when the last one was that is timed on its device
};

constexpr size_t GROUP_SLOTS = 1024, WORK_SLOTS = 2048, OUTPUT_SLOTS = 1024, PAIRS = 64, NO_FUTURE_MAX = 16;

struct Link {  // pointer -> record; direct-mapped, so that it is bounded and needs no lock; an entry that is driven out costs a wait that is not seen
    std::atomic<uintptr_t> key{0};
    std::atomic<uint64_t> value{0};
};

template <size_t N>
struct Links {
    Link slots[N];
    static size_t at(uintptr_t p) { return (mix(p) >> 20) % N; }
    void put(const void* p, uint64_t value) {
        Link& s = slots[at(uintptr_t(p))];
        s.key.store(0, std::memory_order_relaxed);
        s.value.store(value, std::memory_order_release);
        s.key.store(uintptr_t(p), std::memory_order_release);
    }
    bool get(const void* p, uint64_t& value, bool take) {
        Link& s = slots[at(uintptr_t(p))];
        uintptr_t expected = uintptr_t(p);
        if (s.key.load(std::memory_order_acquire) != expected) return false;
        value = s.value.load(std::memory_order_acquire);
        return take ? s.key.compare_exchange_strong(expected, 0) : s.key.load(std::memory_order_acquire) == uintptr_t(p);
    }
};

Ring ring;
std::atomic<bool> off{true};
std::atomic<uint32_t> epoch{0};  // of the ring in use: what began in another one ends nowhere
std::atomic<int> coalescing{0}, capturing{0};
std::atomic<uint32_t> every{8};
constexpr uint64_t TIMED_APART_NS = 200'000;  // a pair of events costs about 2 us: one percent of that
std::atomic<int> breaks{0};  // so many operations fail inside the tap: for tests
std::atomic<Members*> groups[GROUP_SLOTS];
std::mutex first_sight;
std::unordered_map<std::string, std::vector<int64_t>> hints;  // members by name, as Python knows them; under first_sight
Links<WORK_SLOTS> works;
Links<OUTPUT_SLOTS> outputs;
std::atomic<const std::type_info*> no_future[NO_FUTURE_MAX];
std::atomic_flag row_locks[CKPTD_GROUPS_MAX];

// Record indexes travel with their ring's epoch and whether they are on a device: 48 bits, 15 bits, 1 bit.
uint64_t tagged(uint64_t i, bool device) { return (i & 0xFFFFFFFFFFFFull) | (uint64_t(epoch.load(std::memory_order_relaxed) & 0x7FFF) << 48) | (uint64_t(device) << 63); }
uint64_t index_of(uint64_t tag) { return tag & 0xFFFFFFFFFFFFull; }
bool on_device(uint64_t tag) { return tag >> 63; }
bool current(uint64_t tag) { return !off.load(std::memory_order_relaxed) && ((tag >> 48) & 0x7FFF) == (epoch.load(std::memory_order_relaxed) & 0x7FFF); }

struct RowLock {
    std::atomic_flag& flag;
    explicit RowLock(int row) : flag(row_locks[row]) { while (flag.test_and_set(std::memory_order_acquire)) {} }
    ~RowLock() { flag.clear(std::memory_order_release); }
};

struct RowChange {  // the row's version is odd meanwhile
    ckptd_ring_group& g;
    explicit RowChange(ckptd_ring_group& row) : g(row) { store(g.version, load(g.version) + 1); std::atomic_thread_fence(std::memory_order_release); }
    ~RowChange() { __atomic_store_n(&g.version, load(g.version) + 1, __ATOMIC_RELEASE); }
};

ckptd_ring_record* claim(uint64_t& i) {
    i = __atomic_fetch_add(&ring.header->head, 1, __ATOMIC_ACQ_REL);
    ckptd_ring_record* r = &ring.records[i & ring.mask];
    store(r->commit, 0);
    std::atomic_thread_fence(std::memory_order_release);
    return r;
}

ckptd_ring_record* still(uint64_t i) {
    ckptd_ring_record* r = &ring.records[i & ring.mask];
    return __atomic_load_n(&r->commit, __ATOMIC_ACQUIRE) == i + 1 ? r : nullptr;
}

// --- groups -----------------------------------------------------------------------------------------------------------------

std::vector<int64_t> members_of(c10d::ProcessGroup& pg, const std::string& name) {
    auto hint = hints.find(name);
    if (hint != hints.end() && int(hint->second.size()) == pg.getSize()) return hint->second;
    try {
        for (const auto& d : pg.getDeviceTypes()) {
            auto options = pg.getBackend(d.type())->getBackendOptions();
            if (options && int(options->global_ranks_in_group.size()) == pg.getSize()) {
                return std::vector<int64_t>(options->global_ranks_in_group.begin(), options->global_ranks_in_group.end());
            }
        }
    } catch (...) {  // a backend without options: one says so, another gives none
    }
    std::vector<int64_t> all(pg.getSize());
    for (size_t i = 0; i < all.size(); i++) all[i] = int64_t(i);
    return all;
}

int row_of(Members& m) {  // under first_sight
    uint64_t key = group_key(m.name, m.ranks);
    uint32_t used = ring.header->groups;
    for (uint32_t row = 0; row < used; row++) {
        if (ring.groups[row].key == key) return int(row);
    }
    if (used >= CKPTD_GROUPS_MAX) {
        ring.header->untabled++;
        return CKPTD_NO_GROUP;
    }
    ckptd_ring_group& g = ring.groups[used];
    bool everybody = true;
    for (size_t i = 0; i < m.ranks.size(); i++) everybody &= m.ranks[i] == int64_t(i);
    uint32_t at = CKPTD_EVERYBODY, filled = ring.header->ranks_used;
    if (!everybody && filled + m.ranks.size() <= CKPTD_RANKS_MAX) {
        at = filled;
        for (size_t i = 0; i < m.ranks.size(); i++) ring.ranks[at + i] = uint32_t(m.ranks[i]);
        ring.header->ranks_used = filled + uint32_t(m.ranks.size());
    }
    g.key = key, g.size = uint32_t(m.size), g.mine = uint32_t(m.mine), g.ranks_at = at, g.local_id = used, g.p2p_peer = -1;
    __atomic_store_n(&ring.header->groups, used + 1, __ATOMIC_RELEASE);
    return int(used);
}

Members* seen(const c10::intrusive_ptr<c10d::ProcessGroup>& pg) {
    size_t at = (mix(uintptr_t(pg.get())) >> 20) % GROUP_SLOTS;
    for (size_t probe = 0; probe < GROUP_SLOTS; probe++, at = (at + 1) % GROUP_SLOTS) {
        Members* m = groups[at].load(std::memory_order_acquire);
        if (m != nullptr && m->group == pg.get()) {
            if (m->epoch.load(std::memory_order_acquire) != epoch.load(std::memory_order_relaxed)) {
                std::lock_guard<std::mutex> lock(first_sight);
                m->row.store(row_of(*m), std::memory_order_release);
                m->epoch.store(epoch.load(std::memory_order_relaxed), std::memory_order_release);
            }
            return m;
        }
        if (m == nullptr) break;
    }
    std::lock_guard<std::mutex> lock(first_sight);
    at = (mix(uintptr_t(pg.get())) >> 20) % GROUP_SLOTS;
    for (size_t probe = 0; probe < GROUP_SLOTS; probe++, at = (at + 1) % GROUP_SLOTS) {
        Members* m = groups[at].load(std::memory_order_acquire);
        if (m != nullptr && m->group == pg.get()) return m;
        if (m != nullptr) continue;
        std::string name = pg->getGroupName();
        m = new Members{c10::weak_intrusive_ptr<c10d::ProcessGroup>(pg), pg.get(), name, members_of(*pg, name), pg->getSize(), pg->getRank()};
        m->row.store(row_of(*m), std::memory_order_relaxed);
        m->epoch.store(epoch.load(std::memory_order_relaxed), std::memory_order_relaxed);
        groups[at].store(m, std::memory_order_release);
        return m;
    }
    return nullptr;
}

// --- what happens to an operation -------------------------------------------------------------------------------------------

struct Spec {
    const char* name;
    uint8_t code;
    int tensors;  // which argument is measured; -1: none
    bool even, p2p, coalesced;
    bool functional;  // functional collectives (and their sends) end in it: wait_tensor may be asked about its outputs
    int group = -1, peer = -1, async = -1;  // arguments, found in the schema
};

const Spec SPECS[] = {
    {"allreduce_", CKPTD_ALL_REDUCE, 0, true, false, false, true},
    {"allreduce_coalesced_", CKPTD_ALL_REDUCE_COALESCED, 0, true, false, true, true},
    {"broadcast_", CKPTD_BROADCAST, 0, true, false, false, true},
    {"reduce_", CKPTD_REDUCE, 0, true, false, false, false},
    {"allgather_", CKPTD_ALL_GATHER, 1, false, false, false, true},
    {"_allgather_base_", CKPTD_ALL_GATHER, 1, true, false, false, true},
    {"allgather_coalesced_", CKPTD_ALL_GATHER_COALESCED, 1, false, false, true, true},
    {"allgather_into_tensor_coalesced_", CKPTD_ALL_GATHER_COALESCED, 1, true, false, true, true},
    {"reduce_scatter_", CKPTD_REDUCE_SCATTER, 1, false, false, false, true},
    {"_reduce_scatter_base_", CKPTD_REDUCE_SCATTER, 1, true, false, false, true},
    {"reduce_scatter_tensor_coalesced_", CKPTD_REDUCE_SCATTER_COALESCED, 1, true, false, true, true},
    {"alltoall_", CKPTD_ALL_TO_ALL, 1, false, false, false, true},
    {"alltoall_base_", CKPTD_ALL_TO_ALL, 1, false, false, false, true},
    {"gather_", CKPTD_GATHER, 1, false, false, false, false},
    {"scatter_", CKPTD_SCATTER, 0, false, false, false, false},
    {"barrier", CKPTD_BARRIER, -1, true, false, false, false},
    {"monitored_barrier_", CKPTD_BARRIER, -1, true, false, false, false},
    {"send", CKPTD_SEND, 0, true, true, false, true},
    {"recv_", CKPTD_RECV, 0, true, true, false, true},
    {"recv_any_source_", CKPTD_RECV_ANY, 0, true, true, false, false},
};

uint8_t plain_of(uint8_t code) {  // as SINGLE in tap_ops.py
    switch (code) {
        case CKPTD_ALL_REDUCE_COALESCED: return CKPTD_ALL_REDUCE;
        case CKPTD_ALL_GATHER_COALESCED: return CKPTD_ALL_GATHER;
        case CKPTD_REDUCE_SCATTER_COALESCED: return CKPTD_REDUCE_SCATTER;
        default: return code;
    }
}

uint8_t dtype_code(at::ScalarType t) {
    switch (t) {
        case at::kByte: return CKPTD_U8;
        case at::kChar: return CKPTD_I8;
        case at::kShort: return CKPTD_I16;
        case at::kInt: return CKPTD_I32;
        case at::kLong: return CKPTD_I64;
        case at::kHalf: return CKPTD_F16;
        case at::kFloat: return CKPTD_F32;
        case at::kDouble: return CKPTD_F64;
        case at::kBFloat16: return CKPTD_BF16;
        case at::kBool: return CKPTD_BOOL;
        case at::kComplexFloat: return CKPTD_C64;
        case at::kComplexDouble: return CKPTD_C128;
        case at::ScalarType::Float8_e4m3fn:
        case at::ScalarType::Float8_e5m2:
        case at::ScalarType::Float8_e4m3fnuz:
        case at::ScalarType::Float8_e5m2fnuz: return CKPTD_F8;
        default: return CKPTD_DT_OTHER;
    }
}

using Lists = std::vector<std::vector<at::Tensor>>;

struct Measured {
    uint64_t bytes = 0;
    uint8_t dtype = 0;
    bool any = false;
    c10::Device device = c10::Device(c10::DeviceType::CPU);

    void add(const at::Tensor& t) {
        if (!t.defined()) return;
        bytes += uint64_t(t.numel()) * t.element_size();
        if (!any) dtype = dtype_code(t.scalar_type()), device = t.device(), any = true;
    }
    void add(at::TensorList list) {
        for (const at::Tensor& t : list) add(t);
    }
    void add(const Lists& lists) {
        for (const auto& list : lists) add(at::TensorList(list));
    }
    void add(const c10::IValue& v) {
        if (v.isTensor()) {
            add(v.toTensor());
        } else if (v.isList()) {
            for (const c10::IValue& x : v.toListRef()) add(x);
        }
    }
};

uint64_t enter(const Spec& spec, Members& m, const Measured& what, int64_t peer, bool async, uint64_t now) {
    int row = m.row.load(std::memory_order_relaxed);
    bool device = what.device.type() != c10::DeviceType::CPU;
    uint8_t flags = (spec.p2p ? CKPTD_P2P : 0) | (async ? CKPTD_ASYNC : 0) | (device ? CKPTD_DEVICE : 0) |
        (spec.coalesced || coalescing.load(std::memory_order_relaxed) > 0 ? CKPTD_COALESCED : 0) | (capturing.load(std::memory_order_relaxed) > 0 ? CKPTD_CAPTURED : 0);
    int32_t there = peer >= 0 && size_t(peer) < m.ranks.size() ? int32_t(m.ranks[peer]) : -1;
    uint64_t i, seq = 0;
    ckptd_ring_record* r = claim(i);
    if (row != int(CKPTD_NO_GROUP)) {
        ckptd_ring_group& g = ring.groups[row];
        RowLock lock(row);
        RowChange change(g);
        if (spec.p2p) {
            seq = load(g.p2p_entered) + 1;
            store(g.p2p_entered, seq), store(g.p2p_ns, now), store(g.p2p_op, spec.code), store(g.p2p_open, 1), store(g.p2p_peer, there);
        } else {
            uint64_t sign = signature(spec.code, what.dtype, spec.even ? what.bytes : 0);
            seq = load(g.entered) + 1;
            store(g.entered, seq), store(g.entered_ns, now), store(g.history, mix(load(g.history) ^ sign)), store(g.signature, sign);
            store(g.bytes, what.bytes), store(g.op, spec.code), store(g.dtype, what.dtype);
        }
    }
    store(r->entered_ns, now), store(r->returned_ns, 0), store(r->ended_ns, 0), store(r->bytes, what.bytes), store(r->seq, seq);
    store(r->step, load(ring.header->step) + 1), store(r->group, row), store(r->op, spec.code), store(r->dtype, what.dtype), store(r->flags, flags);
    store(r->peer, there), store(r->waited_us, 0), store(r->inside_us, 0);
    __atomic_store_n(&r->commit, i + 1, __ATOMIC_RELEASE);
    if (device && load(ring.header->device) < 0) store(ring.header->device, what.device.has_index() ? what.device.index() : 0);
    return i;
}

void ended(uint64_t i, uint64_t now, bool failed) {
    ckptd_ring_record* r = still(i);
    if (r == nullptr) return;
    uint8_t row = load(r->group), flags = load(r->flags);
    uint32_t low = load(r->seq);
    if (failed) __atomic_fetch_or(&r->flags, uint8_t(CKPTD_FAILED), __ATOMIC_RELAXED);
    uint64_t none = 0;
    __atomic_compare_exchange_n(&r->ended_ns, &none, now, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    if (row == CKPTD_NO_GROUP) return;
    ckptd_ring_group& g = ring.groups[row];
    RowLock lock(row);
    bool p2p = flags & CKPTD_P2P;
    uint64_t newest = load(p2p ? g.p2p_entered : g.entered), seq = (newest & ~0xFFFFFFFFull) | low;
    if (seq > newest) seq -= 1ull << 32;
    if (seq <= load(p2p ? g.p2p_done : g.done)) return;
    RowChange change(g);
    if (p2p) {
        store(g.p2p_done, seq);
        if (seq == newest) store(g.p2p_open, 0);
    } else {
        store(g.done, seq), store(g.done_ns, now);
    }
}

void returned(uint64_t i, uint64_t now) {
    ckptd_ring_record* r = still(i);
    uint64_t none = 0;
    if (r != nullptr) __atomic_compare_exchange_n(&r->returned_ns, &none, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

void waited(uint64_t tag, uint64_t began, uint64_t now, bool failed) {
    if (!current(tag)) return;
    ckptd_ring_record* r = still(index_of(tag));
    if (r == nullptr) return;
    store(r->returned_ns, now);
    __atomic_fetch_or(&r->flags, uint8_t(CKPTD_WAITED), __ATOMIC_RELAXED);
    uint64_t us = load(r->waited_us) + (now - began) / 1000;
    store(r->waited_us, us > 0xFFFFFFFFull ? 0xFFFFFFFFull : us);
    if (failed || !on_device(tag)) ended(index_of(tag), now, failed);
}

// --- device time ------------------------------------------------------------------------------------------------------------

enum { FREE, TAKEN, RECORDED };

struct Pair {
    std::optional<c10::Event> start, end;
    std::atomic<int> state{FREE};
    c10::Device device = c10::Device(c10::DeviceType::CPU);
    uint64_t tag = 0;
};

struct Clock {  // pairs of events, and the thread that asks them
    Pair pairs[PAIRS];
    std::mutex asking;  // held while events are asked: a capture begins only between two looks
    std::mutex sleeping;
    std::condition_variable wake;
    std::thread thread;
    std::atomic<int> out{0};
    bool ending = false;

    Pair* take() {
        for (Pair& p : pairs) {
            int free = FREE;
            if (p.state.compare_exchange_strong(free, TAKEN, std::memory_order_acquire)) return &p;
        }
        return nullptr;
    }

    Pair* begin(c10::Device device, uint64_t tag) {
        Pair* p = take();
        if (p == nullptr) {
            __atomic_fetch_add(&ring.header->device_lost, 1, __ATOMIC_RELAXED);
            return nullptr;
        }
        try {
            if (!p->start.has_value() || p->device != device) {
                p->start.emplace(device.type(), c10::EventFlag::BACKEND_DEFAULT);
                p->end.emplace(device.type(), c10::EventFlag::BACKEND_DEFAULT);
            }
            p->device = device, p->tag = tag;
            p->start->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
            return p;
        } catch (...) {
            p->state.store(FREE, std::memory_order_release);
            return nullptr;
        }
    }

    void finish(Pair* p) {  // in the callback of the work's future: its stream waits for the work
        try {
            p->end->record(c10::impl::VirtualGuardImpl(p->device.type()).getStream(p->device));
            p->state.store(RECORDED, std::memory_order_release);
            if (out.fetch_add(1, std::memory_order_acq_rel) == 0) awake();
        } catch (...) {
            p->state.store(FREE, std::memory_order_release);
        }
    }

    void awake() {
        std::lock_guard<std::mutex> lock(sleeping);
        if (!thread.joinable() && !ending) thread = std::thread([this] { run(); });
        wake.notify_one();
    }

    int ask() {  // how many ended
        std::lock_guard<std::mutex> lock(asking);
        int found = 0;
        if (capturing.load(std::memory_order_acquire) > 0) return 0;
        for (Pair& p : pairs) {
            if (p.state.load(std::memory_order_acquire) != RECORDED) continue;
            try {
                if (!p.end->query()) continue;
                double ms = p.start->elapsedTime(*p.end);
                if (current(p.tag)) {
                    uint64_t i = index_of(p.tag);
                    uint64_t us = ms > 0 ? uint64_t(ms * 1000.0 + 0.5) : 0;
                    if (ckptd_ring_record* r = still(i)) store(r->inside_us, us > 0xFFFFFFFFull ? 0xFFFFFFFFull : us > 0 ? us : 1);
                    ended(i, now_ns(), false);
                }
            } catch (...) {  // a device that is lost: the user hears of it elsewhere
            }
            p.state.store(FREE, std::memory_order_release);
            out.fetch_sub(1, std::memory_order_acq_rel);
            found++;
        }
        return found;
    }

    void run() {
        pthread_setname_np(pthread_self(), "ckptd-events");
        bool set = false;
        while (true) {
            {
                std::unique_lock<std::mutex> lock(sleeping);
                if (out.load() == 0) wake.wait(lock, [this] { return ending || out.load() > 0; });
                if (ending) return;
            }
            if (!set) {
                for (Pair& p : pairs) {
                    if (p.state.load(std::memory_order_acquire) == RECORDED) {  // else the first question would make a context on device 0
                        try {
                            c10::impl::VirtualGuardImpl(p.device.type()).setDevice(p.device);
                            set = true;
                        } catch (...) {
                        }
                        break;
                    }
                }
            }
            ask();
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }

    void stop() {
        {
            std::lock_guard<std::mutex> lock(sleeping);
            ending = true;
            wake.notify_one();
        }
        if (thread.joinable()) thread.join();
    }
};

Clock* clock_of() {
    static Clock* c = new Clock();  // never destroyed: events must not be, after the device's driver
    return c;
}

// --- the kernel -------------------------------------------------------------------------------------------------------------

bool has_future(const c10d::Work& work) {
    const std::type_info* type = &typeid(work);
    for (auto& known : no_future) {
        const std::type_info* t = known.load(std::memory_order_relaxed);
        if (t == nullptr) return true;
        if (t == type) return false;
    }
    return true;
}

void remember_no_future(const c10d::Work& work) {  // torch makes that error slowly: asked once per type
    const std::type_info* type = &typeid(work);
    for (auto& known : no_future) {
        const std::type_info* none = nullptr;
        if (known.compare_exchange_strong(none, type) || none == type) return;
    }
}

void follow(const c10::intrusive_ptr<c10d::Work>& work, uint64_t tag, Pair* pair) {
    if (!work) {  // NCCL gives none where nobody is to wait: the operation ran on the caller's own stream (torch 2.8 and newer)
        if (pair != nullptr) clock_of()->finish(pair);
        return;
    }
    works.put(work.get(), tag);
    bool device = on_device(tag);
    if (device && pair == nullptr) return;  // its future is done when it is enqueued
    if (has_future(*work)) {
        try {
            auto future = work->getFuture();
            if (future) {
                if (pair != nullptr) {
                    future->addCallback([pair](c10::ivalue::Future&) { clock_of()->finish(pair); }, true);
                } else {
                    future->addCallback([tag](c10::ivalue::Future& f) { if (current(tag)) ended(index_of(tag), now_ns(), f.hasError()); }, false);
                }
                return;
            }
        } catch (...) {
            remember_no_future(*work);
        }
    }
    if (pair != nullptr) pair->state.store(FREE, std::memory_order_release);
}

void remember_outputs(const at::Tensor& t, uint64_t tag) {
    if (t.defined() && t.has_storage()) outputs.put(t.storage().unsafeGetStorageImpl(), tag);
}
void remember_outputs(at::TensorList list, uint64_t tag) {
    for (const at::Tensor& t : list) remember_outputs(t, tag);
}
void remember_outputs(const Lists& lists, uint64_t tag) {
    for (const auto& list : lists) remember_outputs(at::TensorList(list), tag);
}
void remember_outputs(const c10::IValue& v, uint64_t tag) {
    if (v.isTensor()) {
        remember_outputs(v.toTensor(), tag);
    } else if (v.isList()) {
        for (const c10::IValue& x : v.toListRef()) remember_outputs(x, tag);
    }
}

void failed() {
    if (ring.header != nullptr && __atomic_add_fetch(&ring.header->errors, 1, __ATOMIC_RELAXED) >= 16) off.store(true);
}

const DispatchKeySet BELOW(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Work = c10::intrusive_ptr<c10d::Work>;

struct Call {  // one operation, from its entry until it has returned
    uint64_t began = now_ns(), called = 0, tag = 0;
    bool async = false, sampled = false;
    Pair* pair = nullptr;
};

class Operation {  // what both kernels do before and after
public:
    explicit Operation(const Spec& s) : spec(s), single(s) { single.coalesced = false, single.code = plain_of(s.code); }

protected:
    Spec spec, single;  // single: what a coalesced operation of one tensor is

    bool opened(Call& c, const Group& group, const Measured& what, int64_t peer, bool alone) const {
        Members* m = seen(group);
        if (m == nullptr) return false;
        if (breaks.load(std::memory_order_relaxed) > 0 && breaks.fetch_sub(1) > 0) throw std::runtime_error("as tests asked");
        uint64_t i = enter(alone && spec.coalesced && spec.even ? single : spec, *m, what, peer, c.async, c.began);
        bool device = what.device.type() != c10::DeviceType::CPU;
        c.tag = tagged(i, device);
        uint32_t one_in = every.load(std::memory_order_relaxed);
        if (device && one_in > 0 && capturing.load(std::memory_order_relaxed) == 0) {
            // Few operations are all timed: the last before a pause must be, for it tells whether the group has left it.
            bool turn = m->device_ops.fetch_add(1, std::memory_order_relaxed) % one_in == 0;
            if (turn || c.began - m->timed_ns.load(std::memory_order_relaxed) > TIMED_APART_NS) {
                m->timed_ns.store(c.began, std::memory_order_relaxed);
                c.pair = clock_of()->begin(what.device, c.tag);
            }
        }
        c.sampled = (i & 63) == 0;
        if (c.sampled) c.called = now_ns();
        return true;
    }

    static void thrown(const Call& c) {  // what the operation throws goes on to its caller
        if (c.pair != nullptr) c.pair->state.store(FREE, std::memory_order_release);
        uint64_t now = now_ns();
        if (current(c.tag)) returned(index_of(c.tag), now), ended(index_of(c.tag), now, true);
    }

    template <class Outputs>
    void closed(const Call& c, bool gives_work, const Work& work, const Outputs& results) const {
        uint64_t back = now_ns();
        if (!current(c.tag)) {
            if (c.pair != nullptr) c.pair->state.store(FREE, std::memory_order_release);
            return;
        }
        returned(index_of(c.tag), back);
        if (gives_work) {
            follow(work, c.tag, c.pair);
        } else {
            if (c.pair != nullptr) c.pair->state.store(FREE, std::memory_order_release);
            if (!on_device(c.tag)) ended(index_of(c.tag), back, false);  // a call that gives no work is over
        }
        if (c.async && spec.functional) remember_outputs(results, c.tag);  // wait_tensor is asked about these
        if (c.sampled) __atomic_fetch_add(&ring.header->hook_ns, 64 * ((c.called - c.began) + (now_ns() - back)), __ATOMIC_RELAXED);
    }
};

class Boxed : public c10::OperatorKernel, Operation {  // any operator, by what its schema says
public:
    using Operation::Operation;

    void operator()(const c10::OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
        if (off.load(std::memory_order_relaxed)) {
            op.redispatchBoxed(keys & BELOW, stack);
            return;
        }
        Call c;
        bool known = false;
        c10::IValue results;
        try {
            known = before(op, *stack, c, results);
        } catch (...) {
            failed();
        }
        if (!known) {
            op.redispatchBoxed(keys & BELOW, stack);
            return;
        }
        try {
            op.redispatchBoxed(keys & BELOW, stack);
        } catch (...) {
            thrown(c);
            throw;
        }
        try {
            Work work;
            bool gives = given(op, *stack, work);
            closed(c, gives, work, results);
        } catch (...) {
            failed();
        }
    }

private:
    bool before(const c10::OperatorHandle& op, const Stack& stack, Call& c, c10::IValue& results) const {
        const c10::IValue* args = stack.data() + (stack.size() - op.schema().arguments().size());
        auto group = c10::static_intrusive_pointer_cast<c10d::ProcessGroup>(args[spec.group].toObjectRef().getSlot(0).toCapsule());
        Measured what;
        if (spec.tensors >= 0) what.add(args[spec.tensors]);
        else if (args[0].isTensor() && args[0].toTensor().defined()) what.device = args[0].toTensor().device();  // a barrier's says only where
        c.async = spec.async >= 0 ? args[spec.async].toBool() : spec.p2p;
        bool alone = spec.tensors >= 0 && args[spec.tensors].isList() && args[spec.tensors].toListRef().size() == 1;
        if (!opened(c, group, what, spec.peer >= 0 ? args[spec.peer].toInt() : -1, alone)) return false;
        if (c.async && spec.functional) results = args[0];
        return true;
    }

    static bool given(const c10::OperatorHandle& op, const Stack& stack, Work& work) {
        if (op.schema().returns().empty() || !stack.back().isObject()) return false;
        auto capsule = stack.back().toObjectRef().getSlot(0);
        if (!capsule.isCapsule()) return false;
        work = c10::static_intrusive_pointer_cast<c10d::Work>(capsule.toCapsule());
        return true;
    }
};

// The operators of every training step, with the types that ProcessGroup.hpp calls them with, at the keys of autograd: there torch has a fallback that packs the arguments
// into a stack, which the operation unpacks again. It does so to warn of a backward pass through an operator that has none. Where no tensor wants a gradient, and nothing
// stands between autograd and the backend, there is nothing to warn of: the arguments are handed on as they are, and the operation costs less than without a tap. In all
// other cases torch's fallback is asked (`AutogradOther` has it, too), which comes to Boxed.
// `tensors`: which argument is measured. Registering one whose types are others in this version of torch throws; it stays with Boxed then.
std::atomic<uint64_t> direct{0};  // so many operations went this way: for tests

template <size_t tensors, class Signature>
class Typed;

template <size_t tensors, class Result, class... Args>
class Typed<tensors, Result(Args...)> : Operation {
public:
    Typed(const Spec& s, const c10::OperatorHandle& op) : Operation(s), below(op.typed<Result(Args...)>()) {}

    Result operator()(DispatchKeySet keys, Args... args) {
        DispatchKeySet rest = keys & c10::after_autograd_keyset;
        bool plain = !off.load(std::memory_order_relaxed) && rest.highestPriorityTypeId() == DispatchKey::BackendSelect && !wants_gradient(args...);
        if (!plain) return below.redispatch(rest | DispatchKeySet(DispatchKey::AutogradOther), args...);
        Call c;
        bool known = false;
        auto all = std::forward_as_tuple(args...);
        try {
            known = before(c, all);
        } catch (...) {
            failed();
        }
        if (!known) return below.redispatch(rest & BELOW, args...);
        direct.store(direct.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        Result said = [&] {
            try {
                return below.redispatch(rest & BELOW, args...);
            } catch (...) {
                thrown(c);
                throw;
            }
        }();
        try {
            closed(c, true, work_of(said), std::get<0>(all));
        } catch (...) {
            failed();
        }
        return said;
    }

private:
    c10::TypedOperatorHandle<Result(Args...)> below;

    template <class T>
    static constexpr size_t first() {  // where the first argument of this type is; as many as there are: nowhere
        constexpr bool is[] = {std::is_same_v<std::decay_t<Args>, T>...};
        for (size_t i = 0; i < sizeof...(Args); i++) if (is[i]) return i;
        return sizeof...(Args);
    }
    template <class T>
    static bool wanted(const T&) { return false; }  // of what is no tensor
    static bool wanted(const at::Tensor& t) { return t.requires_grad(); }
    static bool wanted(const std::optional<at::Tensor>& t) { return t.has_value() && t->requires_grad(); }
    static bool wanted(const at::TensorList& list) { return std::any_of(list.begin(), list.end(), [](const at::Tensor& t) { return t.requires_grad(); }); }
    static bool wanted(const Lists& lists) { return std::any_of(lists.begin(), lists.end(), [](const auto& list) { return wanted(at::TensorList(list)); }); }
    static bool wants_gradient(const Args&... args) { return at::GradMode::is_enabled() && (wanted(args) || ...); }
    static bool one(const at::Tensor&) { return false; }
    static bool one(at::TensorList list) { return list.size() == 1; }
    static bool one(const Lists& lists) { return lists.size() == 1; }
    static const Work& work_of(const Work& work) { return work; }
    template <class T>
    static const Work& work_of(const std::tuple<T, Work>& both) { return std::get<1>(both); }

    template <class All>
    bool before(Call& c, const All& all) const {
        Measured what;
        what.add(std::get<tensors>(all));
        c.async = spec.p2p;
        if constexpr (first<bool>() < sizeof...(Args)) c.async = std::get<first<bool>()>(all);
        int64_t peer = -1;
        if constexpr (first<int64_t>() < sizeof...(Args)) peer = spec.peer >= 0 ? std::get<first<int64_t>()>(all) : -1;
        return opened(c, std::get<first<Group>()>(all), what, peer, one(std::get<tensors>(all)));
    }
};

using Reduce = c10::intrusive_ptr<c10d::ReduceOp>;
using Tensors = std::tuple<std::vector<at::Tensor>, Work>;
using OneTensor = std::tuple<at::Tensor, Work>;

template <size_t tensors, class Signature>
void typed(torch::Library& library, const Spec& spec, const c10::OperatorHandle& op) { library.impl(spec.name, Typed<tensors, Signature>(spec, op)); }

struct Usual {
    const char* name;
    void (*install)(torch::Library&, const Spec&, const c10::OperatorHandle&);
};

const Usual USUAL[] = {
    {"allreduce_", typed<0, Tensors(at::TensorList, const Group&, const Reduce&, const std::optional<at::Tensor>&, bool, int64_t)>},
    {"broadcast_", typed<0, Tensors(at::TensorList, const Group&, int64_t, int64_t, bool, int64_t)>},
    {"_allgather_base_", typed<1, OneTensor(at::Tensor&, at::Tensor&, const Group&, bool, int64_t)>},
    {"_reduce_scatter_base_", typed<1, OneTensor(at::Tensor&, at::Tensor&, const Group&, const Reduce&, bool, int64_t)>},
    {"allgather_", typed<1, std::tuple<Lists, Work>(const Lists&, at::TensorList, const Group&, bool, int64_t)>},
    {"reduce_scatter_", typed<1, Tensors(const at::TensorList&, const Lists&, const Group&, const Reduce&, bool, int64_t)>},
    {"allreduce_coalesced_", typed<0, Work(at::TensorList, const Group&, const Reduce&, bool, int64_t)>},
    {"allgather_into_tensor_coalesced_", typed<1, Work(at::TensorList, at::TensorList, const Group&, bool)>},
    {"reduce_scatter_tensor_coalesced_", typed<1, Work(at::TensorList, at::TensorList, const Group&, const Reduce&, bool, int64_t)>},
    {"send", typed<0, Work(at::TensorList, const Group&, int64_t, int64_t)>},
    {"recv_", typed<0, Work(at::TensorList, const Group&, int64_t, int64_t)>},
};

class WaitTensor : public c10::OperatorKernel {
public:
    void operator()(const c10::OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
        uint64_t tag = 0;
        const c10::IValue& v = stack->back();
        bool known = !off.load(std::memory_order_relaxed) && v.isTensor() && v.toTensor().defined() && v.toTensor().has_storage() &&
            outputs.get(v.toTensor().storage().unsafeGetStorageImpl(), tag, true);
        uint64_t began = known ? now_ns() : 0;
        try {
            op.redispatchBoxed(keys & BELOW, stack);
        } catch (...) {
            if (known) waited(tag, began, now_ns(), true);
            throw;
        }
        if (known) waited(tag, began, now_ns(), false);
    }
};

std::unique_ptr<torch::Library> collectives, functional;
std::vector<std::unique_ptr<torch::Library>> above;  // at the keys of autograd
constexpr DispatchKey AUTOGRAD[] = {DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA};

void install_typed(const Spec& spec, const c10::OperatorHandle& op) {
    for (const Usual& u : USUAL) {
        if (std::strcmp(u.name, spec.name) != 0) continue;
        try {
            for (auto& library : above) u.install(*library, spec, op);
        } catch (const c10::Error&) {  // other types in this version
        }
    }
}

void install() {
    if (collectives) return;  // in a forked child, whose parent had it
    collectives = std::make_unique<torch::Library>(torch::Library::IMPL, "c10d", DispatchKey::BackendSelect, __FILE__, __LINE__);
    for (DispatchKey key : AUTOGRAD) above.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "c10d", key, __FILE__, __LINE__));
    for (Spec spec : SPECS) {
        auto op = c10::Dispatcher::singleton().findSchema({std::string("c10d::") + spec.name, ""});
        if (!op.has_value()) continue;
        const auto& args = op->schema().arguments();
        for (size_t i = 0; i < args.size(); i++) {
            if (args[i].name() == "process_group") spec.group = int(i);
            if (args[i].name() == "dst" || args[i].name() == "src") spec.peer = int(i);
            if (args[i].name() == "async_op") spec.async = int(i);
        }
        if (spec.group < 0) continue;
        collectives->impl(spec.name, torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Boxed>(spec)));
        install_typed(spec, *op);
    }
    if (c10::Dispatcher::singleton().findSchema({"_c10d_functional::wait_tensor", ""}).has_value()) {
        functional = std::make_unique<torch::Library>(torch::Library::IMPL, "_c10d_functional", DispatchKey::BackendSelect, __FILE__, __LINE__);
        functional->impl("wait_tensor", torch::CppFunction::makeFromBoxedFunctor(std::make_unique<WaitTensor>()));
    }
}

void use(uintptr_t address, uint64_t capacity) {
    off.store(true);
    std::lock_guard<std::mutex> lock(first_sight);
    auto* base = reinterpret_cast<char*>(address);
    ring.header = reinterpret_cast<ckptd_ring_header*>(base);
    ring.groups = reinterpret_cast<ckptd_ring_group*>(base + CKPTD_GROUPS_AT);
    ring.ranks = reinterpret_cast<uint32_t*>(base + CKPTD_RANKS_AT);
    ring.records = reinterpret_cast<ckptd_ring_record*>(base + CKPTD_RECORDS_AT);
    ring.mask = capacity - 1;
    epoch.fetch_add(1);
    off.store(false);
}

// --- marks ------------------------------------------------------------------------------------------------------------------

void put_mark(uint8_t kind, uint64_t began, uint64_t ended_at, uint64_t value, uint8_t flags, uint32_t waited_us = 0, uint32_t inside_us = 0) {
    if (off.load(std::memory_order_relaxed)) return;
    uint64_t i;
    ckptd_ring_record* r = claim(i);
    store(r->entered_ns, began), store(r->returned_ns, ended_at), store(r->ended_ns, ended_at), store(r->bytes, value), store(r->seq, 0);
    store(r->step, load(ring.header->step) + 1), store(r->group, CKPTD_NO_GROUP), store(r->op, kind), store(r->dtype, 0);
    store(r->flags, CKPTD_MARK | flags), store(r->peer, -1), store(r->waited_us, waited_us), store(r->inside_us, inside_us);
    __atomic_store_n(&r->commit, i + 1, __ATOMIC_RELEASE);
}

void mark(uint8_t kind, uint64_t began, uint64_t ended_at, uint64_t value, uint8_t flags) { put_mark(kind, began, ended_at, value, flags); }

void step(int64_t number, uint32_t cpu_us, uint32_t delay_us) {
    if (off.load(std::memory_order_relaxed)) return;
    uint64_t now = now_ns();
    put_mark(CKPTD_STEP, now, now, number < 0 ? 0 : uint64_t(number), number < 0 ? 0 : 1, delay_us, cpu_us);
    store(ring.header->step, number < 0 ? load(ring.header->step) + 1 : uint64_t(number));
}

void phase(int kind, uint64_t since) {
    if (ring.header == nullptr || off.load()) return;
    if (since) {
        store(ring.header->phase_ns, since);
        __atomic_fetch_or(&ring.header->phases, 1u << kind, __ATOMIC_RELEASE);
    } else {
        __atomic_fetch_and(&ring.header->phases, ~(1u << kind), __ATOMIC_RELEASE);
    }
}

// --- Python -----------------------------------------------------------------------------------------------------------------

bool wait(const c10::intrusive_ptr<c10d::Work>& work, std::chrono::milliseconds timeout) {
    HANDLE_TH_ERRORS
    py::gil_scoped_release unlocked;
    uint64_t tag = 0;
    bool known = !off.load(std::memory_order_relaxed) && works.get(work.get(), tag, false);
    uint64_t began = known ? now_ns() : 0;
    bool said;
    try {
        said = work->wait(timeout);
    } catch (...) {
        if (known) waited(tag, began, now_ns(), true);
        throw;
    }
    if (known) waited(tag, began, now_ns(), false);
    return said;
    END_HANDLE_TH_ERRORS_PYBIND
}

py::dict layout() {  // what tests compare with record.py
    py::dict header, group, record;
#define AT(dict, type, field) dict[#field] = py::make_tuple(offsetof(type, field), sizeof(type::field))
#define H(f) AT(header, ckptd_ring_header, f)
    H(magic); H(version); H(capacity); H(rank); H(world_size); H(local_rank); H(pid); H(pid_start); H(attempt); H(head); H(step); H(groups); H(untabled); H(layer); H(phases);
    H(phase_ns); H(errors); H(hook_ns); H(device_lost); H(ranks_used); H(device); H(job); H(thread); H(done);
#define G(f) AT(group, ckptd_ring_group, f)
    G(key); G(size); G(mine); G(ranks_at); G(local_id); G(entered); G(entered_ns); G(done); G(done_ns); G(history); G(signature); G(bytes); G(op); G(dtype); G(p2p_op); G(p2p_open);
    G(p2p_peer); G(p2p_entered); G(p2p_ns); G(p2p_done); G(version); G(spare);
#define R(f) AT(record, ckptd_ring_record, f)
    R(commit); R(entered_ns); R(returned_ns); R(ended_ns); R(bytes); R(seq); R(step); R(group); R(op); R(dtype); R(flags); R(peer); R(waited_us); R(inside_us);
    py::dict all;
    all["HEADER"] = py::make_tuple(header, sizeof(ckptd_ring_header));
    all["GROUP"] = py::make_tuple(group, sizeof(ckptd_ring_group));
    all["RECORD"] = py::make_tuple(record, sizeof(ckptd_ring_record));
    all["at"] = py::make_tuple(CKPTD_GROUPS_AT, CKPTD_RANKS_AT, CKPTD_RECORDS_AT, CKPTD_GROUPS_MAX, CKPTD_RANKS_MAX, CKPTD_RING_MAGIC, CKPTD_RING_VERSION);
    return all;
}

}  // namespace

PYBIND11_MODULE(CKPTD_MODULE, m) {
    m.def("use", &use, "Write the ring at this address from now on.");
    m.def("install", &install);
    m.def("remove", [] { off.store(true); py::gil_scoped_release unlocked; above.clear(); collectives.reset(); functional.reset(); });
    m.def("set_off", [](bool value) { off.store(value); });
    m.def("is_off", [] { return off.load(); });
    m.def("mark", &mark);
    m.def("step", &step);
    m.def("direct", [] { return direct.load(); });
    m.def("phase", &phase);
    m.def("records", [] { return load(ring.header->head); });
    m.def("error", [] { return __atomic_add_fetch(&ring.header->errors, 1, __ATOMIC_RELAXED); });
    m.def("hint", [](const std::string& name, std::vector<int64_t> ranks) { std::lock_guard<std::mutex> lock(first_sight); hints[name] = std::move(ranks); });
    m.def("coalesce", [](int by) { coalescing.fetch_add(by); });
    m.def("capture", [](int by) {
        py::gil_scoped_release unlocked;
        std::lock_guard<std::mutex> lock(clock_of()->asking);
        capturing.fetch_add(by);
    });
    m.def("link", [](const c10::intrusive_ptr<c10d::Work>& work, uint64_t i, bool device) { works.put(work.get(), tagged(i, device)); });
    m.def("fail", [](int times) { breaks.store(times); });
    m.def("sample", [](uint32_t one_in) { every.store(one_in); });
    m.def("ask", [] { py::gil_scoped_release unlocked; return clock_of()->ask(); });
    m.def("stop", [] { py::gil_scoped_release unlocked; clock_of()->stop(); });
    m.def("out", [] { return clock_of()->out.load(); });
    m.def("wait", &wait, py::arg("work"), py::arg("timeout") = kNoTimeout);
    m.def("method", [](const py::object& type) {  // `wait` as a method of Work
        return py::cpp_function(&wait, py::name("wait"), py::is_method(type), py::arg("timeout") = kNoTimeout);
    });
    m.def("layout", &layout);
    m.attr("torch") = TORCH_VERSION;
    pthread_atfork(nullptr, nullptr, [] { off.store(true); });
}
