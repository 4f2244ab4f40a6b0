// What shim.cc, which runs kernels, and watch.cc, which sees what they do to memory, know of each other.
#pragma once
#include "shim.h"

#include <setjmp.h>

#include <vector>

// From the linker: the static shared memory of all kernels of the library, and the library.
extern "C" __attribute__((visibility("hidden"))) char shared_begin[], shared_end[], __ehdr_start[], _end[];

// Where in the library the caller of a function is; shim.py makes a line of it.
#define CODE unsigned(static_cast<char*>(__builtin_return_address(0)) - 1 - __ehdr_start)

namespace shim {

constexpr unsigned MOST = 1024, WARP = 32;               // threads of a block, of a warp
constexpr size_t STACK = 64 << 10, SHARED = 227 << 10;   // bytes of a thread; of a block, on sm_90

struct Copy { char *target, *source; int bytes, room; unsigned group; };
struct Fiber {
    jmp_buf point;  // where it goes on
    bool begun;     // whether there is such a point
    Wait wait;
    int line;                           // of its barrier
    unsigned shuffles, synced, closed;  // so far: shuffles, __syncwarps, groups of copies
    std::vector<Copy> copies;           // not arrived
};
struct Array { char* begin; size_t size; };
struct Launch {  // as in shim.py
    unsigned grid[3], block[3];
    size_t shared;
    unsigned n_arguments, order, n_arrays, watched;  // order: 0 forward, 1 backward, else a seed
    const unsigned* kinds;
    void** arguments;
    const Array* arrays;  // all memory that the kernel may use
};

extern Fiber fibers[MOST];
extern unsigned current;  // the thread that runs
extern const Launch* launch;

// Ends the launch with a message; @ and an address stand for a line.
[[noreturn]] void fail(const char* format, ...);

void watch();          // a launch begins
void watch_block();    // a block begins
void watch_barrier();  // all threads of the block have met
void unwatch();
void touched(void* what, size_t size, bool write, unsigned code);  // the thread is about to read or write

}  // namespace shim
