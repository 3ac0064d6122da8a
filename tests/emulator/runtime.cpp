// CUDA runtime of a GPU that computes nothing, to be loaded before the real one (LD_PRELOAD).
//
// Real: addresses, sizes, which memory is whose, copies, streams, events, captured graphs, and the log of it all. Device
// memory is host memory that is only taken where something is written. Kernels do nothing, and nothing takes time.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "device.h"

using namespace emulator;

// ---- the log ----

static std::recursive_mutex& lock() {
    static auto* mutex = new std::recursive_mutex;  // never destroyed: threads log until the process is gone
    return *mutex;
}
#define LOCKED std::lock_guard<std::recursive_mutex> guard(lock())

static FILE* log_file() {
    static FILE* file = [] {
        const char *path = getenv("EMULATOR_LOG"), *rank = getenv("RANK");
        return path ? fopen((std::string(path) + "." + (rank ? rank : "0")).c_str(), "a") : nullptr;
    }();
    return file;
}

// Whether this thread is the one that sets marks, or autograd's: a loader's or a checkpoint's may wait.
static thread_local bool marks = false;
static bool watched() {
    static thread_local bool autograd = [] {
        char name[16] = "";
        pthread_getname_np(pthread_self(), name, sizeof name);
        return strncmp(name, "pt_autograd", 11) == 0;
    }();
    return marks || autograd;
}

static void write_line(const char* format, va_list fields) {
    if (FILE* file = log_file()) {
        LOCKED;
        if (!watched()) fputc('~', file);
        vfprintf(file, format, fields);
        fputc('\n', file);
    }
}

extern "C" void emulator_log(const char* format, ...) {
    va_list fields;
    va_start(fields, format);
    write_line(format, fields);
    va_end(fields);
}

// Called by the watched program, through ctypes.
extern "C" void emulator_mark(const char* name) {
    marks = true;
    emulator_log("M %s", name);
    if (FILE* file = log_file()) fflush(file);
}

// ---- memory ----

enum Kind { PAGEABLE, DEVICE, PINNED };
struct Block {
    size_t bytes;
    Kind kind;
    bool ours;  // mapped here, not registered
};
static std::map<const char*, Block>& blocks() {
    static auto* all = new std::map<const char*, Block>;
    return *all;
}
static size_t used = 0;
static thread_local int current_device = 0;

static cudaError_t take(void** out, size_t bytes, Kind kind) {
    LOCKED;
    *out = nullptr;
    if (kind == DEVICE && used + bytes > MEMORY) return cudaErrorMemoryAllocation;
    size_t whole = bytes ? (bytes + 4095) & ~size_t(4095) : 4096;
    void* p = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return cudaErrorMemoryAllocation;
    blocks()[(const char*)p] = {whole, kind, true};
    if (kind == DEVICE) used += whole;
    emulator_log("%c %zu", kind == DEVICE ? 'A' : 'H', bytes);
    *out = p;
    return cudaSuccess;
}

static cudaError_t give(const void* p) {
    LOCKED;
    auto found = blocks().find((const char*)p);
    if (found == blocks().end()) return cudaSuccess;
    if (found->second.kind == DEVICE) used -= found->second.bytes;
    if (found->second.ours) munmap((void*)p, found->second.bytes);
    blocks().erase(found);
    return cudaSuccess;
}

static Kind kind_of(const void* p) {
    LOCKED;
    auto found = blocks().upper_bound((const char*)p);
    if (found == blocks().begin()) return PAGEABLE;
    --found;
    return (const char*)p < found->first + found->second.bytes ? found->second.kind : PAGEABLE;
}

// Zeroes of whole pages are given back to the system instead of being written.
static void fill(void* p, int value, size_t bytes) {
    constexpr size_t LARGE = 1 << 20;
    if (bytes < LARGE) {
        memset(p, value, bytes);
    } else if (value == 0) {
        char *begin = (char*)(((size_t)p + 4095) & ~size_t(4095)), *end = (char*)(((size_t)p + bytes) & ~size_t(4095));
        memset(p, 0, begin - (char*)p);
        madvise(begin, end - begin, MADV_DONTNEED);
        memset(end, 0, (char*)p + bytes - end);
    }
}

static const char* const KIND_NAMES[] = {"pageable", "device", "pinned"};

static cudaError_t copy(const char* how, void* to, const void* from, size_t bytes) {
    constexpr size_t WORTH_KEEPING = 64 << 20;  // larger tensors that never left the device hold nothing anyway
    Kind a = kind_of(from), b = kind_of(to);
    emulator_log("C %s %s>%s %zu", how, KIND_NAMES[a], KIND_NAMES[b], bytes);
    if (a != DEVICE || b != DEVICE || bytes < WORTH_KEEPING) memmove(to, from, bytes);
    return cudaSuccess;
}

extern "C" {

cudaError_t cudaMalloc(void** p, size_t bytes) { return take(p, bytes, DEVICE); }
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return take(p, bytes, DEVICE); }
cudaError_t cudaFree(void* p) { return give(p); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return give(p); }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return take(p, bytes, PINNED); }
cudaError_t cudaMallocHost(void** p, size_t bytes) { return take(p, bytes, PINNED); }
cudaError_t cudaFreeHost(void* p) { return give(p); }
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
    LOCKED;
    blocks()[(const char*)p] = {bytes, PINNED, false};
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) { return give(p); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    LOCKED;
    *total = MEMORY, *free = MEMORY - used;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    Kind kind = kind_of(p);
    memset(a, 0, sizeof *a);
    a->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->device = kind == DEVICE ? current_device : -1;
    a->devicePointer = kind == PAGEABLE ? nullptr : (void*)p;
    a->hostPointer = kind == PINNED ? (void*)p : nullptr;
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** p, const void*) { return take(p, 1 << 20, DEVICE); }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
    static int one;
    *pool = (cudaMemPool_t)&one;
    return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
    *(size_t*)value = 0;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return copy("sync", to, from, bytes); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return copy("async", to, from, bytes);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) {
    return copy("async", to, from, bytes);
}
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    emulator_log("Z %zu", bytes);
    fill(p, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return cudaMemset(p, value, bytes); }

// ---- the device ----

cudaError_t cudaGetDeviceCount(int* count) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES"), *wanted = getenv("EMULATOR_DEVICES");
    *count = visible && !*visible ? 0 : wanted ? atoi(wanted) : 1;
    return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, NAME);
    p->totalGlobalMem = MEMORY, p->totalConstMem = 65536, p->l2CacheSize = L2_BYTES, p->memoryBusWidth = BUS_BITS;
    p->major = MAJOR, p->minor = MINOR, p->multiProcessorCount = MULTIPROCESSORS, p->warpSize = WARP;
    p->sharedMemPerBlock = SHARED_PER_BLOCK, p->sharedMemPerBlockOptin = SHARED_OPT_IN;
    p->sharedMemPerMultiprocessor = SHARED_PER_MULTIPROCESSOR, p->reservedSharedMemPerBlock = 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->textureAlignment = 512, p->concurrentKernels = p->unifiedAddressing = p->cooperativeLaunch = 1;
    return cudaSuccess;
}
int emulator_attribute(int attribute) {
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock: return SHARED_PER_BLOCK;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED_OPT_IN;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return SHARED_PER_MULTIPROCESSOR;
        case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
        case cudaDevAttrTotalConstantMemory: return 65536;
        case cudaDevAttrWarpSize: return WARP;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return REGISTERS;
        case cudaDevAttrClockRate: return CLOCK_KHZ;
        case cudaDevAttrMemoryClockRate: return MEMORY_CLOCK_KHZ;
        case cudaDevAttrGlobalMemoryBusWidth: return BUS_BITS;
        case cudaDevAttrMultiProcessorCount: return MULTIPROCESSORS;
        case cudaDevAttrL2CacheSize: return L2_BYTES;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
        case cudaDevAttrComputeCapabilityMajor: return MAJOR;
        case cudaDevAttrComputeCapabilityMinor: return MINOR;
        case cudaDevAttrUnifiedAddressing: case cudaDevAttrCooperativeLaunch: return 1;
        default: return 0;
    }
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = emulator_attribute(attribute);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", 4 + device);
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = DRIVER_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorNoDevice) return "no CUDA-capable device is detected";
    return error == cudaErrorMemoryAllocation ? "out of memory" : "error of the emulated device";
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"

// ---- streams, events, graphs ----

struct Stream;
struct Capture {
    size_t launches = 0;
    std::set<Stream*> streams;
};
struct Stream {
    Capture* capture = nullptr;
};
struct Event {
    double milliseconds = 0;
    Capture* capture = nullptr;
};
static std::set<Stream*>& streams() {
    static auto* all = new std::set<Stream*>;
    return *all;
}
static Stream* find(const void* stream) {  // null for the default streams, which are never captured
    LOCKED;
    auto found = streams().find((Stream*)stream);
    return found == streams().end() ? nullptr : *found;
}

extern "C" void emulator_launch(const void* stream, const char* format, ...) {
    Stream* known = find(stream);
    if (known && known->capture) {
        known->capture->launches++;
        return;
    }
    va_list fields;
    va_start(fields, format);
    write_line(format, fields);
    va_end(fields);
}

static cudaError_t waited(const char* what) {
    emulator_log("S %s", what);
    return cudaSuccess;
}

extern "C" {

cudaError_t cudaDeviceSynchronize() { return waited("cudaDeviceSynchronize"); }
cudaError_t cudaStreamCreate(cudaStream_t* out) {
    LOCKED;
    auto* stream = new Stream;
    streams().insert(stream);
    *out = (cudaStream_t)stream;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned) { return cudaStreamCreate(out); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int) { return cudaStreamCreate(out); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    LOCKED;
    if (Stream* known = find(stream)) {
        streams().erase(known);
        delete known;
    }
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return waited("cudaStreamSynchronize"); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    Stream* known = find(stream);
    if (Capture* capture = ((Event*)event)->capture; known && capture) {  // a captured graph forks to this stream
        known->capture = capture;
        capture->streams.insert(known);
    }
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
    call(stream, cudaSuccess, data);
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* data) {
    call(data);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* out) {
    *out = (cudaEvent_t) new Event;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) { return cudaEventCreate(out); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete (Event*)event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    Stream* known = find(stream);
    *(Event*)event = {now.tv_sec * 1e3 + now.tv_nsec * 1e-6, known ? known->capture : nullptr};
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return waited("cudaEventSynchronize"); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {  // the host's clock
    double between = ((Event*)to)->milliseconds - ((Event*)from)->milliseconds;
    *milliseconds = between > 1e-3 ? between : 1e-3;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    Stream* known = find(stream);
    if (!known) return cudaErrorStreamCaptureUnsupported;
    known->capture = new Capture;
    known->capture->streams.insert(known);
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    Capture* capture = find(stream)->capture;
    for (Stream* member : capture->streams) member->capture = nullptr;
    *graph = (cudaGraph_t)capture;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    Stream* known = find(stream);
    *status = known && known->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* count) {
    Stream* known = find(stream);
    Capture* capture = known ? known->capture : nullptr;
    *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (id) *id = (unsigned long long)capture;
    if (graph) *graph = (cudaGraph_t)capture;
    if (count) *count = 0;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
    *count = ((Capture*)graph)->launches;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
    *out = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(out, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    emulator_log("G %zu", ((Capture*)graph)->launches);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }          // the executable graph is the same object
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }  // a few bytes, left to the process's end

// ---- kernels ----

static std::map<const void*, std::string>& kernel_names() {
    static auto* all = new std::map<const void*, std::string>;
    return *all;
}
static const char* name_of(const void* function) {
    LOCKED;
    auto found = kernel_names().find(function);
    if (found != kernel_names().end()) return found->second.c_str();
    Dl_info info;
    return dladdr(function, &info) && info.dli_sname ? info.dli_sname : "?";
}
static cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    emulator_launch(stream, "L %s %u,%u,%u %u %zu", name_of(function), grid.x, grid.y, grid.z,
                    block.x * block.y * block.z, shared);
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(function, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void**) {
    return launch(function, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
// The compiler's own entry points, in code that nvcc made.
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
static thread_local struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void**)stream = pushed.stream;
    return cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) {
    static void* handle[4];
    return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    LOCKED;
    kernel_names()[function] = name;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 64, a->binaryVersion = a->ptxVersion = 10 * MAJOR;
    a->maxDynamicSharedSizeBytes = SHARED_OPT_IN;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
    *count = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t*) {
    *count = 32;
    return cudaSuccess;
}

static int nothing() { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    void* found = driver ? dlsym(driver, name) : nullptr;
    *function = found ? found : (void*)nothing;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

}  // extern "C"
