// Runs a kernel on the CPU: a fiber for each thread of a block, block after block.
//
// A fiber runs until it ends or waits at a barrier; then the next one does, in an order that the launch chooses. So a
// missing barrier shows as a difference between two orders, or as NaN: shared memory is NaN when a block begins, and so
// is what an asynchronous copy has still to bring. Kernels built with watches (watch.cc) report the race itself.
#include "run.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <mutex>

Index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr uint64_t CANARY = 0x5AFE57ACC0FFEE01;  // at the end of each stack

alignas(16) unsigned char dynamic[SHARED];
static uint64_t brought[2][MOST];                             // to shuffles; two, so that each takes one meeting
alignas(16) static char stacks[1 + MOST][STACK];              // the first is nobody's: thread 0 may run over
Fiber fibers[MOST];
unsigned current;
const Launch* launch;
static unsigned n;                                            // threads of a block
static unsigned warps[MOST / WARP], lanes[WARP], warp, lane;  // the order of a round, and how far it is gone through
static unsigned random_state;
static const Kernel* kernel;
static jmp_buf home;
static char message[600];

void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    const int used = snprintf(message, sizeof message, "block (%u, %u, %u), thread %u: ", blockIdx.x, blockIdx.y,
                              blockIdx.z, current);
    vsnprintf(message + used, sizeof message - used, format, values);
    _longjmp(home, 2);
}

static unsigned draw(unsigned below) {
    random_state = random_state * 1664525u + 1013904223u;
    return unsigned(uint64_t(random_state) * below >> 32);
}

static void order(unsigned* which, unsigned count) {
    for (unsigned i = 0; i < count; ++i) which[i] = launch->order == 1 ? count - 1 - i : i;
    if (launch->order > 1)
        for (unsigned i = count; i > 1; --i) std::swap(which[i - 1], which[draw(i)]);
}

// Lets the fibers [first, last) go on if all that have not ended are at this barrier; whether it did.
static bool release(unsigned first, unsigned last, Wait where) {
    int line = 0, who = -1;
    for (unsigned i = first; i < last; ++i)
        if (fibers[i].wait != ENDED && fibers[i].wait != where) return false;
    for (unsigned i = first; i < last; ++i) {
        if (fibers[i].wait == ENDED) continue;
        if (who >= 0 && fibers[i].line != line)
            fail("a divergent barrier: thread %d is at line %d, thread %u at line %d", who, line, i, fibers[i].line);
        who = i, line = fibers[i].line;
    }
    for (unsigned i = first; i < last; ++i)
        if (fibers[i].wait == where) fibers[i].wait = RUNS;
    return who >= 0;
}

[[noreturn]] static void next_fiber();

[[noreturn]] static void live() {
    for (;;) {
        kernel->call(launch->arguments);
        fibers[current].wait = ENDED;
        if (!_setjmp(fibers[current].point)) next_fiber();
    }
}

[[noreturn]] static void resume(unsigned thread) {
    Fiber& fiber = fibers[current = thread];
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
    if (fiber.begun) _longjmp(fiber.point, 1);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[1 + thread], context.uc_stack.ss_size = STACK, context.uc_link = nullptr;
    makecontext(&context, live, 0);
    setcontext(&context);
    abort();
}

static void begin_round() {
    order(warps, (n + WARP - 1) / WARP);
    order(lanes, WARP);
    warp = lane = 0;
    watch_barrier();
}

// Goes on with whoever is next: each warp runs as far ahead of the others as it may.
[[noreturn]] static void next_fiber() {
    do {
        for (; warp < (n + WARP - 1) / WARP; ++warp) {
            const unsigned first = warps[warp] * WARP, last = min(first + WARP, n);
            do {
                while (lane < WARP) {
                    const unsigned thread = first + lanes[lane++];
                    if (thread < last && fibers[thread].wait == RUNS) resume(thread);
                }
                lane = 0;
            } while (release(first, last, AT_WARP));
        }
        begin_round();
    } while (release(0, n, AT_BLOCK));
    int waits[] = {-1, -1};
    for (unsigned i = 0; i < n; ++i)
        if (fibers[i].wait != ENDED) waits[fibers[i].wait == AT_WARP] = i;
    if (waits[1] >= 0)
        fail("a deadlock: thread %d waits for its warp at line %d, thread %d for its block at line %d", waits[1],
             fibers[waits[1]].line, waits[0], fibers[waits[0]].line);
    _longjmp(home, 1);
}

// Whether it ran to its end.
static bool run_block() {
    watch_block();
    begin_round();
    memset(shared_begin, 0xFF, shared_end - shared_begin);
    memset(dynamic, 0xFF, launch->shared);
    for (unsigned i = 0; i < n; ++i) {
        fibers[i].wait = RUNS, fibers[i].shuffles = fibers[i].synced = fibers[i].closed = 0;
        fibers[i].copies.clear();
    }
    switch (_setjmp(home)) {
        case 0: next_fiber();
        case 1: return true;
        default: return false;
    }
}

static void run_blocks() {
    std::vector<unsigned> blocks(size_t(gridDim.x) * gridDim.y * gridDim.z);
    order(blocks.data(), blocks.size());
    for (unsigned i = 0; i < n; ++i) memcpy(stacks[1 + i], &CANARY, sizeof CANARY);
    for (unsigned block : blocks) {
        blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / (gridDim.x * gridDim.y)};
        if (!run_block()) break;
    }
    for (unsigned i = 0; i < n; ++i)
        if (memcmp(stacks[1 + i], &CANARY, sizeof CANARY))
            snprintf(message, sizeof message, "thread %u ran out of its stack", i);
    for (Fiber& fiber : fibers) fiber.begun &= !*message;  // else they stand in the middle of a kernel
}

// What a GPU (sm_90) would refuse; empty where nothing.
static void check() {
    const unsigned *grid = launch->grid, *block = launch->block;
    const auto wrong = [](auto... values) { snprintf(message, sizeof message, values...); };
    if (launch->n_arguments != kernel->n_arguments)
        wrong("it takes %u arguments, not %u", kernel->n_arguments, launch->n_arguments);
    for (unsigned i = 0; i < launch->n_arguments && !*message; ++i) {
        const unsigned takes = kernel->kinds[i], given = launch->kinds[i];
        if (takes != given)
            wrong("argument %u is %c%u, not %c%u (P: pointer, i: integer, f: floating, V: struct; of so many bits)", i,
                  takes >> 16, 8 * (takes & 0xFFFF), given >> 16, 8 * (given & 0xFFFF));
    }
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7FFFFFFF || grid[1] > 65535 || grid[2] > 65535)
        wrong("no such grid: %u x %u x %u", grid[0], grid[1], grid[2]);
    if (!block[0] || !block[1] || !block[2] || block[2] > 64 || uint64_t(block[0]) * block[1] * block[2] > MOST)
        wrong("no such block: %u x %u x %u", block[0], block[1], block[2]);
    else if (block[0] * block[1] * block[2] > kernel->threads)
        wrong("%u threads, but launch bounds of %u", block[0] * block[1] * block[2], kernel->threads);
    if (launch->shared > SHARED) wrong("%zu bytes of shared memory; there are %zu", launch->shared, SHARED);
}

// ---- what kernels call

void meet(Wait where, int line) {
    Fiber& me = fibers[current];
    me.wait = where, me.line = line;
    if (!_setjmp(me.point)) next_fiber();
}

static void meet_warp(unsigned mask, int line) {
    if (mask != ~0u) fail("line %d: a mask that leaves out lanes", line);
    meet(AT_WARP, line);
}

void sync_warp(unsigned mask, int line) {
    meet_warp(mask, line);
    ++fibers[current].synced;
}

unsigned enter_shuffle(unsigned mask, uint64_t mine, int line) {
    const unsigned which = fibers[current].shuffles++ % 2;
    brought[which][current] = mine;
    meet_warp(mask, line);
    return which;
}

static bool took_part(unsigned thread) { return thread < n && fibers[thread].shuffles >= fibers[current].shuffles; }

uint64_t from_lane(unsigned which, unsigned lane, int line) {
    const unsigned thread = current / WARP * WARP + lane;
    if (!took_part(thread)) fail("line %d: it reads from lane %u, which isn't there", line, lane);
    return brought[which][thread];
}

}  // namespace shim

using namespace shim;

unsigned __ballot_sync(unsigned mask, int predicate, int line) {
    const unsigned which = enter_shuffle(mask, predicate != 0, line), first = current / WARP * WARP;
    unsigned votes = 0;
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (took_part(first + lane)) votes |= unsigned(brought[which][first + lane]) << lane;
    return votes;
}

// An asynchronous copy: the target is NaN until it arrives.
void device_copy(void* target, const void* source, int bytes, int room) {
    char *const to = static_cast<char*>(target), *const from = static_cast<char*>(const_cast<void*>(source));
    const bool in_static = to >= shared_begin && to + room <= shared_end;
    const size_t offset = to - reinterpret_cast<char*>(dynamic);
    if (!in_static && offset + room > launch->shared) fail("@%x copies to what isn't shared memory", CODE);
    if (uintptr_t(to) % room || (bytes && uintptr_t(from) % room)) fail("@%x copies what isn't aligned", CODE);
    if (launch->watched) touched(to, room, true, CODE);
    if (launch->watched && bytes) touched(from, bytes, false, CODE);
    memset(to, 0xFF, room);
    fibers[current].copies.push_back({to, from, bytes, room, fibers[current].closed});
}

void device_close_copies() { ++fibers[current].closed; }

void device_copies_arrived(int last) {
    Fiber& me = fibers[current];
    auto copy = me.copies.begin();
    for (; copy != me.copies.end() && int(me.closed - copy->group) > last; ++copy) {
        if (launch->watched) touched(copy->target, copy->room, true, CODE);
        memset(copy->target, 0, copy->room);
        memcpy(copy->target, copy->source, copy->bytes);
    }
    me.copies.erase(me.copies.begin(), copy);
}

template <class T>
static T add(T* target, T value) {
    const T old = *target;
    *target = old + value;
    return old;
}
int atomicAdd(int* target, int value) { return add(target, value); }
unsigned atomicAdd(unsigned* target, unsigned value) { return add(target, value); }
unsigned long long atomicAdd(unsigned long long* target, unsigned long long value) { return add(target, value); }

extern "C" {

// Runs a kernel; what was wrong, or null.
__attribute__((visibility("default"))) const char* shim_launch(const Kernel* which, const Launch* how) {
    static std::mutex one;  // a launch at a time
    const std::lock_guard hold(one);
    kernel = which, launch = how, *message = 0;
    gridDim = {how->grid[0], how->grid[1], how->grid[2]}, blockDim = {how->block[0], how->block[1], how->block[2]};
    n = blockDim.x * blockDim.y * blockDim.z, random_state = how->order;
    check();
    if (*message) return message;
    if (how->watched) watch();
    run_blocks();
    unwatch();
    return *message ? message : nullptr;
}

}  // extern "C"
