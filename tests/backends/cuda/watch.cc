// Sees every access of a kernel to memory: kernels that are built with -fsanitize=thread and -fsanitize=undefined call
// the functions at the end. No other part of those sanitizers is used.
//
// Each piece of memory that a launch may use has cells, which remember the last accesses. Two accesses to one cell are
// a race if one writes and nothing puts them in order: a barrier of the block, a __syncwarp of a warp, or being one and
// the same thread. Blocks of a launch have no order. What is nowhere in these pieces, nor on a stack or among the
// constants of the library, is out of bounds.
#include "run.h"

#include <stdlib.h>

namespace shim {

// When something was done: `time` counts barriers and blocks, `synced` the thread's __syncwarps.
struct Access { unsigned time, synced, thread, code; };
struct Cell { Access write, reads[2]; };  // the last ones; the two reads are of two threads
struct Memory { char* begin; size_t size; bool shared; Cell* cells; };
static std::vector<Memory> memories;
static unsigned now, block_begin;

static bool in_order(const Access& before, bool shared) {
    if (before.time < block_begin) return shared || !before.time;  // by another block, or never
    const bool same_warp = before.thread / WARP == current / WARP;
    return before.time < now || before.thread == current || (same_warp && before.synced < fibers[current].synced);
}

static void record(Cell& cell, bool write, bool shared, unsigned code) {
    const Access access = {now, fibers[current].synced, current, code};
    const auto check = [&](const Access& before, const char* did) {
        if (!in_order(before, shared))
            fail("a race in %s memory: @%x %s what thread %u%s %s @%x, and no barrier is between",
                 shared ? "shared" : "global", code, write ? "writes" : "reads", before.thread,
                 before.time < block_begin ? " of another block" : "", did, before.code);
    };
    check(cell.write, "wrote");
    if (!write) {
        if (cell.reads[0].thread != current || !cell.reads[0].time) cell.reads[1] = cell.reads[0];
        cell.reads[0] = access;
        return;
    }
    for (const Access& read : cell.reads) check(read, "read");
    cell.write = access;
}

// One cell for each 4 bytes that are used as such, else one for each byte.
void touched(void* what, size_t size, bool write, unsigned code) {
    char* const first = static_cast<char*>(what);
    for (const Memory& memory : memories) {
        if (first < memory.begin || first + size > memory.begin + memory.size) continue;
        const size_t step = size % 4 || uintptr_t(first) % 4 ? 1 : 4, offset = first - memory.begin;
        for (size_t i = 0; i < size; i += step) record(memory.cells[offset + i], write, memory.shared, code);
        return;
    }
    if (first < __ehdr_start || first + size > _end || (first >= shared_begin && first < shared_end) ||
        (first >= (char*)dynamic && first < (char*)dynamic + SHARED))
        fail("@%x %s %zu bytes outside of all arrays", code, write ? "writes" : "reads", size);
}

void watch() {
    const auto add = [](char* begin, size_t size, bool shared) {
        if (size) memories.push_back({begin, size, shared, static_cast<Cell*>(calloc(size, sizeof(Cell)))});
    };
    add(shared_begin, shared_end - shared_begin, true);
    add(reinterpret_cast<char*>(dynamic), launch->shared, true);
    for (unsigned i = 0; i < launch->n_arrays; ++i) add(launch->arrays[i].begin, launch->arrays[i].size, false);
}

void unwatch() {
    for (const Memory& memory : memories) free(memory.cells);
    memories.clear();
}

void watch_block() { block_begin = ++now; }

void watch_barrier() { ++now; }

}  // namespace shim

using namespace shim;

extern "C" {

// Calls of -fsanitize=thread.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* what, size_t size) { touched(what, size, false, CODE); }
void __tsan_write_range(void* what, size_t size) { touched(what, size, true, CODE); }
#define ACCESS(size)                                                                    \
    void __tsan_read##size(void* what) { touched(what, size, false, CODE); }            \
    void __tsan_write##size(void* what) { touched(what, size, true, CODE); }            \
    void __tsan_unaligned_read##size(void* what) { touched(what, size, false, CODE); }  \
    void __tsan_unaligned_write##size(void* what) { touched(what, size, true, CODE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

// Calls of -fsanitize=undefined.
#define UNDEFINED(what) \
    void __ubsan_handle_##what() { fail("@%x is undefined: %s", CODE, #what); }
UNDEFINED(out_of_bounds)
UNDEFINED(type_mismatch_v1)
UNDEFINED(pointer_overflow)
UNDEFINED(shift_out_of_bounds)
UNDEFINED(add_overflow)
UNDEFINED(sub_overflow)
UNDEFINED(mul_overflow)
UNDEFINED(negate_overflow)
UNDEFINED(divrem_overflow)
UNDEFINED(load_invalid_value)
UNDEFINED(builtin_unreachable)
UNDEFINED(missing_return)
UNDEFINED(invalid_builtin)
UNDEFINED(vla_bound_not_positive)
UNDEFINED(nonnull_arg)

}  // extern "C"
