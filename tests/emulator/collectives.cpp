// NCCL: each rank gets back what it put in, as if all had put in the same; who talked to how many, and how much, is logged.
#include <nccl.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "device.h"

using namespace emulator;

struct ncclComm {
    int size, rank;
    std::string name;  // the same on all its ranks, and no other communicator's
    int splits = 0;
};

namespace {

size_t size_of(ncclDataType_t type) {
    switch (type) {
        case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
        case ncclFloat16: case ncclBfloat16: return 2;
        case ncclInt64: case ncclUint64: case ncclFloat64: return 8;
        default: return 4;
    }
}

ncclResult_t done(const char* name, ncclComm_t comm, size_t bytes, cudaStream_t stream) {
    emulator_launch(stream, "N %s %d %zu", name, comm->size, bytes);
    return ncclSuccess;
}

void pass_on(void* to, const void* from, size_t bytes) {
    constexpr size_t WORTH_KEEPING = 64 << 20;
    if (to != from && bytes < WORTH_KEEPING) memmove(to, from, bytes);
}

ncclResult_t make(ncclComm_t* comm, int size, int rank, const std::string& name) {
    *comm = new ncclComm{size, rank, name};
    emulator_log("N init %d 0", size);
    return ncclSuccess;
}

// How many of the parent's ranks go into each part is all that ranks have to tell each other: by files beside the log.
int ranks_of_colour(ncclComm_t parent, const std::string& part, int color) {
    const char* log = getenv("EMULATOR_LOG");
    std::filesystem::path folder = std::string(log ? log : "/tmp/emulator") + ".splits";
    std::filesystem::create_directories(folder);
    auto file = [&](int rank) { return folder / (part + "." + std::to_string(rank)); };
    std::ofstream(file(parent->rank).string() + ".tmp") << color << std::endl;
    std::filesystem::rename(file(parent->rank).string() + ".tmp", file(parent->rank));
    int count = 0;
    for (int rank = 0; rank < parent->size; rank++) {
        while (!std::filesystem::exists(file(rank))) usleep(1000);
        int theirs;
        std::ifstream(file(rank)) >> theirs;
        count += theirs == color;
    }
    return count;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    static std::atomic<int> made{0};
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "%d-%d", getpid(), made++);
    return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
    return make(comm, size, rank, id.internal);
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
    return make(comm, size, rank, id.internal);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int size, int rank, int, ncclUniqueId* id, ncclConfig_t*) {
    return make(comm, size, rank, id->internal);
}
ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t* comm, ncclConfig_t*) {
    std::string part = parent->name + "." + std::to_string(parent->splits++);
    int size = ranks_of_colour(parent, part, color);
    *comm = nullptr;
    return color == NCCL_SPLIT_NOCOLOR ? ncclSuccess : make(comm, size, key, part + "." + std::to_string(color));
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
    *count = comm->size;
    return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
    *rank = comm->rank;
    return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
    *error = ncclSuccess;
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommRegister(const ncclComm_t, void*, size_t, void** handle) {
    *handle = nullptr;
    return ncclSuccess;
}
ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }
ncclResult_t ncclGroupStart() { return ncclSuccess; }
ncclResult_t ncclGroupEnd() { return ncclSuccess; }

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t, ncclComm_t comm,
                           cudaStream_t stream) {
    pass_on(to, from, count * size_of(type));
    return done("allReduce", comm, count * size_of(type), stream);
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    size_t bytes = count * size_of(type);
    for (int rank = 0; rank < comm->size; rank++) pass_on((char*)to + rank * bytes, from, bytes);
    return done("allGather", comm, bytes * comm->size, stream);
}
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t,
                               ncclComm_t comm, cudaStream_t stream) {
    pass_on(to, from, count * size_of(type));
    return done("reduceScatter", comm, count * size_of(type) * comm->size, stream);
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int, ncclComm_t comm,
                           cudaStream_t stream) {
    pass_on(to, from, count * size_of(type));
    return done("broadcast", comm, count * size_of(type), stream);
}
ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t, int,
                        ncclComm_t comm, cudaStream_t stream) {
    pass_on(to, from, count * size_of(type));
    return done("reduce", comm, count * size_of(type), stream);
}
ncclResult_t ncclSend(const void*, size_t count, ncclDataType_t type, int, ncclComm_t comm, cudaStream_t stream) {
    return done("send", comm, count * size_of(type), stream);
}
ncclResult_t ncclRecv(void*, size_t count, ncclDataType_t type, int, ncclComm_t comm, cudaStream_t stream) {
    return done("recv", comm, count * size_of(type), stream);
}

}  // extern "C"
