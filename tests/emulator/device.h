// What the stand-ins share: the log, the device that they pretend to be, and the stream that is being captured.
#pragma once
#include <cstddef>
#include <cstdio>

namespace emulator {

constexpr const char* NAME = "NVIDIA H100 80GB HBM3";
constexpr size_t MEMORY = 85017493504ull;
constexpr int MAJOR = 9, MINOR = 0, MULTIPROCESSORS = 132, WARP = 32;
constexpr int SHARED_PER_BLOCK = 49152, SHARED_OPT_IN = 232448, SHARED_PER_MULTIPROCESSOR = 233472;
constexpr int REGISTERS = 65536, L2_BYTES = 52428800, CLOCK_KHZ = 1980000, MEMORY_CLOCK_KHZ = 2619000, BUS_BITS = 5120;
constexpr int DRIVER_VERSION = 13000;

// One line of the log, $EMULATOR_LOG.RANK: a letter for the kind of event, then its fields.
//   L launch    P product    C copy    Z fill    S host wait    A device memory    H pinned memory    N collective
//   G launch of a captured graph       M mark of the program that is watched
// A ~ before it: from a thread other than the one that sets marks and autograd's.
extern "C" void emulator_log(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A kernel or product on a stream: logged, or counted in the graph that the stream is being captured into.
extern "C" void emulator_launch(const void* stream, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace emulator
